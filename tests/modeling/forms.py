"""Random tokens, and the fast forms of attention called with them as the attention module calls them.

Log-features of keys and their decay travel with the keys, in the places that a table has for what features need.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dijiang_convert.modeling.cache import Sizes
from dijiang_convert.modeling.configuration_dijiang import Kernel
from dijiang_convert.modeling.kernel import attend_blocks, attend_both_sides
from dijiang_convert.modeling.layout import Layout
from dijiang_convert.modeling.linear import attend_chunks, attend_chunks_both_sides, attend_one
from dijiang_convert.modeling.state import NEVER, Decay, State, Written
from dijiang_convert.modeling.step import advance, attend_token
from dijiang_convert.modeling.table import Keys, KeyTokens, Logits, Queries, Table
from tests.modeling.naive import Inputs

LOGITS = Logits(0.3)
SMALL = Kernel(window=16, block=16, memory=8)
FEATURES = 14
DECAYS = ("none", "head", "features", "both")


def inputs(
    length: int,
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 12,
    value_dim: int = 10,
    state: bool = True,
    decay: str = "both",
    spread: float = 1.5,
    seed: int = 0,
) -> Inputs:
    """Float64. Exact rows and the state have weights of the same order; spread: of log-features."""
    made = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    q, k, v = normal(batch, heads, length, dim), *(normal(batch, kv_heads, length, n) for n in (dim, value_dim))
    if not state:
        return Inputs(q, k, v)
    features = spread * normal(batch, heads, length, FEATURES) - 2
    written = spread * normal(batch, kv_heads, length, FEATURES) - 2
    slow, each = (torch.rand(batch, kv_heads, length, n, generator=made, dtype=torch.float64) for n in (1, FEATURES))
    of_head = -torch.where(slow > 0.99, 3.0, 0.01 * slow)  # now and then a key wipes nearly all out
    of_features = -0.5 * torch.where(each > 0.98, 1.0, each * torch.logspace(-4, -1, FEATURES, dtype=torch.float64))
    parts = Decay(
        of_head if decay in ("head", "both") else None, of_features if decay in ("features", "both") else None
    )
    return Inputs(q, k, v, features, written, parts)


def part(x: Inputs, span: slice) -> Inputs:
    """Some of the tokens."""
    return x.map(lambda t: t[:, :, span])


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, by the largest number that is expected."""
    assert found.shape == expected.shape and found.isfinite().all()
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


# ------------------------------------------------------------------------------------------------------------ the table


class Past(NamedTuple):
    """A table and the number of tokens that it is of, one or [B]."""

    table: Table
    count: Any


def empty(x: Inputs, kernel: Kernel) -> Past:
    """The past of no token."""
    batch, kv_heads, _, dim = x.k.shape
    sizes = Sizes(kernel, x.q.shape[1], kv_heads, dim, x.v.shape[-1], False)
    made = sizes._replace(kernel=Kernel(**{**kernel.to_dict(), "far": False})).empty(batch, x.k).tables[0]
    if x.written is not None:
        made = made._replace(**State.empty(batch, kv_heads, x.written.shape[-1], x.v.shape[-1], x.v)._asdict())
    held = kernel.window + kernel.block
    own = [None if t is None else t.new_zeros(*t.shape[:2], held, t.shape[3]) for t in _keys(x)[2:]]
    return Past(made._replace(far_k=own[0], gates=own[1]), 0)


def _keys(x: Inputs) -> KeyTokens:
    parts = [t for t in x.decay if t is not None]
    return KeyTokens(x.k, x.v, x.written, torch.cat(parts, -1) if parts else None)


def _written(keys: KeyTokens, block: int, real: Tensor | None = None) -> Written:
    """What slots write, by blocks. real: [B or 1, T], False for what is no key."""
    assert keys.far_k is not None
    scale, decay = keys.far_k.logsumexp(-1, keepdim=True), Decay()
    features = keys.far_k - scale
    if keys.gates is not None:
        sizes = keys.gates.shape[-1] % FEATURES, keys.gates.shape[-1] // FEATURES * FEATURES
        decay = Decay(*(t if t.shape[-1] else None for t in keys.gates.split(sizes, -1)))
    if real is not None:
        scale = scale.masked_fill(~real[:, None, :, None], NEVER)
        decay = decay.map(lambda t: t.masked_fill(~real[:, None, :, None], 0))
    return Written(features, scale, keys.v, decay).map(lambda t: t.unflatten(2, (-1, block)))


def _between(keys: KeyTokens, start: int, end: int) -> KeyTokens:
    return keys.map(lambda x: x[:, :, start:end])


def layout_of(
    x: Inputs, block: int, window: int, count: Any = 0, real: Tensor | None = None, documents: Tensor | None = None
) -> Layout:
    if documents is not None:
        return Layout.packed(documents, block, window)
    length = x.q.shape[2]
    if real is None and not isinstance(count, Tensor):
        return Layout.plain(length, block, window, count, x.q.device)
    real = torch.ones(len(x.q), length, dtype=torch.bool) if real is None else real
    return Layout.padded(real, block, window, torch.as_tensor(count).expand(len(x.q)))


