"""Data that is spoiled: it is evaluated or made into rows, or refused in one line."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from dijiang_convert import DijiangError
from dijiang_convert.checkpoint.loading import load_tokenizer
from dijiang_convert.data.readers import Sources
from dijiang_convert.data.rows import token_rows
from tests.bad_input.conftest import Place
from tests.bad_input.mutations import broken_bytes, spoiled
from tests.bad_input.trying import CONTROL, both_scales, run, try_all

CHAT = [{"role": "user", "content": "How deep is the sea?"}, {"role": "assistant", "content": "Deep. " * 20}]
ROWS = [{"text": "The sea is deep. " * 20}, {"text": "Rain.", "id": 7}, {"messages": CHAT, "tools": None}]
SUFFIXES = (".jsonl", ".json", ".csv", ".txt", ".md", ".jsonl.gz", ".parquet")
SEQ_LEN = 16


def written(rows: list[Any], suffix: str) -> bytes:
    """A file of these rows; rows that the format can't hold are left out."""
    if suffix == ".csv":
        text = io.StringIO()
        table = csv.writer(text)
        for row in rows:
            table.writerows([list(row), list(row.values())] if isinstance(row, dict) else [[row]])
        content = text.getvalue()
    elif suffix == ".json":
        content = json.dumps(rows)
    else:
        content = "\n".join(json.dumps(row) for row in rows)
    return content.encode("utf-8", "surrogatepass")


@st.composite
def broken_data(draw: Any) -> tuple[str, bytes]:
    """The suffix of a file, and its content: rows with spoiled values, or spoiled bytes."""
    suffix = draw(st.sampled_from(SUFFIXES))
    how = draw(st.sampled_from(("values", "values", "bytes", "both")))
    rows = ROWS if how == "bytes" else draw(spoiled(ROWS))
    content = written(rows, suffix)
    return suffix, content if how == "values" else draw(broken_bytes(content))


@both_scales
def test_spoiled_data_is_evaluated_or_refused(scale: int, good: Path, place: Place) -> None:
    tokenizer = load_tokenizer(good / "converted")

    def example(data: tuple[str, bytes]) -> str:
        suffix, content = data
        with place():
            path = Path(f"data{suffix}")
            path.write_bytes(content)
            ends = [evaluated(path), made_into_rows(path)]
        return "done" if "done" in ends else "refused"

    def evaluated(path: Path) -> str:
        options = ["--data", str(path), "--seq-len", str(SEQ_LEN), "--max-tokens", "64", "--json"]
        result = run("eval", str(good / "converted"), *options)
        if result is None:
            return "refused"
        assert math.isfinite(json.loads(result.stdout)["perplexity"])
        return "done"

    def made_into_rows(path: Path) -> str:
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # it says what it leaves out
                rows = token_rows(Sources([str(path)]), tokenizer, seq_len=SEQ_LEN, tokens=64)
        except DijiangError as error:
            assert str(error) and not CONTROL.search(str(error))
            return "refused"
        assert rows.ids.shape == (4, SEQ_LEN) and rows.ids.min() >= 0 and rows.ids.max() < len(tokenizer)
        return "done"

    try_all("data", scale, broken_data(), example)
