"""Where weights lie and how precise they are: `device_map`, half precision, 8 and 4 bits.

Sequences reach far beyond the window of 16 and the chunk of 64.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dijiang_convert.modeling import modeling_dijiang
from dijiang_convert.modeling.cache import DiJiangCacheLayer
from tests.models import KINDS, difference, feed, load, logits_of, moved_checkpoint, tokens

TOLERANCE = 1e-4
LENGTH, NEW = 310, 20
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose far part shows in logits."""
    return moved_checkpoint(request.param, tmp_path_factory.mktemp("moved") / request.param)


def read(folder: Path, **options: Any) -> Any:
    name = type(load(folder.name)).__name__
    return getattr(modeling_dijiang, name).from_pretrained(folder, **options).eval()


# --------------------------------------------------------------------------------------------------------- device_map


def on_disk(model: Any) -> dict[str, str]:
    """A device_map that leaves the last layer, and what comes after it, on disk."""
    body, head = model.base_model_prefix, model.get_output_embeddings()
    places = {name: "cpu" for name, module in model.named_children() if module is head}
    for name, _ in getattr(model, body).named_children():
        places[f"{body}.{name}"] = "disk" if "norm" in name else "cpu"
    del places[f"{body}.layers"]
    return places | {f"{body}.layers.0": "cpu", f"{body}.layers.1": "disk"}


@pytest.mark.parametrize("places", ["auto", "auto with little memory", "explicit"])
def test_device_map(folder: Path, places: str, tmp_path: Path) -> None:
    """The same model where layers are read from disk as they are needed."""
    whole, ids = load(folder.name), tokens(2, LENGTH)
    options: dict[str, Any] = {"device_map": on_disk(whole) if places == "explicit" else "auto"}
    if places == "auto with little memory":
        options["max_memory"] = {"cpu": sum(p.nbytes for p in whole.parameters()) * 2 // 3}
    model = read(folder, offload_folder=tmp_path / "offload", **options)
    away = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    assert any(".dijiang." in name for name in away) == (places != "auto")
    assert len(away) < len(list(model.parameters()))
    expected = logits_of(whole, ids)
    assert difference(logits_of(model, ids), expected) <= TOLERANCE
    assert difference(feed(model, ids, [200, 1])[0], expected) <= TOLERANCE
    for implementation in (None, "static"):
        made = model.generate(ids, cache_implementation=implementation, **GREEDY)
        assert torch.equal(made, whole.generate(ids, use_cache=False, **GREEDY))
