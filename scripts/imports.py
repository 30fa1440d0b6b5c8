"""Which part of the package imports which, and on which floor it stands: one above the highest of these. Fails on an
import upward, and on a circle of modules.

    python scripts/imports.py

A part is a folder, or the modules of `PARTS`. Imports inside functions count like others; those for type checkers alone
don't.
"""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "dijiang_convert"
# From the bottom up. What is in no folder is named by its modules.
PARTS = {
    "base": ("errors", "progress", "files", "kernel_keys", "__init__"),
    "modeling": (),
    "recipe": ("recipe",),
    "source": (),
    "architecture": (),
    "checkpoint": (),
    "data": (),
    "training": (),
    "measure": (),
    "verbs": ("convert", "finetune", "evaluate", "generate", "benchmark", "inspect", "push", "demo"),
    "cli": ("show", "cli", "__main__"),
}


def main() -> None:
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))}
    graph = {name: {each for each in imported(name, path, modules) if each != name} for name, path in modules.items()}
    graph["__init__"] = set()  # its functions are the verbs, which it loads when they are asked for
    order, wrong, floors = list(PARTS), [], dict[str, int]()
    for part in order:
        below = {part_of(each) for name in modules if part_of(name) == part for each in graph[name]} - {part}
        floors[part] = 1 + max((floors.get(each, 0) for each in below), default=0)
        print(f"{floors[part]:2} {part:13}{', '.join(sorted(below, key=order.index))}".rstrip())
        wrong += [
            f"{part} imports {each}, which lies above it" for each in below if order.index(each) > order.index(part)
        ]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        wrong.append(f"a circle: {' → '.join(error.args[1])}")
    if wrong:
        sys.exit("\n".join(wrong))


def part_of(module: str) -> str:
    folder = module.partition(".")[0]
    return next((part for part, names in PARTS.items() if folder in names), folder)


def imported(module: str, path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unrun = {
        each for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for each in ast.walk(node)
    }  # fmt: skip
    for node in ast.walk(tree):
        if not (isinstance(node, ast.ImportFrom) and node.level) or node in unrun:
            continue
        parts = [*module.split(".")[: -node.level], *(node.module.split(".") if node.module else [])]
        for alias in node.names:  # a module's name, or a name in it
            for each in (".".join([*parts, alias.name]), ".".join(parts), ".".join([*parts, "__init__"])):
                if each in modules:
                    yield each
                    break


if __name__ == "__main__":
    main()
