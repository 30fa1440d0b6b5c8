"""Tables and the plot of `lab` runs: means over seeds with their standard errors.

    python -m benchmarks.fidelity.report RUNS.jsonl [MORE.jsonl …] [--plot FIDELITY.png] [--budget 100000]
        [--rows default pure] [--short] [--into README.md --mark stories]

"gap closed" is the share of window-only's distance to the original (in perplexity) that a row with the same window
closes, "KL removed" the same for the divergence. "behind" is how much further from the original a row is than ours with
the same sizes (`pure` without a window, `default` with one): means of differences seed by seed, with their standard
errors.
--into writes the tables between the marks <!-- stories --> and <!-- /stories --> of a file.
"""

import argparse
import json
import math
import re
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

SHORT = ("row", "seeds", "tokens", "untrained ratio", "ratio", "KL a token", "same choice", "gap closed", "KL removed")
COLUMNS = (*SHORT, "error a layer", "recall", "behind: ratio", "behind: KL")
SIZES = ("window", "block", "sinks", "memory")  # settings that say how many keys stay exact
Runs = list[dict[str, Any]]


def load(paths: list[Path]) -> Runs:
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def grouped(runs: Runs) -> dict[tuple[str, int], Runs]:
    """Runs that differ by seed alone, by (row, budget)."""
    groups = defaultdict(list)
    for run in runs:
        groups[run["row"], run["budget"]].append(run)
    return dict(groups)


def sizes(row: str) -> str:
    """Those of a row's settings that are SIZES: "window=16,block=16,memory=0", or nothing."""
    return ",".join(s for s in row.partition(":")[2].split(",") if s.partition("=")[0] in SIZES)


def window(row: str) -> str:
    """The window setting of a row: "window=16", or nothing."""
    return next((s for s in sizes(row).split(",") if s.startswith("window=")), "")


def label(row: str) -> str:
    """A setting that both stages have, once."""
    return re.sub(r"transfer\.(\w+)=([^,]+),distill\.\1=\2", r"\1=\2", row)


def mean(runs: Runs, key: str) -> float:
    return statistics.mean(run[key] for run in runs)


def with_error(runs: Runs, key: str, digits: int) -> str:
    """Mean ± standard error over seeds."""
    return spread([run[key] for run in runs], digits)


def spread(values: list[float], digits: int) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return f"{statistics.mean(values):.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def table(runs: Runs, columns: tuple[str, ...] = COLUMNS) -> str:
    groups = grouped(runs)
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for (row, budget), same in sorted(groups.items(), key=lambda item: (item[0][1], mean(item[1], "kl"))):
        cells = {
            "row": f"`{label(row)}`",
            "seeds": str(len(same)),
            "tokens": f"{budget // 1000}K",
            "untrained ratio": f"{statistics.mean(run['untrained']['ratio'] for run in same):.3f}",
            "ratio": with_error(same, "ratio", 4),
            "KL a token": with_error(same, "kl", 4),
            "same choice": f"{mean(same, 'top1'):.1%}",
            "recall": _recall(same),
            "behind: ratio": behind(same, groups.get((ours(row), budget), []), "ratio"),
            "behind: KL": behind(same, groups.get((ours(row), budget), []), "kl"),
        }
        alone = window_only(groups, row, budget)
        if alone and not row.startswith("window-only"):
            cells["gap closed"] = f"{1 - (mean(same, 'ratio') - 1) / (mean(alone, 'ratio') - 1):.0%}"
            cells["KL removed"] = f"{1 - mean(same, 'kl') / mean(alone, 'kl'):.0%}"
        errors = [run["transfer_errors"]["trained"] for run in same]
        if errors[0]:
            cells["error a layer"] = f"{statistics.mean(map(statistics.mean, errors)):.3f}"
        lines.append(f"| {' | '.join(cells.get(column, '') for column in columns)} |")
    return "\n".join(lines)


def window_only(groups: dict[tuple[str, int], Runs], row: str, budget: int) -> Runs | None:
    """The runs of window-only with the same window, or None."""
    found = (
        same for (name, tokens), same in groups.items()
        if tokens == budget and name.startswith("window-only:") and window(name) == window(row)
    )  # fmt: skip
    return next(found, None)


def ours(row: str) -> str:
    """The row of this project that another is compared with."""
    return f"frequency:{sizes(row)}" if sizes(row) else "pure"


def behind(runs: Runs, other: Runs, key: str) -> str:
    """How much further from the original, seed by seed: both saw the same text in the same order."""
    by_seed = {run["seed"]: run[key] for run in other}
    differences = [run[key] - by_seed[run["seed"]] for run in runs if run["seed"] in by_seed]
    if not differences or runs is other or runs[0]["row"] == "teacher":
        return ""
    return spread(differences, 4)


def _recall(runs: Runs) -> str:
    """Gain in nats from a pair planted at each distance."""
    distances = runs[0]["recall"]
    return ", ".join(f"{d}: {statistics.mean(r['recall'][d]['gain'] for r in runs):.2f}" for d in distances)


def draw(runs: Runs, path: Path) -> None:
    """KL against tokens, a line a row, and KL by position at the largest budget."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = grouped(runs)
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.5))
    rows = sorted({row for row, _ in groups})
    for i, row in enumerate(rows):
        budgets = sorted(budget for name, budget in groups if name == row)
        style = {"color": plt.get_cmap("tab20")(i % 20), "linestyle": "--" if window(row) else "-", "marker": "o"}
        left.plot(budgets, [mean(groups[row, b], "kl") for b in budgets], label=label(row), markersize=4, **style)
        last = groups[row, budgets[-1]]
        by_position = [statistics.mean(values) for values in zip(*(run["kl_by_position"] for run in last), strict=True)]
        positions = [(j + 0.5) * last[0]["seq_len"] / len(by_position) for j in range(len(by_position))]
        right.plot(positions, by_position, markersize=3, **style)
    left.set(xscale="log", yscale="log", xlabel="training tokens", ylabel="KL to the original, nats a token")
    right.set(yscale="log", xlabel="position, each row after its most tokens", ylabel=left.get_ylabel())
    figure.legend(*left.get_legend_handles_labels(), loc="outside center right", fontsize=8)
    figure.tight_layout(rect=(0, 0, 0.8, 1))
    figure.savefig(path, dpi=130)


def write_between(path: Path, mark: str, text: str) -> None:
    content = path.read_text(encoding="utf-8")
    start, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
    before, _, rest = content.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"error: no {start.strip()} … {end} in {path}")
    path.write_text(before + start + text + end + after, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--budget", type=int, help="only runs of this many tokens")
    parser.add_argument("--rows", nargs="+", help="only these rows")
    parser.add_argument("--short", action="store_true", help="fewer columns")
    parser.add_argument("--into", type=Path, help="a file whose marked part becomes the tables")
    parser.add_argument("--mark", default="all")
    args = parser.parse_args()
    runs = [run for run in load(args.runs) if args.budget in (None, run["budget"])]
    runs = [run for run in runs if not args.rows or run["row"].partition(":")[0] in args.rows]
    text = (
        f"The original's perplexity is {runs[0]['original']:.2f}.\n\n{table(runs, SHORT if args.short else COLUMNS)}\n"
    )
    print(text)
    if args.into:
        write_between(args.into, args.mark, text)
    if args.plot:
        draw(runs, args.plot)


if __name__ == "__main__":
    main()
