"""Tensors on disk, as tests write and read them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dijiang_convert.errors import DijiangError


def message(call: pytest.ExceptionInfo[DijiangError]) -> str:
    """The error's text, which must be one line."""
    text = str(call.value)
    assert text and "\n" not in text and text == text.strip()
    return text


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
