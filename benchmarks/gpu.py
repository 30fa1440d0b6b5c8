"""Every figure that needs a GPU, in one call of less than eight minutes: python -m benchmarks.gpu --out gpu.json

Random models of the shapes of Pythia-410M and 2.8B in bfloat16, converted by `convert` with the recipe default, beside
the softmax models they came from. First each path for GPUs is compared with plain torch on the same GPU: a speed counts
only if the paths it took are right. Then, each in a section with its own share of the time:

    generate   generate() as a user calls it, against transformers' default (SDPA, a cache that grows)
    step       a compiled decode step: against the softmax model's with a static cache, as a share of what bytes allow;
               at batch 1 against the time that reading the weights takes. And the recorded step, which is the default
    prefill    the whole model against SDPA, as a share of what operations allow
    attention  the attention operation alone against SDPA, and against flash-linear-attention's chunk kernels
    train      a training step with kernels against one without

An error ends a section, not the run; it is in the results. They are written after each figure. Times are medians after
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM, StaticCache

from dijiang_convert import convert
from dijiang_convert.demo import MODEL
from dijiang_convert.modeling import accelerated
from dijiang_convert.modeling.attention import Call, DiJiangAttention
from dijiang_convert.modeling.cuda_graph import GraphedStep
from dijiang_convert.models import load_converted, silence

TOTAL_SECONDS = 450
SHAPES: dict[str, dict[str, int]] = {
    "410m": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "2.8b": {"hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 10240},
}
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}


@dataclass
class Sizes:
    """What is measured. The defaults are a GPU's; `tiny` is the dry run's."""

    batches: tuple[int, ...] = (1, 16)
    contexts: tuple[int, ...] = (512, 8192)
    new_tokens: int = 48
    steps: int = 32
    piece: int = 512
    prefill: tuple[int, ...] = (2048, 16384)
    attention: tuple[int, ...] = (16384, 131072)
    fla: int = 16384
    train: tuple[int, int] = (4, 2048)
    check: tuple[int, int] = (700, 80)  # prompt and decoded tokens of the comparison with torch
    repeats: int = 3
    vocabulary: int = 50304
    settings: tuple[str, ...] = ()
    copy_bytes: int = 2**31

    @classmethod
    def tiny(cls) -> "Sizes":
        return cls(
            (1, 2), (16, 40), 4, 3, 16, (32, 64), (64, 128), 64, (1, 32), (40, 2), 1, 512, ("window=8",), 2**20
        )  # fmt: skip


@dataclass
class Run:
    """Results so far, and where they go."""

    device: torch.device
    sizes: Sizes
    out: Path | None
    dry: bool
    deadline: float
    results: dict[str, Any] = field(default_factory=dict)

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

    def row(self, name: str, value: float, target: float | None, paths: tuple[str, ...] = (), **figures: Any) -> None:
        """One figure. It meets its target only if the paths that it took are right."""
        wrong = [path for path in paths if not self.results["correct"].get(path, {}).get("ok")]
        met = None if target is None else value >= target and not wrong
        row = {"row": name, "value": value, "target": target, "met": met, "wrong_paths": wrong, **figures}
        self.results["rows"].append(row)
        print("  " + json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
        self.write()

    def write(self) -> None:
        if self.out:
            self.out.write_text(json.dumps(self.results, indent=1) + "\n")

    # ------------------------------------------------------------------------------------------- memory and time

    def start_memory(self) -> int:
        """Forgets the peak; returns what is allocated. 0 on a CPU, as the peak is."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak_memory(self) -> int:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any], warm: int = 1, repeats: int | None = None) -> float:
        """The median, after ``warm`` calls."""
        times = []
        for i in range(warm + (repeats or self.sizes.repeats)):
            self.sync()
            start = time.perf_counter()
            work()
            self.sync()
            if i >= warm:
                times.append(time.perf_counter() - start)
        return statistics.median(times)

    def ids(self, batch: int, length: int) -> Tensor:
        return torch.randint(1, self.sizes.vocabulary, (batch, length), device=self.device)


def _too_long(signum: int, frame: Any) -> None:
    raise TimeoutError("the section took longer than its share of the time")


@contextmanager
def kernels(on: bool, dry: bool) -> Iterator[None]:
    """With kernels for GPUs, or in plain torch. (A dry run takes Triton's interpreter, where there is one.)"""
    before, interpreted = (accelerated.MODE, accelerated.FLA), "interpret" if accelerated.TRITON else "torch"
    accelerated.MODE = (interpreted if dry else "") if on else "torch"
    accelerated.FLA = accelerated.FLA and not dry  # flash-linear-attention asks for a driver
    try:
        yield
    finally:
        accelerated.MODE, accelerated.FLA = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for all of it")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("needs a CUDA device; --dry-run tries all of it on the CPU")
    measure(args.models, args.seconds, args.out, args.dry_run)


