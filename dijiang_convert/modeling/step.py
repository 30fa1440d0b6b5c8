"""Attention of one new token over the table, and the table's move by one block: see `kernel`, which says what both are.

Shape legend: B batch, H query heads, G key/value heads, X = B·G, R = H / G, D head_dim, V value head_dim, C tokens of a
block, P blocks of the window before the query's own, L = (P + 1)·C, M rows of sinks and memory.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_dijiang import Kernel
from .kernel import softmax_over_rows
from .memory import key_score
from .state import NEVER, State, Written
from .table import KeyTokens, Logits, Queries, Table


def attend_token(
    queries: Queries,
    token: KeyTokens,
    table: Table,
    count: int | Tensor,
    valid: Tensor | None,
    kernel: Kernel,
    logits: Logits,
) -> Tensor:
    """Attention of one new token of each row, [B, H, 1, V]. Writes the token to the table, in place.

    queries, token: of one slot. count: tokens before, one number or [B]. valid: [B], False for padding, or None.
    A table whose last block is full must have been through `advance`.
    """
    most, slot, kv_heads = kernel.sinks + kernel.memory, kernel.window + count % kernel.block, table.k.shape[1]
    for kept, new in zip(table.window, token, strict=True):
        if kept is not None and new is not None:
            _write(kept, new, slot, valid)
    batch, heads, _, head_dim = queries.q.shape
    apart = batch * kv_heads  # X
    q = queries.q.reshape(apart, -1, head_dim)  # [X, R, D]
    first, after = visible_rows(count, kernel)
    if isinstance(count, Tensor):
        row = torch.arange(table.k.shape[2], device=q.device)
        hidden = ((row < first[:, None]) | (row >= after[:, None])).repeat_interleave(kv_heads, 0)
        near, values = logits.of(q, table.k.flatten(0, 1)).masked_fill(hidden[:, None], NEVER), table.v
        start, end = most, table.k.shape[2]  # of the window
    else:
        near, values = logits.of(q, table.k[:, :, first:after].flatten(0, 1)), table.v[:, :, first:after]
        start, end = max(first, most), after
    part = {"near": near, "window": values.flatten(0, 1)}
    if queries.features is not None and table.log_weight is not None and table.value is not None:
        part["features"] = queries.features.reshape(apart, -1, table.value.shape[2])
        part["weight"], part["value"] = table.log_weight.view(apart, 1, -1), table.value.flatten(0, 1)
    if logits.sink is not None:
        part["sink"] = logits.sink.to(near.dtype).expand(batch, -1).reshape(apart, -1, 1)
    out, weights = softmax_over_rows(part, logits)
    if kernel.memory:  # the attention that keys receive is a softmax over the window alone
        given = weights[..., weights.shape[-1] - (end - start) :]
        given = (given / given.sum(-1, keepdim=True).clamp_min(torch.finfo(given.dtype).tiny)).sum(1)
        given = given.view(batch, kv_heads, -1)
        given = given if valid is None else given * valid[:, None, None]
        table.received[:, :, start - most : end - most].add_(given)
    return out.view(batch, heads, 1, -1)


def _write(kept: Tensor, new: Tensor, place: int | Tensor, valid: Tensor | None) -> None:
    """Puts new [B, A, 1, D] in the place of kept [B, A, L, D], in rows that are valid."""
    if not isinstance(place, Tensor):
        kept[:, :, place : place + 1] = new
        return
    index = place[:, None, None, None].expand_as(new)
    if valid is not None:
        new = torch.where(valid[:, None, None, None], new, kept.gather(2, index))
    kept.scatter_(2, index, new.to(kept.dtype))


def visible_rows(count: Any, kernel: Kernel) -> tuple[Any, Any]:
    """The rows of k and v that the token after ``count`` others sees, from the first to before the second: numbers, or
    [B] for a count [B]."""
    most = kernel.sinks + kernel.memory
    left = count // kernel.block * kernel.block - kernel.window  # keys that have left the window, or are missing in it
    after = most + kernel.window + count % kernel.block + 1
    if isinstance(count, Tensor):
        return most - left.clamp(max=most), after
    return most - min(left, most), after


def advance(table: Table, written: Written | None, count: int | Tensor, kernel: Kernel) -> Table:
    """The table once its full last block has made room for the next: the oldest block of the window leaves it.

    written: what that block writes to the state, [B, G, C, …], or None without one. count: tokens so far, a whole
    number of blocks. In texts that are shorter than the window nothing leaves yet.
    """
    most, size, state = kernel.sinks + kernel.memory, kernel.block, table.state
    first = torch.as_tensor(count, device=table.k.device).view(-1, 1, 1) - kernel.window - size  # of the leaving block
    gone, place = first >= 0, first + torch.arange(size, device=table.k.device)
    score = table.received[..., :size]
    if written is not None and state is not None:
        score = key_score(score, [written.map(_as_block)], State(*map(_as_block, state)), kernel)
        entering, decay = written.summary()
        state = state.then(State(entering.log_weight.masked_fill(~gone, NEVER), entering.value), decay)
    score = score.masked_fill(place < kernel.sinks, torch.inf).masked_fill(~gone, -torch.inf)
    score, order = torch.cat([table.score.flip(2), score], 2).sort(dim=-1, descending=True, stable=True)
    best = order[..., :most].flip(2)[..., None]

    def kept(rows: Tensor, window: Tensor) -> Tensor:
        candidates = torch.cat([rows[:, :, :most].flip(2), window[:, :, :size]], 2)
        return torch.cat([candidates.gather(2, best.expand(-1, -1, -1, rows.shape[3])), _shifted(window, size)], 2)

    log_weight, value = (None, None) if state is None else state
    return Table(
        k=kept(table.k, table.window.k),
        v=kept(table.v, table.window.v),
        received=_shifted(table.received[..., None], size)[..., 0],
        score=score[..., :most].flip(2),
        log_weight=log_weight,
        value=value,
        far_k=None if table.far_k is None else _shifted(table.far_k, size),
        gates=None if table.gates is None else _shifted(table.gates, size),
    )


def _as_block(x: Tensor) -> Tensor:
    """[B, G, …] → [B, G, 1, …]."""
    return x[:, :, None]


def _shifted(x: Tensor, size: int) -> Tensor:
    """Without the first slots of [B, A, L, D], and with as many empty ones at the end."""
    return F.pad(x[:, :, size:], (0, 0, 0, size))
