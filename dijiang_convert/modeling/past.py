"""What a layer keeps of a text, `Past`, with its `Sizes`, and the new `Tokens` of a call.

Key/value heads may have memories of different sizes. Neighbouring heads with one size are a `Group`, and their tables
are the tensors of one `Table`. This module only holds, divides and joins tensors.

Shape legend: B batch, H query heads, G key/value heads, A query and key/value heads, N tokens, D head_dim, F features,
X numbers of a token's gates.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .configuration_dijiang import Kernel
from .state import State, accumulation_dtype, recurrent_dtype
from .table import KeyTokens, Table, in_pieces


class Group(NamedTuple):
    """Neighbouring key/value heads whose tables have one size. part: which of a layer's heads. kernel: the layer's,
    with the memory of these heads."""

    part: slice
    kernel: Kernel

    @property
    def heads(self) -> int:
        return int(self.part.stop - self.part.start)

    @classmethod
    def of(cls, kernel: Kernel, heads: int, memory: tuple[int, ...]) -> list["Group"]:
        """The groups of a layer. memory: the rows of memory of each head, or () if all have the kernel's."""
        memory = memory or (kernel.memory,) * heads
        starts = [i for i in range(heads) if i == 0 or memory[i] != memory[i - 1]]
        return [
            cls(slice(start, end), replace(kernel, memory=memory[start]))
            for start, end in zip(starts, [*starts[1:], heads], strict=True)
        ]

    def pieces(self, numbers: int, like: Tensor) -> list["Group"]:
        """This group as smaller groups, computed one after the other. numbers: of one head. like: see `in_pieces`."""
        start = self.part.start
        found = in_pieces(self.heads, numbers, like)
        return [Group(slice(start + first, start + last), self.kernel) for first, last in found]


class Past(NamedTuple):
    """All that a layer keeps of a text.

    tables: one for each `Group`, of which the first has the gates, the same for all heads; () without a window. state:
    of a kernel without a window, else None. trail: [B, A, 1, D], the last token's query and key, of which the next
    token's features get a share; None for a kernel without ``shift``.
    """

    tables: tuple[Table, ...]
    state: State | None
    trail: Tensor | None

    def split(self, sizes: list[int]) -> list["Past"]:
        """The past divided by key/value heads. sizes: how many heads each part has; no part has heads of two tables.
        Every part has the gates, and none the trail."""
        if self.state is not None:
            states = (State(*parts) for parts in zip(*(x.split(sizes, 1) for x in self.state), strict=True))
            return [Past((), state, None) for state in states]
        parts, rest = [], list(sizes)
        for table in self.tables:
            own: list[int] = []
            while sum(own) < table.k.shape[1]:
                own.append(rest.pop(0))
            parts += table._replace(gates=self.tables[0].gates).split(own)
        return [Past((table,), None, None) for table in parts]

    @classmethod
    def joined(cls, parts: list["Past"]) -> "Past":
        """The inverse of `split`: neighbours with memories of one size share a table."""
        if not parts[0].tables:
            states = zip(*(part.state for part in parts if part.state is not None), strict=True)
            return cls((), State(*(torch.cat(same, 1) for same in states)), None)
        alike: list[list[Table]] = []
        for (table,), *_ in parts:
            if alike and alike[-1][0].score.shape[2] == table.score.shape[2]:
                alike[-1].append(table)
            else:
                alike.append([table])
        first, *others = (Table.joined(tables) for tables in alike)
        return cls((first, *(table._replace(gates=None) for table in others)), None, None)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Past":
        state = None if self.state is None else State(*map(change, self.state))
        tables = tuple(table.map(change) for table in self.tables)
        return Past(tables, state, None if self.trail is None else change(self.trail))

    def first(self) -> Tensor:
        """One of the tensors, which stands for all, since they are made together."""
        if self.tables:
            return self.tables[0].received
        assert self.state is not None
        return self.state.value

    def tensors(self) -> list[Tensor]:
        found: list[Tensor] = []
        self.map(lambda x: found.append(x) or x)  # type: ignore[func-returns-value]
        return found

    def copy_(self, other: "Past") -> None:
        """Writes the numbers of another past of the same sizes into these tensors, in place."""
        for own, new in zip(self.tensors(), other.tensors(), strict=True):
            if own is not new:
                own.copy_(new)


