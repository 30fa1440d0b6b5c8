"""The command line: a thin skin over the package's functions. Results go to stdout, progress and errors to stderr."""

import dataclasses
import functools
import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .errors import DijiangError
from .paths import ACCELERATE

app = typer.Typer(
    help="Convert any pretrained Transformer to DiJiang attention: O(1) per generated token.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output folder.")]
Recipe = Annotated[str, typer.Option(help="A recipe's name, or a YAML file.")]
RecipeFor = Annotated[
    str | None, typer.Option(help="A recipe's name, or a YAML file. [default: default, or encoder for an encoder]")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
Layers = Annotated[str, typer.Option(help="all, none, sliding-only, 0,3,8-23, every:N, not-every:N, not-last:N.")]
LayersToConvert = Annotated[
    str,
    typer.Option(
        help="all, none, sliding-only, 0,3,8-23, every:N, not-every:N, not-last:N; or auto:N, which calibrates, all "
        "but the N where conversion costs most."
    ),
]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; repeatable.")]
Push = Annotated[str | None, typer.Option(metavar="REPO", help="Push the result to this Hub repository.")]
Private = Annotated[bool, typer.Option("--private", help="Make that repository private.")]
Data = Annotated[str | None, typer.Option(help="A file, a folder, a quoted glob, or a Hub data set.")]
Corpora = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="SOURCE[@WEIGHT]",
        help="A file, a folder, a quoted glob, or a Hub data set, with its share of the tokens; repeatable.",
    ),
]
SeqLen = Annotated[int | None, typer.Option(min=2, help="Tokens a row.")]
Baseline = Annotated[str | None, typer.Option(metavar="SOURCE", help="The original model, to compare with.")]
Tokens = Annotated[int | None, typer.Option(min=1, help="Tokens of all stages together.")]


SHOWN = 12  # layers of a calibration: those that matter fit on a screen


def command(name: str, epilog: str | None = None) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Registers a command whose function returns (result, how to show it to a person)."""

    def register(function: Callable[..., Any]) -> Callable[..., None]:
        @app.command(name, epilog=epilog)
        @functools.wraps(function)
        def run(*args: Any, json_output: bool = False, debug: bool = False, **kwargs: Any) -> None:
            try:
                result, show = function(*args, json_output=json_output, debug=debug, **kwargs)
            except KeyboardInterrupt:
                _fail("stopped; nothing half-written was left behind" + _resume_hint(name), debug)
            except DijiangError as error:
                _fail(str(error), debug)
            except typer.BadParameter:
                raise
            except Exception as error:
                reason = " ".join(str(error).split())[:300]
                _fail(f"unexpected {type(error).__name__}: {reason}: --debug shows where", debug)
            if os.environ.get("RANK", "0") != "0":  # the first of the processes of a launch speaks for all
                return
            if json_output:
                print(json.dumps(dataclasses.asdict(result)))
            else:
                show(result)

        return run

    return register


def _fail(message: str, debug: bool) -> None:
    from .hub import redact

    if debug:  # of the one being handled
        print(redact(traceback.format_exc()), end="", file=sys.stderr)
        raise typer.Exit(1) from None
    message = redact(message)
    if os.environ.get("LOCAL_RANK", "0") == "0" or message.startswith("unexpected"):
        print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(1) from None


@contextmanager
def loading() -> Iterator[None]:
    """Around a verb's imports, which make a million objects that stay: the garbage collector would look through them
    again and again. (Freezing them afterwards would gain more, but triton, which CUDA builds of torch bring, then
    reports leaks at the end.)"""
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _resume_hint(name: str) -> str:
    return "; go on with --resume" if name == "finetune" else ""


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Convert any pretrained Transformer to DiJiang attention: O(1) per generated token."""


