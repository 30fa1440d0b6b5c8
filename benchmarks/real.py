"""A real model, converted and trained as a user would: what it loses, where in a text, and what it can repeat.

    python benchmarks/real.py MODEL --data FOLDER --work WORK --out benchmarks/results/smollm2.json

MODEL is converted in every way of `WAYS` and measured beside the original; those of --train are trained on --tokens by
the default recipe and measured again. What WORK holds is not made again, training goes on where it stopped, and every
row is written as it comes. FOLDER has a train and a validation split.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

import dijiang_convert
from dijiang_convert import convert, evaluate, finetune
from dijiang_convert.checkpoint.loading import converted_config
from dijiang_convert.checkpoint.shards import read_checkpoint
from dijiang_convert.inspect import state_bytes
from dijiang_convert.modeling.configuration_dijiang import read_section

WAYS: dict[str, dict[str, Any]] = {
    "calibrated": {"calibrate": True},
    "equal": {},
    "auto:3": {"layers": "auto:3"},
    "auto:5": {"layers": "auto:5"},
    "small": {"settings": ["window=64", "memory=64"]},
    "frequency": {"recipe": "frequency", "calibrate": True},
    "pure": {"recipe": "pure"},
}
FIGURES = (
    "perplexity", "baseline_perplexity", "perplexity_ratio", "kl_divergence", "top1_agreement", "ratio_by_position",
    "recall", "baseline_recall",
)  # fmt: skip
CONTEXT = 8192  # where the cache is compared with the original's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="with train.parquet and validation.parquet")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, metavar="WAY")
    parser.add_argument("--train", nargs="*", default=list(WAYS)[:1], choices=WAYS, metavar="WAY")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=4)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    content = json.loads(args.out.read_text()) if args.out.exists() else {}
    rows = content.get("rows", [])
    for way in [*args.ways, *args.train]:
        tokens = args.tokens if way in args.train and any(_is(row, way, 0, args) for row in rows) else 0
        if any(_is(row, way, tokens, args) for row in rows):
            continue
        row = {**measured(made(way, tokens, args), args), "way": way, "tokens": tokens}
        row |= {"length": args.length, "texts": args.rows}
        print(row, flush=True)
        rows.append(row)
        versions = {"version": dijiang_convert.__version__, "torch": torch.__version__}
        content = {"model": args.model.name, **versions, "rows": rows}
        args.out.write_text(json.dumps(content, indent=1) + "\n")


def _is(row: dict[str, Any], way: str, tokens: int, args: argparse.Namespace) -> bool:
    return (row["way"], row["tokens"], row["length"]) == (way, tokens, args.length)


def made(way: str, tokens: int, args: argparse.Namespace) -> Path:
    """The checkpoint of a row."""
    name, text = way.replace(":", "-"), str(args.data / "train.parquet")
    base, trained = args.work / name, args.work / f"{name}-{tokens}"
    if not base.exists():
        options = WAYS[way]
        needs_text = "calibrate" in options or "layers" in options
        convert(str(args.model), base, data=text if needs_text else None, **options)
    if tokens and not trained.exists():
        going_on = trained.with_name(f"{trained.name}.run").exists()
        finetune(str(base), out=trained, data=text, tokens=tokens, resume=going_on)
    return trained if tokens else base


def measured(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    found = evaluate(
        str(folder), baseline=str(args.model), data=str(args.data / "validation.parquet"), seq_len=args.length,
        max_tokens=args.length * args.rows, recall=True,
    )  # fmt: skip
    kernel, layers = read_section(converted_config(folder))
    section = read_checkpoint(folder)["dijiang"]
    softmax = list((section.get("calibration") or {}).get("softmax", []))
    count = len(layers.layers) + len(softmax)
    one = layers.kv_heads * (layers.head_dim + layers.value_dim) * CONTEXT * 2  # bytes a softmax layer, in bfloat16
    cache = state_bytes(kernel, layers, torch.bfloat16) + len(softmax) * one
    return {
        "softmax": softmax,
        "memory": layers.memory or kernel.memory,
        "cache_share": cache / (count * one),
        **{name: value for name, value in dataclasses.asdict(found).items() if name in FIGURES},
    }


if __name__ == "__main__":
    main()
