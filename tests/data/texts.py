"""Texts as tests write them, and what rows hold of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dijiang_convert import DijiangError
from dijiang_convert.data.readers import Piece, Source
from dijiang_convert.data.rows import Rows


def words(count: int, first: int = 0) -> list[str]:
    """Documents that all differ, of a few to a few hundred tokens."""
    return [" ".join(f"w{i}x{j}" for j in range(2 + i * 7 % 40)) for i in range(first, first + count)]


def write_lines(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def write_texts(path: Path, texts: Sequence[str]) -> str:
    return write_lines(path, [{"text": text} for text in texts])


def contexts(rows: Rows) -> list[list[int]]:
    """Token ids of every context in the rows, in their order."""
    found: list[list[int]] = []
    for row in (rows[i] for i in range(len(rows))):
        columns = (row[key].tolist() for key in ("input_ids", "position_ids", "attention_mask"))
        for token, position, real in zip(*columns, strict=True):
            if real and position == 0:
                found.append([])
            if real:
                found[-1].append(token)
    return found


def read(name: str, held_out: bool = False) -> list[str]:
    return [piece.text for piece in Source(name).pieces(None, None, held_out) if isinstance(piece, Piece)]


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(DijiangError) as error:
        call()
    message = str(error.value)
    assert message and "\n" not in message
    return message
