"""What attention is computed from: logits as the source makes them, queries, keys, and the table that a cache keeps.

Shape legend: B batch, H query heads, G key/value heads, D head_dim, V value head_dim, F features, n blocks, C tokens of
a block, T = n·C, P blocks of the window before the query's own, L = (P + 1)·C, M rows of sinks and memory, X numbers
that a hidden state is made into.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .state import State, Written, accumulated, accumulation_dtype


class Logits(NamedTuple):
    """How the source makes logits: scaling · q·k, soft-capped to t·tanh(logit / t) where ``softcap`` is t. ``sink`` [H]
    is one more logit of each head that has no value."""

    scaling: float
    softcap: float | None = None
    sink: Tensor | None = None

    def of_heads(self, part: slice, kv_heads: int) -> "Logits":
        """The same for the query heads of some of ``kv_heads`` key/value heads."""
        if self.sink is None:
            return self
        return self._replace(sink=self.sink.unflatten(0, (kv_heads, -1))[part].flatten())

    def scaled(self, queries: "Queries") -> tuple["Queries", "Logits"]:
        """The queries with the scaling in them, and logits without it; but not in half precision, which would round."""
        if accumulation_dtype(queries.q) != queries.q.dtype:
            return queries, self
        return queries._replace(q=queries.q * self.scaling), self._replace(scaling=1.0)

    def of(self, q: Tensor, k: Tensor) -> Tensor:
        """q [..., N, D], k [..., K, D] → [..., N, K], in the accumulation dtype."""
        logits = product(q, k.mT)
        if self.scaling != 1:
            logits = logits * self.scaling
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


# Numbers that are worked on at a time on a CPU: they stay in the second-level cache of its cores.
PIECE = 3 * 2**17


def piece_size(count: int, numbers: int, like: Tensor) -> int:
    """How many of ``count`` things of so many numbers each are worked on at a time, where ``like`` is: on a GPU all."""
    if like.device.type != "cpu" or torch.compiler.is_compiling():
        return count
    pieces = max(-(-count * numbers // PIECE), 1)
    return max(-(-count // pieces), 1)


def in_pieces(count: int, numbers: int, like: Tensor) -> list[tuple[int, int]]:
    """The same pieces of ``count`` things, as the first and the one behind the last of each; at least one."""
    size = piece_size(count, numbers, like)
    if not count > size:
        return [(0, count)]
    return [(start, min(start + size, count)) for start in range(0, count, size)]


# Up to so many numbers are converted from half precision on a CPU before a product. A product of few rows takes 30 to
# 150 µs in bfloat16 there, whatever its size; 20,000 numbers take 14 µs converted, 130,000 take 44 µs, and of 860,000
# the conversion takes longer than it saves.
CONVERTED = 2**17


def product(x: Tensor, rows: Tensor) -> Tensor:
    """x [..., N, K] @ rows [..., K, D] in the accumulation dtype, of rows that may be half precision."""
    if rows.device.type == "cpu" and rows.numel() <= CONVERTED:
        return accumulated(x) @ accumulated(rows)
    return accumulated(x.to(rows.dtype) @ rows)


def packed(rows: Tensor) -> Tensor:
    """Rows [..., D] in 8 bits a number, [..., D + 1]: D whole numbers up to 127, and last the exponent of the power of
    two that all are to be multiplied by. That is exact in every dtype, so that a row is rounded only once. Rows that
    need a gradient are only `rounded`, since no gradient goes through whole numbers."""
    if rows.dtype == torch.int8:
        return rows
    if rows.requires_grad and torch.is_grad_enabled():
        return rounded(rows)
    return _in_eight_bits(rows.detach())


def _in_eight_bits(rows: Tensor) -> Tensor:
    largest = rows.abs().amax(-1, keepdim=True).float()
    exponent = ((largest.view(torch.int32) >> 23) - 126).clamp(-119, 127)  # the largest is less than 2^exponent
    whole = (rows / _power_of_two(exponent - 7).to(rows.dtype)).round().clamp(-127, 127)
    return torch.cat([whole.to(torch.int8), exponent.to(torch.int8)], -1)


def unpacked(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `packed`, [..., D + 1] → [..., D]."""
    if rows.is_floating_point():
        return rows.to(dtype)
    return rows[..., :-1].to(dtype) * _power_of_two(rows[..., -1:].int() - 7).to(dtype)


