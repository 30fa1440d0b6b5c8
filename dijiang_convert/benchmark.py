"""`dijiang bench`: prefill and decode speed and cache memory by length, both models side by side in one run."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from .errors import DijiangError
from .modeling.modeling_dijiang import cache_argument
from .models import generates, load_any, silence
from .progress import count_bar

WARMUP_LENGTH = 128


@dataclass(frozen=True)
class BenchRow:
    """``model`` is "dijiang" or "softmax". Speeds are medians, for the whole batch. Encoders only prefill."""

    model: str
    length: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float | None
    cache_bytes: int


@dataclass(frozen=True)
class BenchResult:
    rows: list[BenchRow]
    plot: str | None = None


def benchmark(
    checkpoint: str | Path,
    *,
    baseline: str | None = None,
    lengths: Sequence[int] = (1024, 4096),
    batch_size: int = 1,
    decode_tokens: int = 32,
    repeats: int = 3,
    plot: str | Path | None = None,
) -> BenchResult:
    """Times a converted checkpoint, and the original if ``baseline`` is given.

    Lengths and models take turns, so that a busy machine slows all alike; the figures are medians of ``repeats``.

    Args:
        lengths: tokens in the prompt; decoding is timed right after it.
        plot: a .png or .svg to draw decode speed against length into.

    Raises:
        DijiangError: no such model, or a length below 1.
    """
    if not lengths or min(lengths) < 1 or batch_size < 1 or decode_tokens < 1 or repeats < 1:
        raise DijiangError("lengths, batch size, decode tokens and repeats must be at least 1")
    silence()
    models = {"dijiang": load_any(str(checkpoint)).eval()}
    if baseline:
        models["softmax"] = load_any(baseline).eval()
    timings: dict[tuple[str, int], list[tuple[float, float | None, int]]] = {}
    for model in models.values():
        if model.main_input_name != "input_ids":
            raise DijiangError(f"{checkpoint} takes {model.main_input_name}: no length to time it by")
    with count_bar("timing", len(models) * len(lengths) * repeats) as advance:
        for model in models.values():
            _time(model, WARMUP_LENGTH, batch_size, 2)
        for _ in range(repeats):
            for length in lengths:
                for name, model in models.items():
                    timings.setdefault((name, length), []).append(_time(model, length, batch_size, decode_tokens))
                    advance(1)
    rows = [
        BenchRow(
            model=name,
            length=length,
            prefill_tokens_per_second=batch_size * length / statistics.median(t[0] for t in times),
            decode_tokens_per_second=batch_size / statistics.median(steps) if steps else None,
            cache_bytes=times[0][2],
        )
        for (name, length), times in timings.items()
        for steps in [[t[1] for t in times if t[1] is not None]]
    ]
    if plot:
        draw(rows, Path(plot))
    return BenchResult(rows, str(plot) if plot else None)


@torch.inference_mode()
def _time(model: PreTrainedModel, length: int, batch_size: int, decode_tokens: int) -> tuple[float, float | None, int]:
    """(seconds of prefill, median seconds of a decoded token, bytes of the cache)."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (batch_size, length), device=model.device)
    if not generates(model):
        start = _now(model)
        model(input_ids=ids)
        return _now(model) - start, None, 0
    cache = DynamicCache(config=model.config.get_text_config())
    state: dict[str, Any] = {str(cache_argument(model.forward)): cache, "use_cache": True}
    start = _now(model)
    model(input_ids=ids, logits_to_keep=1, **state)
    prefill = _now(model) - start
    steps = []
    for i in range(decode_tokens):
        start = _now(model)
        model(input_ids=ids[:, i % length, None], **state)
        steps.append(_now(model) - start)
    return prefill, statistics.median(steps), cache_bytes(cache)


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def cache_bytes(cache: DynamicCache) -> int:
    """What a cache of any kind holds in tensors."""
    values = [value for layer in cache.layers for value in vars(layer).values()]
    tensors = [t for value in values for t in (value if isinstance(value, tuple) else (value,))]
    return sum(t.nbytes for t in tensors if isinstance(t, Tensor))


def draw(rows: Sequence[BenchRow], path: Path) -> None:
    """Decode speed against length, a line a model; of encoders the speed of a pass."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, style in (("dijiang", "o-"), ("softmax", "s--")):
        of_model = [row for row in rows if row.model == name]
        points = sorted((r.length, r.decode_tokens_per_second or r.prefill_tokens_per_second) for r in of_model)
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name)
    what = "read" if any(row.decode_tokens_per_second is None for row in rows) else "decoded"
    axes.set(xscale="log", xlabel="tokens in the context", ylabel=f"tokens {what} a second", ylim=(0, None))
    axes.set_xscale("log", base=2)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
