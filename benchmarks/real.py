"""A real model, converted and trained as a user would: its perplexity and divergence from the original's.

    python benchmarks/real.py MODEL --data FOLDER --work WORK --out benchmarks/results/smollm2.json

MODEL is converted by the default recipe with each of --sizes (window and memory), measured, trained on --tokens by the
recipe's stages with the first of the sizes, and measured again with each: a table's size is no matter of its weights.
What WORK holds is not made again, and training goes on where it stopped. FOLDER has a train and a validation split.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch

import dijiang_convert
from dijiang_convert import convert, evaluate, finetune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="with train.parquet and validation.parquet")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", default=["64,64", "128,256"], metavar="WINDOW,MEMORY")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--train-length", type=int, default=1024)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=4)
    args = parser.parse_args()
    sizes = [tuple(map(int, size.split(","))) for size in args.sizes]
    args.work.mkdir(parents=True, exist_ok=True)

    base, trained, rows = args.work / "converted", args.work / "trained", []
    if not base.exists():
        convert(str(args.model), base, settings=[f"window={sizes[0][0]}", f"memory={sizes[0][1]}"])
    for tokens, folder in ((0, base), (args.tokens, trained)):
        if not folder.exists():
            finetune(
                str(base), out=folder, data=str(args.data / "train.parquet"), tokens=args.tokens,
                seq_len=args.train_length, resume=folder.with_name(f"{folder.name}.run").exists(),
            )  # fmt: skip
        for window, memory in sizes:
            found = measured(resized(folder, window, memory), args)
            rows.append({"tokens": tokens, "window": window, "memory": memory, **found})
            print(rows[-1], flush=True)
    content = {
        "model": args.model.name, "version": dijiang_convert.__version__, "torch": torch.__version__,
        "length": args.length, "texts": args.rows, "train_length": args.train_length, "rows": rows,
    }  # fmt: skip
    args.out.write_text(json.dumps(content, indent=1) + "\n")


def resized(folder: Path, window: int, memory: int) -> Path:
    """A checkpoint with the same weights and a table of another size."""
    out = folder.with_name(f"{folder.name}-{window}-{memory}")
    if not out.exists():
        shutil.copytree(folder, out)
        config = json.loads((out / "config.json").read_text())
        config["dijiang"]["kernel"] |= {"window": window, "memory": memory}
        (out / "config.json").write_text(json.dumps(config))
    return out


def measured(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    result = evaluate(
        str(folder), baseline=str(args.model), data=str(args.data / "validation.parquet"), seq_len=args.length,
        max_tokens=args.length * args.rows,
    )  # fmt: skip
    return {
        "perplexity": result.perplexity, "ratio": result.perplexity_ratio, "kl": result.kl_divergence,
        "same_choice": result.top1_agreement, "by_position": result.perplexity_by_position,
    }  # fmt: skip


if __name__ == "__main__":
    main()
