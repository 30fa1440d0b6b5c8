"""Softmax attention over a table of fixed size: exact keys, and features of a state that are read like keys.

    o = softmax(logits) · values

| rows of a key/value head | logit for query q | value |
|---|---|---|
| sinks and memory, in 8 bits: of keys that left the window, the first ones and those with the best scores | s·q·k | v |
| window: the keys of the query's own block and of P blocks before it | s·q·k | v |
| state: the rows that `state` keeps, one for each feature | log e^{g(q)} φ_f(q) + log_weight_f | value_f |

The table moves in blocks of C tokens. When a block is full, the oldest block of the window leaves it: its keys enter
the state, and the best of its keys and of the memory stay as exact rows. A key is scored once, as it leaves: by the
attention that it received inside the window, times its recall error, the squared distance from its value to what the
state answers to the key (arXiv 2505.23666). Neither factor depends on the memory, so all blocks of a text are computed
together (`attend_blocks`), and only the state is a sum along the blocks. `step` has the same for one token.

Nothing here has parameters: `feature_map` and `decay` make what enters, and `layout` puts tokens in blocks.

Shape legend: B batch, H query heads, G key/value heads, X = B·G, R = H / G, D head_dim, V value head_dim, F features,
n blocks, C tokens of a block, T = n·C, P blocks of the window before the query's own, L = (P + 1)·C, M rows of sinks
and memory.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_dijiang import Kernel
from .layout import Layout
from .memory import Memory, causal_memory, key_score, memory_of_text
from .state import NEVER, State, Written, block_states
from .table import Keys, Logits, Queries, Table, packed, piece_size, product

# ------------------------------------------------------------------------------------------------- all blocks of a text


def attend_blocks(
    queries: Queries, keys: Keys, layout: Layout, table: Table | None, kernel: Kernel, logits: Logits
) -> tuple[Tensor, Table]:
    """Attention of all tokens of a text, in products over blocks.

    queries, keys: in the slots of ``layout``. table: of the tokens before, or None. Returns the output, [B, H, T, V],
    in the accumulation dtype, and the table after each row's last token. The caller adds the table's far_k and gates.
    """
    queries, logits = logits.scaled(queries)
    biases = layout.window_bias(queries.q), layout.causal_bias(queries.q)
    near = _Near.of(queries.q, keys.k, *biases, layout, kernel, logits)
    received = _received(near, layout, None if table is None else table.received)
    states, entered, leaving = None, None, layout.blocks - 1
    if keys.written:
        start = None if table is None else table.state
        states = block_states(keys.written, layout.age, layout.before // layout.block, start)
        entered = State(*(x[:, :, :leaving] for x in states))
    score = key_score(received[..., : leaving * layout.block], keys.written, entered, kernel)
    score = score.masked_fill((layout.places_left() < kernel.sinks)[:, None], torch.inf)
    memory = causal_memory(score, keys, layout, table, kernel)
    out = _attend(queries, near, memory, keys.v, states, layout, logits)
    return out, _table_after(keys, received, states, memory, layout, kernel)


def attend_both_sides(queries: Queries, keys: Keys, layout: Layout, kernel: Kernel, logits: Logits) -> Tensor:
    """Attention of an encoder's tokens, [B, H, T, V]: over the query's own block and P blocks on either side exactly,
    over a state of all keys outside of these, and over a memory of the whole text.

    keys: k, v: [B, G, T, D or V], without the P blocks before; written: of all n blocks, in one piece.
    """
    queries, logits = logits.scaled(queries)
    k, v = (F.pad(x, (0, 0, layout.before, layout.before)) for x in (keys.k, keys.v))
    near = _Near.of(queries.q, k, layout.both_windows_bias(queries.q), None, layout, kernel, logits)
    received = _received(near, layout, None)[..., layout.before : k.shape[2] - layout.before]
    states = states_of_both_sides(keys.written[0], layout) if keys.written else None
    score = key_score(received, keys.written, states, kernel)
    score = score.masked_fill((layout.places() < kernel.sinks)[:, None], torch.inf)
    memory = memory_of_text(score.masked_fill(~layout.real[:, None], -torch.inf), keys, layout, kernel)
    return _attend(queries, near, memory, v, states, layout, logits)


class _Near(NamedTuple):
    """The window's logits, and the attention that its keys receive. L is (2·P + 1)·C for encoders.

    logits: [X, n, R·C, L], in pieces [blocks, R·C, L]. received: [B, G, n, L], the sum of a block's queries' weights,
    in a softmax over the window alone; 0 without a memory. pieces: how [X, n, …] is divided.
    """

    logits: list[Tensor]
    received: Tensor
    pieces: "_Pieces"

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        block_bias: Tensor,
        token_bias: Tensor | None,
        layout: Layout,
        kernel: Kernel,
        logits: Logits,
    ) -> "_Near":
        """q: [B, H, T, D], queries. k: [B, G, P·C + T, D], keys (for encoders with P blocks more at the end).
        block_bias: [B or 1, n, L], NEVER for keys that no query of a block sees. token_bias: [C, L], NEVER for keys
        that come after a query, or None."""
        batch, kv_heads = k.shape[:2]
        own = layout.to_blocks(q, kv_heads)
        repeats = own.shape[2] // layout.block
        windows = k.flatten(0, 1).unfold(1, block_bias.shape[-1], layout.block)  # [X, n, D, L]
        rows = block_bias.shape[-1] + kernel.sinks + kernel.memory + 2 * q.shape[-1]
        pieces = _Pieces.of(len(own), layout.blocks, own.shape[2] * rows, q)
        hidden = block_bias[:, None].expand(batch, kv_heads, -1, -1).flatten(0, 1)[:, :, None]
        counted = layout.real.view(-1, 1, layout.blocks, 1, layout.block)  # padding gives no attention
        counted = counted.expand(batch, kv_heads, -1, repeats, -1).flatten(3).flatten(0, 1)[:, :, None]
        token_bias = None if token_bias is None else token_bias.repeat(repeats, 1)

        near, received = [], []
        for piece in zip(*map(pieces.split, (own, windows, hidden, counted.to(hidden.dtype))), strict=True):
            made = logits.of(piece[0], piece[1].mT).add_(piece[2])
            near.append(made if token_bias is None else made.add_(token_bias))
            if kernel.memory:
                with torch.no_grad():
                    received.append(piece[3] @ near[-1].softmax(-1))
        if not kernel.memory:
            return cls(near, block_bias.new_zeros(batch, kv_heads, layout.blocks, block_bias.shape[-1]), pieces)
        return cls(near, pieces.join(received, layout.blocks).view(batch, kv_heads, layout.blocks, -1), pieces)


class _Pieces(NamedTuple):
    """How tensors [X, n, …] are divided into pieces [blocks, …], which are computed one after the other: ``rows`` of X
    with all their blocks or, where ``rows`` is 0, a ``run`` of one row's blocks.

    Pieces are made by split and unbind, since the gradient of an index is as large as all pieces together.
    """

    rows: int
    run: int

    @classmethod
    def of(cls, rows: int, blocks: int, numbers: int, like: Tensor) -> "_Pieces":
        """rows: X. blocks: n. numbers: how many logits a block has. like: a tensor on the device that computes."""
        run = piece_size(blocks, numbers, like)
        return cls(0, run) if run < blocks else cls(piece_size(rows, blocks * numbers, like), 0)

    def split(self, x: Tensor) -> list[Tensor]:
        if self.rows:
            return [piece.flatten(0, 1) for piece in x.split(self.rows)]
        return [piece for row in x.unbind(0) for piece in row.split(self.run)]

    def join(self, pieces: list[Tensor], blocks: int) -> Tensor:
        """The inverse of `split`: [X, n, …]. blocks: n."""
        joined = torch.cat(pieces)
        return joined.view(-1, blocks, *joined.shape[1:])


def _received(near: _Near, layout: Layout, cached: Tensor | None) -> Tensor:
    """The attention that each key has received from all blocks that have it in their window, [B, G, P·C + T].

    cached: [B, G, L], what the keys of the table's window had received before, or None."""
    parts = near.received.unflatten(3, (-1, layout.block)).unbind(3)
    total = sum(F.pad(part, (0, 0, i, len(parts) - 1 - i)) for i, part in enumerate(parts))
    assert isinstance(total, Tensor)
    if cached is not None:
        total = total + F.pad(cached, (0, total.shape[2] * layout.block - cached.shape[2])).view_as(total)
    return total.flatten(2)


