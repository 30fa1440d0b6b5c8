"""`dijiang bench`: speed and memory by length and batch size, both models side by side in one run."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack

import torch
from transformers import PreTrainedModel

from .checkpoint.loading import chosen_device, is_converted, load_any, silence
from .convert import DTYPES
from .errors import DijiangError
from .measure.timing import Pass, peak_memory, random_ids, time_forward, time_generate, weight_bytes
from .progress import count_bar

WARMUP_LENGTH = 128
WAYS = {"generate": time_generate, "forward": time_forward}


@dataclass(frozen=True)
class BenchRow:
    """``model`` is "dijiang" or "softmax". Speeds are medians, for the whole batch. Encoders only prefill.

    time_to_first_token_seconds: from a prompt to its next token, by one pass that makes the last token's logits alone.
    cache_bytes: what the cache holds after the last token.
    peak_memory_bytes: the model's weights and what a prompt and its decoding add at most, by torch's own allocator.
    """

    model: str
    batch_size: int
    length: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float | None
    time_to_first_token_seconds: float | None
    cache_bytes: int
    peak_memory_bytes: int


@dataclass(frozen=True)
class BenchResult:
    """``device`` is the GPU's name, or the CPU with the number of threads."""

    rows: list[BenchRow]
    device: str
    dtype: str
    via: str = "generate"
    plot: str | None = None


class Timing(TypedDict, total=False):
    """Keyword arguments of `benchmark` that say what is timed; it explains them."""

    lengths: Sequence[int]
    batch_sizes: Sequence[int]
    decode_tokens: int
    repeats: int
    via: str


def benchmark(
    checkpoint: str | Path,
    *,
    baseline: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    plot: str | Path | None = None,
    **timing: Unpack[Timing],
) -> BenchResult:
    """Times a converted checkpoint, and the original if ``baseline`` is given.

    Lengths, batch sizes and models take turns, so that a busy machine slows all alike. The first turn warms up and
    measures memory; the figures are medians of the ``repeats`` turns after it.

    Args:
        device: "cpu", "cuda", …; a GPU if there is one.
        dtype: float32, float16 or bfloat16; that of the checkpoint if None.
        plot: a .png or .svg to draw speed against length into.
        lengths: tokens in the prompt, (1024, 4096) by default; decoding is timed right after it.
        batch_sizes: prompts at a time, (1,) by default.
        decode_tokens: how many tokens are decoded, 64 by default.
        repeats: turns that are measured, 3 by default.
        via: "generate", the default, times `generate()` as a user calls it, "forward" calls the model token by token.
            Encoders make one pass.

    Raises:
        DijiangError: no such model or device, a number below 1, no memory for a length, or nothing to compare with.
    """
    chosen = _Timing(**timing)
    if dtype is not None and dtype not in DTYPES:
        raise DijiangError(f"no dtype {dtype!r}: give one of {', '.join(DTYPES)}")
    silence()
    place = chosen_device(device)
    first = load_any(str(checkpoint), place, dtype=dtype).eval()
    models = {"dijiang" if is_converted(first) else "softmax": first}
    if baseline and "softmax" in models:
        raise DijiangError(
            f"{checkpoint} is not converted: give the converted checkpoint first, and --baseline beside it"
        )
    if baseline:
        models["softmax"] = load_any(baseline, place, dtype=dtype).eval()
    for model in models.values():
        if model.main_input_name != "input_ids":
            raise DijiangError(f"{checkpoint} takes {model.main_input_name}: no length to time it by")
    rows = _time_models(models, chosen)
    if plot:
        draw(rows, Path(plot).expanduser())
    dtype = str(first.dtype).removeprefix("torch.")
    return BenchResult(rows, device_name(place), dtype, chosen.via, str(plot) if plot else None)


@dataclass(frozen=True)
class _Timing:
    """`Timing` with what was not given."""

    lengths: Sequence[int] = (1024, 4096)
    batch_sizes: Sequence[int] = (1,)
    decode_tokens: int = 64
    repeats: int = 3
    via: str = "generate"

    def __post_init__(self) -> None:
        sizes = [*self.lengths, *self.batch_sizes, self.decode_tokens, self.repeats]
        if not self.lengths or not self.batch_sizes or min(sizes) < 1:
            raise DijiangError("lengths, batch sizes, decode tokens and repeats must be at least 1")
        if self.via not in WAYS:
            raise DijiangError(f"--via {self.via}: give {' or '.join(WAYS)}")

    def once(self, model: PreTrainedModel, ids: torch.Tensor) -> Pass:
        return WAYS[self.via](model, ids, self.decode_tokens)