def measure(models: list[str], seconds: float, out: Path | None, dry: bool) -> dict[str, Any]:
    silence()
    torch.manual_seed(0)
    device = torch.device("cpu" if dry else "cuda")
    sizes = Sizes.tiny() if dry else Sizes()
    run = Run(device, sizes, out, dry, time.monotonic() + seconds)
    run.results = {"dry_run": dry, **environment(device), "correct": {}, "rows": [], "errors": {}, "seconds": {}}
    run.results["copy_bytes_per_second"] = run.section("bandwidth", 20, copy_bandwidth)
    for name in models[:1] if dry else models:
        shape, dtype = TINY if dry else SHAPES[name], torch.float32 if dry else torch.bfloat16
        is_first = name == models[0]
        with tempfile.TemporaryDirectory() as folder, kernels(not dry, dry):
            if is_first:
                run.section(
                    "correct",
                    80,
                    check,
                    {**shape, "num_hidden_layers": min(shape["num_hidden_layers"], 2)},
                    Path(folder) / "two",
                )
            pair = run.section(f"{name}: convert", 60, make_pair, shape, Path(folder) / "all", dtype)
            if pair is None:
                continue
            run.section(f"{name}: generate", 60, measure_generate, name, *pair)
            run.section(f"{name}: prefill", 15, measure_prefill, name, *pair)
            run.section(f"{name}: attention", 30, measure_attention, name, pair[1])
            if is_first:
                run.section(f"{name}: train", 25, measure_training, name, pair[1])
            run.section(f"{name}: step", 110, measure_steps, name, *pair)
            del pair
    run.results["seconds"]["all"] = round(seconds - (run.deadline - time.monotonic()), 1)
    run.write()
    print_table(run.results)
    return run.results


def environment(device: torch.device) -> dict[str, Any]:
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "cuda": torch.version.cuda}
    for name in ("triton", "fla"):
        try:
            versions[name] = getattr(__import__(name), "__version__", "?")
        except ImportError:
            versions[name] = None
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    return {"gpu": gpu, "versions": versions}


