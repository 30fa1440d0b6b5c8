"""What a converted model does on a GPU, in one call of less than eight minutes:

    python -m benchmarks.gpu --out benchmarks/results/gpu.json      # then: python benchmarks/readme.py

First each path of a model of two layers is compared with that model in float64 on the CPU. Then come speeds of random
models of the shapes of Pythia-410M and 2.8B in bfloat16, as softmax (SDPA) and converted by each of --recipes, every
figure in a section with its own share of the time:

    prefill    a prompt, until its next token is known
    decode     generate() as a user calls it, with the cache that grows: tokens after the first
    train      forward and backward of all weights
    compiled   generate(cache_implementation="static"), whose step transformers compiles; the row tells whether it was
               compiled, into how many graphs, and how many of these could not become CUDA graphs (stderr says why)

An error ends a section, not the run; it is in the results, which are written after each figure. Times are medians after
a warm-up. With --dry-run all of it runs on the CPU in tiny shapes: that it runs, is all that this shows.
"""

import argparse
import gc
import json
import shutil
import signal
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM

from dijiang_convert import convert
from dijiang_convert.checkpoint.loading import load_converted, silence
from dijiang_convert.demo import MODEL
from dijiang_convert.measure.timing import Pass, now, peak_memory, seconds, time_forward, time_generate

