"""A source of which files are spoiled: the conversion answers, or refuses in one line and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from tests.bad_input.conftest import Place
from tests.bad_input.mutations import broken_bytes, broken_json, broken_shard
from tests.bad_input.trying import both_scales, convert, try_all

KINDS = {  # patterns of file names
    "config": ["config.json"],
    "generation config": ["generation_config.json"],
    "tokenizer": ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"],
    "index": ["model.safetensors.index.json"],
    "weights": ["*.safetensors"],
}


def spoiled(path: Path) -> st.SearchStrategy[Any]:
    """The name of a file, and bytes in place of its own."""
    content = path.read_bytes()
    if path.suffix == ".json":
        changed = broken_json(json.loads(content))
    else:
        changed = broken_shard(content) if path.suffix == ".safetensors" else broken_bytes(content)
    return st.tuples(st.just(path.name), changed)


@both_scales
@pytest.mark.parametrize("kind", KINDS)
def test_spoiled_sources(kind: str, scale: int, good: Path, place: Place) -> None:
    def example(change: tuple[str, bytes]) -> str:
        name, content = change
        with place() as source:
            (source / name).write_bytes(content)
            return convert(source, may_overflow=kind == "weights")  # of finite weights

    paths = sorted(path for pattern in KINDS[kind] for path in (good / "source").glob(pattern))
    try_all(kind, scale, st.one_of([spoiled(path) for path in paths]), example)
