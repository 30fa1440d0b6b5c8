"""What attention is computed from: logits as the source makes them, queries, keys, and the table that a cache keeps.

Rows in 8 bits and products in mixed precision are here as well; `kernel` and `step` compute attention with all of it.

Shape legend: B batch, H query heads, G key/value heads, N tokens, D head_dim, V value head_dim, F features, n blocks, C
tokens of a block, T = n·C, P blocks of the window before the query's own, L = (P + 1)·C, M rows of sinks and memory, X
numbers of a token's gates.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .state import State, Written, accumulated, accumulation_dtype


class Logits(NamedTuple):
    """How the source makes logits: scaling · q·k. softcap: t of the soft-capped logits t·tanh(logit / t), or None.
    sink: [H], one more logit of each head, which has no value, or None."""

    scaling: float
    softcap: float | None = None
    sink: Tensor | None = None

    def of_heads(self, part: slice, kv_heads: int) -> "Logits":
        """These logits for ``part`` of the ``kv_heads`` key/value heads, and their query heads."""
        if self.sink is None:
            return self
        return self._replace(sink=self.sink.unflatten(0, (kv_heads, -1))[part].flatten())

    def scaled(self, queries: "Queries") -> tuple["Queries", "Logits"]:
        """Queries multiplied by the scaling, and logits without it; in half precision, which would round the product,
        both as they are."""
        if accumulation_dtype(queries.q) != queries.q.dtype:
            return queries, self
        return queries._replace(q=queries.q * self.scaling), self._replace(scaling=1.0)

    def of(self, q: Tensor, k: Tensor, unit: Tensor | None = None) -> Tensor:
        """Logits of q [..., N, D] and k [..., K, D], [..., N, K], in the accumulation dtype. unit: [..., 1, K], a
        factor of each key that is not in k, or None."""
        logits = product(q, k.mT)
        if unit is not None:
            logits = logits * unit
        if self.scaling != 1:
            logits = logits * self.scaling
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


# How many float32 numbers a CPU computes at a time: 1.5 MiB, which stay in the second-level cache of a core.
PIECE = 3 * 2**17


def piece_size(count: int, numbers: int, like: Tensor) -> int:
    """How many of ``count`` things are computed at a time, each of so many ``numbers``, on the device of ``like``: on a
    CPU as many as `PIECE` allows, elsewhere and in a compiled graph all."""
    if like.device.type != "cpu" or torch.compiler.is_compiling():
        return count
    pieces = max(-(-count * numbers // PIECE), 1)
    return max(-(-count // pieces), 1)


def in_pieces(count: int, numbers: int, like: Tensor) -> list[tuple[int, int]]:
    """The pieces of `piece_size`, each as the index of its first thing and of the one after its last; at least one."""
    size = piece_size(count, numbers, like)
    if not count > size:
        return [(0, count)]
    return [(start, min(start + size, count)) for start in range(0, count, size)]


# The most half-precision numbers that a CPU converts to float32 before a product. A product of few rows takes 30 to 150
# µs in bfloat16 there, whatever its size. Converted, 20,000 numbers take 14 µs and 130,000 take 44 µs; with 860,000 the
# conversion takes longer than it saves.
CONVERTED = 2**17


def product(x: Tensor, rows: Tensor) -> Tensor:
    """x @ rows, [..., N, D], in the accumulation dtype. x: [..., N, K]. rows: [..., K, D], perhaps half precision."""
    if rows.device.type == "cpu" and not torch.compiler.is_compiling() and rows.numel() <= CONVERTED:
        return accumulated(x) @ accumulated(rows)
    return accumulated(x.to(rows.dtype) @ rows)


def packed(rows: Tensor) -> Tensor:
    """Rows [..., D] in 8 bits a number, [..., D + 1]: D whole numbers from −127 to 127, and last e, where 2^(e − 7) is
    the unit of all. A power of two is exact in every dtype, so a row is rounded only once. Rows that need a gradient
    are only `rounded`, [..., D], since whole numbers have no gradient; packed rows are returned as they are."""
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
    """rows: [..., D + 1], `packed` → [..., D] in ``dtype``. Rows of floating-point numbers are not packed."""
    whole, unit = whole_numbers(rows, dtype)
    return whole if unit is None else whole * unit


def whole_numbers(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """rows: [..., D + 1], `packed` → whole numbers [..., D] and the unit [..., 1] of each row, in ``dtype``. A product
    with a power of two is exact, so that it may come after a sum. Rows that are not packed have no unit."""
    if rows.is_floating_point():
        return rows.to(dtype), None
    return rows[..., :-1].to(dtype), _power_of_two(rows[..., -1:].int() - 7).to(dtype)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent, in float32. exponent: int32, −126 to 127. Floats are made of bits, since powers may be rounded."""
    return (exponent + 127 << 23).view(torch.float32)


