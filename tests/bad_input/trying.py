"""How a property is tried, and in which two ways an example may end."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from dijiang_convert.checkpoint.loading import load_converted
from dijiang_convert.cli import app
from tests.cli.commands import error_line
from tests.sources_on_disk import VOCABULARY

# Examples of each kind in a quick run, 100 in all; a slow run takes TIMES as many.
EXAMPLES = {
    "config": 21, "generation config": 6, "tokenizer": 10, "index": 7, "weights": 16, "recipe": 12, "data": 13,
    "options": 15,
}  # fmt: skip
TIMES = 20
both_scales = pytest.mark.parametrize(
    "scale", [pytest.param(1, id="quick"), pytest.param(TIMES, id="slow", marks=pytest.mark.slow)]
)
PLACE = Path("../..")  # the folder of an example, as seen from the current one; see `place`
LONGEST = 1100  # characters of an error
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\ud800-\udfff]")


def try_all(kind: str, scale: int, strategy: st.SearchStrategy[Any], example: Callable[[Any], str]) -> None:
    """Calls ``example`` with values of the strategy. It returns how the example ended: each end must be reached.

    A quick run is too small to promise that.
    """
    ends: Counter[str] = Counter()

    def count(value: Any) -> None:
        ends[example(value)] += 1

    count.__qualname__ = kind  # the name that the reproducible order of examples follows from
    chosen = settings(
        max_examples=EXAMPLES[kind] * scale, derandomize=True, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    chosen(given(strategy)(count))()
    print(f"{kind}: {dict(ends)}")
    if scale > 1:
        assert {"refused", "done"} <= ends.keys(), ends
    assert ends.total() >= EXAMPLES[kind] * scale * 3 // 4, ends  # some kinds of broken bytes are few


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder in a folder, with the bytes of files."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def run(*arguments: str) -> Any:
    """Runs the command, and returns its result if it ended well.

    If it was refused, that is checked and None returned: a line that says why, or a note on how it is called.
    """
    before = tree(PLACE)
    result = CliRunner().invoke(app, list(arguments))
    if result.exit_code == 0:
        return result
    assert tree(PLACE) == before
    assert result.exit_code in (1, 2) and "Traceback" not in result.output, result.output
    if result.exit_code == 1:
        line = error_line(result.stderr)
        assert not CONTROL.search(line), ascii(line)
        assert len(line) < LONGEST, line
    return None


def logits_of(folder: Path, attention: str) -> torch.Tensor:
    model = load_converted(folder, attention)
    assert all(parameter.isfinite().all() for parameter in model.parameters()), "a weight is not finite"
    with torch.no_grad():
        return model(torch.arange(1, 12)[None]).logits


def answer(folder: Path, may_overflow: bool = False) -> None:
    """Checks that a converted checkpoint loads and predicts.

    may_overflow: whether its numbers need not be finite where those of the original are not.
    """
    logits = logits_of(folder, "dijiang")
    assert logits.shape == (1, 11, VOCABULARY)
    finite = bool(logits.isfinite().all())
    assert finite or (may_overflow and not logits_of(folder, "softmax").isfinite().all()), "no finite logits"


def convert(source: Path, *options: str, may_overflow: bool = False) -> str:
    """Converts a source to the folder ``out``, and returns how that ended. may_overflow: as of `answer`."""
    result = run("convert", str(source), "--out", "out", "--json", *options)
    if result is None:
        return "refused"
    assert json.loads(result.stdout)["out"] == "out"
    answer(Path("out"), may_overflow)
    return "done"
