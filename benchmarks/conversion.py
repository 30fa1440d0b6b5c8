"""Conversion against `cp -r`: time and peak memory on a synthetic sharded checkpoint.

    python benchmarks/conversion.py --gigabytes 1

Each is run in turn, three times, with the disk's caches in the same state; times are medians. Start-up is what
`dijiang inspect` takes on the same folder: imports and reading the config.
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
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HIDDEN, LAYERS, SHARDS = 1024, 8, 4


def make_source(folder: Path, gigabytes: float) -> None:
    """A Llama of random weights whose vocabulary makes up the size, in shards, with a tokenizer file."""
    vocabulary = max(int((gigabytes * 1e9 / 4 - LAYERS * 12 * HIDDEN**2) / (2 * HIDDEN)), 1024)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=2816, num_hidden_layers=LAYERS,
        num_attention_heads=16, num_key_value_heads=8, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in LlamaForCausalLM(config).state_dict().items()}
    folder.mkdir(parents=True)
    weight_map = {}
    for i in range(SHARDS):
        names = sorted(shapes)[i::SHARDS]
        file = f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors"
        save_file({name: torch.randn(shapes[name]) for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")


def timed(command: list[str]) -> tuple[float, int]:
    """(seconds, peak memory in bytes) of a command."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    return time.perf_counter() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    times: dict[str, list[float]] = {"cp": [], "convert": [], "startup": []}
    peak = 0
    with tempfile.TemporaryDirectory() as name:
        source, copied, converted = (Path(name) / each for each in ("source", "copied", "converted"))
        make_source(source, args.gigabytes)
        dijiang = [sys.executable, "-m", "dijiang_convert"]
        for _ in range(args.repeats):
            times["cp"].append(timed(["cp", "-r", str(source), str(copied)])[0])
            shutil.rmtree(copied)
            seconds, memory = timed([*dijiang, "convert", str(source), "--out", str(converted)])
            shutil.rmtree(converted)
            times["convert"].append(seconds)
            peak = max(peak, memory)
            times["startup"].append(timed([*dijiang, "inspect", str(source)])[0])
        size = sum(path.stat().st_size for path in source.iterdir())
    medians = {key: statistics.median(values) for key, values in times.items()}
    result = {
        "bytes": size,
        **{f"{key}_seconds": round(value, 2) for key, value in medians.items()},
        "convert_less_startup_over_cp": round((medians["convert"] - medians["startup"]) / medians["cp"], 2),
        "peak_memory_bytes": peak,
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps({f"{args.gigabytes:.0f} GB": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
