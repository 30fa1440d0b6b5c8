"""Draws docs/table.png: the table of one head, and its move by one block.

    python scripts/draw_table.py [--out docs/table.png]

docs/how-it-works.md shows it. Numbers of rows are those of the recipe `default`.
"""

import argparse
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

SINKS, MEMORY, WINDOW, STATE, GREY = "#3b6fb0", "#c9711a", "#2f8a4c", "#7656ad", "#666666"
EMPTY = "#dddddd"
WIDTH, HEIGHT = 124, 50  # of the figure, in tenths of an inch
CELL = 1.35  # edge of a token
BLOCK = 8  # tokens of a block, and rows of memory, as they are drawn; 64 and 432 in the layer
LEAVING = (2, 5)  # tokens of the oldest block that become rows of memory
PLACES = (4, 6)  # where memory has them afterwards, by their scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[1] / "docs" / "table.png"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    figure = Figure(figsize=(WIDTH / 10, HEIGHT / 10))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect="equal")
    axes.axis("off")
    draw_rows(axes)
    axes.plot([57.5, 57.5], [1.5, 48.5], color="#cccccc", lw=1)
    draw_move(axes, left=60)
    figure.savefig(args.out, dpi=130)


def draw_rows(axes: Axes) -> None:
    """The left half: what each row of the table has as key, value and logit."""
    write(axes, 1, 47.4, "The table of one head", 13, weight="bold")
    exact = (r"$k_j$", r"$v_j$", r"$s\,q\cdot k_j$")
    groups = (
        ("sinks", "the first 4 tokens", SINKS, 5.4, exact),
        ("memory", "the best tokens of all that\nhave left the window, in 8 bits", MEMORY, 7.6, exact),
        ("window", "the query's own block and\nthose before it:\n129 to 192 tokens", WINDOW, 9.6, exact),
        ("state", "one row for each of\n2·head_dim features $f$", STATE, 10.4, (
            "learned\nfrequency", "weighted\nmean of all\npast values",
            r"$\log\,e^{g(q)}\phi_f(q)$" + "\n" + r"$+\,\log\,weight_f$",
        )),
    )  # fmt: skip
    centers = (31.6, 39.2, 49.4)
    write(axes, 2.6, 43.8, "rows", 10, style="italic")
    for x, title in zip(centers, ("key", "value", "logit for query $q$"), strict=True):
        write(axes, x, 43.8, title, 10, ha="center", style="italic")
    top = 42.4
    for name, which, color, height, columns in groups:
        axes.add_patch(Rectangle((1, top - height), 54.5, height - 0.7, color=color, alpha=0.14, lw=0))
        axes.add_patch(Rectangle((1, top - height), 0.8, height - 0.7, color=color, lw=0))
        middle = top - (height + 0.7) / 2
        write(axes, 2.6, middle, name, 11, color, weight="bold")
        write(axes, 11, middle, which, 8.5)
        for x, text in zip(centers, columns, strict=True):
            write(axes, x, middle, text, 10.5 if "$" in text else 8.5, ha="center")
        top -= height
    write(axes, 28.2, 5.6, r"output for $q$  =  softmax(logits) · values", 12, ha="center")
    write(axes, 28.2, 2.5, "one softmax over all rows, whose number does not grow with the text", 9, GREY, ha="center")


