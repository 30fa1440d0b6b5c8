"""Recovered quality of recipes at equal token budgets, on one model and one corpus.

    python benchmarks/quality.py MODEL --data FOLDER --seq-len 256 --tokens 300000 --seeds 3 \
        default:window=16 window-only:window=16 default pure paper

Each argument is a recipe, with settings of its kernel after a colon. Prints a line a run and a table at the end:
perplexity ratio to the original, KL divergence a token, and the share of window-only's gap that is closed, where
window-only with the same window was run too. Writes all figures as JSON with --out.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from dijiang_convert import convert, evaluate, finetune


def run(args: argparse.Namespace, recipe: str, settings: list[str], seed: int) -> dict[str, Any]:
    """Converts, finetunes and evaluates once."""
    with tempfile.TemporaryDirectory() as folder:
        converted, finetuned = Path(folder) / "converted", Path(folder) / "finetuned"
        convert(args.model, converted, recipe=recipe, settings=settings)
        before = measure(args, converted)
        trained = finetune(
            converted, finetuned, data=args.data, tokens=args.tokens, seq_len=args.seq_len, seed=seed,
            settings=args.set,
        )  # fmt: skip
        after = measure(args, finetuned)
    return {
        "recipe": recipe,
        "settings": settings,
        "seed": seed,
        "original": after["baseline_perplexity"],
        "untrained_ratio": before["perplexity_ratio"],
        "untrained_kl": before["kl_divergence"],
        "ratio": after["perplexity_ratio"],
        "kl": after["kl_divergence"],
        "top1": after["top1_agreement"],
        "by_position": after["perplexity_by_position"],
        "tokens": sum(stage.tokens for stage in trained.stages),
        "seconds": trained.seconds,
    }


def measure(args: argparse.Namespace, checkpoint: Path) -> dict[str, Any]:
    result = evaluate(
        checkpoint, baseline=args.model, data=args.data, seq_len=args.seq_len, max_tokens=args.eval_tokens
    )
    return dataclasses.asdict(result)


def table(runs: list[dict[str, Any]]) -> str:
    """One row a configuration, means over seeds."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for each in runs:
        groups.setdefault(name(each["recipe"], each["settings"]), []).append(each)
    mean = {key: {k: statistics.mean(r[k] for r in rows) for k in FIGURES} for key, rows in groups.items()}
    lines = [
        "| recipe | seeds | untrained ratio | ratio | KL | same choice | gap closed |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, row in mean.items():
        alone = mean.get("window-only" + key.removeprefix("default")) if key.startswith("default") else None
        closed = f"{1 - (row['ratio'] - 1) / (alone['ratio'] - 1):.0%}" if alone else ""
        lines.append(
            f"| {key} | {len(groups[key])} | {row['untrained_ratio']:.4f} | {row['ratio']:.4f} | {row['kl']:.4f} "
            f"| {row['top1']:.1%} | {closed} |"
        )
    return "\n".join(lines)


FIGURES = ("untrained_ratio", "ratio", "kl", "top1")


def name(recipe: str, settings: list[str]) -> str:
    return f"{recipe} {', '.join(settings)}".strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("recipes", nargs="+", metavar="recipe[:key=value,…]")
    parser.add_argument("--data", required=True)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--eval-tokens", type=int, default=60_000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], help="of the stages, as for dijiang finetune")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    runs = []
    for seed in range(args.seeds):
        for spec in args.recipes:
            recipe, _, settings = spec.partition(":")
            result = run(args, recipe, [s for s in settings.split(",") if s], seed)
            runs.append(result)
            print(json.dumps(result), flush=True)
            if args.out:
                args.out.write_text(json.dumps(runs, indent=1) + "\n")
    print(f"\noriginal's perplexity {runs[0]['original']:.3f}\n\n{table(runs)}")


if __name__ == "__main__":
    main()
