"""What the commands show a person in the terminal, of the results that the package's functions return."""

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import DijiangError, printable, without_steering
from .files import bytes_text

A100_SPEED = 0.3 * 312e12  # operations a second: training reaches some 30 % of what an A100 gives in bfloat16
SHOWN = 12  # most layers of a calibration that are shown: those that matter fit on a screen


@contextmanager
def writing() -> Iterator[None]:
    """Around what writes to stdout. Raises DijiangError where that takes no more."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise DijiangError(unwritten(error)) from error


def unwritten(error: OSError) -> str:
    return f"can't write the output ({error.strerror}): send it to a file or terminal that takes it"


def inspection(r: Any) -> None:
    """What a conversion would do."""
    if not r.supported:
        _say(f"{r.source} ({r.architecture}) is not supported: {r.reason}")
        return
    from .training.estimate import duration

    kept = f"{bytes_text(r.state_bytes)} at any length"
    kept += f"; softmax's cache is larger from {r.smaller_from:,} tokens on" if r.smaller_from else ""
    caches = ", ".join(f"{bytes_text(n)} at {length:,}" for length, n in (r.kv_cache_bytes_at or {}).items())
    _table("", "", [
        ["model", f"{r.source} ({r.architecture})"],
        ["layers", f"{r.layers_converted} of {r.layers}: {r.heads} heads of {r.head_dim}, {r.kv_heads} for keys"],
        ["new parameters", f"{r.new_parameters:,} beside {r.parameters:,}"],
        *([["cache", kept], ["softmax's cache", caches]] if caches else []),
        ["to convert", f"{bytes_text(r.weights_bytes)} of weights, and as much on disk for the copy"],
        ["to finetune", f"{r.finetune_tokens:,} tokens, {bytes_text(r.finetune_bytes)} of memory; one A100 takes about "
         f"{duration(r.finetune_operations / A100_SPEED)} by its operations (not timed)"],
    ])  # fmt: skip


def conversion(r: Any) -> None:
    """What was written, or would be."""
    verb = "would write" if r.dry_run else "wrote"
    _say(
        f"{verb} {r.out}: {r.layers_converted} layers converted by recipe {r.recipe}, "
        f"{r.new_parameters:,} new parameters of {r.total_parameters:,}, {r.seconds:.1f} s"
    )
    if r.linked:
        note = ": change no weight file of either folder in place" if r.linked == "hard link" else ""
        _say(f"weights are {r.linked}s to the source's{note}")
    if r.calibration_tokens:
        _say(f"would calibrate on about {r.calibration_tokens:,} tokens, forwards and backwards")
    if r.calibration is not None:
        _show_calibration(r.calibration)
    _show_repo(r)
    if not r.dry_run:
        out, source = shlex.quote(r.out), shlex.quote(r.source)
        _say(f"next: dijiang eval {out} --baseline {source}, or dijiang finetune {out}")
        if r.calibration is None and r.recipe != "encoder":
            _say("(a conversion with --calibrate, which takes minutes, keeps more of the original)")


def _show_calibration(c: Any) -> None:
    """The layers to which exact keys are worth most, and what their heads got."""
    memory = iter(c.memory)
    got = {i: "stays softmax" if i in c.softmax else ", ".join(f"{n:,}" for n in next(memory, ())) for i in c.worth}
    worth = {i: sum(heads) for i, heads in c.worth.items()}
    best = sorted(worth, key=lambda i: worth[i], reverse=True)[:SHOWN]
    _say(
        f"calibrated on {c.tokens:,} tokens, with small tables: KL {c.kl:.3f} nats a token, "
        f"{c.repeated_kl:.3f} where they repeat a passage; the layers that lose most of it:"
    )
    _table("layer", "of what is lost", [[str(i), f"{worth[i]:.1%}", got[i]] for i in best], "rows of memory by head")


def finetuning(r: Any) -> None:
    """How each stage went; of a dry run what it would take."""
    from .measure.report import REPORT
    from .training.estimate import told

    if r.dry_run:
        _say(*told(r.plan, r.free_bytes))
        return
    for s in r.stages:
        _say(
            f"{s.name}: {s.tokens:,} tokens, loss {s.first_loss:.4f} to {s.last_loss:.4f}, "
            f"{s.tokens_per_second:,.0f} tokens/s, peak memory {s.peak_memory_bytes / 1e9:.1f} GB"
        )
    report = Path(r.out) / REPORT
    _say(f"wrote {r.out} in {r.seconds:.0f} s" + (f"; {report} shows how it went" if report.is_file() else ""))
    _show_repo(r)
    _say(f"next: dijiang eval {shlex.quote(r.out)} --baseline ORIGINAL")


def evaluation(r: Any) -> None:
    """How good a model is, beside the original where there is one."""
    rows = [["tokens", f"{r.tokens:,} in rows of {r.seq_len}"]]
    if r.likeness is not None:
        like, same = r.likeness, r.likeness.top1_agreement
        rows += [
            ["hidden states", f"cosine {like.hidden_cosine:.4f}, error {like.hidden_error:.4f} of their squared norm"],
            ["embeddings of texts", f"cosine {like.embedding_cosine:.4f}"],
            *([] if same is None else [["same choice", f"{same:.1%}"]]),
        ]
        return _table("", "", rows)
    rows.insert(0, ["perplexity", f"{r.perplexity:.3f}"])
    if r.baseline_perplexity is not None:
        rows += [
            ["original's perplexity", f"{r.baseline_perplexity:.3f}"],
            ["ratio", f"{r.perplexity_ratio:.4f}"],
            ["KL divergence", f"{r.kl_divergence:.4f} nats a token"],
            ["same choice", f"{r.top1_agreement:.1%}"],
        ]
    rows.append(["by position", "  ".join(f"{p:.2f}" for p in r.perplexity_by_position)])
    if r.ratio_by_position is not None:
        rows.append(["ratio by position", "  ".join(f"{p:.3f}" for p in r.ratio_by_position)])
    for distance, found in (r.recall or {}).items():
        told = f"{found.gain:.1f} nats a token, {found.accuracy:.0%} right"
        if r.baseline_recall is not None:
            theirs = r.baseline_recall[distance]
            told += f" (the original {theirs.gain:.1f}, {theirs.accuracy:.0%})"
        rows.append([f"recall, {distance:,} tokens ago", told])
    rows += [[task, json.dumps(scores)] for task, scores in r.tasks.items()]
    _table("", "", rows)


def generation(r: Any) -> None:
    """How fast the text came; the text itself was streamed."""
    print()
    print(f"{r.tokens} tokens, {r.tokens_per_second:.1f} a second", file=sys.stderr)


def benchmark(r: Any) -> None:
    """Speed and memory by length."""
    from .benchmark import ratios

    times, rows = ratios(r.rows), []
    several = len({x.batch_size for x in r.rows}) > 1

    def tokens(x: Any) -> str:
        return f"{x.batch_size} × {x.length:,}" if several else f"{x.length:,}"

    for x in sorted(r.rows, key=lambda x: (x.batch_size, x.length, x.model)):
        decode, first = x.decode_tokens_per_second, x.time_to_first_token_seconds
        beside = times.get((x.batch_size, x.length), (None, None)) if x.model == "dijiang" else (None, None)
        prefill_ratio, decode_ratio = ("" if t is None else f" {t:.2f}×" for t in beside)
        rows.append([
            x.model, tokens(x), f"{x.prefill_tokens_per_second:,.0f}{prefill_ratio}",
            "" if decode is None else f"{decode:,.1f}{decode_ratio}", "" if first is None else _duration(first),
            bytes_text(x.cache_bytes), bytes_text(x.peak_memory_bytes),
        ])  # fmt: skip
    _table("model", "tokens", rows, "prefill /s", "decode /s", "1st token", "cache", "memory")
    _say(f"tokens a second, and times softmax's; {r.device}, {r.dtype}")


def pushed(r: Any) -> None:
    """Where a checkpoint was uploaded."""
    _say(f"{r.url}: {bytes_text(r.bytes_uploaded)} in commit {r.commit[:12]}")


def demonstration(r: Any) -> None:
    """All steps of the demo."""
    for name, text in r.generate.items():
        print(without_steering(f"--- {name} ---\n{text.prompt}{text.text}\n"))
    _table("step", "figures", [
        ["convert", f"{r.convert.layers_converted} layers, {r.convert.seconds:.1f} s"],
        ["before finetune", f"perplexity {r.untrained.perplexity:.2f}, ratio {r.untrained.perplexity_ratio:.3f}"],
        ["finetune", f"{sum(s.tokens for s in r.finetune.stages):,} tokens, {r.finetune.seconds:.0f} s"],
        ["after finetune", f"perplexity {r.eval.perplexity:.2f}, ratio {r.eval.perplexity_ratio:.3f}, "
         f"same choice as the original {r.eval.top1_agreement:.1%}"],
        ["original", f"perplexity {r.eval.baseline_perplexity:.2f}"],
    ])  # fmt: skip
    benchmark(r.bench)
    _say(f"loss and speed: {r.plot}")


def _say(*lines: str) -> None:
    """Prints lines as they are: what would steer the terminal is escaped."""
    for line in lines:
        print(printable(line))


def _show_repo(r: Any) -> None:
    if r.pushed:
        _say(f"pushed to {r.pushed}")


def _table(first: str, second: str, rows: list[list[str]], *more: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=bool(first))
    for name in (first, second, *more):
        table.add_column(name, overflow="fold")  # a long path goes on in the next line, and is not cut
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))  # as text, nothing in a cell is markup
    Console().print(table)


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"
