"""`dijiang convert --calibrate`: which layers need exact keys most, measured on a little text.

All layers are converted, and in turn one of them computes softmax attention again. What the divergence from the
original loses by that is what exact keys are worth in the layer. So memory, of which a row costs the same in every
layer, is shared out by it; and of ``--layers auto:N`` the N layers worth most stay softmax altogether. (Choosing
layers by the divergence is from arXiv 2512.20569, which measures more of them at once.)
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from .distill.attention import attention, original
from .distill.data import token_rows
from .errors import DijiangError
from .modeling.interface import dijiang_attention, dijiang_mask, softmax_attention
from .modeling.modeling_dijiang import layer_index
from .models import load_converted, load_tokenizer, silence
from .progress import count_bar

ROW = 2048  # tokens
LEAST, MOST = 8, 4  # a layer gets an eighth of the mean memory at least, and four times it at most
# Memory is shared by this power of the gains: in proportion to them (1) the divergence is as low, and less is copied.
POWER = 1.5
NOTHING = 1e-6  # nats a token, which rounding explains
NAME = "dijiang_calibration"

_SOFTMAX: ContextVar[nn.Module | None] = ContextVar("softmax", default=None)


@dataclass(frozen=True)
class Calibration:
    """What was measured, with a table of one block of memory and two of window (see `small_tables`).

    tokens: of how much text. kl: KL(original ‖ model) in nats a token with all layers converted; gains: how much less
    it is, by layer, with that layer alone left softmax. softmax: the layers that stay so; memory: rows of the others.
    """

    tokens: int
    kl: float
    gains: dict[int, float]
    softmax: tuple[int, ...]
    memory: tuple[int, ...]


def calibrate(folder: Path, data: str | Sequence[str], softmax: int = 0, tokens: int = 2 * ROW) -> Calibration:
    """Measures the converted checkpoint in ``folder``, which has an equal memory in all layers.

    Args:
        data: a file, a folder, a glob or a Hub data set; `Sources` of several, or the documents themselves.
        softmax: how many layers are to stay softmax.
        tokens: how much text.

    Raises:
        DijiangError: text that is too short, or rows that the table holds whole, so that there is nothing to measure.
    """
    silence()
    model: Any = load_converted(folder).eval()
    layers = {layer_index(name, module): module for name, module in model.named_modules() if hasattr(module, "dijiang")}
    length = min(getattr(model.config.get_text_config(), "max_position_embeddings", ROW), ROW)
    # In order, each document by itself: texts of one piece are what far keys matter to.
    rows = token_rows(data, load_tokenizer(folder), seq_len=length, tokens=tokens, shuffle_seed=None)
    converted, each = [], {index: [] for index in layers}  # type: ignore[var-annotated]
    with count_bar("calibrating (layers)", len(rows) * (len(layers) + 1)) as advance, small_tables(layers):
        for row, count in zip(rows.ids, rows.lengths.tolist(), strict=True):
            ids = row[None, :count].to(model.device, torch.long)
            with original(model):
                teacher = _log_probabilities(model, ids)
            converted.append(_divergence(model, ids, teacher, None))
            advance(1)
            for index, module in layers.items():
                each[index].append(_divergence(model, ids, teacher, module))
                advance(1)
    kl = sum(converted) / len(converted)
    gains = {index: kl - sum(found) / len(found) for index, found in each.items()}
    best = sorted(gains, key=lambda index: gains[index], reverse=True)
    kernel = next(iter(layers.values())).dijiang.kernel
    if kl < NOTHING or gains[best[0]] <= 0:
        raise DijiangError(
            f"rows of {length} tokens fit into the table, and no layer loses by it: leave --calibrate out"
        )
    rest = [index for index in layers if index not in best[:softmax]]
    memory = shared_memory([gains[index] for index in rest], kernel.memory) if kernel.memory else ()
    return Calibration(rows.tokens, kl, gains, tuple(sorted(best[:softmax])), memory)


def shared_memory(gains: Sequence[float], mean: int, power: float = POWER) -> tuple[int, ...]:
    """Rows of memory of each layer: in proportion to a power of what it gains, between an eighth of ``mean`` and four
    times it, and no more in all than ``mean`` each."""
    worth = [max(gain, 0.0) ** power for gain in gains]
    if not any(worth):
        return (mean,) * len(gains)
    least, most = mean // LEAST, mean * MOST

    def at(scale: float) -> list[int]:
        return [min(max(int(each * scale), least), most) for each in worth]

    below, above = 0.0, most / min(each for each in worth if each > 0)
    for _ in range(64):
        middle = (below + above) / 2
        below, above = (middle, above) if sum(at(middle)) <= mean * len(gains) else (below, middle)
    return tuple(at(below))


@contextmanager
def small_tables(layers: dict[int, Any]) -> Iterator[None]:
    """Inside, a window and a memory are one block each: rows are short beside the contexts that the model is made for,
    and so is the table."""
    before = {index: module.dijiang.kernel for index, module in layers.items()}
    try:
        for index, module in layers.items():
            kernel = before[index]
            window, memory = min(kernel.window, kernel.block), min(kernel.memory, kernel.block)
            module.dijiang.kernel = dataclasses.replace(kernel, window=window, memory=memory)
        yield
    finally:
        for index, module in layers.items():
            module.dijiang.kernel = before[index]


@torch.no_grad()
def _log_probabilities(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)


def _divergence(model: Any, ids: Tensor, teacher: Tensor, softmax: nn.Module | None) -> float:
    """KL(teacher ‖ model) in nats a token, where one attention module is softmax."""
    token = _SOFTMAX.set(softmax)
    try:
        with attention(model, NAME):
            found = _log_probabilities(model, ids)
    finally:
        _SOFTMAX.reset(token)
    return float((teacher.exp() * (teacher - found)).sum(-1).mean())


def calibration_attention(module: nn.Module, *tensors: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """`dijiang_attention`, but of one module softmax."""
    if module is _SOFTMAX.get():
        kwargs.pop("dijiang")
        return softmax_attention(module, *tensors, **kwargs)
    return dijiang_attention(module, *tensors, **kwargs)


AttentionInterface.register(NAME, calibration_attention)
AttentionMaskInterface.register(NAME, dijiang_mask)
