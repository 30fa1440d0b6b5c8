"""`dijiang convert --calibrate`: which layers need exact keys most, measured on a little text.

All layers are converted, and in turn one of them computes softmax attention again. What the divergence from the
original loses by that is what exact keys are worth in the layer. So memory, of which a row costs the same in every
layer, is shared out by it; and of ``--layers auto:N`` the N layers worth most stay softmax altogether. (Choosing
layers by the divergence is from arXiv 2512.20569, which measures more of them at once.)
"""

import dataclasses
import math
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
from .distill.logits import counted, distillation_loss, live_teacher
from .errors import DijiangError
from .modeling.interface import dijiang_attention, dijiang_mask, softmax_attention
from .modeling.modeling_dijiang import layer_index
from .models import load_converted, load_tokenizer, silence
from .plan import source_context
from .progress import count_bar

ROW = 2048  # tokens
SEEN = 16  # times as much text is looked through for the longest documents
LEAST, MOST = 1 / 8, 4  # of the mean memory a layer gets
# Memory is shared by this power of the gains: in proportion to them (1) the divergence is as low, and less is copied.
POWER = 1.5
NAME = "dijiang_calibration"

_SOFTMAX: ContextVar[nn.Module | None] = ContextVar("softmax", default=None)
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Calibration:
    """What a calibration measured, with small tables, and what it chose.

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
        DijiangError: too little text, or texts that the table holds whole, so that there is nothing to measure.
    """
    silence()
    model: Any = load_converted(folder).eval()
    found = {layer_index(name, module): module for name, module in model.named_modules() if hasattr(module, "dijiang")}
    layers = dict(sorted(found.items()))
    converted, each = 0.0, dict.fromkeys(layers, 0.0)
    with small_tables(layers):
        kernel = next(iter(layers.values())).dijiang.kernel
        texts = _texts(data, folder, model, kernel.sinks + kernel.memory + kernel.window, tokens)
        count = sum(int(counted(batch).sum()) for batch in texts)
        with count_bar("calibrating (layers)", len(texts) * (len(layers) + 1)) as advance:
            for batch in texts:
                share = int(counted(batch).sum()) / count
                with torch.no_grad():
                    teacher = live_teacher(model, batch, lambda: original(model))
                    for index, module in [(None, None), *layers.items()]:
                        kl = share * _divergence(model, batch, teacher, module)
                        if index is None:
                            converted += kl
                        else:
                            each[index] += kl
                        advance(1)
    if not math.isfinite(converted):
        raise DijiangError(f"the model's answers to {data if isinstance(data, str) else 'this text'} are not finite")
    gains = {index: converted - kl for index, kl in each.items()}
    best = sorted(gains, key=lambda index: gains[index], reverse=True)[:softmax]
    kernel = next(iter(layers.values())).dijiang.kernel
    rest = [gain for index, gain in gains.items() if index not in best]
    memory = shared_memory(rest, kernel.memory) if kernel.memory else ()
    return Calibration(count, converted, gains, tuple(sorted(best)), memory)


def _texts(data: str | Sequence[str], folder: Path, model: Any, held: int, tokens: int) -> list[Batch]:
    """The longest of the first documents, or their first parts: ``tokens`` tokens, in batches of one. Far keys matter
    to texts of one piece; those of no more than ``held`` tokens tell nothing."""
    length = min(source_context(model.config), ROW)
    rows = token_rows(data, load_tokenizer(folder), seq_len=length, tokens=SEEN * tokens, shuffle_seed=None)
    lengths = rows.lengths
    longest = lengths.argsort(descending=True, stable=True)
    texts, taken = [], 0
    for i in longest.tolist():
        if taken >= tokens or lengths[i] <= held:
            break
        texts.append({name: x[None, : lengths[i]].to(model.device) for name, x in rows[i].items()})
        taken += int(lengths[i])
    if not texts:
        raise DijiangError(
            f"a table of {held} keys holds these texts of at most {int(lengths.max())} tokens, so that no layer loses "
            "by it: give longer ones, or leave --calibrate and auto:N out"
        )
    return texts


def shared_memory(gains: Sequence[float], mean: int, power: float = POWER) -> tuple[int, ...]:
    """Rows of memory of each layer: in proportion to a power of what it gains, between an eighth of ``mean`` and four
    times it, and no more in all than ``mean`` each."""
    worth = [max(gain, 0.0) ** power for gain in gains]
    if not any(worth):
        return (mean,) * len(gains)
    least, most = int(mean * LEAST), mean * MOST

    def at(log_scale: float) -> list[int]:
        return [min(max(int(each * math.exp(log_scale)), least), most) for each in worth]

    below, above = -100.0, 100.0
    for _ in range(100):
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


def _divergence(model: Any, batch: Batch, teacher: Any, softmax: nn.Module | None) -> float:
    """KL(teacher ‖ model) in nats a token, where one attention module is softmax."""
    token = _SOFTMAX.set(softmax)
    try:
        with attention(model, NAME):
            return float(distillation_loss(model, teacher, batch, 0.0))
    finally:
        _SOFTMAX.reset(token)


def calibration_attention(module: nn.Module, *tensors: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """`dijiang_attention`, but of one module softmax."""
    if module is _SOFTMAX.get():
        kwargs.pop("dijiang")
        return softmax_attention(module, *tensors, **kwargs)
    return dijiang_attention(module, *tensors, **kwargs)


AttentionInterface.register(NAME, calibration_attention)
AttentionMaskInterface.register(NAME, dijiang_mask)