def states_of_both_sides(written: Written, layout: Layout) -> State:
    """The state that each block of an encoder reads, [B, G, n, …]: of all keys of its document but those of its window.

    written: what all n blocks write. The keys before and after the window are summed apart, each side with the decay of
    its own keys."""
    sides = []
    for side, around in ((written, layout), (written.map(lambda x: x.flip(2, 3)), layout.flip())):
        side = side.map(lambda x: F.pad(x, (0, 0, 0, 0, layout.before // layout.block, 0))[:, :, : layout.blocks - 1])
        sides.append(block_states([side], around.age, layout.before // layout.block, None))
    before, after = sides
    return before.then(State(after.log_weight.flip(2), after.value.flip(2)))


# ------------------------------------------------------------------------------------------------- the whole softmax


def _attend(
    queries: Queries,
    near: _Near,
    memory: Memory | None,
    v: Tensor,
    states: State | None,
    layout: Layout,
    logits: Logits,
) -> Tensor:
    """The output, [B, H, T, V]: one softmax over all rows of the table. v: [B, G, P·C + T, V], the values of the keys
    from which `_Near` was made. states: [B, G, n, …], what each block reads."""
    batch, kv_heads = v.shape[:2]
    own = layout.to_blocks(queries.q, kv_heads)
    window = v.flatten(0, 1).unfold(1, near.received.shape[-1], layout.block).mT  # [X, n, L, V]
    split = near.pieces.split
    parts: dict[str, Iterable[Tensor]] = {"near": near.logits, "window": split(window)}
    if memory is not None:
        hidden = torch.where(memory.seen, 0.0, NEVER).to(near.received.dtype)[..., None, :]
        parts["own"] = split(own)
        parts["k"], parts["v"] = memory.rows(memory.k, split), memory.rows(memory.v, split)
        parts["hidden"] = split(hidden.expand(batch, kv_heads, -1, -1, -1).flatten(0, 1))
    if states is not None and queries.features is not None:
        parts["features"] = split(layout.to_blocks(queries.features, kv_heads))
        parts["weight"] = split(states.log_weight.flatten(0, 1)[:, :, None])
        parts["value"] = split(states.value.flatten(0, 1))
    if logits.sink is not None:
        sink = logits.sink.to(near.received.dtype).view(1, kv_heads, 1, -1, 1)
        sink = sink.expand(batch, -1, layout.blocks, -1, layout.block).flatten(3).flatten(0, 1)
        parts["sink"] = split(sink[..., None])
    pieces = (dict(zip(parts, piece, strict=True)) for piece in zip(*parts.values(), strict=True))
    out = [softmax_over_rows(piece, logits)[0] for piece in pieces]
    return layout.from_blocks(near.pieces.join(out, layout.blocks), batch)


def softmax_over_rows(part: dict[str, Tensor], logits: Logits) -> tuple[Tensor, Tensor]:
    """One softmax over the rows of A tables, for N queries of each: the output, [A, N, V], and the weights of the
    window's keys, [A, N, L]. ``part`` has the window, and may have other parts of a table:

    near: [A, N, L], logits of the window's keys. window: [A, L, V], their values.
    own: [A, N, D], queries. k, v: [A, M, D or V], sinks and memory. k_unit, v_unit: [A, 1, M], by which these rows are
    multiplied. hidden: [A, 1, M], NEVER for rows that are unseen.
    features: [A, N, F], log features of queries. weight: [A, 1, F] and value: [A, F, V], the state's.
    sink: [A, N, 1], a logit that has no value.
    """
    rows, values = [part["near"]], [part["window"]]
    if "k" in part:
        memory = logits.of(part["own"], part["k"], part.get("k_unit"))
        rows.append(memory.add_(part["hidden"]) if "hidden" in part else memory)
        values.append(part["v"])
    if "features" in part:
        rows.append(part["features"] + part["weight"])
        values.append(part["value"])
    if "sink" in part:
        rows.append(part["sink"])
    weights = torch.cat(rows, -1).softmax(-1).split([row.shape[-1] for row in rows], -1)
    out = product(weights[0], values[0])
    if "v_unit" in part:
        weights = (weights[0], weights[1] * part["v_unit"], *weights[2:])
    for weight, value in zip(weights[1:], values[1:], strict=False):
        out = torch.baddbmm(out, weight, value) if value.dtype == out.dtype else out.add_(product(weight, value))
    return out, weights[0]


def _table_after(
    keys: Keys, received: Tensor, states: State | None, memory: Memory | None, layout: Layout, kernel: Kernel
) -> Table:
    """The table after each row's last token. received: [B, G, P·C + T], attention that keys have received. states: what
    blocks read. memory: the rows that they read beside the window, or None."""
    most = kernel.sinks + kernel.memory
    k, v = layout.last_window(keys.k), layout.last_window(keys.v)
    score = received.new_full((*k.shape[:2], most), -torch.inf)
    if memory is None:
        kept = [x.new_zeros(*x.shape[:2], most, x.shape[3] + 1, dtype=torch.int8) for x in (k, v)]
    else:
        last = memory._replace(chosen=layout.last_block(memory.chosen)[:, :, None])
        rows = [next(last.rows(x, lambda rows: [rows])) for x in (memory.k, memory.v)]
        kept = [packed(x).view(*k.shape[:2], most, -1) for x in rows]
        there = layout.last_block(memory.seen.expand_as(memory.chosen))
        score = torch.where(there, memory.score.gather(2, last.chosen[:, :, 0]), score)
    log_weight, value = (None, None) if states is None else (layout.last_block(x).clone() for x in states)
    return Table(
        k=k.clone(),
        v=v.clone(),
        received=layout.last_window(received[..., None])[..., 0].clone(),
        memory_k=kept[0],
        memory_v=kept[1],
        score=score,
        log_weight=log_weight,
        value=value,
    )