def copy_bandwidth(run: Run) -> float:
    """Bytes read and written a second by a copy in the GPU's memory."""
    a = torch.empty(run.sizes.copy_bytes, dtype=torch.uint8, device=run.device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / run.seconds(lambda: b.copy_(a), warm=3, repeats=10)


def make_pair(run: Run, shape: dict[str, int], folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """(softmax model, converted model) of random weights."""
    longest = max(*run.sizes.contexts, *run.sizes.prefill) + 1024
    config = GPTNeoXConfig(
        vocab_size=run.sizes.vocabulary, max_position_embeddings=longest, rotary_pct=0.25, dtype=dtype, **shape
    )
    with run.device:
        softmax = GPTNeoXForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    softmax.save_pretrained(folder / "source")
    for path in MODEL.glob("tokenizer*"):
        shutil.copy(path, folder / "source")
    convert(str(folder / "source"), folder / "converted", recipe="default", settings=run.sizes.settings)
    shutil.rmtree(folder / "source")
    converted = load_converted(folder / "converted", device=run.device).eval()
    for model in (softmax, converted):  # generate to the end, and no warning about it
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return softmax, converted


def attentions(model: Any) -> list[DiJiangAttention]:
    return [module for module in model.modules() if isinstance(module, DiJiangAttention)]


# ------------------------------------------------------------------------------------------------------- correctness


def check(run: Run, shape: dict[str, int], folder: Path) -> None:
    """Each path against plain torch, with kernel parameters away from their start: a prompt (one row of it padded),
    decoding far beyond the window, recorded, compiled, and gradients. Errors are root mean squares over the spread of
    what is right. In float32 they are to be small; in half precision no more than torch's own by much."""
    _, model = make_pair(run, shape, folder, torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".dijiang." in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    prompt, count = run.sizes.check
    ids, mask = run.ids(2, prompt + count), torch.ones(2, prompt, dtype=torch.long, device=run.device)
    mask[0, : prompt // 3] = 0

    @torch.no_grad()
    def logits(on: bool, wrap: Callable[[Any], Any] = lambda model: model) -> tuple[Tensor, Tensor]:
        """Of the prompt's real tokens, and of those decoded, by the step that ``wrap`` makes of the model."""
        with kernels(on, run.dry):
            cache, rest = StaticCache(config=model.config, max_cache_len=prompt + count), []
            first = model(ids[:, :prompt], attention_mask=mask, past_key_values=cache).logits
            step = wrap(model)
            for n in range(prompt, prompt + count):
                out = step(input_ids=ids[:, n, None], past_key_values=cache, use_cache=True)
                rest.append(out.logits.float().clone())
        return first[mask.bool()].float(), torch.cat(rest, 1)

    def gradient(on: bool) -> Tensor:
        with kernels(on, run.dry):
            model.zero_grad(set_to_none=True)
            model(ids[:, :prompt], labels=ids[:, :prompt], use_cache=False).loss.backward()
            return torch.cat([x.grad.float().flatten() for x in model.parameters() if x.grad is not None])

    def error(found: Tensor, right: Tensor) -> float:
        return ((found - right).norm() / (right - right.mean()).norm()).item()

    right, right_gradient, recorded = logits(False), gradient(False), GraphedStep if run.device.type == "cuda" else None
    half = torch.float16 if run.dry else torch.bfloat16  # which Triton's interpreter multiplies wrongly
    for dtype, bound in ((torch.float32, 1e-3), (half, 1e-2)):
        name, bounds = "" if dtype == half else " in float32", [bound] * 3
        if dtype != torch.float32:
            for each, parameter in model.named_parameters():
                if ".dijiang." not in each:
                    parameter.data = parameter.data.to(dtype)
            own = logits(False)
            of_torch = error(own[0], right[0]), error(own[1], right[1]), error(gradient(False), right_gradient)
            bounds = [bound + 1.5 * each for each in of_torch]
        found = logits(True)
        run.correct(f"prefill{name}", error(found[0], right[0]), bounds[0])
        run.correct(f"decode{name}", error(found[1], right[1]), bounds[1])
        run.correct(f"train{name}", error(gradient(True), right_gradient), bounds[2] * 3)
        if recorded is not None:
            run.correct(f"recorded{name}", error(logits(True, recorded)[1], right[1]), bounds[1])
    run.correct("compiled", error(logits(True, lambda model: compile_step(run, model))[1], right[1]), bounds[1])


def compile_step(run: Run, model: Any) -> Any:
    options = {"backend": "eager"} if run.dry else {"mode": "reduce-overhead"}
    return torch.compile(model.forward, fullgraph=True, dynamic=False, **options)


# ------------------------------------------------------------------------------------------------------------- speed


def measure_generate(run: Run, name: str, softmax: Any, converted: Any) -> None:
    """Speed of tokens after the first: what a call for some tokens takes less what one for a single token does."""
    paths = ("prefill", "decode", "recorded")
    for context in run.sizes.contexts:
        for batch in run.sizes.batches:
            ids = run.ids(batch, context)
            options = {"attention_mask": torch.ones_like(ids), "do_sample": False}
            figures: dict[str, Any] = {}
            for kind, model in (("softmax", softmax), ("dijiang", converted)):

                def call(count: int, model: Any = model, ids: Tensor = ids, options: Any = options) -> Any:
                    return model.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)

                before = run.start_memory()
                whole = run.seconds(lambda: call(run.sizes.new_tokens + 1), repeats=2)
                one = run.seconds(lambda: call(1), warm=0, repeats=2)
                figures[f"{kind}_call_seconds"] = whole
                figures[f"{kind}_tokens_per_second"] = batch * run.sizes.new_tokens / max(whole - one, 0.01 * whole)
                figures[f"{kind}_bytes_beyond_weights"] = run.peak_memory() - before
            ratio = figures["dijiang_tokens_per_second"] / figures["softmax_tokens_per_second"]
            figures["whole_call_ratio"] = figures["softmax_call_seconds"] / figures["dijiang_call_seconds"]
            target = 8.0 if context == max(run.sizes.contexts) else 1.0
            run.row("generate() against transformers' default", ratio, target, paths, model=name, context=context,
                    batch=batch, **figures)  # fmt: skip


@torch.no_grad()
def measure_steps(run: Run, name: str, softmax: Any, converted: Any) -> None:
    """The recorded step first, which needs no compiler; then compiled ones, the batch of 1 before the larger one."""
    context, bandwidth = max(run.sizes.contexts), run.results["copy_bytes_per_second"]
    for batch in run.sizes.batches:
        at_all = {"model": name, "context": context, "batch": batch}
        ours = filled(run, converted, batch, context)
        recorded = GraphedStep(converted) if run.device.type == "cuda" else converted
        of_recorded = step_seconds(run, recorded, ours, batch)
        weights = weight_bytes(converted)
        figures = {"recorded_seconds": of_recorded, "weight_bytes": weights}
        if batch == 1:
            run.row("recorded decode against reading the weights", weights / bandwidth / of_recorded, None,
                    ("decode", "recorded"), **at_all, **figures)  # fmt: skip
        of_compiled = step_seconds(run, compile_step(run, converted), ours, batch)
        figures["compiled_seconds"] = of_compiled
        if batch == 1:
            target = {"410m": 0.2, "2.8b": 0.5}[name]
            run.row("compiled decode against reading the weights", weights / bandwidth / of_compiled, target,
                    ("decode", "compiled"), **at_all, **figures)  # fmt: skip
            continue
        traffic = state_traffic(ours)
        del ours
        theirs = filled(run, softmax, batch, context)
        kv = sum(layer.keys[:, :, :context].nbytes + layer.values[:, :, :context].nbytes for layer in theirs.layers)
        of_softmax = step_seconds(run, compile_step(run, softmax), theirs, batch)
        allowed = (weight_bytes(softmax) + kv) / (weights + traffic)
        share = of_softmax / of_compiled / allowed
        run.row("compiled decode against softmax's with a static cache: share of what bytes allow", share, 0.7,
                ("decode", "compiled"), **at_all, **figures, softmax_seconds=of_softmax, allowed=allowed,
                kv_bytes=kv, state_traffic_bytes=traffic)  # fmt: skip


def filled(run: Run, model: Any, batch: int, context: int) -> StaticCache:
    """A static cache that has read a context, with room for what is timed."""
    cache = StaticCache(config=model.config, max_cache_len=context + 8 * run.sizes.steps)
    ids = run.ids(batch, context)
    for start in range(0, context, run.sizes.piece):
        model(ids[:, start : start + run.sizes.piece], past_key_values=cache, logits_to_keep=1)
    return cache


def step_seconds(run: Run, step: Any, cache: StaticCache, batch: int) -> float:
    """Of a decode step: the median of runs of several, each after the other without a pause."""
    ids = run.ids(batch, 1)

    def steps() -> None:
        for _ in range(run.sizes.steps):
            if run.device.type == "cuda":
                torch.compiler.cudagraph_mark_step_begin()
            step(input_ids=ids, past_key_values=cache, use_cache=True)

    return run.seconds(steps, warm=1) / run.sizes.steps


def weight_bytes(model: Any) -> int:
    """What a step reads of the weights: all but the table of embeddings, of which it reads a row."""
    return sum(x.nbytes for x in model.parameters()) - model.get_input_embeddings().weight.nbytes


def state_traffic(cache: StaticCache) -> int:
    """What a step reads and writes of the layers' states, and reads of their windows."""
    layers = cache.layers
    return sum(2 * x.s.nbytes for x in (layer.state for layer in layers)) + sum(
        x.nbytes for layer in layers for x in layer.recent[:2]
    )


@torch.no_grad()
def measure_prefill(run: Run, name: str, softmax: Any, converted: Any) -> None:
    for length in run.sizes.prefill:
        ids, seconds = run.ids(1, length), {}
        for kind, model in (("softmax", softmax), ("dijiang", converted)):

            def prefill(model: Any = model, ids: Tensor = ids) -> None:
                cache = DynamicCache(config=model.config)
                model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

            seconds[kind] = run.seconds(prefill)
        config = converted.config
        linear = 2 * (weight_bytes(softmax) // softmax.dtype.itemsize)  # of a token
        theirs = linear + 2 * config.hidden_size * length * config.num_hidden_layers
        ours = linear + attention_operations(attentions(converted)[0]) * config.num_hidden_layers
        ratio, allowed = seconds["softmax"] / seconds["dijiang"], theirs / ours
        run.row("prefill against SDPA: share of what operations allow", ratio / allowed, 0.6, ("prefill",), model=name,
                length=length, ratio=ratio, allowed=allowed, softmax_seconds=seconds["softmax"],
                dijiang_seconds=seconds["dijiang"])  # fmt: skip


def attention_operations(child: DiJiangAttention) -> int:
    """Of a token and layer: the window, features, the state read and written, and half of each chunk of far keys."""
    kernel, layers = child.kernel, child.layers
    heads, dim, chunk = layers.heads, layers.head_dim, kernel.chunk_size
    features, values = 2 * dim if kernel.signed else dim, layers.value_dim
    near = 2 * heads * kernel.window * (dim + values)
    maps = 2 * dim * dim * (heads + layers.kv_heads)
    state = 2 * features * (values + 1) * (heads + layers.kv_heads)
    return near + maps + state + heads * chunk * (features + values)


@torch.no_grad()
def measure_attention(run: Run, name: str, converted: Any) -> None:
    """One layer's attention from q, k and v on, all that the kernel does to them included."""
    child, config, dtype = attentions(converted)[0], converted.config, converted.dtype
    shape = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    for length in run.sizes.attention:
        q, k, v = (torch.randn(1, shape[0], length, shape[1], device=run.device, dtype=dtype) for _ in range(3))
        call = a_call(child, run.device, length, config.hidden_size, dtype)
        ours = run.seconds(lambda: child(q, k, v, None, call), warm=2)  # noqa: B023
        sdpa = run.seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), warm=2)  # noqa: B023
        target = 6.0 if length == max(run.sizes.attention) else 1.0
        at_all = {"model": name, "length": length, "dijiang_seconds": ours}
        run.row("attention alone against SDPA", sdpa / ours, target, ("prefill",), **at_all, sdpa_seconds=sdpa)
        if length == run.sizes.fla and run.results["versions"]["fla"] and run.device.type == "cuda":
            for kind, seconds in fla_seconds(run, q, k, v).items():
                target = 0.9 if kind == "chunk_gla" else None
                run.row("the layer against flash-linear-attention on q, k, v of its size", seconds / ours, target,
                        ("prefill",), **at_all, kernel=kind, fla_seconds=seconds)  # fmt: skip


def a_call(child: DiJiangAttention, device: torch.device, length: int, hidden: int, dtype: torch.dtype) -> Call:
    """What the attention module would hand over."""
    hidden_states = torch.randn(1, length, hidden, device=device, dtype=dtype)
    angles = torch.arange(length, device=device)[None, :, None] / 10 ** torch.linspace(
        0, 4, child.layers.rotary_dim // 2, device=device
    )
    angles = torch.cat([angles, angles], -1)
    return Call(
        None, hidden_states, (angles.cos().to(dtype), angles.sin().to(dtype)), scaling=child.layers.head_dim**-0.5
    )


def fla_seconds(run: Run, q: Tensor, k: Tensor, v: Tensor) -> dict[str, float]:
    """Gated linear attention with a decay of each number of a key, and with one of each key; and the first with keys
    as long as the layer's features."""
    from fla.ops.gla import chunk_gla
    from fla.ops.simple_gla import chunk_simple_gla

    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    g = F.logsigmoid(torch.randn_like(k).float())
    wide = [torch.cat([x, x], -1) for x in (q, k)]
    return {
        "chunk_gla": run.seconds(lambda: chunk_gla(q, k, v, g.to(q.dtype)), warm=2),
        "chunk_simple_gla": run.seconds(lambda: chunk_simple_gla(q, k, v, g[..., 0].contiguous()), warm=2),
        "chunk_gla with keys twice as long": run.seconds(
            lambda: chunk_gla(*wide, v, torch.cat([g, g], -1).to(q.dtype)), warm=2
        ),
    }


def measure_training(run: Run, name: str, converted: Any) -> None:
    """Forward and backward of all weights."""
    batch, length = run.sizes.train
    ids, seconds, peaks = run.ids(batch, length), {}, {}

    def step() -> None:
        converted.zero_grad(set_to_none=True)
        converted(ids, labels=ids, use_cache=False).loss.backward()

    for kind, on in (("torch", False), ("kernels", True)):
        with kernels(on, run.dry):
            run.start_memory()
            seconds[kind] = run.seconds(step)
            peaks[kind] = run.peak_memory()
    converted.zero_grad(set_to_none=True)
    run.row("a training step with kernels against torch", seconds["torch"] / seconds["kernels"], None, ("train",),
            model=name, batch=batch, length=length, seconds=seconds, peak_bytes=peaks)  # fmt: skip


def print_table(results: dict[str, Any]) -> None:
    print(f"\n{results['gpu'] or 'CPU'}, {results['versions']}" + (", a dry run" if results["dry_run"] else ""))
    for row in results["rows"]:
        at = {name: row[name] for name in ("model", "context", "length", "batch", "kernel") if name in row}
        wanted = "" if row["target"] is None else f" of {row['target']} {'met' if row['met'] else 'NOT met'}"
        print(f"{row['row']}, {' '.join(f'{k} {v}' for k, v in at.items())}: {row['value']:.3g}{wanted}")
    for name, error in results["errors"].items():
        print(f"{name}: {error['error'].splitlines()[0]}")


if __name__ == "__main__":
    main()
