"""Conversion against `cp -r`: time and peak memory on synthetic sharded checkpoints; and how long commands start.

    python benchmarks/conversion.py --out benchmarks/results/conversion.json

Each command runs in turn, five times, the disk's writes settled before each; times are medians. Neither cp nor a
conversion waits for the disk at its end. Start-up is `dijiang convert --dry-run`: imports, and the model traced without
weights. Beside it, what of that is torch's and transformers' own: Python importing the source's model class.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dijiang_convert.checkpoint.shards import INDEX, Tensor, write_json, write_safetensors
from dijiang_convert.demo import MODEL

SHARD = 2 * 10**9  # bytes, at most
MODELS: dict[str, dict[str, Any]] = {  # Llamas in bfloat16; the second is Llama 3.2 3B with an output head of its own
    "1 GB": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "num_attention_heads": 16,
        "num_key_value_heads": 8, "vocab_size": 32000,
    },
    "8 GB": {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 24,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
IMPORTS = "import transformers.models.llama.modeling_llama"


def make_source(folder: Path, shape: dict[str, Any]) -> None:
    """A model of random numbers, written one tensor at a time, with the demo model's tokenizer."""
    config = LlamaConfig(**shape, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in LlamaForCausalLM(config).state_dict().items()}
    folder.mkdir()
    tensors = [Tensor(n, torch.bfloat16, s, partial(_random, s), lambda _, n: _random((n,))) for n, s in shapes.items()]
    shards = list(_shards(tensors))
    weight_map: dict[str, str] = {}
    for i, tensors in enumerate(shards, start=1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, tensors)
        weight_map |= {t.name: name for t in tensors}
    write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})
    config.save_pretrained(folder)
    for path in MODEL.glob("tokenizer*"):
        shutil.copy(path, folder)


def _shards(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    shard: list[Tensor] = []
    for tensor in tensors:
        if shard and sum(t.nbytes for t in shard) + tensor.nbytes > SHARD:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def _random(shape: tuple[int, ...]) -> torch.Tensor:
    numbers = torch.empty(-(-torch.Size(shape).numel() // 4), dtype=torch.int64).random_()
    numbers.view(torch.int16).bitwise_and_(-(2**14) - 1)  # the exponent's first bit: all numbers are below 4
    return numbers.view(torch.bfloat16)[: torch.Size(shape).numel()].reshape(shape)


def timed(command: list[str], out: Path) -> tuple[float, int]:
    """(seconds, peak memory in bytes) of a command, whose output is removed again."""
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    assert status == 0, command
    shutil.rmtree(out, ignore_errors=True)
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(folder: Path, shape: dict[str, Any], repeats: int) -> dict[str, Any]:
    source, out = folder / "source", folder / "out"
    with ProcessPoolExecutor(1) as elsewhere:  # what this process has in memory counts as its children's, too
        elsewhere.submit(make_source, source, shape).result()
    convert = [sys.executable, "-m", "dijiang_convert", "convert", str(source), "--out", str(out)]
    commands = {
        "cp": ["cp", "-r", str(source), str(out)],
        "convert": convert,
        "link": [*convert, "--link"],
        "startup": [*convert, "--dry-run"],
        "imports": [sys.executable, "-c", IMPORTS],
    }
    runs = [{name: timed(command, out) for name, command in commands.items()} for _ in range(repeats)]
    medians = {name: statistics.median(run[name][0] for run in runs) for name in commands}
    linked = json.loads(subprocess.run([*convert, "--link", "--json"], capture_output=True, check=True).stdout)
    return {
        "bytes": sum(path.stat().st_size for path in source.iterdir()),
        **{f"{name}_seconds": round(value, 2) for name, value in medians.items()},
        "convert_over_cp": round(medians["convert"] / medians["cp"], 2),
        "convert_less_startup_over_cp": round((medians["convert"] - medians["startup"]) / medians["cp"], 2),
        "peak_memory_bytes": max(run["convert"][1] for run in runs),
        "linked": linked["linked"],
    }


def measure_startup(repeats: int) -> dict[str, float]:
    """Seconds of commands that do little, and of Python importing the source's model class."""
    dijiang, nowhere = [sys.executable, "-m", "dijiang_convert"], Path("nowhere")
    commands = {
        "help": [*dijiang, "--help"],
        "inspect": [*dijiang, "inspect", str(MODEL)],
        "imports": [sys.executable, "-c", IMPORTS],
    }
    runs = [{name: timed(command, nowhere)[0] for name, command in commands.items()} for _ in range(repeats)]
    return {name: round(statistics.median(run[name] for run in runs), 2) for name in commands}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write, on the disk to measure")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results: dict[str, Any] = {"startup": measure_startup(args.repeats)}
    print(results["startup"], flush=True)
    for size in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            results[size] = measure(Path(name), MODELS[size], args.repeats)
        print(size, json.dumps(results[size], indent=1), flush=True)
    if args.out:
        write_json(args.out, {"torch": torch.__version__, "cores": os.cpu_count(), **results})


if __name__ == "__main__":
    main()
