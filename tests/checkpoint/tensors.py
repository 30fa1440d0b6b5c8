"""Tensors on disk, as tests write and read them."""

from __future__ import annotations

from pathlib import Path


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
