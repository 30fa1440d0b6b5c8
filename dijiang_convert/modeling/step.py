"""Decoding: attention of one new token over the table, and the table's move by one block. `kernel` describes both.

The caller decides when the table moves, and keeps the table and the count of tokens.

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
from .state import NEVER, State, Written, accumulation_dtype
from .table import KeyTokens, Logits, Queries, Table, packed, whole_numbers


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

    queries: q [B, H, 1, D] and features [B, H, 1, F]. token: [B, G, 1, …], the same token as a key. table: with room
    in its last block, as `advance` makes it. count: how many tokens are before, one number or [B]. valid: [B], False
    for padding, or None without padding.
    """
    slot: Any = kernel.window + count % kernel.block
    for kept, new in zip(table.window, token, strict=True):
        if kept is not None and new is not None:
            _write(kept, new, slot, valid)
    batch, heads, _, head_dim = queries.q.shape
    kv_heads = table.k.shape[1]
    apart = batch * kv_heads  # X
    q = queries.q.reshape(apart, -1, head_dim)  # [X, R, D]
    best, first = visible_rows(count, kernel)
    memory, window = slice(None), slice(None)
    if not isinstance(count, Tensor):
        memory, window = slice(best, None), slice(first, slot + 1)
    part = {
        "near": logits.of(q, table.k[:, :, window].flatten(0, 1)),
        "window": table.v[:, :, window].flatten(0, 1),
        "own": q,
    }
    for name, packed_rows in (("k", table.memory_k), ("v", table.memory_v)):
        part[name], unit = whole_numbers(packed_rows[:, :, memory].flatten(0, 1), accumulation_dtype(q))
        if unit is not None:
            part[f"{name}_unit"] = unit.mT
    if isinstance(count, Tensor):
        row = torch.arange(max(table.k.shape[2], table.score.shape[2]), device=q.device)
        unseen = ((row < first[:, None]) | (row > slot[:, None]))[:, : table.k.shape[2]]
        part["near"] = part["near"].masked_fill(unseen.repeat_interleave(kv_heads, 0)[:, None], NEVER)
        empty = (row < best[:, None])[:, : table.score.shape[2]]
        part["hidden"] = torch.where(empty, NEVER, 0.0).repeat_interleave(kv_heads, 0)[:, None]
    if queries.features is not None and table.log_weight is not None and table.value is not None:
        part["features"] = queries.features.reshape(apart, -1, table.value.shape[2])
        part["weight"], part["value"] = table.log_weight.view(apart, 1, -1), table.value.flatten(0, 1)
    if logits.sink is not None:
        part["sink"] = logits.sink.to(part["near"].dtype).expand(batch, -1).reshape(apart, -1, 1)
    out, weights = softmax_over_rows(part, logits)
    if kernel.memory:  # the attention that keys receive is a softmax over the window alone
        given = (weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)).sum(1)
        given = given.view(batch, kv_heads, -1)
        given = given if valid is None else given * valid[:, None, None]
        table.received[:, :, window].add_(given)
    return out.view(batch, heads, 1, -1)


def _write(kept: Tensor, new: Tensor, place: int | Tensor, valid: Tensor | None) -> None:
    """Writes a token to a slot of the window, in place. kept: [B, A, L, D], the window. new: [B, A, 1, D], the token.
    place: the slot, one number or [B]. valid: [B], False for rows that stay, or None."""
    if not isinstance(place, Tensor):
        kept[:, :, place : place + 1] = new
        return
    index = place[:, None, None, None].expand_as(new)
    if valid is not None:
        new = torch.where(valid[:, None, None, None], new, kept.gather(2, index))
    kept.scatter_(2, index, new.to(kept.dtype))


def visible_rows(count: Any, kernel: Kernel) -> tuple[Any, Any]:
    """The first row of the memory, and the first slot of the window, that the token after ``count`` others sees: two
    numbers, or [B] each for a count [B]."""
    most = kernel.sinks + kernel.memory
    left = count // kernel.block * kernel.block - kernel.window  # keys that left the window; below 0, its empty slots
    if isinstance(count, Tensor):
        return most - left.clamp(0, most), (-left).clamp_min(0)
    return most - min(max(left, 0), most), max(-left, 0)


def advance(table: Table, written: Written | None, count: int | Tensor, kernel: Kernel) -> Table:
    """A new table whose last block is free: the oldest block of the window has left it.

    table: with a full last block. written: [B, G, C, …], what the oldest block writes to the state, or None without a
    state. count: how many tokens are in the text, one number or [B], multiples of C. In a text that is not longer than
    the window the oldest block is still empty, and no key leaves.
    """
    most, size, state = kernel.sinks + kernel.memory, kernel.block, table.state
    # The place of the leaving block's first token in the text; below 0 where no block leaves.
    first = torch.as_tensor(count, device=table.k.device).view(-1, 1, 1) - kernel.window - size
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
        candidates = torch.cat([packed(rows).flip(2), packed(window[:, :, :size])], 2)
        return candidates.gather(2, best.expand(-1, -1, -1, rows.shape[3]))

    log_weight, value = (None, None) if state is None else state
    return Table(
        k=_shifted(table.k, size),
        v=_shifted(table.v, size),
        received=_shifted(table.received[..., None], size)[..., 0],
        memory_k=kept(table.memory_k, table.k),
        memory_v=kept(table.memory_v, table.v),
        score=score[..., :most].flip(2),
        log_weight=log_weight,
        value=value,
        far_k=None if table.far_k is None else _shifted(table.far_k, size),
        gates=None if table.gates is None else _shifted(table.gates, size),
    )


def _as_block(x: Tensor) -> Tensor:
    """x: [B, G, …] → [B, G, 1, …], as one block."""
    return x[:, :, None]


def _shifted(x: Tensor, size: int) -> Tensor:
    """x [B, A, L, D] without its first ``size`` slots, and with as many slots of zeros at the end."""
    return F.pad(x[:, :, size:], (0, 0, 0, size))