TOTAL_SECONDS = 450
RECIPES = ("default:memory=256", "default")
SHAPES: dict[str, dict[str, int]] = {
    "410m": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "2.8b": {"hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 10240},
}
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
TINY_RECIPES = ("frequency:window=8,block=8,sinks=2,memory=8",)


@dataclass
class Sizes:
    """What is measured. The defaults are a GPU's; `tiny` is the dry run's."""

    prefill: tuple[int, ...] = (2048, 16384, 65536)
    contexts: tuple[int, ...] = (1024, 16384)  # tokens before those that are decoded
    batches: tuple[int, ...] = (1, 16)
    new_tokens: int = 128  # two blocks, so that the table's moves count
    train: tuple[int, int] = (4, 2048)
    check: tuple[int, int] = (700, 140)  # prompt and decoded tokens of the comparison with float64
    pieces: tuple[int, ...] = (100, 64, 1, 300, 235)  # of that prompt
    repeats: int = 3
    vocabulary: int = 50304

    @classmethod
    def tiny(cls) -> "Sizes":
        return cls((32, 64), (16, 40), (1, 2), 4, (1, 32), (50, 20), (10, 8, 1, 31), 1, 1024)


@dataclass
class Run:
    """Results so far, and where they go."""

    device: torch.device
    sizes: Sizes
    out: Path | None
    deadline: float
    results: dict[str, Any] = field(
        default_factory=lambda: {"correct": {}, "compiled": {}, "rows": [], "errors": {}, "seconds": {}}
    )

    def section(self, name: str, seconds: float, work: Callable[..., Any], *args: Any) -> Any:
        """What ``work`` returns, or None where it failed or took too long."""
        start = time.monotonic()
        seconds = min(seconds, self.deadline - start)
        print(f"— {name}", flush=True)
        try:
            if seconds <= 1:
                raise TimeoutError("no time was left")
            signal.signal(signal.SIGALRM, _too_long)
            signal.setitimer(signal.ITIMER_REAL, seconds)
            return work(self, *args)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".strip()
            self.results["errors"][name] = {"error": reason[:2000], "where": traceback.format_exc()[-3000:]}
            print(f"  {reason.splitlines()[0]}", flush=True)
            return None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.results["seconds"][name] = round(time.monotonic() - start, 1)
            self.write()
            torch._dynamo.reset()
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def correct(self, path: str, error: float, bound: float) -> None:
        self.results["correct"][path] = {"error": error, "bound": bound, "ok": bool(error <= bound)}
        print(f"  {path}: {error:.2e} (at most {bound:.0e})", flush=True)
        self.write()

    def row(self, what: str, path: str, tokens_per_second: float, **figures: Any) -> None:
        """One figure. It counts only if the path that it took is right, in each dtype that was looked at."""
        looked_at = [found["ok"] for name, found in self.results["correct"].items() if name.split()[0] == path]
        right = bool(looked_at) and all(looked_at)
        row = {"row": what, **figures, "tokens_per_second": tokens_per_second, "right": right}
        self.results["rows"].append(row)
        print("  " + json.dumps(row), flush=True)
        self.write()

    def write(self) -> None:
        if self.out:
            self.out.write_text(json.dumps(self.results, indent=1) + "\n")

    def ids(self, batch: int, length: int) -> Tensor:
        return torch.randint(1, self.sizes.vocabulary, (batch, length), device=self.device)

    def median(self, call: Callable[[], Any], figure: Callable[[Any], Any]) -> tuple[float, int]:
        """(the median of a figure of what ``call`` returns, after a warm-up; the bytes it takes beside the model)."""
        call()
        results, held = zip(*(peak_memory(self.device, call) for _ in range(self.sizes.repeats)), strict=True)
        return statistics.median(map(figure, results)), max(held)


def _too_long(signum: int, frame: Any) -> None:
    raise TimeoutError("the section took longer than its share of the time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--recipes", nargs="+", metavar="RECIPE[:key=value,…]")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for all of it")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("needs a CUDA device; --dry-run tries all of it on the CPU")
    recipes = args.recipes or (TINY_RECIPES if args.dry_run else RECIPES)
    measure(args.models, recipes, args.seconds, args.out, args.dry_run)


def measure(models: list[str], recipes: Sequence[str], seconds: float, out: Path | None, dry: bool) -> dict[str, Any]:
    silence()
    torch.manual_seed(0)
    if not dry:
        torch._logging.set_logs(cudagraphs=True)  # says why a graph could not become a CUDA graph
    run = Run(
        torch.device("cpu" if dry else "cuda"), Sizes.tiny() if dry else Sizes(), out, time.monotonic() + seconds
    )  # fmt: skip
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "cuda": torch.version.cuda}
    run.results |= {"dry_run": dry, "gpu": None if dry else torch.cuda.get_device_name(), "versions": versions}
    shapes = {name: TINY if dry else SHAPES[name] for name in models}
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        run.section("correct", 130, check, recipes[0], shapes[models[0]], Path(folder) / "check")
        for name in models:
            dtype = torch.float32 if dry else torch.bfloat16
            kinds = run.section(f"{name}: convert", 60, make_models, shapes[name], recipes, Path(folder) / name, dtype)
            found[name] = kinds or {}
            run.section(f"{name}: prefill", 20, measure_prefill, name, found[name])
            run.section(f"{name}: decode", 60, measure_decoding, name, found[name])
            if name == models[0]:
                run.section(f"{name}: train", 30, measure_training, name, found[name])
        for name in models:
            for kind in sorted(found[name], key=lambda kind: [recipes[0], "softmax", *recipes[1:]].index(kind)):
                run.section(f"{name}: compiled {kind}", 120, measure_compiled, name, kind, found[name][kind])
    run.results["seconds"]["all"] = round(seconds - (run.deadline - time.monotonic()), 1)
    run.write()
    return run.results


def make_models(
    run: Run, shape: dict[str, int], recipes: Sequence[str], folder: Path, dtype: torch.dtype
) -> dict[str, Any]:
    """The softmax model of random weights, and it converted by each recipe."""
    longest = max(*run.sizes.contexts, *run.sizes.prefill) + 1024
    config = GPTNeoXConfig(
        vocab_size=run.sizes.vocabulary, max_position_embeddings=longest, rotary_pct=0.25, dtype=dtype, **shape
    )
    with run.device:
        softmax = GPTNeoXForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    softmax.save_pretrained(folder / "source")
    for path in MODEL.glob("tokenizer*"):
        shutil.copy(path, folder / "source")
    models = {"softmax": softmax}
    for i, recipe in enumerate(recipes):
        name, _, settings = recipe.partition(":")
        chosen = [s for s in settings.split(",") if s]
        convert(str(folder / "source"), folder / str(i), recipe=name, settings=chosen, link=True)
        models[recipe] = load_converted(folder / str(i), device=run.device).eval()
    shutil.rmtree(folder)
    for model in models.values():  # generate to the end, and no warning about it
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return models


