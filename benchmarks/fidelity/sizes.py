"""What tables of other sizes are worth to one checkpoint, and other ways to share memory out: sizes are no weights.

    python -m benchmarks.fidelity.sizes CHECKPOINT --baseline MODEL --data FILE --out SIZES.jsonl \
        128,256 64,336 128,224 128,224:shared 128,256:shared

A size is the window and the mean memory of a head, which CHECKPOINT's calibration shares out where it says so; else all
heads have as much. Rows that SIZES.jsonl has are not measured again.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dijiang_convert.checkpoint.loading import load_any, load_converted, load_tokenizer, silence
from dijiang_convert.checkpoint.shards import read_checkpoint
from dijiang_convert.data.rows import token_rows
from dijiang_convert.measure.calibrate import shared_memory
from dijiang_convert.measure.recall import recall

from .measures import fidelity

TEXTS = 2  # of which recall is measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("sizes", nargs="+", metavar="WINDOW,MEMORY[:shared]")
    parser.add_argument("--baseline", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=4)
    args = parser.parse_args()
    silence()
    rows = token_rows(
        args.data, load_tokenizer(args.checkpoint), seq_len=args.length, tokens=args.length * args.rows, held_out=True,
        shuffle_seed=None,
    )  # fmt: skip
    cpu = torch.device("cpu")
    model, original = load_converted(args.checkpoint, device=cpu).eval(), load_any(args.baseline, cpu).eval()
    found = read_checkpoint(args.checkpoint)["dijiang"].get("calibration")
    worth = found and [heads for layer, heads in found["worth"].items() if int(layer) not in found["softmax"]]
    done = [json.loads(line)["size"] for line in args.out.read_text().splitlines()] if args.out.exists() else []
    for size in args.sizes:
        if size in done:
            continue
        memory = resize(model, size, worth)
        texts = rows.ids[rows.lengths == args.length][:TEXTS]
        copied = {n: found.gain for n, found in recall(model, texts).items()}
        row = {"size": size, "memory": memory, "recall": copied, **fidelity(model, rows, original)}
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{size}: ratio {row['ratio']:.4f} KL {row['kl']:.4f} recall {copied}", flush=True)


def resize(model: Any, size: str, worth: list[list[float]] | None) -> tuple[tuple[int, ...], ...]:
    """Gives every layer its tables; returns the memories of their heads, () where all are equal. worth: of the heads of
    converted layers."""
    shape, _, way = size.partition(":")
    window, mean = map(int, shape.split(","))
    kernels = [module.dijiang for module in model.modules() if hasattr(module, "dijiang")]
    memory: tuple[tuple[int, ...], ...] = ()
    if way:
        assert way == "shared" and worth is not None, "this needs a calibrated checkpoint"
        memory = shared_memory(worth, mean)
    for each, heads in zip(kernels, memory or [()] * len(kernels), strict=True):
        each.resize(replace(each.kernel, window=window, memory=mean), heads)
    return memory


if __name__ == "__main__":
    main()
