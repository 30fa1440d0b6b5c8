"""`dijiang demo`: the whole job on a small model and text that come with the package and with Python. No network."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .benchmark import BenchResult, BenchRow, benchmark
from .convert import ConvertResult, convert
from .data.demo_text import documents
from .errors import DijiangError
from .evaluate import EvalResult, evaluate
from .finetune import FinetuneResult, finetune
from .generate import GenerateResult, generate
from .measure.report import running_mean
from .progress import console

MODEL = Path(__file__).parent / "demo_model"
PROMPT = '    def __repr__(self):\n        """Return'
LENGTHS = (512, 2048, 8192)
ROW_CHARACTERS = 1500  # about as many as a row of 512 tokens has
TABLE = ("window=64", "memory=64")  # rows are of 512 tokens: so the table is smaller than the recipe's, too
EVAL_TOKENS = 20_000


@dataclass(frozen=True)
class DemoResult:
    """Each verb's own result, in order. ``untrained`` is the checkpoint right after conversion."""

    convert: ConvertResult
    untrained: EvalResult
    finetune: FinetuneResult
    eval: EvalResult
    generate: dict[str, GenerateResult]
    bench: BenchResult
    plot: str


def demo(
    out: str | Path = "dijiang-demo", *, recipe: str = "default", tokens: int = 150_000, force: bool = False
) -> DemoResult:
    """Converts the embedded model, finetunes it, compares it with the original, and draws losses and speed.

    Raises DijiangError where ``out`` exists without ``force``, or Python has no sources of its library to read.
    """
    folder = Path(out).expanduser()
    if folder.exists() and any(folder.iterdir()) and not force:
        raise DijiangError(f"{folder} exists and is not empty: choose another --out, or --force to replace it")
    original, held_out = str(MODEL), documents("validation")
    converted, finetuned = folder / "converted", folder / "finetuned"

    console.rule("1  convert: swap the attention")
    more: dict[str, Any] = {}
    if recipe == "default":
        more = {"settings": TABLE, "calibrate": True, "data": [text[:ROW_CHARACTERS] for text in documents("train")]}
    swapped = convert(original, converted, recipe=recipe, force=True, **more)
    untrained = evaluate(converted, baseline=original, data=held_out, seq_len=512, max_tokens=EVAL_TOKENS)
    console.rule("2  finetune: distil what the swap lost")
    trained = finetune(converted, finetuned, data=documents("train"), tokens=tokens, seq_len=512, force=True)
    console.rule("3  eval: against the original, on modules that neither has seen")
    after = evaluate(finetuned, baseline=original, data=held_out, seq_len=512, max_tokens=EVAL_TOKENS)
    console.rule("4  generate: side by side")
    texts = {
        name: generate(model, PROMPT, max_new_tokens=60)
        for name, model in (("original", original), ("dijiang", finetuned))
    }
    console.rule("5  bench: decode speed by length")
    speed = benchmark(finetuned, baseline=original, lengths=LENGTHS, decode_tokens=32)
    plot = folder / "demo.png"
    _draw(trained, speed.rows, plot)
    return DemoResult(swapped, untrained, trained, after, texts, speed, str(plot))


def _draw(trained: FinetuneResult, rows: list[BenchRow], path: Path) -> None:
    """Loss of every stage, and decode speed of both models."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for stage in trained.stages:
        tokens, losses = zip(*stage.losses, strict=True)
        (line,) = left.plot(tokens, running_mean(losses), label=stage.name)
        left.plot(tokens, losses, color=line.get_color(), alpha=0.25)
    left.set(xlabel="tokens", ylabel="loss", yscale="log", title="finetune")
    for name, style in (("dijiang", "o-"), ("softmax", "s--")):
        points = sorted((row.length, row.decode_tokens_per_second) for row in rows if row.model == name)
        right.plot(*zip(*points, strict=True), style, label=name)
    right.set(xlabel="tokens in the context", ylabel="tokens decoded a second", ylim=(0, None), title="decode speed")
    right.set_xscale("log", base=2)
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
