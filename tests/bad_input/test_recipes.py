"""Recipes that are spoiled: the conversion answers, or refuses in one line and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from dijiang_convert.recipe import RECIPES
from tests.bad_input.conftest import Place
from tests.bad_input.mutations import broken_bytes, spoiled
from tests.bad_input.trying import both_scales, convert, try_all

# A list of ten lists of ten lists …, nine levels: a billion values in a few hundred bytes.
LAUGHS = "[&x0 [1], " + ", ".join(f"&x{i} [{', '.join([f'*x{i - 1}'] * 10)}]" for i in range(1, 10)) + "]"
TEXTS = (
    "kernel: !!python/object/apply:os.system [id]\n", "? [1, 2]\n: 3\n", "kernel: {window: 128, window: 64}\n",
    "kernel: &k {window: *k}\n", "kernel: &k [*k]\n", "<<: {kernel: {}}\n", "kernel:\n\twindow: 1\n", "--- a\n--- b\n",
    "description: 2024-02-31\n", "name: 1e3\nkernel: {}\n", "kernel: {frequency: .nan}\n",
    "kernel: {frequency: .inf}\n",
    "kernel: {}\nstages: []\n", "1: 2\n", "kernel: {1: 2}\n", "!!set {a, b}\n", "kernel: !!binary aGVsbG8=\n",
    f"kernel: {LAUGHS}\n", f"stages: {LAUGHS}\n", f"name: {LAUGHS}\n", f"data: {LAUGHS}\n", f"other: {LAUGHS}\n",
    f"kernel: {{window: {LAUGHS}}}\n", f"stages: [{{name: {LAUGHS}}}]\n",
)  # fmt: skip


@st.composite
def broken_recipe(draw: Any, path: Path) -> bytes:
    """The bytes of a recipe: mostly of spoiled values, sometimes no recipe at all."""
    how = draw(st.sampled_from(("values", "values", "values", "bytes", "text")))
    if how == "bytes":
        return draw(broken_bytes(path.read_bytes()))
    if how == "text":
        return draw(st.sampled_from(TEXTS)).encode()
    content = {**yaml.safe_load(path.read_text()), "name": path.stem}
    return yaml.safe_dump(draw(spoiled(content)), allow_unicode=True).encode("utf-8", "surrogatepass")


@both_scales
def test_spoiled_recipes(scale: int, place: Place) -> None:
    def example(content: bytes) -> str:
        with place() as source:
            Path("own.yaml").write_bytes(content)
            return convert(source, "--recipe", "own.yaml")

    try_all("recipe", scale, st.one_of([broken_recipe(path) for path in sorted(RECIPES.glob("*.yaml"))]), example)