def _power_of_two(exponent: Tensor) -> Tensor:
    """exponent: whole numbers from −126 to 127. A float is made of its bits, since powers may be rounded."""
    return (exponent + 127 << 23).view(torch.float32)


def rounded(rows: Tensor) -> Tensor:
    """Rows as they are once they have been packed; the gradient goes through as if they had not."""
    made = unpacked(_in_eight_bits(rows.detach()), rows.dtype)
    return made + (rows - rows.detach()) if rows.requires_grad else made


class Queries(NamedTuple):
    """Queries in slots (see `Layout`). q: [B, H, T, D]. features: [B, H, T, F], log e^{g(q)} φ(q), None without a
    state."""

    q: Tensor
    features: Tensor | None


class Keys(NamedTuple):
    """Keys in slots, from P blocks before the queries' on. k, v: [B, G, P·C + T, D or V]. written: what blocks write to
    the state, [B, G, n − 1, C, …], of those that leave the window: all but the last P + 1. In pieces along n; empty
    without a state."""

    k: Tensor
    v: Tensor
    written: list[Written]


class KeyTokens(NamedTuple):
    """Tokens as keys. k, v: [B, G, N, D or V]. far_k: [B, G, N, D], the keys as features see them, None where these see
    k. gates: [B, 1, N, X], what the tokens' hidden states do to the state, or None."""

    k: Tensor
    v: Tensor
    far_k: Tensor | None = None
    gates: Tensor | None = None

    def split(self, sizes: list[int]) -> list["KeyTokens"]:
        """By heads, so many in each part; they share the gates."""
        parts = ([None] * len(sizes) if x is None else x.split(sizes, 1) for x in (self.k, self.v, self.far_k))
        return [KeyTokens(k, v, far_k, self.gates) for k, v, far_k in zip(*parts, strict=True)]  # type: ignore[arg-type]

    def between(self, start: int, end: int) -> "KeyTokens":
        return self.map(lambda x: x[:, :, start:end])

    def map(self, change: Callable[..., Tensor], *others: "KeyTokens | None") -> "KeyTokens":
        """``change`` of each tensor, and of those of others in its place (None of an other that is None)."""
        rows = zip(self, *([None] * 4 if other is None else other for other in others), strict=True)
        return KeyTokens(*(None if row[0] is None else change(*row) for row in rows))  # type: ignore[arg-type]


class Table(NamedTuple):
    """What a cache keeps of a text for key/value heads that are alike.

    k, v: [B, G, L, D or V], the window. received: [B, G, L], the attention that its keys have received. memory_k,
    memory_v: [B, G, M, D + 1 or V + 1], sinks and memory, `packed`. score: [B, G, M], theirs, the best last; −inf in
    empty rows, which come first. log_weight, value: the `State`, or None without one. far_k: [B, G, L, D], the window's
    keys as features see them, if they are others. gates: [B, 1, L, X], what tokens of the window do to the state as
    they leave, or None.
    """

    k: Tensor
    v: Tensor
    received: Tensor
    memory_k: Tensor
    memory_v: Tensor
    score: Tensor
    log_weight: Tensor | None = None
    value: Tensor | None = None
    far_k: Tensor | None = None
    gates: Tensor | None = None

    @property
    def state(self) -> State | None:
        return None if self.log_weight is None or self.value is None else State(self.log_weight, self.value)

    @property
    def window(self) -> KeyTokens:
        return KeyTokens(self.k, self.v, self.far_k, self.gates)

    def split(self, sizes: list[int]) -> list["Table"]:
        """By heads, so many in each part; they share the gates."""
        if len(sizes) == 1:
            return [self]
        parts = ([None] * len(sizes) if x is None else x.split(sizes, 1) for x in self[:-1])
        return [Table._make((*part, self.gates)) for part in zip(*parts, strict=True)]

    @classmethod
    def joined(cls, parts: list["Table"]) -> "Table":
        """The inverse of `split`."""
        if len(parts) == 1:
            return parts[0]
        *own, gates = zip(*parts, strict=True)
        return cls._make([*(None if same[0] is None else torch.cat(same, 1) for same in own), gates[0]])

    def of(self, tensors: Iterable[Tensor]) -> "Table":
        """A table of these tensors, with None where this one has it."""
        given = iter(tensors)
        return Table(*(None if x is None else next(given) for x in self))  # type: ignore[arg-type]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Table":
        return Table(*(None if x is None else change(x) for x in self))  # type: ignore[arg-type]
