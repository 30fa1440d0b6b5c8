"""What a layer keeps of a text, and the new tokens that it takes.

Shape legend: B batch, H query heads, G key/value heads, A query and key/value heads, N tokens, D head_dim, V value
head_dim, F features, X numbers that a hidden state is made into.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .configuration_dijiang import Kernel
from .state import State, accumulation_dtype, recurrent_dtype
from .table import KeyTokens, Table


class Past(NamedTuple):
    """All that a layer keeps of a text: a ``table``, or of a kernel without exact rows a ``state``; and the ``trail``,
    [B, A, 1, D], the last token's query and key where the next token's features get a share of them."""

    table: Table | None
    state: State | None
    trail: Tensor | None

    def split(self, sizes: list[int]) -> list["Past"]:
        """By key/value heads, so many in each part; without the trail, which is of all heads."""
        tables: Any = [None] * len(sizes) if self.table is None else self.table.split(sizes)
        states: Any = [None] * len(sizes)
        if self.state is not None:
            states = [State(*parts) for parts in zip(*(x.split(sizes, 1) for x in self.state), strict=True)]
        return [Past(*parts, None) for parts in zip(tables, states, strict=True)]

    @classmethod
    def joined(cls, parts: list["Past"]) -> "Past":
        """The inverse of `split`."""
        if parts[0].table is None:
            states = zip(*(part.state for part in parts if part.state is not None), strict=True)
            return cls(None, State(*(torch.cat(same, 1) for same in states)), None)
        return cls(Table.joined([part.table for part in parts if part.table is not None]), None, None)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Past":
        table = None if self.table is None else self.table.map(change)
        state = None if self.state is None else State(*map(change, self.state))
        return Past(table, state, None if self.trail is None else change(self.trail))

    def first(self) -> Tensor:
        """One of the tensors, which are all made together."""
        if self.table is not None:
            return self.table.received
        assert self.state is not None
        return self.state.value

    def tensors(self) -> list[Tensor]:
        found: list[Tensor] = []
        self.map(lambda x: found.append(x) or x)  # type: ignore[func-returns-value]
        return found

    def copy_(self, other: "Past") -> None:
        """Takes over the numbers of another past of the same sizes, in place."""
        for own, new in zip(self.tensors(), other.tensors(), strict=True):
            if own is not new:
                own.copy_(new)


class Sizes(NamedTuple):
    """What the past of a layer is made of. heads, kv_heads, head_dim, value_dim: those that attention sees. far_k:
    whether features see keys other than k."""

    kernel: Kernel
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    far_k: bool

    @property
    def features(self) -> int:
        """F, how many features the state has; 0 without one."""
        return self.head_dim * (2 if self.kernel.signed else 1) if self.kernel.far else 0

    @property
    def gates(self) -> int:
        """X, how many numbers a token's hidden state is made into."""
        return (2 * self.kv_heads if self.kernel.selective else 0) + self.kernel.decay_rank if self.kernel.far else 0

    @property
    def state_heads(self) -> int:
        """How many heads have a state of their own."""
        return self.heads if self.kernel.decay == "retnet" else self.kv_heads

    def empty(self, batch: int, like: Tensor) -> Past:
        """The past of no token, with ``batch`` rows, on the device of ``like``; keys and values have its dtype."""
        kernel, heads = self.kernel, self.state_heads
        held = kernel.window + kernel.block
        rows = held + kernel.sinks + kernel.memory

        def zeros(heads: int, tokens: int, dim: int) -> Tensor:
            return like.new_zeros(batch, heads, tokens, dim)

        state = State.empty(batch, heads, self.features, self.value_dim, like) if kernel.far else None
        trail = zeros(self.heads + self.kv_heads, 1, self.head_dim) if kernel.far and kernel.shift else None
        if not kernel.window:
            assert state is not None
            return Past(None, State(state.log_weight.to(recurrent_dtype(like)), state.value), trail)
        received = torch.zeros(batch, heads, held, dtype=accumulation_dtype(like), device=like.device)
        log_weight, value = (None, None) if state is None else state
        table = Table(
            k=zeros(heads, rows, self.head_dim),
            v=zeros(heads, rows, self.value_dim),
            received=received,
            score=received.new_full((batch, heads, kernel.sinks + kernel.memory), -torch.inf),
            log_weight=log_weight,
            value=value,
            far_k=zeros(self.kv_heads, held, self.head_dim) if self.far_k else None,
            gates=received.new_zeros(batch, 1, held, self.gates) if self.gates else None,
        )
        return Past(table, None, trail)


class Tokens(NamedTuple):
    """New tokens. q: [B, H, N, D]. far_q: the same as features see it. keys: the same tokens as keys. valid: [B, N],
    False for padding, or None."""

    q: Tensor
    far_q: Tensor
    keys: KeyTokens
    valid: Tensor | None

    @property
    def length(self) -> int:
        return self.q.shape[2]

    def real(self) -> Tensor:
        """[B, N], False for padding."""
        return self.q.new_ones(len(self.q), self.length, dtype=torch.bool) if self.valid is None else self.valid

    def split(self, sizes: list[int]) -> list["Tokens"]:
        """By key/value heads, with their query heads, so many in each part."""
        repeats = self.q.shape[1] // self.keys.k.shape[1]
        queries = zip(*(x.split([size * repeats for size in sizes], 1) for x in (self.q, self.far_q)), strict=True)
        return [
            Tokens(q, far_q, keys, self.valid) for (q, far_q), keys in zip(queries, self.keys.split(sizes), strict=True)
        ]

    def followed_by(self, other: "Tokens") -> "Tokens":
        keys = self.keys.map(lambda x, y: torch.cat([x, y], 2), other.keys)
        q, far_q = torch.cat([self.q, other.q], 2), torch.cat([self.far_q, other.far_q], 2)
        return Tokens(q, far_q, keys, torch.cat([self.real(), other.real()], 1))

    def without_last(self, count: int) -> "Tokens":
        """A copy without the last ``count`` tokens."""
        return self.map(lambda x: x[:, : x.shape[1] - count] if x.dim() == 2 else x[:, :, : x.shape[2] - count].clone())

    def map(self, change: Callable[[Tensor], Tensor]) -> "Tokens":
        valid = None if self.valid is None else change(self.valid)
        return Tokens(change(self.q), change(self.far_q), self.keys.map(change), valid)
