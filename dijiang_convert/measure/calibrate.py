"""`dijiang convert --calibrate`: which heads need exact keys most, measured on a little text.

Few heads look far back, and they need many rows; most need hardly any (arXiv 2410.10819). To tell them apart, the
output of each key/value head's queries is made a mixture of the table's and softmax attention's. What the model loses
falls as the share of softmax grows from 0 to 1, and the integral of the derivative by a head's own share is what exact
keys are worth in that head, of all that is lost (integrated gradients, arXiv 1703.01365). So memory, of which a row
costs the same everywhere, is shared out by it; and of ``--layers auto:N`` the N layers whose heads are worth most stay
softmax altogether.

What is lost is the divergence from the original on text, and as much again on a passage at its end that repeats an
earlier one: copying from far back is what a fixed table is worst at, and text alone asks for it too rarely to tell.
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

ROW = 2048  # tokens
SEEN = 16  # times as much text is looked through for the longest documents
REPEATED = 1 / 8  # of a text repeat a passage of it
# The share of softmax at which derivatives are taken, and their weights: the trapezoidal rule. (At 1 they are 0.)
POINTS = ((0.0, 0.25), (0.5, 0.5))
# Of the mean memory a head gets at least the first, and at most the second. (With a quarter at least hardly less is
# lost, and there are a third more tables.)
LEAST, MOST = 1 / 2, 8
NAME = "dijiang_calibration"

_SHARES: ContextVar[dict[nn.Module, Tensor]] = ContextVar("shares")
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Calibration:
    """What a calibration measured, with small tables, and what it chose.

    tokens: of how much text. kl: KL(original ‖ model) in nats a token on it; repeated_kl: on passages that repeat an
    earlier one. worth: of exact keys in each key/value head, by layer; about 1 in all. softmax: the layers that stay
    so; memory: rows of each head of the others, () where none has any.
    """

    tokens: int
    kl: float
    repeated_kl: float
    worth: dict[int, tuple[float, ...]]
    softmax: tuple[int, ...]
    memory: tuple[tuple[int, ...], ...]


def calibrate(folder: Path, data: str | Sequence[str], softmax: int = 0, tokens: int = 2 * ROW) -> Calibration:
    """Measures the converted checkpoint in ``folder``, which has an equal memory in all heads.

    Args:
        data: a file, a folder, a glob or a Hub data set; `Sources` of several, or the documents themselves.
        softmax: how many layers are to stay softmax.
        tokens: how much text.

    Raises:
        DijiangError: texts that are too short for anything to leave the table, or a model that loses nothing.
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
    is_shared = kernel.memory > 0 and kernel.decay != "retnet"  # whose heads are those of queries
    shared = shared_memory(rest, kernel.memory) if is_shared else ()
    return Calibration(count, lost / count, repeated_lost / count, of_heads, tuple(sorted(best)), shared)


def shared_memory(worth: Sequence[Sequence[float]], mean: int) -> tuple[tuple[int, ...], ...]:
    """Rows of memory of each head of each layer, no more in all than ``mean`` each: the least at first, and then as
    long as there are rows the head that is worth most a row gets as many again. So there are few sizes, and heads that
    have one are computed together. Equal shares where no head is worth anything."""
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
    """The longest of the first documents, or their first parts: ``tokens`` tokens, in batches of one. The last part of
    each repeats a passage that lies more than ``held`` tokens before it; documents too short for that tell nothing."""
    length = min(source_context(model.config), ROW)
    rows = token_rows(data, load_tokenizer(folder), seq_len=length, tokens=SEEN * tokens, shuffle_seed=None)
    lengths = rows.lengths
    longest = lengths.argsort(descending=True, stable=True)
    generator = torch.Generator().manual_seed(0)
    texts, taken = [], 0
    for i in longest.tolist():
        passage = int(lengths[i] * REPEATED)
        places = int(lengths[i]) - held - 2 * passage  # where a passage can begin
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
    """Inside, the converted attention modules have a window and a memory of one block each: texts are short beside the
    contexts that the model is made for, and so is the table. Yields how many keys that holds at most."""
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
    """KL on a text, KL on the passage at its end, and the worth of each head, [layers, heads]: its part in the fall of
    both, each by what it was, as all heads turn to softmax. advance: is called after each pass."""
    heads, count = model.config.dijiang["kv_heads"], int(counted(text).sum())
    passage = int(text["input_ids"].shape[1] * REPEATED)
    with torch.no_grad():
        teacher = live_teacher(model, text, lambda: original(model))

    def lost(shares: Tensor, scales: tuple[float, float]) -> tuple[Tensor, list[float]]:
        """The sum of both, each times its scale, and both as they are."""
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
    if on_text <= 0 or on_passage <= 0:  # but not where they are no numbers
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
    """A mixture of the table's attention and softmax attention, where shares of the latter are to be differentiated;
    computed again for the backward pass, which would else keep all that lies between. Elsewhere `dijiang_attention`."""
    share = _SHARES.get().get(module)
    if share is None or not share.requires_grad:
        return dijiang_attention(module, query, key, value, attention_mask, **kwargs)
    return checkpoint(
        _mixed, share, module, query, key, value, attention_mask, use_reentrant=False, preserve_rng_state=False,
        **kwargs,
    )  # fmt: skip


def _mixed(share: Tensor, module: nn.Module, *tensors: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """share: [G], of softmax in each key/value head."""
    out, _ = dijiang_attention(module, *tensors, **kwargs)
    del kwargs["dijiang"]
    softmax, _ = softmax_attention(module, *tensors, **kwargs)
    of_queries = share.to(out.dtype).repeat_interleave(out.shape[2] // len(share))
    return torch.lerp(out, softmax, of_queries[:, None].expand_as(out)), None


AttentionInterface.register(NAME, calibration_attention)
AttentionMaskInterface.register(NAME, dijiang_mask)
