"""`dijiang convert --calibrate`: measures on a little text which heads need exact keys most.

Few heads look far back, and these need many rows of memory; most heads need hardly any (arXiv 2410.10819). To tell
them apart, the output of each key/value head is made a mixture of the table's attention and softmax attention. As the
share of softmax grows from 0 to 1 in all heads, the loss falls to 0. The worth of a head is its part in that fall: the
integral of the loss's derivative by the head's own share (integrated gradients, arXiv 1703.01365). Memory, of which a
row costs the same in every head, is shared out by worth, and with ``--layers auto:N`` the N layers whose heads are
worth most stay softmax.

The loss is the KL divergence from the original: one half comes from text, the other half from a passage at its end that
repeats an earlier one. A table of fixed size is worst at copying from far back, and plain text asks for that too rarely
to measure it.

Shape legend: B batch, H query heads, G key/value heads, N tokens, D head_dim, V value head_dim.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ..checkpoint.loading import load_converted, load_tokenizer, silence
from ..data.rows import token_rows
from ..errors import DijiangError
from ..modeling.interface import dijiang_attention, dijiang_mask, softmax_attention
from ..modeling.modeling_dijiang import layer_index
from ..progress import count_bar
from ..training.attention import attention, original
from ..training.logits import counted, distillation_loss, live_teacher
from ..training.plan import source_context

ROW = 2048  # tokens of a text at most
TOKENS = 2 * ROW  # about how many tokens of text are measured on
SEEN = 16  # the longest documents are chosen from this many times as much text as is measured on
REPEATED = 1 / 8  # share of a text, at its end, that repeats a passage of it
# Shares of softmax at which derivatives are taken, with their weights in the trapezoidal rule. At share 1 the
# divergence has its minimum, and the derivative is 0.
POINTS = ((0.0, 0.25), (0.5, 0.5))
# Bounds of a head's memory, as multiples of the mean. With a lower bound of 1/4 hardly less is lost, and there are a
# third more tables.
LEAST, MOST = 1 / 2, 8
NAME = "dijiang_calibration"

# For each attention module, [G], the share of softmax in each key/value head.
_SHARES: ContextVar[dict[nn.Module, Tensor]] = ContextVar("shares")
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Calibration:
    """What a calibration measured, with `small_tables`, and what it chose.

    tokens: predicted tokens that were measured.
    kl: KL(original ‖ model) in nats per token of text. repeated_kl: the same in passages that repeat an earlier one.
    worth: for each layer, the worth of exact keys in each of its key/value heads. All of them sum to about 1.
    softmax: the layers that stay softmax.
    memory: rows of memory of each head of the other layers; () where the recipe has none to share out.
    """

    tokens: int
    kl: float
    repeated_kl: float
    worth: dict[int, tuple[float, ...]]
    softmax: tuple[int, ...]
    memory: tuple[tuple[int, ...], ...]


def calibrate(folder: Path, data: str | Sequence[str], softmax: int = 0, tokens: int = TOKENS) -> Calibration:
    """Measures the converted checkpoint in ``folder``, whose heads all have the same memory.

    Args:
        data: a file, a folder, a glob or a Hub data set; `Sources` of several; or the documents themselves.
        softmax: how many layers stay softmax.
        tokens: about how many tokens of text to measure on.

    Raises:
        DijiangError: the texts are too short for any key to leave the table, the model loses nothing, or its outputs
            are not finite.
    """
    silence()
    model: Any = load_converted(folder).eval().requires_grad_(False)
    found = {layer_index(name, module): module for name, module in model.named_modules() if hasattr(module, "dijiang")}
    layers = dict(sorted(found.items()))
    kernel, heads = next(iter(layers.values())).dijiang.kernel, model.config.dijiang["kv_heads"]
    worth, lost, repeated_lost, count = torch.zeros(len(layers), heads), 0.0, 0.0, 0
    with small_tables(layers.values()) as held:
        texts = _texts(data, folder, model, held, tokens)
        with count_bar("calibrating (passes)", len(texts) * (1 + len(POINTS))) as advance:
            for text in texts:
                on_text, on_passage, each = _worth(model, list(layers.values()), text, advance)
                part = int(counted(text).sum())
                worth, count = worth + part * each, count + part
                lost, repeated_lost = lost + part * on_text, repeated_lost + part * on_passage
    if not math.isfinite(lost + repeated_lost) or not worth.isfinite().all():
        raise DijiangError(f"the model's answers to {data if isinstance(data, str) else 'this text'} are not finite")
    of_heads = dict(zip(layers, map(tuple, (worth / count).tolist()), strict=True))
    best = sorted(of_heads, key=lambda index: sum(of_heads[index]), reverse=True)[:softmax]
    rest = [of_heads[index] for index in layers if index not in best]
    is_shared = kernel.memory > 0 and kernel.decay != "retnet"  # retnet has a table for each query head
    shared = shared_memory(rest, kernel.memory) if is_shared else ()
    return Calibration(count, lost / count, repeated_lost / count, of_heads, tuple(sorted(best)), shared)


def shared_memory(worth: Sequence[Sequence[float]], mean: int) -> tuple[tuple[int, ...], ...]:
    """Shares out rows of memory by worth, ``mean`` rows per head on average at most.

    Each head starts with the least. As long as rows are left, the head with the highest worth per row has its number
    doubled. So there are few different sizes, and heads of one size are computed together. If no head is worth
    anything, each gets ``mean``.

    worth: of each head of each layer. The result has the same layout.
    """
    flat = [max(each, 0.0) for heads in worth for each in heads]
    rows = [max(int(mean * LEAST), 1) if any(flat) else mean] * len(flat)
    left = mean * len(flat) - sum(rows)
    while growing := [i for i, each in enumerate(flat) if each and rows[i] <= min(left, mean * MOST // 2)]:
        best = max(growing, key=lambda i: flat[i] / rows[i])
        left -= rows[best]
        rows[best] *= 2
    sizes = iter(rows)
    return tuple(tuple(next(sizes) for _ in heads) for heads in worth)


def _texts(data: str | Sequence[str], folder: Path, model: Any, held: int, tokens: int) -> list[Batch]:
    """The longest of the first documents, cut to one row: about ``tokens`` tokens, in batches of one text.

    The end of each text repeats a passage that ends more than ``held`` tokens before it. Documents that are too short
    for that are left out.
    """
    length = min(source_context(model.config), ROW)
    rows = token_rows(data, load_tokenizer(folder), seq_len=length, tokens=SEEN * tokens, shuffle_seed=None)
    lengths = rows.lengths
    longest = lengths.argsort(descending=True, stable=True)
    generator = torch.Generator().manual_seed(0)
    texts, taken = [], 0
    for i in longest.tolist():
        passage = int(lengths[i] * REPEATED)
        places = int(lengths[i]) - held - 2 * passage  # the number of places where the passage can begin
        if taken >= tokens or places < 1 or passage < 1:
            break
        text = {name: x[None, : lengths[i]].clone() for name, x in rows[i].items()}
        begin = int(torch.randint(places, (), generator=generator))
        text["input_ids"][:, -passage:] = text["input_ids"][:, begin : begin + passage]
        texts.append({name: x.to(model.device) for name, x in text.items()})
        taken += int(lengths[i])
    if not texts:
        raise DijiangError(
            f"texts of at most {int(lengths.max())} tokens are too short to see what a table of {held} keys loses: "
            "give longer ones, or leave --calibrate and auto:N out"
        )
    return texts


@contextmanager
def small_tables(modules: Iterable[Any]) -> Iterator[int]:
    """Inside the context, converted attention modules have a window and a memory of at most one block each.

    The texts are short beside the contexts that the model is made for, so the table has to be small beside the texts.
    Yields how many keys such a table holds at most.
    """
    kernels = [module.dijiang for module in modules]
    before = [(each.kernel, each.memory) for each in kernels]
    try:
        for each, (kernel, _) in zip(kernels, before, strict=True):
            block = kernel.block
            small = replace(kernel, window=min(kernel.window, block), memory=min(kernel.memory, block))
            each.resize(small)
        yield small.sinks + small.memory + small.window + (small.block if small.window else 0)
    finally:
        for each, sizes in zip(kernels, before, strict=True):
            each.resize(*sizes)


def _worth(
    model: Any, modules: list[nn.Module], text: Batch, advance: Callable[[int], None]
) -> tuple[float, float, Tensor]:
    """Measures one text; ``advance`` is called after each pass.

    Returns the KL per token on the text, the KL per token on the passage at its end, and [layers, G], the worth of each
    head: its part in the fall of both KLs, each relative to its value without softmax, as all heads turn to softmax.
    """
    heads, count = model.config.dijiang["kv_heads"], int(counted(text).sum())
    passage = int(text["input_ids"].shape[1] * REPEATED)
    with torch.no_grad():
        teacher = live_teacher(model, text, lambda: original(model))

    def lost(shares: Tensor, scales: tuple[float, float]) -> tuple[Tensor, list[float]]:
        """The sums of KL on text and on passage: both times their scales and added, and both as they are.

        shares: [layers, G], the share of softmax in each head.
        """
        sums, edge = [0.0, 0.0], count - passage

        def divergence(logits: Tensor, part: slice) -> Tensor:
            first, last = part.start, part.start + len(logits)
            middle, total = min(max(edge, first), last), torch.zeros((), device=logits.device)
            for i, where in enumerate((slice(first, middle), slice(middle, last))):
                if where.start < where.stop:
                    kl = teacher(logits[where.start - first : where.stop - first], where)
                    sums[i] += float(kl.detach())
                    total = total + scales[i] * kl
            return total

        token = _SHARES.set(dict(zip(modules, shares, strict=True)))
        try:
            with attention(model, NAME):
                return distillation_loss(model, divergence, text, 0.0) * count, sums
        finally:
            _SHARES.reset(token)

    worth = torch.zeros(len(modules), heads, device=model.device)
    with torch.no_grad():
        _, (on_text, on_passage) = lost(worth, (1.0, 1.0))
    advance(1)
    if on_text <= 0 or on_passage <= 0:  # NaN passes, and `calibrate` reports it
        raise DijiangError("no head loses anything on this text: leave --calibrate and auto:N out")
    for share, weight in POINTS:
        shares = torch.full_like(worth, share, requires_grad=True)
        with torch.enable_grad():
            total, _ = lost(shares, (0.5 / on_text, 0.5 / on_passage))
            worth -= weight * torch.autograd.grad(total, [shares])[0]
        advance(1)
    return on_text / (count - passage), on_passage / passage, worth.cpu()


def calibration_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """A mixture of the table's attention and softmax attention where the shares need a gradient, else the former alone.

    The backward pass recomputes the mixture, since its intermediate tensors take much memory. Arguments and result are
    those of `dijiang_attention`.
    """
    share = _SHARES.get().get(module)
    if share is None or not share.requires_grad:
        return dijiang_attention(module, query, key, value, attention_mask, **kwargs)
    return checkpoint(
        _mixed, share, module, query, key, value, attention_mask, use_reentrant=False, preserve_rng_state=False,
        **kwargs,
    )  # fmt: skip


def _mixed(share: Tensor, module: nn.Module, *tensors: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """The mixture, [B, N, H, V]. share: [G], the share of softmax in each key/value head."""
    out, _ = dijiang_attention(module, *tensors, **kwargs)
    del kwargs["dijiang"]
    softmax, _ = softmax_attention(module, *tensors, **kwargs)
    of_queries = share.to(out.dtype).repeat_interleave(out.shape[2] // len(share))
    return torch.lerp(out, softmax, of_queries[:, None].expand_as(out)), None


AttentionInterface.register(NAME, calibration_attention)
AttentionMaskInterface.register(NAME, dijiang_mask)