def draw_move(axes: Axes, left: float) -> None:
    """The right half: the table before and after the oldest block of the window has left it."""
    write(axes, left, 47.4, "The move by one block", 13, weight="bold")
    write(axes, left, 43.2, "1   The last block of the window is full.", 10.5)
    write(axes, left, 9.9, "2   The oldest block has left the window; the next block has room.", 10.5)
    before, after = 37.2, 15.0
    sinks, memory, oldest, last, state = (left + x for x in (0.6, 8.6, 24.6, 37.6, 53.0))
    kept = [WINDOW if i in PLACES else MEMORY for i in range(BLOCK)]

    draw_tokens(axes, sinks, before, [SINKS] * 4, "sinks", above=True)
    draw_tokens(axes, memory, before, [MEMORY] * BLOCK, "memory", above=True)
    draw_tokens(axes, oldest, before, [WINDOW] * BLOCK, "oldest block", above=True, marked=LEAVING)
    draw_tokens(axes, last, before, [WINDOW] * BLOCK, "last block", above=True)
    cross_out(axes, memory, before, len(LEAVING))
    draw_tokens(axes, sinks, after, [SINKS] * 4, "sinks", above=False)
    draw_tokens(axes, memory, after, kept, "memory", above=False, marked=PLACES)
    draw_tokens(axes, oldest, after, [WINDOW] * BLOCK, "oldest block", above=False)
    draw_tokens(axes, last, after, [EMPTY] * BLOCK, "last block, empty", above=False)
    for y in (before, after):
        axes.add_patch(Rectangle((state, y - 1.6), 9, CELL + 3.2, color=STATE, alpha=0.22, lw=0))
        write(axes, state + 4.5, y + CELL / 2, "state", 10.5, STATE, ha="center", weight="bold")

    for start, end in zip(LEAVING, PLACES, strict=True):
        arrow(axes, (oldest + (start + 0.46) * CELL, before), (memory + (end + 0.46) * CELL, after + CELL), MEMORY)
    arrow(axes, (oldest + 7.6 * CELL, before), (state, after + CELL), STATE)
    arrow(axes, (last + 2 * CELL, before), (oldest + 6.6 * CELL, after + CELL), WINDOW)
    arrow(axes, (state + 4.5, before - 1.6), (state + 4.5, after + CELL + 1.6), STATE)
    write(axes, left + 0.6, 31.4, "The keys with the\nlowest scores go:\nthe state has them.", 8.5, GREY)
    write(axes, left + 0.6, 24.0, "The best keys of the\noldest block replace them.", 8.5, MEMORY)
    write(axes, left + 42.2, 31.4, "All its keys\nenter the state.", 8.5, STATE)
    write(axes, state + 5.2, 24.6, "decay", 8.5, STATE)
    write(axes, left, 5.6, "A key's score, computed once, as it leaves the window:", 9, GREY)
    write(axes, left, 2.5, "attention received in the window  ×  ‖ the state's answer to the key − its value ‖²", 9.5)


def draw_tokens(
    axes: Axes, x: float, y: float, colors: list[str], name: str, above: bool, marked: tuple[int, ...] = ()
) -> None:
    """Tokens side by side from x on, with a name; those in ``marked`` have a dark edge and a dot."""
    for i, color in enumerate(colors):
        edge, order = ("black", 4) if i in marked else ("white", 3)
        place = (x + i * CELL, y)
        axes.add_patch(Rectangle(place, CELL * 0.92, CELL * 0.92, facecolor=color, edgecolor=edge, zorder=order))
        if i in marked:
            axes.plot(place[0] + 0.46 * CELL, y + 0.46 * CELL, "o", color="black", markersize=2.6, zorder=5)
    middle, color = x + len(colors) * CELL / 2, GREY if colors[0] == EMPTY else colors[0]
    write(axes, middle, y + (CELL + 0.7 if above else -1.7), name, 9, color, ha="center", va="baseline")


def cross_out(axes: Axes, x: float, y: float, count: int) -> None:
    """Crosses out the first of the tokens that begin at x."""
    for i in range(count):
        for ends in ((y, y + 0.92 * CELL), (y + 0.92 * CELL, y)):
            axes.plot([x + i * CELL, x + (i + 0.92) * CELL], ends, color="black", lw=1.2, zorder=5)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    axes.add_patch(FancyArrowPatch(start, end, color=color, lw=1.4, arrowstyle="-|>", mutation_scale=11, shrinkA=3,
                                   shrinkB=2, zorder=1))  # fmt: skip


def write(
    axes: Axes, x: float, y: float, text: str, size: float, color: str = "black", va: str = "center_baseline",
    **options: Any,
) -> None:  # fmt: skip
    axes.text(x, y, text, fontsize=size, color=color, va=va, linespacing=1.3, **options)


if __name__ == "__main__":
    main()
