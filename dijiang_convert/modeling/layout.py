"""Where tokens lie in blocks.

Blocks count from a row's first real token, or a document's where a row has several. So tokens are moved before
attention sees them: padding goes, and each document begins a block of its own.

Shape legend: B batch, A heads of any kind, N new tokens, n blocks, C tokens of a block, T = n·C slots, P blocks of the
window, L = (P + 1)·C slots that a cache keeps: those of P blocks and of the block after them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .state import NEVER, accumulation_dtype


class Layout(NamedTuple):
    """The slots of new tokens. Slot 0 is the first of the block that the last cached token is in.

    block, blocks: C, and n. before: P · C, the slots before slot 0 that keys have and queries don't.
    age: [B or 1, n], which block of its document a block is, counted from 0.
    offset: how many tokens of block 0 are cached: one number, or [B] where rows differ.
    real: [B or 1, T], which slots have a new token.
    source: [B, T], the new token in each slot, or None where rows are alike: then tokens follow one another from slot
        `offset` on. target: [B, N], the slot of each new token, or None as well.
    last: the block of each row's last token: one number, or [B].
    """

    block: int
    blocks: int
    before: int
    age: Tensor
    offset: int | Tensor
    real: Tensor
    source: Tensor | None
    target: Tensor | None
    last: int | Tensor

    @classmethod
    def plain(cls, length: int, block: int, before: int, count: int, device: torch.device) -> "Layout":
        """Rows without padding, after ``count`` cached tokens each."""
        first = max(count - 1, 0) // block
        offset = count - first * block
        blocks = -(-(offset + length) // block)
        places = torch.arange(blocks * block, device=device)[None]
        age = first + torch.arange(blocks, device=device)[None]
        real = (places >= offset) & (places < offset + length)
        return cls(block, blocks, before, age, offset, real, None, None, blocks - 1)

    @classmethod
    def padded(cls, valid: Tensor, block: int, before: int, count: Tensor) -> "Layout":
        """Rows with padding anywhere, after ``count`` [B] cached tokens. valid: [B, N], False for padding."""
        length = valid.shape[1]
        first = (count - 1).clamp(min=0) // block
        offset = count - first * block
        rank = valid.long().cumsum(1)  # from 1 on
        blocks = -(-(block + length) // block)  # offset is at most a block
        target = torch.where(valid, offset[:, None] + rank - 1, blocks * block)
        age = first[:, None] + torch.arange(blocks, device=valid.device)
        last = (offset + rank[:, -1] - 1).clamp(min=0) // block
        return cls._from_targets(target, block, blocks, before, age, offset, last)

    @classmethod
    def packed(cls, documents: Tensor, block: int, before: int) -> "Layout":
        """Rows of several documents and no cache. documents: [B, N], the number of each token's document.

        A compiled graph has room for as many documents in a row as it has blocks; more of them are an error.
        """
        length = documents.shape[1]
        places = torch.arange(length, device=documents.device)
        starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
        position = places - torch.where(starts, places, 0).cummax(1).values  # in the document
        index = (position % block == 0).long().cumsum(1) - 1  # of each token's block
        if torch.compiler.is_compiling():
            blocks = 2 * -(-length // block) + 1
            torch._assert_async((index < blocks).all(), "a compiled graph takes no row with more documents than blocks")
        else:
            blocks = int(index.max()) + 1
        age = torch.zeros(len(documents), blocks, dtype=torch.long, device=documents.device)
        age = age.scatter(1, index, position // block)
        offset, last = torch.zeros_like(index[:, 0]), index[:, -1]
        return cls._from_targets(index * block + position % block, block, blocks, before, age, offset, last)

    @classmethod
    def _from_targets(
        cls, target: Tensor, block: int, blocks: int, before: int, age: Tensor, offset: Tensor, last: Tensor
    ) -> "Layout":
        """Tokens whose target lies behind the last slot are padding."""
        slots, length = blocks * block, target.shape[1]
        source = torch.full((target.shape[0], slots + 1), -1, dtype=torch.long, device=target.device)
        places = torch.arange(length, device=target.device).expand_as(target)
        source = source.scatter(1, target, places)[:, :-1]
        target = target.clamp(max=slots - 1)
        return cls(block, blocks, before, age, offset, source >= 0, source.clamp(min=0), target, last)

    def queries(self, new: Tensor) -> Tensor:
        """[B, A, N, D] → [B, A, T, D]. What lies in slots without a new token means nothing."""
        if self.source is not None:
            return new.gather(2, self.source[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3]))
        assert isinstance(self.offset, int)
        empty = self.offset, self.blocks * self.block - self.offset - new.shape[2]
        return _padded(new, *empty)

    def keys(self, new: Tensor, cached: Tensor | None) -> Tensor:
        """[B, A, N, D] → [B, A, P · C + T, D], with the cached tokens [B, A, L, D] where they belong."""
        placed = self.queries(new)
        if cached is None:
            return _padded(placed, self.before, 0)
        place = torch.arange(self.block, device=new.device)
        kept = place < (self.offset[:, None] if isinstance(self.offset, Tensor) else self.offset)
        first = torch.where(kept.view(-1, 1, self.block, 1), cached[:, :, self.before :], placed[:, :, : self.block])
        return torch.cat([cached[:, :, : self.before], first, placed[:, :, self.block :]], 2)

    def outputs(self, x: Tensor, length: int) -> Tensor:
        """[B, A, T, D] → [B, A, N, D], the inverse of `queries`."""
        if self.target is not None:
            return x.gather(2, self.target[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
        assert isinstance(self.offset, int)
        return x[:, :, self.offset : self.offset + length]

    def to_blocks(self, x: Tensor, kv_heads: int) -> Tensor:
        """Query heads with their key/value head: [B, H, T, D] → [X, n, R · C, D]."""
        x = x.view(x.shape[0], kv_heads, -1, self.blocks, self.block, x.shape[3])
        return x.transpose(2, 3).flatten(3, 4).flatten(0, 1)

    def from_blocks(self, x: Tensor, batch: int) -> Tensor:
        """The inverse of `to_blocks`: [X, n, R · C, D] → [B, H, T, D]."""
        x = x.view(batch, x.shape[0] // batch, self.blocks, -1, self.block, x.shape[3])
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def causal_bias(self, like: Tensor) -> Tensor:
        """[C, L], NEVER where a key of the window comes after the query."""
        place = torch.arange(self.block, device=like.device)
        return self._never(torch.arange(-self.before, self.block, device=like.device) > place[:, None], like)

    def window_bias(self, like: Tensor) -> Tensor:
        """[B or 1, n, L], NEVER where a block of the window is not of the same document."""
        back = torch.arange(self.before // self.block, -1, -1, device=like.device)
        return self._never((back > self.age[..., None]).repeat_interleave(self.block, -1), like)

    def both_windows_bias(self, like: Tensor) -> Tensor:
        """The same for a window on both sides, [B or 1, n, 2·P·C + C], and NEVER where there is no key."""
        reach, blocks = self.before // self.block, self.blocks
        first = torch.arange(blocks, device=like.device) - self.age
        around = F.pad(first, (reach, reach), value=-1).unfold(1, 2 * reach + 1, 1)  # [B or 1, n, 2·P + 1]
        real = F.pad(self.real, (self.before, self.before)).unfold(1, 2 * self.before + self.block, self.block)
        same = (around == first[..., None]).repeat_interleave(self.block, -1)
        return self._never(~(same & real), like)

    @staticmethod
    def _never(hidden: Tensor, like: Tensor) -> Tensor:
        return torch.zeros(hidden.shape, dtype=accumulation_dtype(like), device=like.device).masked_fill(hidden, NEVER)

    def places(self) -> Tensor:
        """Which token of its document is in each slot, [B or 1, T]."""
        slot = torch.arange(self.block, device=self.age.device)
        return (self.age[..., None] * self.block + slot).flatten(1)

    def places_left(self) -> Tensor:
        """The same for keys that leave the window, [B or 1, (n − 1)·C]: those of P + 1 blocks before."""
        return self.places()[:, self.block :] - self.before - self.block

    def flip(self) -> "Layout":
        """Blocks from right to left."""
        first = torch.arange(self.blocks, device=self.age.device) - self.age
        length = (first[:, :, None] == first[:, None]).sum(-1)  # of each block's document, in blocks
        return self._replace(age=(length - 1 - self.age).flip(1))

    def last_block(self, x: Tensor) -> Tensor:
        """What belongs to each row's last block: [B, A, n, …] → [B, A, …]."""
        if not isinstance(self.last, Tensor):
            return x[:, :, self.last]
        index = self.last.view(-1, *[1] * (x.dim() - 1)).expand(-1, x.shape[1], 1, *x.shape[3:])
        return x.gather(2, index)[:, :, 0]

    def last_window(self, x: Tensor) -> Tensor:
        """The slots that a cache keeps, which end with each row's last block: [B, A, P · C + T, D] → [B, A, L, D]."""
        length = self.before + self.block
        if not isinstance(self.last, Tensor):
            return x[:, :, x.shape[2] - length :]
        index = self.last[:, None] * self.block + torch.arange(length, device=x.device)
        return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _padded(x: Tensor, before: int, after: int) -> Tensor:
    """[B, A, T, D] with so many zeros before and after: one copy, where F.pad writes everything twice."""
    parts = [x.new_zeros(*x.shape[:2], count, x.shape[3]) for count in (before, after)]
    return torch.cat([parts[0], x, parts[1]], 2) if before or after else x
