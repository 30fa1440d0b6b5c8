"""The command line: a thin skin over the package's functions. Results go to stdout, progress and errors to stderr."""

import dataclasses
import errno
import functools
import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__, show
from .architecture.layers import LAYER_SPECS
from .errors import DijiangError, printable, without_steering
from .files import ACCELERATE, is_of_full_disk

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
    str | None, typer.Option(help="A recipe's name, or a YAML file.", show_default="default; encoder for an encoder")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
Layers = Annotated[str, typer.Option(help=f"{LAYER_SPECS}.")]
LayersToConvert = Annotated[
    str,
    typer.Option(help=f"{LAYER_SPECS}; or auto:N, which calibrates, all but the N where conversion costs most."),
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


def command(name: str, epilog: str | None = None) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Registers a command whose function returns (result, how to show it to a person)."""

    def register(function: Callable[..., Any]) -> Callable[..., None]:
        @app.command(name, epilog=epilog)
        @functools.wraps(function)
        def run(*args: Any, json_output: bool = False, debug: bool = False, **kwargs: Any) -> None:
            try:
                result, shown = function(*args, json_output=json_output, debug=debug, **kwargs)
                if _is_first_process():  # the first process speaks for all
                    with show.writing():
                        print(json.dumps(dataclasses.asdict(result))) if json_output else shown(result)
            except BrokenPipeError:  # typer ends quietly where whoever read the output is gone, as in `… | head`
                raise
            except KeyboardInterrupt:
                goes_on = name == "finetune" and not kwargs.get("dry_run")
                _fail("stopped; nothing half-written was left behind" + "; go on with --resume" * goes_on, debug)
            except DijiangError as error:
                _fail(str(error), debug)
            except typer.BadParameter:
                raise
            except Exception as error:
                if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
                    _fail(f"{str(error.filename)[:40]}… is too long for the name of a file: give a shorter one", debug)
                if is_of_full_disk(error):
                    where = f" of {error.filename}" if isinstance(error, OSError) and error.filename else ""
                    _fail(f"no space left on the disk{where}: free some, then try again", debug)
                reason = " ".join(str(error).split())[:300]
                _fail(f"unexpected {type(error).__name__}: {reason}: --debug shows where", debug)

        return run

    return register


def _fail(message: str, debug: bool) -> None:
    from .source.hub import redact

    if debug:  # the traceback is that of the exception being handled
        print(without_steering(redact(traceback.format_exc())), end="", file=sys.stderr)
        raise typer.Exit(1) from None
    message = printable(redact(message))
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


def _check_push(repo: str | None) -> None:
    """Asks the Hub whether the token is good, before anything that takes long."""
    if repo is not None:
        from .push import check_push

        check_push(repo)


def _pushed(result: Any, repo: str | None, private: bool) -> Any:
    """The result of a verb once the checkpoint it wrote is on the Hub. The first process of a launch pushes."""
    if repo is None or result.dry_run or not _is_first_process():
        return result
    from .push import push_result

    return dataclasses.replace(result, pushed=push_result(result.out, repo, private))


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


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
    out: Annotated[Path | None, typer.Option(help="Output folder.", show_default="./NAME-dijiang")] = None,
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
    with loading():
        from .convert import convert

    _check_push(push)
    result = convert(
        source, out, recipe=recipe, revision=revision, dtype=dtype, layers=layers, settings=settings or (),
        calibrate=calibrate, data=data, force=force, dry_run=dry_run, link=link,
    )  # fmt: skip
    return _pushed(result, push, private), show.conversion


def _no_recipe(name: str | None) -> None:
    if name is not None:
        raise typer.BadParameter(
            "the checkpoint has its recipe from dijiang convert --recipe; --set KEY=VALUE changes it"
        )


@command(
    "finetune",
    "Several GPUs: accelerate launch --config_file FILE --num_processes N -m dijiang_convert finetune CHECKPOINT …, "
    f"FILE one of ddp.yaml and fsdp2.yaml in {ACCELERATE}",
)
def finetune(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="A converted checkpoint.", show_default="the one in this folder")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Output folder.", show_default="CHECKPOINT-finetuned")] = None,
    data: Corpora = None,
    tokens: Tokens = None,
    stage: Annotated[list[str] | None, typer.Option(help="Run this stage; several run in the order given.")] = None,
    skip: Annotated[list[str] | None, typer.Option(metavar="STAGE", help="Leave out a stage; repeatable.")] = None,
    full: Annotated[bool | None, typer.Option("--full/--lora", help="Train all weights, or adapters.")] = None,
    seq_len: SeqLen = None,
    settings: Settings = None,
    teacher: Annotated[str | None, typer.Option(metavar="SOURCE", help="The original, where it can't be told.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the last run stopped.")] = False,
    push: Push = None,
    private: Private = False,
    force: Force = False,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Leave report.html and plots.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what it takes, and write nothing.")] = False,
    seed: Annotated[int, typer.Option(help="Of the data's order and the adapters.")] = 0,
    recipe: Annotated[str | None, typer.Option(hidden=True, callback=_no_recipe)] = None,
    json_output: Json = False,
    debug: Debug = False,
) -> Any:
    """Distil the original's behaviour into a converted checkpoint."""
    with loading():
        from .data.readers import Sources
        from .finetune import finetune

    _check_push(push)
    result = finetune(
        checkpoint, out, data=Sources(data) if data else None, tokens=tokens, stages=stage or (), skip=skip or (),
        seq_len=seq_len, settings=settings or (), train=None if full is None else "full" if full else "lora",
        teacher=teacher, resume=resume, force=force, report=report, dry_run=dry_run, seed=seed,
    )  # fmt: skip
    return _pushed(result, push, private), show.finetuning


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
    return result, show.evaluation


@command("generate")
def generate(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint, or any causal language model.")],
    prompt: Annotated[list[str], typer.Argument(help="Text to continue, or what to ask; several are turns of a chat.")],
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Ask through the chat template, or continue the text.",
            show_default="--chat if it has one",
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="What the system says first in a chat.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    json_output: Json = False,
    debug: Debug = False,
) -> Any:
    """Stream text: an answer, or what follows the prompt."""
    with loading():
        from .generate import generate

    result = generate(
        checkpoint, prompt, chat=chat, system=system, max_new_tokens=max_new_tokens, temperature=temperature,
        seed=seed, write=None if json_output else _write,
    )  # fmt: skip
    return result, show.generation


def _write(text: str) -> None:
    """Writes a piece of generated text, to a terminal without what would steer it."""
    with show.writing():
        print(without_steering(text) if sys.stdout.isatty() else text, end="")


@command("bench")
def bench(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint, or any causal language model.")],
    baseline: Baseline = None,
    lengths: Annotated[str, typer.Option(help="Tokens in the prompt.")] = "1024,4096",
    batch_size: Annotated[str, typer.Option(help="Prompts at a time; several as 1,16.")] = "1",
    decode_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode after the prompt.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Figures are medians of so many turns.")] = 3,
    via: Annotated[str, typer.Option(help="generate, or forward: call the model token by token.")] = "generate",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …", show_default="a GPU if there is one")] = None,
    dtype: Annotated[str | None, typer.Option(help="Run in float32, float16 or bfloat16.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw speed against length.")] = None,
    json_output: Json = False,
    debug: Debug = False,
) -> Any:
    """Time prefill and decoding by length, and measure memory."""
    counts, sizes = _numbers("--lengths", lengths), _numbers("--batch-size", batch_size)
    with loading():
        from .benchmark import benchmark

    result = benchmark(
        checkpoint, baseline=baseline, lengths=counts, batch_sizes=sizes, decode_tokens=decode_tokens,
        repeats=repeats, via=via, device=device, dtype=dtype, plot=plot,
    )  # fmt: skip
    return result, show.benchmark


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

    return result, show.inspection


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
    return result, show.pushed


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

    return result, show.demonstration