def _time_models(models: dict[str, PreTrainedModel], timing: _Timing) -> list[BenchRow]:
    """A row for each model, batch size and length."""
    cells = [(batch_size, length) for batch_size in timing.batch_sizes for length in timing.lengths]
    passes: dict[tuple[int, int, str], list[Pass]] = {}
    peaks: dict[tuple[int, int, str], int] = {}
    with count_bar("timing", len(models) * len(cells) * (timing.repeats + 1)) as advance:
        for model in models.values():
            WAYS[timing.via](model, random_ids(model, cells[0][0], WARMUP_LENGTH), 2)
        for turn in range(timing.repeats + 1):
            for batch_size, length in cells:
                for name, model in models.items():
                    key, ids = (batch_size, length, name), random_ids(model, batch_size, length)
                    try:
                        if turn > 0:
                            passes.setdefault(key, []).append(timing.once(model, ids))
                        else:
                            peaks[key] = _peak(model, ids, timing)
                    except torch.OutOfMemoryError as error:
                        raise DijiangError(
                            f"{name} at {length:,} tokens and batch size {batch_size}: the GPU has too little memory: "
                            "choose smaller --lengths or --batch-size"
                        ) from error
                    advance(1)
    return [_row(name, batch, n, found, peaks[batch, n, name]) for (batch, n, name), found in passes.items()]


def _peak(model: PreTrainedModel, ids: torch.Tensor, timing: _Timing) -> int:
    if ids.device.type == "cuda":  # kernels that choose their own settings take memory to try them
        timing.once(model, ids)
    return weight_bytes(model) + peak_memory(ids.device, lambda: timing.once(model, ids))[1]


def _row(name: str, batch_size: int, length: int, passes: list[Pass], peak: int) -> BenchRow:
    steps = [p.decode for p in passes if p.decode is not None]
    first = [p.first_token for p in passes if p.first_token is not None]
    return BenchRow(
        model=name,
        batch_size=batch_size,
        length=length,
        prefill_tokens_per_second=batch_size * length / statistics.median(p.prefill for p in passes),
        decode_tokens_per_second=batch_size / statistics.median(steps) if steps else None,
        time_to_first_token_seconds=statistics.median(first) if first else None,
        cache_bytes=passes[0].cache_bytes,
        peak_memory_bytes=peak,
    )


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def ratios(rows: Sequence[BenchRow]) -> dict[tuple[int, int], tuple[float, float | None]]:
    """How many times softmax's speed the converted model has, in prefill and decoding, by (batch size, length)."""
    found = {(r.model, r.batch_size, r.length): r for r in rows}
    pairs = [(r, found.get(("softmax", r.batch_size, r.length))) for r in rows if r.model == "dijiang"]
    return {
        (ours.batch_size, ours.length): (
            ours.prefill_tokens_per_second / theirs.prefill_tokens_per_second,
            ours.decode_tokens_per_second / theirs.decode_tokens_per_second
            if ours.decode_tokens_per_second and theirs.decode_tokens_per_second
            else None,
        )
        for ours, theirs in pairs
        if theirs
    }


def draw(rows: Sequence[BenchRow], path: Path) -> None:
    """Speed against length, of decoding and of prefill (of encoders, a pass)."""
    panels: dict[str, dict[str, dict[int, float]]] = {"decoding": {}, "prefill": {}}
    several = len({row.batch_size for row in rows}) > 1
    for row in rows:
        line = f"{row.model}, batch {row.batch_size}" if several else row.model
        panels["prefill"].setdefault(line, {})[row.length] = row.prefill_tokens_per_second
        if row.decode_tokens_per_second is not None:
            panels["decoding"].setdefault(line, {})[row.length] = row.decode_tokens_per_second
    draw_panels({title: lines for title, lines in panels.items() if lines}, path)


def draw_panels(panels: dict[str, dict[str, dict[int, float]]], path: Path) -> None:
    """Tokens a second by length, a panel a title and a line a model ("NAME" or "NAME, batch B"): at each point of a
    line that is not softmax's, how many times softmax's speed that is."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        colors: dict[str, str] = {}  # softmax's line has the color of the other model at its batch size
        for i, (name, speeds) in enumerate(sorted(lines.items())):
            model, _, batch = name.partition(", ")
            color = colors.get(batch, "gray") if model == "softmax" and batch else f"C{i}"
            colors[batch] = color
            style, lengths = "s--" if model == "softmax" else "o-", sorted(speeds)
            axes.plot(lengths, [speeds[n] for n in lengths], style, color=color, label=name)
            beside = {} if model == "softmax" else lines.get(f"softmax, {batch}" if batch else "softmax", {})
            for n in speeds.keys() & beside.keys():
                ratio = speeds[n] / beside[n]
                text = f"{ratio:.1f} ×" if ratio >= 1 else f"{ratio:.2f} ×"
                axes.annotate(text, (n, speeds[n]), (0, 6), textcoords="offset points", ha="center", fontsize=8)
        ticks = sorted({n for speeds in lines.values() for n in speeds})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
        axes.set(xlabel="tokens in the context", ylabel="tokens a second", title=title)
        axes.set_ylim(0, axes.get_ylim()[1] * 1.1)
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