@command("convert")
def convert(
    source: Annotated[str, typer.Argument(help="Alias (pythia-410m), Hub id, or folder.")],
    out: Annotated[Path | None, typer.Option(help="Output folder. [default: ./NAME-dijiang]")] = None,
    recipe: RecipeFor = None,
    revision: Revision = None,
    dtype: Annotated[str | None, typer.Option(help="Rewrite weights as float32, float16 or bfloat16.")] = None,
    layers: LayersToConvert = "all",
    settings: Settings = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure what each head loses, and share the memory by it.")
    ] = False,
    data: Annotated[
        str | None, typer.Option(help="Text to calibrate on: a file, a folder, a quoted glob, or a Hub data set.")
    ] = None,
    push: Push = None,
    private: Private = False,
    force: Force = False,
    link: Annotated[bool, typer.Option("--link", help="Link the source's weights: no copy, no space.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, and write nothing.")] = False,
    json_output: Json = False,
    debug: Debug = False,
) -> Any:
    """Swap softmax attention for a DiJiang kernel."""
    from .files import copy_file
    from .head_start import head_start

    copies = not (dry_run or link or dtype)
    with head_start(source, out, force) if copies else nullcontext(copy_file) as lay:
        with loading():
            from .convert import convert

        result = convert(
            source, out, recipe=recipe, revision=revision, dtype=dtype, layers=layers, settings=settings or (),
            calibrate=calibrate, data=data, push=push, private=private, force=force, dry_run=dry_run, link=link,
            lay=lay,
        )  # fmt: skip

    def show(r: Any) -> None:
        verb = "would write" if r.dry_run else "wrote"
        print(
            f"{verb} {r.out}: {r.layers_converted} layers converted by recipe {r.recipe}, "
            f"{r.new_parameters:,} new parameters of {r.total_parameters:,}, {r.seconds:.1f} s"
        )
        if r.linked:
            note = ": change no weight file of either folder in place" if r.linked == "hard link" else ""
            print(f"weights are {r.linked}s to the source's{note}")
        if r.calibration is not None:
            _show_calibration(r.calibration)
        _show_pushed(r)
        if not r.dry_run:
            print(f"next: dijiang finetune {r.out}")

    return result, show


