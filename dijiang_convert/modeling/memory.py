"""The choice of the keys that keep a row once they have left the window: sinks and memory.

A key is scored once, as it leaves, by the attention that it received inside the window and by its recall error (arXiv
2505.23666). No score depends on the choice, so one sort of a text's scores gives the rows of all blocks: for each, the
best keys that left before it. The choice has no gradient, and nothing here computes attention.

Shape legend: B batch, G key/value heads, X = B·G, K keys, D head_dim, V value head_dim, n blocks, C tokens of a block,
P blocks of the window before the query's own, M rows of sinks and memory.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .configuration_dijiang import Kernel
from .layout import Layout
from .state import State, Written, recall
from .table import Keys, Table, rounded, unpacked


def key_score(received: Tensor, written: list[Written], state: State | None, kernel: Kernel) -> Tensor:
    """The scores by which keys get an exact row, [B, G, K]: received · ‖recall − v‖², recall being the state's answer.

    received: [B, G, K], attention that keys received in the window. written: what the keys write to the state,
    [B, G, n, C, …], in pieces along n. state: [B, G, n, …], which each block enters, or None. Without a state the score
    is the attention received; without a memory it is −inf, and sinks alone get rows.
    """
    if not kernel.memory:
        return torch.full_like(received, -torch.inf)
    if not written or state is None:
        return received
    counts, errors = [piece.features.shape[2] for piece in written], []
    with torch.no_grad():
        states = zip(state.log_weight.split(counts, 2), state.value.split(counts, 2), strict=True)
        for piece, entered in zip(written, states, strict=True):
            errors.append((recall(piece.features, State(*entered)) - piece.values).square_().sum(-1))
        return received * torch.cat(errors, 2).flatten(2)


class Memory(NamedTuple):
    """The sinks and memory of each block, chosen from K candidates.

    chosen: [B, G, n, M], which candidates a block reads, the best last. seen: [B or 1, G or 1, n, M], False for empty
    rows. k, v: [B, G, K, D or V], the candidates. score: [B, G, K], theirs.
    """

    chosen: Tensor
    seen: Tensor
    k: Tensor
    v: Tensor
    score: Tensor

    def rows(self, x: Tensor, split: Callable[[Tensor], list[Tensor]]) -> Iterator[Tensor]:
        """The rows of each block, [X, n, M, D or V], in the pieces that ``split`` makes of [X, n, …]. x: k or v.

        A piece is gathered as it is asked for; with gradients all are gathered at once, since the gradient of each
        gather is as large as x."""
        batch, kv_heads, candidates, dim = x.shape
        offset = torch.arange(batch * kv_heads, device=x.device).view(batch, kv_heads, 1, 1) * candidates
        index, x = (self.chosen + offset).flatten(0, 1), x.reshape(-1, dim)
        if torch.is_grad_enabled():
            yield from split(_rows(x, index))
        else:
            yield from (_rows(x, piece) for piece in split(index))


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.index_select(0, index.flatten()).view(*index.shape, x.shape[1])


def causal_memory(score: Tensor, keys: Keys, layout: Layout, table: Table | None, kernel: Kernel) -> Memory | None:
    """The rows of each block: the best of the keys that left the window before the block and of the table's rows. None
    if there are no such keys.

    score: [B, G, (n − 1)·C], of the keys that leave the window. keys: the text's. table: of the tokens before, or None.
    """
    most, leaving = kernel.sinks + kernel.memory, score.shape[2]
    if not most or (table is None and not leaving):
        return None
    k, v = (rounded(x[:, :, :leaving]) for x in (keys.k, keys.v))
    block = torch.arange(layout.blocks - 1, device=k.device).repeat_interleave(layout.block)
    if table is not None:  # the table's rows come first, the best before the others
        before = ((table.memory_k, k), (table.memory_v, v))
        k, v = (torch.cat([unpacked(x, y.dtype).flip(2), y], 2) for x, y in before)
        score, block = torch.cat([table.score.flip(2), score], 2), torch.cat([block.new_full((most,), -1), block])
    reads = torch.arange(layout.blocks, device=k.device)
    first = (reads - layout.age + layout.before // layout.block)[:, None, :, None]  # of each block's document

    def usable(block: Tensor) -> Tensor:
        return (block < reads[:, None]) & (block >= first)

    return Memory(*_best(score, block, usable, most), k, v, score)


def memory_of_text(score: Tensor, keys: Keys, layout: Layout, kernel: Kernel) -> Memory | None:
    """The rows of each block of an encoder: the best keys of its document outside its window; None for a kernel without
    sinks and memory. score: [B, G, T], −inf for slots without a key."""
    most = kernel.sinks + kernel.memory
    if not most:
        return None
    reads = torch.arange(layout.blocks, device=score.device)
    first = reads - layout.age  # the block that a block's document begins with, [B or 1, n]

    def usable(block: Tensor) -> Tensor:
        begins = first.expand(len(block), -1)[:, None, None].expand(*block.shape[:3], -1)
        begins = begins.gather(3, block.expand(-1, -1, 1, -1))
        far = (block - reads[:, None]).abs() * layout.block > layout.before
        return far & (begins == first[:, None, :, None])

    block = reads.repeat_interleave(layout.block)
    return Memory(*_best(score, block, usable, most), keys.k, keys.v, score)


def _best(score: Tensor, block: Tensor, usable: Callable[[Tensor], Tensor], most: int) -> tuple[Tensor, Tensor]:
    """For each block the M = ``most`` best keys that it may read, the best last: their index, [B, G, n, M], and True
    for rows that have a key. Of keys with the same score the earlier is better.

    score: [B, G, K], −inf for what is no key. block: [K], the block of each key. usable: takes the blocks of keys,
    [B, G, 1, K], and returns which blocks of the text may read them, [B, G, n, K].
    """
    score, order = score.sort(dim=-1, descending=True, stable=True)
    there = usable(block[order][:, :, None]) & (score > -torch.inf)[:, :, None]
    rank = there.cumsum(-1, dtype=torch.int32)  # among the keys that a block may read, from 1 on
    place = torch.where(there & (rank <= most), most - rank, most).long()
    index = place.new_zeros(*place.shape[:3], most + 1)
    index = index.scatter(-1, place, order[:, :, None].expand_as(place))[..., :most]
    return index, torch.arange(most, device=score.device) >= most - rank[..., -1:]
