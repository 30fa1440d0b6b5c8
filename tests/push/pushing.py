"""A checkpoint to push, and what the Hub has of it."""

from __future__ import annotations

import itertools
from pathlib import Path

INDEX = "model.safetensors.index.json"
CODE = ("configuration_dijiang.py", "modeling_dijiang.py")
TEXTS = ("config.json", "tokenizer.json", "merges.txt", "README.md", "LICENSE")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


ALLOWED = {*TEXTS, INDEX, *SHARDS, *CODE, "loss.png"}


NUMBERS = itertools.count()  # for repositories of their own


def size(folder: Path, *names: str) -> int:
    return sum((folder / name).stat().st_size for name in names)