# ------------------------------------------------------------------------------------------------------- correctness


def check(run: Run, recipe: str, shape: dict[str, int], folder: Path) -> None:
    """Each path of a model whose kernels are away from their start, with a padded row, against float64 on the CPU.

    Errors are root mean squares over the spread of what is right, and held against what the CPU's own are in the same
    dtype: where two keys' scores are close, rounding decides which of them the memory keeps.
    """
    shape = {**shape, "num_hidden_layers": min(shape["num_hidden_layers"], 2)}
    model = make_models(run, shape, [recipe], folder, torch.float32)[recipe]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".dijiang." in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    prompt, count = run.sizes.check
    ids, mask = run.ids(2, prompt), torch.ones(2, prompt, dtype=torch.long, device=run.device)
    mask[0, : prompt // 3] = 0
    exact, real = copied(model, torch.float64), mask.bool().cpu()
    right, right_gradient = at_once(exact, ids, mask)[real], gradient(exact, ids)
    for dtype, floor in ((torch.float32, 1e-3), (torch.bfloat16, 1e-2)):
        label = str(dtype).removeprefix("torch.")
        of_cpu = copied(model, dtype)
        bound = floor + 2 * error(at_once(of_cpu, ids, mask)[real], right)
        bound_of_gradient = 3 * floor + 2 * error(gradient(of_cpu, ids), right_gradient)
        found = copied(model, dtype, run.device)
        run.correct(f"prefill in {label}", error(at_once(found, ids, mask)[real], right), bound)
        run.correct(f"pieces in {label}", error(in_pieces(found, ids, mask, run.sizes.pieces)[real], right), bound)
        run.correct(f"train in {label}", error(gradient(found, ids), right_gradient), bound_of_gradient)
        for path, options in (("decode", {}), ("compiled", compiled_options(run))):
            with counted(found) as use:
                logits, text = continued(found, ids, mask, count, options)
            whole = at_once(exact, text, torch.cat([mask, mask.new_ones(2, count)], 1))
            run.correct(f"{path} in {label}", error(logits, whole[:, prompt - 1 : -1]), bound)
            if options:
                run.results["compiled"][f"check in {label}"] = use


def copied(model: Any, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """The model in another dtype, as loading leaves it: kernels stay float32, but for a model in float64."""
    copy = deepcopy(model).to(device)
    if dtype == torch.float64:
        return copy.double()
    for name, parameter in copy.named_parameters():
        parameter.data = parameter.data if ".dijiang." in name else parameter.data.to(dtype)
    return copy


@torch.no_grad()
def at_once(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    return model(ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits.double().cpu()


@torch.no_grad()
def in_pieces(model: Any, ids: Tensor, mask: Tensor, pieces: tuple[int, ...]) -> Tensor:
    """The same through a cache, some tokens at a time."""
    cache, found, end = DynamicCache(config=model.config), [], 0
    for piece in ids.split(pieces, 1):
        end += piece.shape[1]
        out = model(piece, attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        found.append(out.logits.double().cpu())
    return torch.cat(found, 1)


def gradient(model: Any, ids: Tensor) -> Tensor:
    """Of the loss, for all weights, in one row of numbers."""
    ids = ids.to(model.device)
    model(ids, labels=ids, use_cache=False).loss.backward()
    found = torch.cat([x.grad.double().flatten().cpu() for x in model.parameters() if x.grad is not None])
    model.zero_grad(set_to_none=True)
    return found


def continued(model: Any, ids: Tensor, mask: Tensor, count: int, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits [B, count, V] of tokens that generate() chose, and the whole text with them."""
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    return torch.stack(out.logits, 1).double().cpu(), out.sequences


def error(found: Tensor, right: Tensor) -> float:
    return ((found - right).norm() / (right - right.mean()).norm()).item()


# -------------------------------------------------------------------------------------------------- compiled decoding


def compiled_options(run: Run) -> dict[str, Any]:
    """What makes generate() compile its step; on a CPU it must be told to, and nothing is gained."""
    if run.device.type == "cuda":
        return {"cache_implementation": "static"}
    config = CompileConfig(backend="aot_eager", mode=None)  # type: ignore[arg-type]
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


@contextmanager
def counted(model: Any) -> Iterator[dict[str, int]]:
    """What is compiled inside: calls of the compiled model, graphs, breaks in them, and those without CUDA graphs."""
    torch._dynamo.reset()
    counters.clear()
    found, get = {"calls": 0}, model.get_compiled_call
    model.__dict__.pop("_compiled_call", None)

    def get_counted(config: Any) -> Callable[..., Any]:
        compiled = get(config)

        def call(*args: Any, **kwargs: Any) -> Any:
            found["calls"] += 1
            return compiled(*args, **kwargs)

        return call

    model.get_compiled_call = get_counted
    try:
        yield found
    finally:
        del model.get_compiled_call
        found["graphs"] = counters["stats"]["unique_graphs"]
        found["graph_breaks"] = sum(counters["graph_break"].values())
        found["without_cuda_graphs"] = counters["inductor"]["cudagraph_skips"]


def measure_compiled(run: Run, name: str, kind: str, model: Any) -> None:
    """At the longest context. Raises RuntimeError where generate() did not compile."""
    context = max(run.sizes.contexts)
    for batch in run.sizes.batches:
        with counted(model) as use:
            start = now(run.device)
            time_generate(model, run.ids(batch, context), run.sizes.new_tokens, **compiled_options(run))
            compiling = now(run.device) - start
            row = decoding(run, model, batch, context, compiled_options(run))
        use["seconds_until_compiled"] = round(compiling, 1)
        run.results["compiled"][f"{name}, {kind}, batch {batch}"] = use
        if not use["calls"] or not use["graphs"]:
            raise RuntimeError(f"generate() did not compile its step: {use}")
        run.row("decoding, compiled", "compiled", **row, shape=name, model=kind)


# ------------------------------------------------------------------------------------------------------------- speed


def measure_prefill(run: Run, name: str, models: dict[str, Any]) -> None:
    for length in run.sizes.prefill:
        for kind, model in models.items():
            ids = run.ids(1, length)
            taken, held = run.median(lambda: time_forward(model, ids, 0), lambda p: p.first_token)  # noqa: B023
            run.row("prefill", "prefill", length / taken, shape=name, model=kind, length=length, batch=1, bytes=held)


def measure_decoding(run: Run, name: str, models: dict[str, Any]) -> None:
    for context in run.sizes.contexts:
        for batch in run.sizes.batches:
            for kind, model in models.items():
                run.row("decoding", "decode", **decoding(run, model, batch, context, {}), shape=name, model=kind)


def decoding(run: Run, model: Any, batch: int, context: int, options: dict[str, Any]) -> dict[str, Any]:
    ids = run.ids(batch, context)

    def generated() -> Pass:
        return time_generate(model, ids, run.sizes.new_tokens, **options)

    taken, held = run.median(generated, lambda each: each.decode)
    return {"tokens_per_second": batch / taken, "length": context, "batch": batch, "bytes": held}


def measure_training(run: Run, name: str, models: dict[str, Any]) -> None:
    batch, length = run.sizes.train
    ids = run.ids(batch, length)
    for kind, model in models.items():

        def step(model: Any = model) -> None:
            model(ids, labels=ids, use_cache=False).loss.backward()
            model.zero_grad(set_to_none=True)

        taken, held = run.median(lambda: seconds(run.device, step), float)
        at_all = {"shape": name, "model": kind, "length": length, "batch": batch, "bytes": held}
        run.row("training step", "train", batch * length / taken, **at_all)


if __name__ == "__main__":
    main()
