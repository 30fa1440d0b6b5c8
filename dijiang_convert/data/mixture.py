"""Tokenises several corpora into one stream of contexts, shuffled and mixed by weight.

A context is a sequence of tokens that see no token outside of it: a document, a piece of one, or a chat. The stream
depends on nothing but the corpora, the tokenizer and a seed. `rows` packs contexts into rows.
"""

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import DijiangError
from ..progress import say
from .chat import chat_tokens
from .readers import Chat, Piece, Source

SHUFFLE_CHARS = 2**26  # characters in the shuffle buffer of a source
BATCH_CHARS = 2**19  # characters that are tokenised together
# Bits of a token's mark: the token is no padding, starts a context in its row, is a target of the loss.
REAL, START, TARGET = 1, 2, 4

Array = np.ndarray[Any, Any]


class Tokens(NamedTuple):
    """A context, or a row of contexts. ids: [n] int32, token ids. marks: [n] uint8, bits of REAL, START and TARGET."""

    ids: Array
    marks: Array


class Stream:
    """The contexts of one source.

    number: the place of the source among all, which makes its order different from the others'.
    size: characters of a piece. bare: documents come without the special tokens of `ends`.
    """

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
        self.taken = 0  # tokens given so far
        self.holds = 0  # tokens of the source, known once it has been read to the end
        self.silent = 0  # chats without an answer in the first reading
        self.before, self.after = ([], []) if bare else ends(tokenizer)

    def once(self, order: random.Random | None) -> Iterator[Tokens]:
        """Reads the source once: shuffled and in pieces, or without ``order`` as it is and with whole documents."""
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
        """Reads the source again and again, each time in another order. Raises DijiangError if there are no tokens."""
        for reading in itertools.count():
            before = self.taken
            yield from self.once(random.Random(f"{seed} {self.number} {reading}"))
            if self.taken == before:
                what = "answer of an assistant" if self.silent else "word"
                raise DijiangError(f"{self.source.name} has no {what} to learn from: give another corpus")
            self.holds = self.holds or self.taken

    def tell(self) -> None:
        """Says on stderr how often the source was read, if more than once, and how many chats were left out."""
        notes = []
        if self.holds and self.taken > self.holds:
            times = self.taken / self.holds
            notes.append(f"it has {self.holds:,} tokens for a share of {self.taken:,}, so it is read {times:.1f} times")
        if self.silent:
            notes.append(f"{self.silent:,} chats without an answer to learn from are left out")
        if notes:
            say(f"{self.source.name}: {'; '.join(notes)}")

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        options: dict[str, Any] = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        return self.tokenizer(texts, add_special_tokens=False, **options)["input_ids"]


def ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens before and after a document: those that the tokenizer puts around a text, or else its end-of-text."""
    bare, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    before, after = full[:at], full[at + len(bare) :]
    if not before and not after and tokenizer.eos_token_id is not None:
        after = [tokenizer.eos_token_id]
    return before, after


def _shuffled(pieces: Iterable[Piece | Chat], order: random.Random) -> Iterator[Piece | Chat]:
    """The pieces in an order that is random within a buffer of SHUFFLE_CHARS characters."""
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
    """Characters that a piece counts for: those of its text, and an allowance for the Python objects around it."""
    if isinstance(piece, Piece):
        return len(piece.text) + 200
    return sum(len(str(message.get("content"))) + 500 for message in piece.messages)


def _batches(pieces: Iterable[Piece | Chat]) -> Iterator[list[Piece | Chat]]:
    """The pieces in batches, small ones first, so that a short run does not wait for text that it won't need."""
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
    """A context whose targets are all tokens, or those with 1 in ``targets``. Packing later unmarks its first token."""
    marks = np.full(len(ids), REAL | TARGET, np.uint8)
    if targets is not None:
        marks[np.asarray(targets) == 0] = REAL
    return Tokens(np.asarray(ids, np.int32), marks)


def mixed(streams: Sequence[Stream], seq_len: int, seed: int) -> Iterator[Tokens]:
    """Contexts of all streams, without end: the next one comes from the stream that has given least for its weight.

    Raises DijiangError if all sources together hold less than a row of ``seq_len`` tokens.
    """
    contexts = {stream: stream.forever(seed) for stream in streams}
    while True:
        yield next(contexts[min(streams, key=lambda stream: stream.taken / stream.source.weight)])
        if all(stream.holds for stream in streams):
            total = sum(stream.holds for stream in streams)
            if total < seq_len:
                raise too_short(streams, total, seq_len)


def too_short(streams: Sequence[Stream], tokens: int, seq_len: int) -> DijiangError:
    """The error for sources that hold less than one row."""
    names = ", ".join(stream.source.name for stream in streams)
    return DijiangError(
        f"{names} has {tokens} tokens, less than one row of {seq_len}: give more text or a smaller --seq-len"
    )