def by_blocks(
    x: Inputs,
    kernel: Kernel,
    logits: Logits = LOGITS,
    *,
    past: Past | None = None,
    real: Tensor | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Past]:
    """All tokens at once, after those of ``past``: [B, H, N, V], and the past that they become part of."""
    length, count = x.q.shape[2], 0 if past is None else past.count
    table = None if past is None else past.table
    layout = layout_of(x, kernel.block, kernel.window, count, real, documents)
    keys = _keys(x).map(layout.keys, None if table is None else table.window)
    written, leaving = [], kernel.block * (layout.blocks - 1)
    if keys.far_k is not None:  # in pieces of three blocks
        for start in range(0, max(leaving, 1), 3 * kernel.block):
            end = min(start + 3 * kernel.block, leaving)
            written.append(_written(_between(keys, start, end), kernel.block))
    queries = Queries(layout.queries(x.q), None if x.features is None else layout.queries(x.features))
    out, after = attend_blocks(queries, Keys(keys.k, keys.v, written), layout, table, kernel, logits)
    far_k, gates = (t if t is None else layout.last_window(t).clone() for t in keys[2:])
    after = after._replace(far_k=far_k, gates=gates)
    return layout.outputs(out, length), Past(after, count + (length if real is None else real.sum(1)))


def both_sides(
    x: Inputs, kernel: Kernel, logits: Logits = LOGITS, *, real: Tensor | None = None, documents: Tensor | None = None
) -> Tensor:
    layout = layout_of(x, kernel.block, kernel.window, 0, real, documents)
    keys = _keys(x).map(layout.queries)
    queries = Queries(layout.queries(x.q), None if x.features is None else layout.queries(x.features))
    written = [] if keys.far_k is None else [_written(keys, kernel.block, layout.real)]
    rows = Keys(keys.k, keys.v, written)
    return layout.outputs(attend_both_sides(queries, rows, layout, kernel, logits), x.q.shape[2])


def by_token(
    x: Inputs, kernel: Kernel, logits: Logits = LOGITS, *, past: Past | None = None, real: Tensor | None = None
) -> tuple[Tensor, Past]:
    """The same, one token after the other, with the table written in place."""
    table, count = empty(x, kernel) if past is None else past
    table, outputs = table.map(torch.clone), []
    if real is not None:
        count = torch.as_tensor(count).expand(len(x.q))
    for n in range(x.q.shape[2]):
        valid = None if real is None else real[:, n]
        table = _with_room(table, count, valid, kernel)
        one = part(x, slice(n, n + 1))
        outputs.append(attend_token(Queries(one.q, one.features), _keys(one), table, count, valid, kernel, logits))
        count = count + (1 if valid is None else valid.long())
    return torch.cat(outputs, 2), Past(table, count)


def _with_room(table: Table, count: Any, valid: Tensor | None, kernel: Kernel) -> Table:
    """The table after its last block has made room, in rows where it is full and a token is to come."""
    due = torch.as_tensor(count)
    due = (due > 0) & (due % kernel.block == 0) & (torch.tensor(True) if valid is None else valid)
    if not due.any():
        return table
    written = None
    if table.far_k is not None:
        written = _written(_between(table.window, 0, kernel.block), kernel.block).map(lambda x: x[:, :, 0])
    after = advance(table, written, count, kernel)
    if not isinstance(count, Tensor):
        return after
    pairs = zip(table, after, strict=True)
    return Table(*(None if x is None else torch.where(due.view(-1, *[1] * (x.dim() - 1)), y, x) for x, y in pairs))  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------- without exact rows


def by_chunks(
    x: Inputs,
    normalize: bool = True,
    chunk: int = 16,
    *,
    state: State | None = None,
    causal: bool = True,
    real: Tensor | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, State | None]:
    """All tokens at once, after ``state``: [B, H, N, V], and the state after them (None if not ``causal``)."""
    layout = layout_of(x, chunk, 0, 0, real, documents)
    written = _written(_keys(x).map(layout.queries), chunk, layout.real)
    assert x.features is not None
    features, after = layout.queries(x.features), None
    if causal:
        out, after = attend_chunks(features, written, layout, state, normalize)
    else:
        out = attend_chunks_both_sides(features, written, layout, normalize)
    return layout.outputs(out, x.q.shape[2]), after


def by_step(
    x: Inputs, normalize: bool = True, *, state: State | None = None, real: Tensor | None = None
) -> tuple[Tensor, State]:
    """The same, one token after the other."""
    if state is None:
        state = State.empty(len(x.q), x.k.shape[1], FEATURES, x.v.shape[-1], x.v)
    outputs = []
    for n in range(x.q.shape[2]):
        one = part(x, slice(n, n + 1))
        written = _written(_keys(one), 1, None if real is None else real[:, n : n + 1])
        assert one.features is not None
        out, state = attend_one(one.features, written.map(lambda t: t[:, :, 0]), state, normalize)
        outputs.append(out)
    return torch.cat(outputs, 2), state


# -------------------------------------------------------------------------------------------------------- which tokens


def padding(length: int, spans: list[tuple[int, int]]) -> Tensor:
    """[B, N], False in the first and the last so many tokens of each row."""
    real = torch.ones(len(spans), length, dtype=torch.bool)
    for row, (left, right) in zip(real, spans, strict=True):
        row[:left] = row[length - right :] = False
    return real


def numbered(rows: list[list[int]]) -> Tensor:
    """[B, N], which document each token is of, by the documents' lengths."""
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])
