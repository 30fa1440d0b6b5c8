"""Undoing rotary embedding, for features that are made without it.

Any model's rotary function turns back when it gets −sin. Most functions only pair the numbers of a head, which
`rotation` finds out by trying; then `Turn` does the same in a quarter of the operations. The model makes cos and sin.

Shape legend: B batch, A heads of any kind, N tokens, D head_dim.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .state import accumulated

_known: dict[tuple[Any, ...], "Turn | None"] = {}  # the results of `known_rotation`


def without_rotation(
    apply_rotary: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """Queries and keys without their rotary embedding, of the same shape and dtype.

    apply_rotary: the model's function. q, k: [B, A, N, D], rotated. cos, sin: [B or 1, N, width] in most models, by
    which the function rotated. Both are divided by cos² + sin², which scaled variants (YaRN) make other than 1. dim:
    how many numbers of each head, the first ones, the function takes.
    """
    looks = not torch.is_grad_enabled() and not torch.compiler.is_compiling() and q.device.type == "cpu"
    turn = known_rotation(apply_rotary, cos, sin, dim) if looks else None
    if turn is not None:
        if q.shape[2] > 1:
            return turn.back(q, cos, sin), turn.back(k, cos, sin)
        both = turn.back(torch.cat([q, k], 1), cos, sin)
        return both[:, : q.shape[1]], both[:, q.shape[1] :]
    cos, sin = accumulated(cos), accumulated(sin)
    length = cos[..., :1].square() + sin[..., :1].square()
    back = (cos / length, -sin / length)
    if "k" in parameter_names(apply_rotary):
        turned_q, turned_k = apply_rotary(q[..., :dim], k[..., :dim], *back)
    else:  # the function rotates one tensor
        turned_q, turned_k = (apply_rotary(x[..., :dim], *back) for x in (q, k))
    return (
        torch.cat([turned_q.to(q.dtype), q[..., dim:]], -1),
        torch.cat([turned_k.to(k.dtype), k[..., dim:]], -1),
    )


@functools.cache
def parameter_names(function: Callable[..., Any]) -> list[str]:
    """The names of a function's parameters."""
    return list(inspect.signature(function).parameters)


class Turn(NamedTuple):
    """A rotary function by which number j of a head becomes x_j cos_j + x_p sign_j sin_j, where p is j's partner.

    partner, sign: [width], of each number that is rotated. swap: [width, width], a matrix: x swap is x_p sign_j.
    """

    partner: Tensor
    sign: Tensor
    swap: Tensor

    def back(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x with its first ``width`` numbers turned back. x: [B, A, N, D]. cos, sin: [B or 1, N, width], by which x was
        rotated."""
        dim, head_dim = self.partner.shape[0], x.shape[-1]
        if x.shape[2] == 1:
            matrix = self._once(self._matrix, cos, sin, head_dim)
            return (accumulated(x[:, :, 0]) @ matrix).to(x.dtype)[:, :, None]
        cos, sin = self._once(self._factors, cos, sin)
        first = accumulated(x[..., :dim])
        swapped = first @ self.swap.to(first.dtype)  # a product is several times as fast as a gather
        turned = torch.addcmul(first * cos, swapped, sin).to(x.dtype)
        return turned if dim == head_dim else torch.cat([turned, x[..., dim:]], -1)

    def _factors(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of x_j and x_p that turn x back, each [B or 1, 1, N, width]: cos and −sin over cos² + sin²."""
        length = (cos[..., :1].square() + sin[..., :1].square())[:, None]
        return cos[:, None] / length, -sin[:, None] / length

    def _matrix(self, cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
        """The matrix that turns a single token back, as x · matrix: [B, D, D], or [D, D] if one is for all rows."""
        rest = head_dim - self.partner.shape[0]
        of_own, of_partner = (x[:, 0] for x in self._factors(cos, sin))  # [B or 1, 1, width]
        own = torch.eye(head_dim, dtype=cos.dtype, device=cos.device) * F.pad(of_own, (0, rest), value=1.0)
        swap = F.pad(self.swap.to(cos.dtype), (0, rest, 0, rest))
        matrix = torch.addcmul(own, swap, F.pad(of_partner, (0, rest)))
        return matrix[0] if len(matrix) == 1 else matrix

    def _once(self, make: Callable[..., Any], cos: Tensor, sin: Tensor, *arguments: int) -> Any:
        """The result of ``make`` for cos and sin, kept with cos: all layers of a model get the same cos."""
        key = (id(self.partner), make.__name__)
        return _kept_with(cos, key, lambda: make(accumulated(cos), accumulated(sin), *arguments))


def rotation(apply_rotary: Any, cos: Tensor, sin: Tensor, dim: int) -> Turn | None:
    """The `Turn` of a model's rotary function, or None for a function of another form.

    The function is tried: on unit vectors with cos 0 and sin 1, which shows the partners, and on numbers that confirm
    the form. cos, sin: [B or 1, 1, width], of one token. dim: how many numbers of a head the function takes; it rotates
    the first ``width`` of them.
    """
    width = cos.shape[-1]
    is_usual = cos.dim() == 3 and cos.shape[1] == 1 and width <= dim and sin.shape == cos.shape
    if not is_usual or not cos.is_floating_point():
        return None

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x[:, None, None]  # each row of x is a batch row of one head and token
        both = (x, x, cos, sin) if "k" in parameter_names(apply_rotary) else (x, cos, sin)
        out = apply_rotary(*both)
        return (out[0] if isinstance(out, tuple) else out)[:, 0, 0]

    kind: dict[str, Any] = {"dtype": torch.float32, "device": cos.device}
    shape = (dim, *cos.shape[1:])
    signs = turned(torch.eye(dim, **kind), torch.zeros(shape, **kind), torch.ones(shape, **kind)).T[:width]  # [j, p]
    partner = signs.abs().argmax(1)
    sign = signs.gather(1, partner[:, None])[:, 0]
    x = torch.linspace(0.1, 1.3, dim, **kind).expand(dim, -1)
    some_cos, some_sin = (torch.linspace(0.1, last, width, **kind).expand(dim, -1) for last in (2.7, 3.1))
    found = turned(x, some_cos.reshape(shape), some_sin.reshape(shape))
    expected = x[:, :width] * some_cos + sign * x[:, partner] * some_sin
    if not torch.allclose(found, torch.cat([expected, x[:, width:]], -1), atol=1e-5):
        return None
    sign = sign.sign()
    swap = torch.zeros(width, width, **kind).index_put_((partner, torch.arange(width, device=cos.device)), sign)
    return Turn(partner, sign, swap)


def known_rotation(apply_rotary: Any, cos: Tensor, sin: Tensor, dim: int) -> Turn | None:
    """The result of `rotation`, found out once for each function, device and width of cos and sin."""
    key = (apply_rotary, cos.device, dim, cos.dim(), sin.dim(), *cos.shape[2:], *sin.shape[2:])
    if key not in _known:
        _known[key] = rotation(apply_rotary, cos[:, :1], sin[:, :1], dim)
    return _known[key]


def _kept_with(x: Tensor, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """The result of ``make``, which is called once for each key and kept as long as x lives."""
    made: dict[tuple[Any, ...], Any] = vars(x).setdefault("_dijiang", {})
    if key not in made:
        made[key] = make()
    return made[key]