@command(
    "finetune",
    "Several GPUs: accelerate launch --config_file FILE --num_processes N -m dijiang_convert finetune CHECKPOINT …, "
    f"FILE one of ddp.yaml, fsdp2.yaml and deepspeed-zero3.yaml in {ACCELERATE}",
)
def finetune(
    checkpoint: Annotated[Path | None, typer.Argument(help="[default: the converted one in this folder]")] = None,
    out: Annotated[Path | None, typer.Option(help="Output folder. [default: CHECKPOINT-finetuned]")] = None,
    data: Corpora = None,
    tokens: Tokens = None,
    stage: Annotated[list[str] | None, typer.Option(help="Run this stage; several run in the order given.")] = None,
    skip: Annotated[list[str] | None, typer.Option(metavar="STAGE", help="Leave out a stage; repeatable.")] = None,
    full: Annotated[bool | None, typer.Option("--full/--lora", help="Train all weights, or adapters.")] = None,
    seq_len: SeqLen = None,
    settings: Settings = None,
    teacher: Annotated[str | None, typer.Option(metavar="SOURCE", help="The original, where it can't be told.")] = None,
    cache_teacher: Annotated[
        int | None,
        typer.Option(min=1, metavar="K", help="Keep the teacher's K likeliest tokens on disk, not it in memory."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the last run stopped.")] = False,
    push: Push = None,
    private: Private = False,
    force: Force = False,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Leave report.html and plots.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what it takes, and write nothing.")] = False,
    seed: Annotated[int, typer.Option(help="Of the data's order and the adapters.")] = 0,
    json_output: Json = False,
    debug: Debug = False,
) -> Any:
    """Distil the original's behaviour into a converted checkpoint."""
    with loading():
        from .distill.corpus import Sources
        from .finetune import finetune

    result = finetune(
        checkpoint, out, data=Sources(data) if data else None, tokens=tokens, stages=stage or (), skip=skip or (),
        seq_len=seq_len, settings=settings or (), train=None if full is None else "full" if full else "lora",
        teacher=teacher, cache_teacher=cache_teacher, resume=resume, push=push, private=private, force=force,
        report=report, dry_run=dry_run, seed=seed,
    )  # fmt: skip

    def show(r: Any) -> None:
        if r.dry_run:
            from .estimate import told

            print(*told(r.plan, r.free_bytes), sep="\n")
            return
        for s in r.stages:
            print(
                f"{s.name}: {s.tokens:,} tokens, loss {s.first_loss:.4f} to {s.last_loss:.4f}, "
                f"{s.tokens_per_second:,.0f} tokens/s, peak memory {s.peak_memory_bytes / 1e9:.1f} GB"
            )
        print(f"wrote {r.out} in {r.seconds:.0f} s" + (f"; how it went: {r.out}/report.html" if report else ""))
        _show_pushed(r)
        print(f"next: dijiang eval {r.out} --baseline ORIGINAL")

    return result, show


@command("eval")
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint, or any causal language model.")],
    baseline: Baseline = None,
    data: Data = None,
    seq_len: SeqLen = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens to evaluate on.")] = 100_000,
    recall: Annotated[
        bool, typer.Option("--recall", help="Also measure how well passages read before are repeated.")
    ] = False,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks: a,b.")] = "",
    save: Annotated[bool, typer.Option("--save", help="Keep the figures in the checkpoint's model card.")] = False,
    json_output: Json = False,
    debug: Debug = False,
) -> Any:
    """Measure perplexity on held-out text, and how close the original is."""
    with loading():
        from .evaluate import evaluate

    names = [task for task in tasks.split(",") if task]
    result = evaluate(
        checkpoint, baseline=baseline, data=data, seq_len=seq_len, max_tokens=max_tokens, recall=recall,
        tasks=names, save=save,
    )  # fmt: skip
    return result, _show_eval


@command("generate")
def generate(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint, or any causal language model.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    json_output: Json = False,
    debug: Debug = False,
) -> Any:
    """Stream text."""
    with loading():
        from .generate import generate

    def write(text: str) -> None:
        print(text, end="", flush=True)

    if not json_output:
        write(prompt)
    result = generate(
        checkpoint, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
        write=None if json_output else write,
    )  # fmt: skip

    def show(r: Any) -> None:
        print()
        print(f"{r.tokens} tokens, {r.tokens_per_second:.1f} a second", file=sys.stderr)

    return result, show


@command("bench")
def bench(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint, or any causal language model.")],
    baseline: Baseline = None,
    lengths: Annotated[str, typer.Option(help="Tokens in the prompt.")] = "1024,4096",
    batch_size: Annotated[str, typer.Option(help="Prompts at a time; several as 1,16.")] = "1",
    decode_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode after the prompt.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Figures are medians of so many turns.")] = 3,
    via: Annotated[str, typer.Option(help="generate, or forward: call the model token by token.")] = "generate",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, … [default: a GPU if there is one]")] = None,
    dtype: Annotated[str | None, typer.Option(help="Run in float32, float16 or bfloat16.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw speed against length.")] = None,
    json_output: Json = False,
    debug: Debug = False,
) -> Any:
    """Time prefill and decoding by length, and measure memory."""
    from .benchmark import benchmark

    result = benchmark(
        checkpoint, baseline=baseline, lengths=_numbers("--lengths", lengths),
        batch_sizes=_numbers("--batch-size", batch_size), decode_tokens=decode_tokens, repeats=repeats, via=via,
        device=device, dtype=dtype, plot=plot,
    )  # fmt: skip
    return result, _show_bench


def _numbers(option: str, text: str) -> list[int]:
    if not all(part.strip().isdigit() for part in text.split(",")):
        raise typer.BadParameter(f"{option} {text!r}: give numbers with commas between")
    return [int(part) for part in text.split(",")]


@command("inspect")
def inspect(
    source: Annotated[str, typer.Argument(help="Alias (pythia-410m), Hub id, or folder.")],
    recipe: RecipeFor = None,
    revision: Revision = None,
    layers: Layers = "all",
    settings: Settings = None,
    json_output: Json = False,
    debug: Debug = False,
) -> Any:
    """Tell what a conversion would do, from the config alone."""
    with loading():
        from .inspect import inspect

    result = inspect(source, recipe=recipe, revision=revision, layers=layers, settings=settings or ())

    def show(r: Any) -> None:
        if not r.supported:
            print(f"{r.source} ({r.architecture}) is not supported: {r.reason}")
            return
        kept = f"{_size(r.state_bytes)} at any length; softmax's cache is larger from {r.smaller_from or 1:,} tokens on"
        caches = ", ".join(f"{_size(n)} at {length:,}" for length, n in (r.kv_cache_bytes_at or {}).items())
        _table("", "", [
            ["model", f"{r.source} ({r.architecture})"],
            ["layers", f"{r.layers_converted} of {r.layers}: {r.heads} heads of {r.head_dim}, {r.kv_heads} for keys"],
            ["new parameters", f"{r.new_parameters:,} beside {r.parameters:,}"],
            *([["table and state", kept], ["softmax's cache", caches]] if caches else []),
            ["memory to finetune", _size(r.finetune_bytes)],
        ])  # fmt: skip

    return result, show


@command("push")
def push(
    checkpoint: Annotated[Path, typer.Argument(help="A converted checkpoint.")],
    repo: Annotated[str, typer.Argument(help="owner/name")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
    tag: Annotated[str | None, typer.Option(help="Tag for the commit.")] = None,
    json_output: Json = False,
    debug: Debug = False,
) -> Any:
    """Upload a checkpoint to the Hub, with its model card."""
    with loading():
        from .push import push

    result = push(checkpoint, repo, private=private, revision=revision, tag=tag)
    return result, lambda r: print(f"{r.url}: {_size(r.bytes_uploaded)} in commit {r.commit[:12]}")


@command("demo")
def demo(
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("dijiang-demo"),
    recipe: Recipe = "default",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to finetune on.")] = 150_000,
    force: Force = False,
    json_output: Json = False,
    debug: Debug = False,
) -> Any:
    """Run the whole job on an embedded small model."""
    with loading():
        from .demo import demo

    result = demo(out, recipe=recipe, tokens=tokens, force=force)

    def show(r: Any) -> None:
        for name, text in r.generate.items():
            print(f"--- {name} ---\n{text.prompt}{text.text}\n")
        _table("step", "figures", [
            ["convert", f"{r.convert.layers_converted} layers, {r.convert.seconds:.1f} s"],
            ["before finetune", f"perplexity {r.untrained.perplexity:.2f}, ratio {r.untrained.perplexity_ratio:.3f}"],
            ["finetune", f"{sum(s.tokens for s in r.finetune.stages):,} tokens, {r.finetune.seconds:.0f} s"],
            ["after finetune", f"perplexity {r.eval.perplexity:.2f}, ratio {r.eval.perplexity_ratio:.3f}, "
             f"same choice as the original {r.eval.top1_agreement:.1%}"],
            ["original", f"perplexity {r.eval.baseline_perplexity:.2f}"],
        ])  # fmt: skip
        _show_bench(r.bench)
        print(f"loss and speed: {r.plot}")

    return result, show


def _show_calibration(c: Any) -> None:
    """The layers to which exact keys are worth most, and what their heads got."""
    memory = iter(c.memory)
    got = {i: "stays softmax" if i in c.softmax else ", ".join(f"{n:,}" for n in next(memory, ())) for i in c.worth}
    worth = {i: sum(heads) for i, heads in c.worth.items()}
    best = sorted(worth, key=lambda i: worth[i], reverse=True)[:SHOWN]
    print(
        f"calibrated on {c.tokens:,} tokens, with small tables: KL {c.kl:.3f} nats a token, "
        f"{c.repeated_kl:.3f} where they repeat a passage; the layers that lose most of it:"
    )
    _table("layer", "of what is lost", [[str(i), f"{worth[i]:.1%}", got[i]] for i in best], "rows of memory by head")


def _show_eval(r: Any) -> None:
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


def _show_bench(r: Any) -> None:
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
            _size(x.cache_bytes), _size(x.peak_memory_bytes),
        ])  # fmt: skip
    _table("model", "tokens", rows, "prefill /s", "decode /s", "1st token", "cache", "memory")
    print(f"tokens a second, and times softmax's; {r.device}, {r.dtype}")


def _show_pushed(r: Any) -> None:
    if r.pushed:
        print(f"pushed to {r.pushed}")


def _table(first: str, second: str, rows: list[list[str]], *more: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(first, second, *more, show_header=bool(first))
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def _size(count: int) -> str:
    size, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
