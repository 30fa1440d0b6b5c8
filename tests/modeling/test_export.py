"""`torch.export`: programs that run without this package's code, and give the model's numbers.

Sequences reach far beyond the window of 16 and what the memory holds.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves
from transformers import StaticCache

from tests.models import BLOCK, difference, load, logits_of, tokens

TOLERANCE = 1e-4
LENGTH, PLACES = 310, 320


class Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids, attention_mask=attention_mask, use_cache=False).logits


class DecodeStep(nn.Module):
    """One token in, its logits out; the static cache is part of the program, as buffers."""

    def __init__(self, model: Any, batch: int, places: int) -> None:
        super().__init__()
        self.model, self.cache = model, StaticCache(config=model.config, max_cache_len=places)
        model(torch.zeros(batch, 1, dtype=torch.long), past_key_values=self.cache)  # makes the tensors
        self.cache.reset()
        for i, layer in enumerate(self.cache.layers):
            for n, tensor in enumerate(x for x in tree_leaves(vars(layer)) if isinstance(x, Tensor)):
                self.register_buffer(f"layer_{i}_{n}", tensor)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids, past_key_values=self.cache).logits


def padded(batch: int, length: int) -> tuple[Tensor, Tensor]:
    ids = tokens(batch, length)
    mask = torch.ones_like(ids)
    mask[0, :100] = 0
    return ids, mask


@torch.no_grad()
def test_fixed_length() -> None:
    model, (ids, mask) = load("neox"), padded(2, LENGTH)
    program = torch.export.export(Logits(model), padded(2, LENGTH)).module()
    found, expected = program(ids, mask), logits_of(model, ids, attention_mask=mask)
    assert difference(found[mask.bool()], expected[mask.bool()]) <= TOLERANCE


@torch.no_grad()
def test_any_number_of_blocks() -> None:
    """One program for all lengths that are a multiple of the block."""
    model: Any = load("llama")
    model.model.layers = model.model.layers[:1]  # for the time that it takes
    length = BLOCK * torch.export.Dim("blocks", min=12, max=256)
    shapes = {"input_ids": {1: length}, "attention_mask": {1: length}}
    program = torch.export.export(Logits(model), padded(2, 320), dynamic_shapes=shapes).module()
    for blocks in (12, 20, 44):
        ids, mask = padded(2, BLOCK * blocks)
        found, expected = program(ids, mask), logits_of(model, ids, attention_mask=mask)
        assert difference(found[mask.bool()], expected[mask.bool()]) <= TOLERANCE


def nodes(program: Any) -> list[Any]:
    """The operations of a program, those of its branches too."""
    return [node for graph in program.modules() if isinstance(graph, GraphModule) for node in graph.graph.nodes]


@pytest.mark.parametrize("variant", ["frequency", "keep", "default", "pure", "partial", "shared", "shared-default"])
@torch.no_grad()
def test_decode_step(variant: str) -> None:
    """Its tensors stay where they are, it looks at no number in them, and no shape depends on one: what a graph on any
    device needs. Where a block is full the window moves, in a branch of the program."""
    model, ids = load("llama", variant).double(), tokens(2, 150)  # so that no key's rounding to 8 bits goes another way
    program = torch.export.export(DecodeStep(model, 2, PLACES), (ids[:, :1],), strict=True).module()
    operations = nodes(program)
    targets = {str(node.target) for node in operations if node.op == "call_function"}
    assert not {name for name in targets if "nonzero" in name or "aten.item" in name or "_local_scalar" in name}
    shapes = [node.meta["val"].shape for node in operations if isinstance(node.meta.get("val"), Tensor)]
    assert len(shapes) > 100 and all(isinstance(n, int) for shape in shapes for n in shape)
    assert ("cond" in targets) == (variant != "pure")
    found = torch.cat([program(ids[:, i, None]) for i in range(ids.shape[1])], 1)
    assert difference(found, logits_of(model, ids)) <= TOLERANCE


@torch.no_grad()
def test_decode_step_is_refused_where_its_cache_would_be_constant() -> None:
    """Non-strict export swaps buffers in modules, and a cache is none: it would stay as it was, without an error."""
    with pytest.raises(ValueError, match="strict=True"):
        torch.export.export(DecodeStep(load("llama"), 2, PLACES), (tokens(2, 1),), strict=False)
