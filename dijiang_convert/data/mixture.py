"""Text as contexts: tokens that see nothing of each other, from several corpora, shuffled and mixed by weight.

Everything is a stream, and depends on nothing but the corpora, the tokenizer and a seed.
"""

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import DijiangError
from ..progress import console
from .chat import chat_tokens
from .readers import Chat, Piece, Source

SHUFFLE_CHARS = 2**26  # of pieces that wait to be drawn, a source
BATCH_CHARS = 2**19  # of pieces that are tokenised together
REAL, START, TARGET = 1, 2, 4  # bits of a token's mark; padding has none. START is of a context in a row

Array = np.ndarray[Any, Any]


class Tokens(NamedTuple):
    """A context, or a row of them: token ids [n] int32 and their marks [n] uint8."""

    ids: Array
    marks: Array


class Stream:
    """The contexts of one source, and how many tokens it has given. Documents have their `ends`, unless ``bare``."""

    def __init__(
        self,
        source: Source,
        number: int,
        tokenizer: PreTrainedTokenizerBase,
        size: int,
        held_out: bool,
        bare: bool = False,
    ) -> None:
        self.source, self.number, self.tokenizer, self.size, self.held_out = source, number, tokenizer, size, held_out
        self.taken = 0  # tokens
        self.holds = 0  # tokens of one reading, once it has been read to the end
        self.silent = 0  # chats without an answer, in the first reading
        self.before, self.after = ([], []) if bare else ends(tokenizer)

    def once(self, order: random.Random | None) -> Iterator[Tokens]:
        """One reading: in random order, or as it is and with no document cut."""
        pieces = self.source.pieces(None if order is None else self.size, order, self.held_out)
        for batch in _batches(pieces if order is None else _shuffled(pieces, order)):
            texts = [piece.text for piece in batch if isinstance(piece, Piece)]
            encoded = iter(self._encode(texts))
            for piece in batch:
                if isinstance(piece, Chat):
                    ids, targets = chat_tokens(piece, self.tokenizer, answers=order is not None)
                    tokens = _context(ids, targets)
                    if not (tokens.marks[1:] & TARGET).any():
                        self.silent += not self.holds
                        continue
                else:
                    tokens = _context([*self.before * piece.first, *next(encoded), *self.after * piece.last])
                if len(tokens.ids):
                    self.taken += len(tokens.ids)
                    yield tokens

    def forever(self, seed: int) -> Iterator[Tokens]:
        """One reading after another, each in an order of its own."""
        for reading in itertools.count():
            before = self.taken
            yield from self.once(random.Random(f"{seed} {self.number} {reading}"))
            if self.taken == before:
                what = "answer of an assistant" if self.silent else "word"
                raise DijiangError(f"{self.source.name} has no {what} to learn from: give another corpus")
            self.holds = self.holds or self.taken

    def tell(self) -> None:
        """What a user should know of the source, on stderr."""
        notes = []
        if self.holds and self.taken > self.holds:
            times = self.taken / self.holds
            notes.append(f"it has {self.holds:,} tokens for a share of {self.taken:,}, so it is read {times:.1f} times")
        if self.silent:
            notes.append(f"{self.silent:,} chats without an answer to learn from are left out")
        if notes:
            console.print(f"{self.source.name}: {'; '.join(notes)}", markup=False, highlight=False, soft_wrap=True)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        options: dict[str, Any] = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        return self.tokenizer(texts, add_special_tokens=False, **options)["input_ids"]


def ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What starts and ends a document: the tokens that the tokenizer puts around a text, or else its end-of-text."""
    bare, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    before, after = full[:at], full[at + len(bare) :]
    if not before and not after and tokenizer.eos_token_id is not None:
        after = [tokenizer.eos_token_id]
    return before, after


def _shuffled(pieces: Iterable[Piece | Chat], order: random.Random) -> Iterator[Piece | Chat]:
    """In random order, as far as SHUFFLE_CHARS allow."""
    buffer: list[Piece | Chat] = []
    held = 0
    for piece in pieces:
        buffer.append(piece)
        held += _chars(piece)
        while held > SHUFFLE_CHARS:
            drawn = order.randrange(len(buffer))
            buffer[drawn], buffer[-1] = buffer[-1], buffer[drawn]
            held -= _chars(buffer[-1])
            yield buffer.pop()
    order.shuffle(buffer)
    while buffer:
        yield buffer.pop()


def _chars(piece: Piece | Chat) -> int:
    """What a piece takes of a buffer: its text, and about what the objects around it do."""
    if isinstance(piece, Piece):
        return len(piece.text) + 200
    return sum(len(str(message.get("content"))) + 500 for message in piece.messages)


def _batches(pieces: Iterable[Piece | Chat]) -> Iterator[list[Piece | Chat]]:
    """Small at first, so that a short run does not wait for what it won't need."""
    batch: list[Piece | Chat] = []
    held, limit = 0, BATCH_CHARS // 64
    for piece in pieces:
        batch.append(piece)
        held += _chars(piece)
        if held >= limit:
            yield batch
            batch, held, limit = [], 0, min(2 * limit, BATCH_CHARS)
    if batch:
        yield batch


def _context(ids: list[int], targets: list[int] | None = None) -> Tokens:
    """All tokens are targets, or those that ``targets`` marks; packing takes the first of a context or row."""
    marks = np.full(len(ids), REAL | TARGET, np.uint8)
    if targets is not None:
        marks[np.asarray(targets) == 0] = REAL
    return Tokens(np.asarray(ids, np.int32), marks)


def mixed(streams: Sequence[Stream], seq_len: int, seed: int) -> Iterator[Tokens]:
    """Contexts of all streams: the next is from the one that has given the least for its weight."""
    contexts = {stream: stream.forever(seed) for stream in streams}
    while True:
        yield next(contexts[min(streams, key=lambda stream: stream.taken / stream.source.weight)])
        if all(stream.holds for stream in streams):
            total = sum(stream.holds for stream in streams)
            if total < seq_len:
                raise too_short(streams, total, seq_len)


def too_short(streams: Sequence[Stream], tokens: int, seq_len: int) -> DijiangError:
    names = ", ".join(stream.source.name for stream in streams)
    return DijiangError(
        f"{names} has {tokens} tokens, less than one row of {seq_len}: give more text or a smaller --seq-len"
    )
