"""How models are run: a sequence piece by piece through a cache, or an encoder. Imports torch alone, for it serves a
process without this project, too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PIECES = ([100, 1], [1], [1, 7, 64, 30, 1, 1, 20])


@torch.no_grad()
def fed(model: Any, ids: Tensor, sizes: list[int], positions: bool = False) -> Tensor:
    """Logits of a sequence fed in pieces through the cache, the last size repeated to the end.

    positions: says where each piece is, as generate() does; Bamba counts from 0 again without.
    """
    parts, start, cache = [], 0, None
    while start < ids.shape[1]:
        end = min(start + sizes[min(len(parts), len(sizes) - 1)], ids.shape[1])
        given = {"position_ids": torch.arange(start, end).expand(len(ids), -1)} if positions else {}
        out = model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True, **given)
        cache = out.past_key_values
        parts.append(out.logits)
        start = end
    return torch.cat(parts, 1)


@torch.no_grad()
def output(model: Any, **inputs: Tensor) -> Tensor:
    """An encoder's head's logits, or its last hidden state. (Some mask at random: always the same.)"""
    torch.manual_seed(0)
    out = model(**inputs)
    return out.logits if getattr(out, "logits", None) is not None else out[0]
