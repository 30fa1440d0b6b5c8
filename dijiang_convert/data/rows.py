"""Text in, rows of tokens out: shuffled, mixed, packed, and kept on disk.

For training, documents are cut into pieces of a few rows before shuffling, so that a run of few tokens sees all of a
corpus of long books, and packed end to end; each piece is a context of its own, where positions restart. Several
corpora share the tokens by weight, and one that runs out is read again. For evaluation every document starts a row of
its own. Everything is a stream: memory does not grow with the number of tokens.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..checkpoint.shards import write_json
from ..errors import DijiangError
from ..files import new_folder
from .mixture import REAL, START, TARGET, Stream, Tokens, ends, mixed, too_short
from .readers import Source, Sources, parse_source

PIECE_ROWS = 4  # a piece of text is about as many rows
CHARS_PER_TOKEN = 4  # roughly; only sizes the pieces
LOST_ROWS = 10_000  # without a target, one after another: there won't be any


@dataclass(frozen=True)
class Rows:
    """Rows of tokens, in memory or mapped from a file.

    ids: [n, seq_len] int32, padded on the right.
    marks: [n, seq_len] uint8, bits of REAL, START (of a context) and TARGET (of the loss); 0 is padding.
    whole: each row is a text as encoders take it, and positions are the model's own business.
    """

    ids: Tensor
    marks: Tensor
    whole: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """All [seq_len] int64. position_ids restart with every context, attention_mask marks real tokens, loss_mask
        those that count as targets: none is the first of its context. ``whole`` rows have the mask alone."""
        marks = self.marks[index]
        if self.whole:
            return {"input_ids": self.ids[index].long(), "attention_mask": (marks & REAL > 0).long()}
        at = torch.arange(len(marks))
        starts = torch.where(marks & START > 0, at, 0).cummax(0).values
        return {
            "input_ids": self.ids[index].long(),
            "position_ids": at - starts,
            "attention_mask": (marks & REAL > 0).long(),
            "loss_mask": (marks & TARGET > 0).long(),
        }

    @property
    def mask(self) -> Tensor:
        """[n, seq_len], 1 for real tokens."""
        return (self.marks & REAL > 0).long()

    @property
    def lengths(self) -> Tensor:
        """[n] real tokens a row."""
        return self.marks.count_nonzero(1)

    @property
    def tokens(self) -> int:
        return int(self.marks.count_nonzero())

    @property
    def packed(self) -> bool:
        """Whether any row holds more than one context."""
        return any(bool((marks[:, 1:] & START).any()) for marks in self.marks.split(4096))

    def split(self, counts: Sequence[int]) -> list["Rows"]:
        """Consecutive parts of so many rows each."""
        parts = zip(self.ids.split(list(counts)), self.marks.split(list(counts)), strict=True)
        return [Rows(ids, marks, self.whole) for ids, marks in parts]


def token_rows(
    data: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    tokens: int,
    held_out: bool = False,
    shuffle_seed: int | None = 0,
    whole: bool = False,
    progress: Callable[[int], None] = lambda count: None,
    folder: Path | None = None,
) -> Rows:
    """About ``tokens`` tokens of a corpus as rows of seq_len; for training always as many rows as hold them.

    Args:
        data: a file, a folder, a glob or a Hub data set (``owner/name`` or ``owner/name:config``); `Sources` of them,
            each with ``@weight`` behind it if it should give more or fewer tokens than others; or the documents.
        held_out: take the files (or the split) set aside for evaluation, where there are any.
        shuffle_seed: decides the order of everything. None keeps the corpus' order and gives every document rows of
            its own, for evaluation: then the rows end with the corpus.
        whole: every row is a text of its own between the tokens that the tokenizer puts around one, for encoders. What
            is longer than a row is several texts.
        progress: called with every number of tokens gathered.
        folder: where the rows are kept, mapped into memory and not loaded. If it has them already, from the same
            request, they are taken as they are, and the corpus is not touched.

    Raises:
        DijiangError: no such data, no text in it, less than one row, or ``folder`` holds rows of another request.
    """
    if seq_len < 2:
        raise DijiangError(f"seq_len is {seq_len}: a row needs at least 2 tokens to have one to predict")
    names = [data] if isinstance(data, str) else list(data) if isinstance(data, Sources) else "documents"
    request = {"data": names, "held_out": held_out, "tokens": tokens, "seq_len": seq_len, "seed": shuffle_seed}
    request["whole"] = whole
    if folder is not None and folder.is_dir():
        return _stored(folder, request)
    size = PIECE_ROWS * seq_len * CHARS_PER_TOKEN
    streams = [Stream(source, i, tokenizer, size, held_out, bare=whole) for i, source in enumerate(_sources(data))]
    contexts: Iterable[Tokens]
    if shuffle_seed is None:
        contexts = itertools.chain.from_iterable(stream.once(None) for stream in streams)
    else:
        contexts = mixed(streams, seq_len, shuffle_seed)
    wanted = max(-(-tokens // seq_len), 1)
    if whole:
        packed = _whole(contexts, tokenizer, seq_len)
    else:
        packed = _with_targets(_packed(contexts, tokenizer, seq_len, alone=shuffle_seed is None))
    rows = _counted(itertools.islice(packed, wanted), progress)
    if folder is None:
        found = _rows(list(rows), seq_len, whole)
    else:
        with new_folder(folder) as new:
            _write(rows, new, request)
        found = _stored(folder, request)
    if len(found) < wanted and found.tokens < seq_len:
        raise too_short(streams, found.tokens, seq_len)
    for stream in streams:
        stream.tell()
    return found


def check_data(data: str | Sequence[str]) -> None:
    """Raises DijiangError where there is no such file or folder, or no file of text in it. Asks no Hub."""
    for source in _sources(data):
        if source.texts is None:
            source.files()


def _sources(data: str | Sequence[str]) -> list[Source]:
    if isinstance(data, str):
        return [parse_source(data)]
    if isinstance(data, Sources):
        return [parse_source(text) for text in data]
    return [Source("the text", texts=data)]


def _packed(
    contexts: Iterable[Tokens], tokenizer: PreTrainedTokenizerBase, seq_len: int, alone: bool
) -> Iterator[Tokens]:
    """Rows of seq_len, filled with one context after another, or each ``alone``; padded where they end early.

    A context that goes on in the next row starts anew there. One that would only get a scrap of a row starts the next.
    """
    row, used = _empty(tokenizer, seq_len), 0
    for context in contexts:
        done, length, room = 0, len(context.ids), seq_len - used
        if used and (alone or length > room < seq_len // 8):
            yield row
            row, used = _empty(tokenizer, seq_len), 0
        while done < length:
            count = min(length - done, seq_len - used)
            row.ids[used : used + count] = context.ids[done : done + count]
            row.marks[used : used + count] = context.marks[done : done + count]
            row.marks[used] = REAL | START
            used, done = used + count, done + count
            if used == seq_len:
                yield row
                row, used = _empty(tokenizer, seq_len), 0
    if used:
        yield row


def _empty(tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Tokens:
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    return Tokens(np.full(seq_len, padding, np.int32), np.zeros(seq_len, np.uint8))


def _whole(contexts: Iterable[Tokens], tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Iterator[Tokens]:
    """A row for each context, or several for a long one, whose last scrap goes."""
    before, after = ends(tokenizer)
    room = seq_len - len(before) - len(after)
    if room < 1:
        raise DijiangError(
            f"seq_len is {seq_len}: a row needs room for a token between {len(before) + len(after)} more"
        )
    for context in contexts:
        for start in range(0, len(context.ids), room):
            ids = [*before, *context.ids[start : start + room], *after]
            if start and len(ids) < seq_len // 8:
                continue
            row = _empty(tokenizer, seq_len)
            row.ids[: len(ids)], row.marks[: len(ids)] = ids, REAL
            yield row


def _with_targets(rows: Iterable[Tokens]) -> Iterator[Tokens]:
    """Without the rows that have nothing to learn from, such as a part of a chat before its answers."""
    lost = 0
    for row in rows:
        if (row.marks & TARGET).any():
            lost = 0
            yield row
        elif (lost := lost + 1) == LOST_ROWS:
            raise DijiangError(f"{lost:,} rows one after another have nothing to learn from: give a longer --seq-len")


def _counted(rows: Iterable[Tokens], progress: Callable[[int], None]) -> Iterator[Tokens]:
    for row in rows:
        progress(int(np.count_nonzero(row.marks)))
        yield row


def _rows(rows: Sequence[Tokens], seq_len: int, whole: bool = False) -> Rows:
    ids = np.array([row.ids for row in rows], np.int32).reshape(-1, seq_len)
    marks = np.array([row.marks for row in rows], np.uint8).reshape(-1, seq_len)
    return Rows(torch.from_numpy(ids), torch.from_numpy(marks), whole)


def _write(rows: Iterable[Tokens], folder: Path, request: dict[str, Any]) -> None:
    """Their arrays one after another in ids.bin and marks.bin, 5 bytes a token, and what they are in rows.json."""
    count = 0
    with open(folder / "ids.bin", "wb") as ids, open(folder / "marks.bin", "wb") as marks:
        for row in rows:
            ids.write(row.ids.tobytes())
            marks.write(row.marks.tobytes())
            count += 1
    write_json(folder / "rows.json", {**request, "rows": count})


def _stored(folder: Path, request: dict[str, Any]) -> Rows:
    """What `_write` wrote, mapped into memory. Raises DijiangError where it was asked for something else."""
    kept = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    count = kept.pop("rows")
    other = [key for key in request if kept.get(key) != request[key]]
    if other:
        raise DijiangError(
            f"{folder} holds rows of another run ({other[0]} was {kept.get(other[0])}, is {request[other[0]]}): "
            "repeat that run's options, or drop --resume"
        )
    shape = count, request["seq_len"]
    size = count * request["seq_len"]
    return Rows(
        torch.from_file(str(folder / "ids.bin"), size=size, dtype=torch.int32).reshape(shape),
        torch.from_file(str(folder / "marks.bin"), size=size, dtype=torch.uint8).reshape(shape),
        request["whole"],
    )
