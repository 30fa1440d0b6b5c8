"""Sources and what conversion makes of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

INDEX = "model.safetensors.index.json"


CPU = torch.device("cpu")


WEIGHTS = (".safetensors", ".bin")


def digests(folder: Path) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))]


def written(out: Path) -> dict[str, torch.Tensor]:
    """All tensors, by the index; every file that it names, and no weight file that it does not."""
    weight_map = json.loads((out / INDEX).read_text())["weight_map"]
    files = {name: load_file(out / name) for name in set(weight_map.values())}
    assert set(files) == {path.name for path in out.iterdir() if path.name.endswith(WEIGHTS)}
    assert {(name, key) for name, state in files.items() for key in state} == {(v, k) for k, v in weight_map.items()}
    return {key: files[name][key] for key, name in weight_map.items()}


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content
