"""A sequence piece by piece through a model's cache. Imports torch alone: it serves a process without this project."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LENGTH = 160  # of sequences
TOLERANCE = 1e-4  # of logits, in units of their spread
SOURCE_DIFFERS = 1e-2  # with a cache: then it can't do what is asked, and is not compared with
PIECES = ([100, 1], [1], [1, 7, 64, 30, 1, 1, 20])


@torch.no_grad()
def fed(model: Any, ids: Tensor, sizes: list[int]) -> Tensor:
    """Logits of a sequence fed in pieces through the cache, the last size repeated to the end."""
    parts, start, cache = [], 0, None
    while start < ids.shape[1]:
        size = sizes[min(len(parts), len(sizes) - 1)]
        out = model(input_ids=ids[:, start : start + size], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
        start += size
    return torch.cat(parts, 1)