def rounded(rows: Tensor) -> Tensor:
    """Rows with the numbers that `packed` keeps, in their own dtype; their gradient is that of rows as they were."""
    made = unpacked(_in_eight_bits(rows.detach()), rows.dtype)
    return made + (rows - rows.detach()) if rows.requires_grad else made


class Queries(NamedTuple):
    """Queries in slots (see `Layout`). q: [B, H, T, D]. features: [B, H, T, F], log e^{g(q)} φ(q), or None without a
    state."""

    q: Tensor
    features: Tensor | None


class Keys(NamedTuple):
    """Keys in slots, which begin P blocks before the queries' slots. k, v: [B, G, P·C + T, D or V]. written:
    [B, G, n − 1, C, …], what the blocks that leave the window write to the state: all blocks but the last P + 1, in
    pieces along n; empty without a state."""

    k: Tensor
    v: Tensor
    written: list[Written]


class KeyTokens(NamedTuple):
    """Tokens as keys. k, v: [B, G, N, D or V]. far_k: [B, G, N, D], the keys that features are made of, or None if
    features are made of k. gates: [B, 1, N, X], see `TokenGates`, or None."""

    k: Tensor
    v: Tensor
    far_k: Tensor | None = None
    gates: Tensor | None = None

    def split(self, sizes: list[int]) -> list["KeyTokens"]:
        """The tokens divided by heads; all parts share the gates. sizes: how many heads a part has."""
        parts = ([None] * len(sizes) if x is None else x.split(sizes, 1) for x in (self.k, self.v, self.far_k))
        return [KeyTokens(k, v, far_k, self.gates) for k, v, far_k in zip(*parts, strict=True)]  # type: ignore[arg-type]

    def between(self, start: int, end: int) -> "KeyTokens":
        return self.map(lambda x: x[:, :, start:end])

    def map(self, change: Callable[..., Tensor], *others: "KeyTokens | None") -> "KeyTokens":
        """``change`` of each tensor and the same tensors of ``others``, which are None for an other that is None."""
        rows = zip(self, *([None] * 4 if other is None else other for other in others), strict=True)
        return KeyTokens(*(None if row[0] is None else change(*row) for row in rows))  # type: ignore[arg-type]


class Table(NamedTuple):
    """What a cache keeps of a text for key/value heads whose memories have one size.

    k, v: [B, G, L, D or V], the window. received: [B, G, L], the attention that the window's keys have received.
    memory_k, memory_v: [B, G, M, D + 1 or V + 1], sinks and memory, `packed`. score: [B, G, M], of sinks and memory,
    the best last; −inf for empty rows, which come first. log_weight: [B, G, F] and value: [B, G, F, V], the `State`, or
    None without one. far_k: [B, G, L, D] and gates: [B, 1, L, X], of the window, as in `KeyTokens`.
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
        """The table divided by heads; all parts share the gates. sizes: how many heads a part has."""
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
        """A table of ``tensors``, which has None where this table has None."""
        given = iter(tensors)
        return Table(*(None if x is None else next(given) for x in self))  # type: ignore[arg-type]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Table":
        return Table(*(None if x is None else change(x) for x in self))  # type: ignore[arg-type]
