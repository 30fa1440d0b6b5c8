"""Losses whose gradient is computed with their value, piece by piece, so that no piece's graph outlives it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def gradients(loss: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """∂loss/∂inputs, zeros where loss does not depend on one; frees the graph. Safe under autocast."""
    with torch.autocast(loss.device.type, enabled=False):  # which would run the backward pass in half precision
        return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)


def with_gradients(value: Tensor, inputs: Sequence[Tensor], known: Sequence[Tensor]) -> Tensor:
    """``value`` (a number) as a function of ``inputs`` whose gradients are ``known``."""
    return _Known.apply(value, len(inputs), *inputs, *known)  # type: ignore[no-any-return]


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *inputs_and_gradients: Tensor) -> Tensor:
        ctx.known = inputs_and_gradients[count:]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        # Of a whole batch's sum, so that half precision does not round small ones away; the mean divides by ``outer``.
        scaled = tuple(known * outer[0].to(known.dtype) for known in ctx.known)
        return None, None, *scaled, *(None for _ in ctx.known)
