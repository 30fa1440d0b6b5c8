"""What these tests share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from dijiang_convert.checkpoint.card_parts import Card, merge, parse
from tests.push.pushing import CODE, INDEX, NUMBERS, SHARDS


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    dijiang = {"version": "0.1.0", "source": "EleutherAI/pythia-70m", "recipe": "default", "layers": [0]}
    (folder / "config.json").write_text(json.dumps({"model_type": "dijiang_gpt_neox", "dijiang": dijiang}))
    weight_map = {}
    number = next(NUMBERS)  # no two tests push the same weights: the Hub would have them already
    for i, shard in enumerate(SHARDS):
        (folder / shard).write_bytes(save({f"layer.{i}": np.full((16, 16), 10 * number + i, dtype=np.float32)}))
        weight_map[f"layer.{i}"] = shard
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name in CODE:
        (folder / name).write_text(f"# {name}\n")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "merges.txt").write_text("a b\n")
    (folder / "LICENSE").write_text("Apache\n")
    card = parse("---\nlibrary_name: transformers\n---\n\nA model.\n")
    (folder / "README.md").write_text(merge(card, Card({}), "").text())
    (folder / "loss.png").write_bytes(b"\x89PNG %d" % number)
    return folder
