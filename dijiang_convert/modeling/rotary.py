"""Undoing rotary embedding, for features that are made without it.

Any model's rotary function turns back when it gets −sin. Most pair numbers in one of few ways, which `rotation` finds
out: then `Turn` does the same in a quarter of the operations.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


@functools.cache
def parameter_names(function: Callable[..., Any]) -> list[str]:
    """What a function takes."""
    return list(inspect.signature(function).parameters)


class Turn(NamedTuple):
    """A rotary function: number j becomes x_j cos_j + x_p sign_j sin_j, p its partner. partner, sign: [dim]; pairing
    has both in one, ±(p + 1), as kernels read it."""

    partner: Tensor
    sign: Tensor
    pairing: Tensor

    def back(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, A, N, D] with its first numbers turned back. cos, sin: [B, N, dim], over their squared length."""
        dim, head_dim = self.partner.shape[0], x.shape[-1]
        cos, sin = cos[:, None], -sin[:, None] * self.sign
        first = x if dim == head_dim else x[..., :dim]
        turned = torch.addcmul(first * cos, first.index_select(-1, self.partner), sin).to(x.dtype)
        return turned if dim == head_dim else torch.cat([turned, x[..., dim:]], -1)


def rotation(apply_rotary: Any, cos: Tensor, sin: Tensor, dim: int) -> Turn | None:
    """How a model's rotary function pairs numbers, or None where it is of another kind. cos, sin: [B, 1, dim], of one
    token."""
    is_usual = (
        cos.dim() == 3 and cos.shape[1:] == (1, dim) and sin.shape == cos.shape
    )  # a row for one token, or for all
    if not is_usual or not cos.is_floating_point():
        return None

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x[:, None, None]  # a row of the batch each
        both = (x, x, cos, sin) if "k" in parameter_names(apply_rotary) else (x, cos, sin)
        out = apply_rotary(*both)
        return (out[0] if isinstance(out, tuple) else out)[:, 0, 0]

    kind: dict[str, Any] = {"dtype": torch.float32, "device": cos.device}
    shape = (dim, *cos.shape[1:])
    signs = turned(torch.eye(dim, **kind), torch.zeros(shape, **kind), torch.ones(shape, **kind)).T  # [j, p]
    partner = signs.abs().argmax(1)
    sign = signs.gather(1, partner[:, None])[:, 0]
    x, some_cos, some_sin = (torch.linspace(0.1, last, dim, **kind).expand(dim, -1) for last in (1.3, 2.7, 3.1))
    found = turned(x, some_cos.reshape(shape), some_sin.reshape(shape))
    if not torch.allclose(found, x * some_cos + sign * x[:, partner] * some_sin, atol=1e-5):
        return None
    return Turn(partner, sign.sign(), ((partner + 1) * sign.sign()).to(torch.int32))
