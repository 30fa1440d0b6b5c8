"""`torch.export`: programs that run without this package's code, and give the model's numbers.

Sequences reach far beyond the window of 16 and the chunk of 64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import StaticCache

from tests.models import difference, load, logits_of, tokens

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
def test_any_number_of_chunks() -> None:
    """One program for all lengths that are a multiple of the chunk."""
    model: Any = load("llama")
    model.model.layers = model.model.layers[:1]  # for the time that it takes
    length = 64 * torch.export.Dim("chunks", min=3, max=64)
    shapes = {"input_ids": {1: length}, "attention_mask": {1: length}}
    program = torch.export.export(Logits(model), padded(2, 320), dynamic_shapes=shapes).module()
    for chunks in (3, 5, 11):
        ids, mask = padded(2, 64 * chunks)
        found, expected = program(ids, mask), logits_of(model, ids, attention_mask=mask)
        assert difference(found[mask.bool()], expected[mask.bool()]) <= TOLERANCE


@torch.no_grad()
def test_decode_step() -> None:
    model, ids = load("llama", "partial"), tokens(2, 150)
    program = torch.export.export(DecodeStep(model, 2, PLACES), (ids[:, :1],), strict=True).module()
    found = torch.cat([program(ids[:, i, None]) for i in range(ids.shape[1])], 1)
    assert difference(found, logits_of(model, ids)) <= TOLERANCE


@torch.no_grad()
def test_decode_step_is_refused_where_its_cache_would_be_constant() -> None:
    """Non-strict export swaps buffers in modules, and a cache is none: it would stay as it was, without an error."""
    with pytest.raises(ValueError, match="strict=True"):
        torch.export.export(DecodeStep(load("llama"), 2, PLACES), (tokens(2, 1),), strict=False)