class Sizes(NamedTuple):
    """The sizes of a layer's past. heads, kv_heads, head_dim, value_dim: as in `Layers`. far_k: whether features are
    made of other keys than k. memory: see `Layers.memory_of`."""

    kernel: Kernel
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    far_k: bool
    memory: tuple[int, ...] = ()

    @property
    def features(self) -> int:
        """F, how many features the state has; 0 without one."""
        return self.head_dim * (2 if self.kernel.signed else 1) if self.kernel.far else 0

    @property
    def gates(self) -> int:
        """X, how many gates a token has."""
        return (2 * self.kv_heads if self.kernel.selective else 0) + self.kernel.decay_rank if self.kernel.far else 0

    @property
    def state_heads(self) -> int:
        """How many heads have a table or a state of their own."""
        return self.heads if self.kernel.decay == "retnet" else self.kv_heads

    def empty(self, batch: int, like: Tensor) -> Past:
        """The past of no token, with ``batch`` rows, on the device of ``like``; keys and values have its dtype."""
        kernel, heads, trail = self.kernel, self.state_heads, None
        if kernel.far and kernel.shift:
            trail = like.new_zeros(batch, self.heads + self.kv_heads, 1, self.head_dim)
        if kernel.window:
            groups = Group.of(kernel, heads, self.memory)
            return Past.joined([Past((self._table(batch, group, like),), None, None) for group in groups])._replace(
                trail=trail
            )
        state = State.empty(batch, heads, self.features, self.value_dim, like)
        return Past((), State(state.log_weight.to(recurrent_dtype(like)), state.value), trail)

    def _table(self, batch: int, group: Group, like: Tensor) -> Table:
        """The empty table of a group of heads."""
        kernel, heads, dim = group.kernel, group.heads, self.head_dim
        most, held = kernel.sinks + kernel.memory, kernel.window + kernel.block
        received = torch.zeros(batch, heads, held, dtype=accumulation_dtype(like), device=like.device)
        state = State.empty(batch, heads, self.features, self.value_dim, like) if kernel.far else None
        log_weight, value = (None, None) if state is None else state
        return Table(
            k=like.new_zeros(batch, heads, held, dim),
            v=like.new_zeros(batch, heads, held, self.value_dim),
            received=received,
            memory_k=like.new_zeros(batch, heads, most, dim + 1, dtype=torch.int8),
            memory_v=like.new_zeros(batch, heads, most, self.value_dim + 1, dtype=torch.int8),
            score=received.new_full((batch, heads, most), -torch.inf),
            log_weight=log_weight,
            value=value,
            far_k=like.new_zeros(batch, heads * self.kv_heads // self.state_heads, held, dim) if self.far_k else None,
            gates=received.new_zeros(batch, 1, held, self.gates) if self.gates else None,
        )


class Tokens(NamedTuple):
    """New tokens. q: [B, H, N, D], queries. far_q: [B, H, N, D], the queries that features are made of. keys: the same
    tokens as keys. valid: [B, N], False for padding, or None without padding."""

    q: Tensor
    far_q: Tensor
    keys: KeyTokens
    valid: Tensor | None

    @property
    def length(self) -> int:
        return self.q.shape[2]

    def real(self) -> Tensor:
        """`valid` as a tensor: [B, N], False for padding."""
        return self.q.new_ones(len(self.q), self.length, dtype=torch.bool) if self.valid is None else self.valid

    def split(self, sizes: list[int]) -> list["Tokens"]:
        """The tokens divided by key/value heads, with their query heads. sizes: how many key/value heads a part has."""
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
