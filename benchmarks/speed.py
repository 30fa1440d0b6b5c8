"""Speed on a CPU, beside the softmax model: prefill, decoding, and what the cache takes, all in one run.

    python benchmarks/speed.py MODEL --out benchmarks/results/speed-cpu.json     # then: python benchmarks/readme.py

MODEL is a folder whose shape is widened: --hidden numbers, --layers layers, heads as wide as they were, random weights.
It runs as the softmax model (SDPA, the cache that generate() makes) and converted by each of --recipes, which may have
settings of the kernel after a colon: default:memory=256. Models and lengths take turns, five times as many
for the shortest prompts; figures are medians. Decoding goes on from a context of the given length: converted models
have read it, softmax's cache is filled with random keys and values of as many tokens, which costs a step the same. A
turn of a converted model is a whole block of steps, since its table moves once a block.
"""

import argparse
import copy
import json
import os
import platform
import shutil
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from dijiang_convert import convert
from dijiang_convert.checkpoint.loading import load_any, silence
from dijiang_convert.measure.timing import cache_bytes, random_ids, time_decoding, time_forward, with_cache
from dijiang_convert.modeling.configuration_dijiang import Kernel

CPU = torch.device("cpu")
PREFILL = (2048, 8192, 16384, 32768)
DECODE = (1024, 8192, 16384, 65536)
PIECE = 8192  # tokens that are read at a time before decoding
RECIPES = ("default:memory=256", "default", "pure")
STEPS = Kernel().block  # tokens that a turn decodes
Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, metavar="RECIPE[:key=value,…]")
    parser.add_argument("--repeats", type=int, default=3, help="turns; decoding takes two more")
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the lengths, few turns: does it run?")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    silence()
    torch.manual_seed(0)
    prefill, decode = ([n // (16 if args.quick else 1) for n in lengths] for lengths in (PREFILL, DECODE))
    repeats = 1 if args.quick else args.repeats
    with tempfile.TemporaryDirectory() as folder:
        source = widened(args.model, args.hidden, args.layers, max(decode) + 1024, Path(folder) / "source")
        models = {"softmax": load_any(str(source), CPU).eval()}
        for name in args.recipes:
            recipe, _, settings = name.partition(":")
            converted = Path(folder) / str(len(models))
            convert(str(source), converted, recipe=recipe, settings=[s for s in settings.split(",") if s])
            models[name] = load_any(str(converted), CPU).eval()
    config = models["softmax"].config
    content: dict[str, Any] = {
        "quick": args.quick,
        "machine": machine(),
        "model": {
            "type": config.model_type, "hidden": args.hidden, "layers": args.layers,
            "heads": config.num_attention_heads, "parameters": models["softmax"].num_parameters(),
        },
    }  # fmt: skip
    content["prefill"] = time_prefill(models, prefill, repeats)
    print("prefill", *map(json.dumps, content["prefill"]), sep="\n", flush=True)
    content["decode"] = time_decode(models, decode, repeats + 2)
    print("decode", *map(json.dumps, content["decode"]), sep="\n", flush=True)
    if args.out:
        args.out.write_text(json.dumps(content, indent=1) + "\n")


def machine() -> Row:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return {
        "cpu": next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def head_dim(config: Any) -> int:
    return config.hidden_size // config.num_attention_heads


def widened(model: Path, hidden: int, layers: int, positions: int, folder: Path) -> Path:
    """A source of random weights with the config of another, made larger."""
    config = AutoConfig.from_pretrained(model)
    config.num_attention_heads = hidden // head_dim(config)
    config.hidden_size, config.intermediate_size = hidden, 4 * hidden
    config.num_hidden_layers, config.max_position_embeddings = layers, positions
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for path in model.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def in_turns(calls: dict[tuple[Any, ...], Callable[[], float]], turns: int) -> dict[tuple[Any, ...], float]:
    """Medians of what the calls return, by their keys."""
    times: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for _ in range(turns):
        for key, call in calls.items():
            times[key].append(call())
    return {key: statistics.median(found) for key, found in times.items()}


def time_prefill(models: dict[str, PreTrainedModel], lengths: list[int], repeats: int) -> list[Row]:
    for model in models.values():  # warm up
        time_forward(model, random_ids(model, 1, lengths[0]), 0)

    def call(model: PreTrainedModel, n: int) -> Callable[[], float]:
        return lambda: time_forward(model, random_ids(model, 1, n), 0).prefill

    calls = {(name, n): call(model, n) for n in lengths for name, model in models.items()}
    medians = in_turns(calls, repeats)
    short = {key: call for key, call in calls.items() if key[1] == lengths[0]}  # whose times differ most
    medians |= in_turns(short, 5 * repeats)
    return [{"model": name, "length": n, "tokens_per_second": n / taken} for (name, n), taken in medians.items()]


def time_decode(models: dict[str, PreTrainedModel], lengths: list[int], repeats: int) -> list[Row]:
    caches = {
        (name, n): cache
        for name, model in models.items()
        for n, cache in (filled(model, lengths) if name == "softmax" else read(model, lengths)).items()
    }
    sizes = {key: cache_bytes(cache) for key, cache in caches.items()}
    token = torch.zeros(1, 1, dtype=torch.long)

    def call(name: str, n: int) -> Callable[[], float]:
        model, cache, steps = models[name], caches[name, n], STEPS
        if name == "softmax":  # whose steps are all alike
            steps = 8 if n > 16384 else 32

        def decode() -> float:
            if name == "softmax" and cache.get_seq_length() > n:  # else each turn would find a longer one
                cache.crop(n - cache.get_seq_length())
            return statistics.fmean(time_decoding(model, cache, token, steps))

        return decode

    calls = {key: call(*key) for key in sorted(caches, key=lambda key: key[1])}
    in_turns(calls, 1)  # warm up
    medians = in_turns(calls, repeats)
    return [
        {"model": name, "length": n, "tokens_per_second": 1 / taken, "cache_bytes": sizes[name, n]}
        for (name, n), taken in medians.items()
    ]


def filled(model: PreTrainedModel, lengths: list[int]) -> dict[int, DynamicCache]:
    """Caches of the softmax model, with random keys and values."""
    caches = {}
    for n in lengths:
        caches[n] = DynamicCache(config=model.config)
        for layer in range(model.config.num_hidden_layers):
            k, v = torch.randn(2, 1, model.config.num_attention_heads, n, head_dim(model.config)).unbind(0)
            caches[n].update(k, v, layer)
    return caches


@torch.inference_mode()
def read(model: PreTrainedModel, lengths: list[int]) -> dict[int, DynamicCache]:
    """Caches of a converted model, which reads on from one length to the next."""
    cache, found, ids = DynamicCache(config=model.config), {}, random_ids(model, 1, max(lengths))
    for start, end in zip([0, *lengths], lengths, strict=False):
        for piece in ids[:, start:end].split(PIECE, dim=1):
            model(input_ids=piece, logits_to_keep=1, **with_cache(model, cache))
        found[end] = copy.deepcopy(cache)
    return found


if __name__ == "__main__":
    main()
