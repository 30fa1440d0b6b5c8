"""The places of tokens in blocks, settled before attention sees the tokens.

Blocks count from the first real token of a row, or of each document in a packed row. So tokens are moved to slots:
padding gets none, and each document begins a block. This module moves tensors and says which slots see each other; it
computes no attention.

Shape legend: B batch, H query heads, G key/value heads, X = B·G, R = H / G, A heads of any kind, N new tokens, n
blocks, C tokens of a block, T = n·C slots, P blocks of the window before the query's own, L = (P + 1)·C slots of a
window, D head_dim or any width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .state import NEVER, accumulation_dtype


class Layout(NamedTuple):
    """The slots of new tokens. Slot 0 begins the block that holds the last cached token.

    block, blocks: C and n. before: P · C, the number of slots before slot 0, which only keys have.
    age: [B or 1, n], which block of its document a block is, counted from 0.
    offset: how many tokens of block 0 are cached, one number or [B].
    real: [B or 1, T], True for slots that have a new token.
    source: [B, T], the new token in each slot, or None if in every row tokens follow one another from slot `offset` on.
    target: [B, N], the slot of each new token, or None as `source`.
    last: the block of each row's last token, one number or [B].
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
        """The layout of N = ``length`` tokens without padding, which follow ``count`` cached tokens in every row."""
        first = max(count - 1, 0) // block
        offset = count - first * block
        blocks = -(-(offset + length) // block)
        places = torch.arange(blocks * block, device=device)[None]
        age = first + torch.arange(blocks, device=device)[None]
        real = (places >= offset) & (places < offset + length)
        return cls(block, blocks, before, age, offset, real, None, None, blocks - 1)

    @classmethod
    def padded(cls, valid: Tensor, block: int, before: int, count: Tensor) -> "Layout":
        """The layout of rows with padding anywhere. valid: [B, N], False for padding. count: [B], cached tokens."""
        length = valid.shape[1]
        first = (count - 1).clamp(min=0) // block
        offset = count - first * block
        rank = valid.long().cumsum(1)  # how many real tokens a row has so far
        blocks = -(-(block + length) // block)  # no offset is larger than a block
        target = torch.where(valid, offset[:, None] + rank - 1, blocks * block)
        age = first[:, None] + torch.arange(blocks, device=valid.device)
        last = (offset + rank[:, -1] - 1).clamp(min=0) // block
        return cls._from_targets(target, block, blocks, before, age, offset, last)

    @classmethod
    def packed(cls, documents: Tensor, block: int, before: int) -> "Layout":
        """The layout of packed rows, which have no cache. documents: [B, N], the number of each token's document.

        A compiled graph has 2·⌈N / C⌉ + 1 blocks, enough for ⌈N / C⌉ + 1 documents a row; a row that needs more fails.
        """
        length = documents.shape[1]
        places = torch.arange(length, device=documents.device)
        starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
        position = places - torch.where(starts, places, 0).cummax(1).values  # the place of each token in its document
        index = (position % block == 0).long().cumsum(1) - 1  # the block of each token
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
        """The layout that puts tokens into given slots. target: [B, N], a token's slot, or T for padding."""
        slots, length = blocks * block, target.shape[1]
        source = torch.full((target.shape[0], slots + 1), -1, dtype=torch.long, device=target.device)
        places = torch.arange(length, device=target.device).expand_as(target)
        source = source.scatter(1, target, places)[:, :-1]
        target = target.clamp(max=slots - 1)
        return cls(block, blocks, before, age, offset, source >= 0, source.clamp(min=0), target, last)

    def queries(self, new: Tensor) -> Tensor:
        """new: [B, A, N, D] → [B, A, T, D], in slots. Slots without a new token hold arbitrary numbers."""
        if self.source is not None:
            return new.gather(2, self.source[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3]))
        assert isinstance(self.offset, int)
        empty = self.offset, self.blocks * self.block - self.offset - new.shape[2]
        return _padded(new, *empty)

    def keys(self, new: Tensor, cached: Tensor | None) -> Tensor:
        """new: [B, A, N, D] → [B, A, P · C + T, D], in slots. cached: [B, A, L, D], the tokens before, or None."""
        placed = self.queries(new)
        if cached is None:
            return _padded(placed, self.before, 0)
        place = torch.arange(self.block, device=new.device)
        kept = place < (self.offset[:, None] if isinstance(self.offset, Tensor) else self.offset)
        first = torch.where(kept.view(-1, 1, self.block, 1), cached[:, :, self.before :], placed[:, :, : self.block])
        return torch.cat([cached[:, :, : self.before], first, placed[:, :, self.block :]], 2)

    def outputs(self, x: Tensor, length: int) -> Tensor:
        """x: [B, A, T, D] → [B, A, N, D], the inverse of `queries`. length: N."""
        if self.target is not None:
            return x.gather(2, self.target[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
        assert isinstance(self.offset, int)
        return x[:, :, self.offset : self.offset + length]

    def to_blocks(self, x: Tensor, kv_heads: int) -> Tensor:
        """x: [B, H, T, D] → [X, n, R · C, D], the query heads of a key/value head side by side in each block."""
        x = x.view(x.shape[0], kv_heads, -1, self.blocks, self.block, x.shape[3])
        return x.transpose(2, 3).flatten(3, 4).flatten(0, 1)

    def from_blocks(self, x: Tensor, batch: int) -> Tensor:
        """x: [X, n, R · C, D] → [B, H, T, D], the inverse of `to_blocks`. batch: B."""
        x = x.view(batch, x.shape[0] // batch, self.blocks, -1, self.block, x.shape[3])
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def causal_bias(self, like: Tensor) -> Tensor:
        """What is added to logits, [C, L]: NEVER where a key of the window comes after the query, else 0."""
        place = torch.arange(self.block, device=like.device)
        return self._never(torch.arange(-self.before, self.block, device=like.device) > place[:, None], like)

    def window_bias(self, like: Tensor) -> Tensor:
        """What is added to logits, [B or 1, n, L]: NEVER where a block of the window is of another document, else 0."""
        back = torch.arange(self.before // self.block, -1, -1, device=like.device)
        return self._never((back > self.age[..., None]).repeat_interleave(self.block, -1), like)

    def both_windows_bias(self, like: Tensor) -> Tensor:
        """What is added to logits of a window on both sides, [B or 1, n, (2·P + 1)·C]: NEVER where a slot is of another
        document or has no key, else 0."""
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
        """The place of each slot in its document, counted from 0, [B or 1, T]."""
        slot = torch.arange(self.block, device=self.age.device)
        return (self.age[..., None] * self.block + slot).flatten(1)

    def places_left(self) -> Tensor:
        """The places of the keys that leave the window before each block but the first, [B or 1, (n − 1)·C]. They lie
        P + 1 blocks before that block; where the document has no such keys, their places are negative."""
        return self.places()[:, self.block :] - self.before - self.block

    def flip(self) -> "Layout":
        """The layout with its blocks from right to left, of which only `age` is made: nothing else is valid."""
        first = torch.arange(self.blocks, device=self.age.device) - self.age
        length = (first[:, :, None] == first[:, None]).sum(-1)  # how many blocks each block's document has
        return self._replace(age=(length - 1 - self.age).flip(1))

    def last_block(self, x: Tensor) -> Tensor:
        """x: [B, A, n, …] → [B, A, …], the part of each row's last block."""
        if not isinstance(self.last, Tensor):
            return x[:, :, self.last]
        index = self.last.view(-1, *[1] * (x.dim() - 1)).expand(-1, x.shape[1], 1, *x.shape[3:])
        return x.gather(2, index)[:, :, 0]

    def last_window(self, x: Tensor) -> Tensor:
        """x: [B, A, P · C + T, D] → [B, A, L, D], the window that ends with each row's last block; a cache keeps it."""
        length = self.before + self.block
        if not isinstance(self.last, Tensor):
            return x[:, :, x.shape[2] - length :]
        index = self.last[:, None] * self.block + torch.arange(length, device=x.device)
        return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _padded(x: Tensor, before: int, after: int) -> Tensor:
    """x [B, A, T, D] with ``before`` and ``after`` slots of zeros. It is one copy, where F.pad writes all twice."""
    parts = [x.new_zeros(*x.shape[:2], count, x.shape[3]) for count in (before, after)]
    return torch.cat([parts[0], x, parts[1]], 2) if before or after else x
