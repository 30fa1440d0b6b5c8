"""Two corpora, that tests of rows mix."""

from __future__ import annotations

from pathlib import Path

import pytest

from dijiang_convert.data.readers import Sources
from tests.data.texts import words, write_texts


@pytest.fixture
def two(tmp_path: Path) -> Sources:
    """A corpus of words that start with w, and one of others."""
    write_texts(tmp_path / "w.jsonl", words(400))
    write_texts(tmp_path / "v.jsonl", [text.replace("w", "v") for text in words(400)])
    return Sources([str(tmp_path / "w.jsonl"), f"{tmp_path / 'v.jsonl'}@3"])
