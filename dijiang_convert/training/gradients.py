"""Losses that compute their gradient together with their value, so that the graph of each part is freed at once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def gradients(loss: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """∂loss/∂inputs, zeros for an input that the scalar ``loss`` does not depend on. Frees the graph."""
    with torch.autocast(loss.device.type, enabled=False):  # autocast would run the backward pass in half precision
        return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)


def with_gradients(value: Tensor, inputs: Sequence[Tensor], known: Sequence[Tensor]) -> Tensor:
    """The scalar ``value`` as a function of ``inputs`` with ``known`` gradients, each of the shape of its input."""
    return _Known.apply(value, len(inputs), *inputs, *known)  # type: ignore[no-any-return]


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *inputs_and_gradients: Tensor) -> Tensor:
        ctx.known = inputs_and_gradients[count:]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        # `mean_loss` passes the gradients of a sum, since half precision could round those of a mean to 0. The factor
        # ``outer`` makes them a mean's.
        scaled = tuple(known * outer[0].to(known.dtype) for known in ctx.known)
        return None, None, *scaled, *(None for _ in ctx.known)
