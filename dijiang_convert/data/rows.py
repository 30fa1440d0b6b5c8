"""Makes rows of tokens from text: shuffled, mixed, packed, and kept on disk.

For training, documents are cut into pieces of a few rows before shuffling, so that a run of few tokens sees all parts
of a corpus of long books. The pieces are packed end to end, and each is a context of its own, in which positions
restart. Several corpora share the tokens by weight, and one that runs out is read again. For evaluation every document
starts a row of its own. Rows that are kept on disk are written one by one, so memory does not grow with their number.
"""

import itertools
import json
import sys
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
from ..progress import count_bar
from .mixture import REAL, START, TARGET, Stream, Tokens, ends, mixed, too_short
from .readers import Source, Sources, parse_source

PIECE_ROWS = 4  # a piece of text is about as long as 4 rows
CHARS_PER_TOKEN = 4  # a rough mean, which only the length of pieces depends on
LONGEST_ROW = 2**24  # tokens, so that a row takes 80 MB at most
LOST_ROWS = 10_000  # after as many rows in succession without a target, the data is taken to have none


@dataclass(frozen=True)
class Rows:
    """Rows of tokens, in memory or mapped from a file.

    ids: [n, seq_len] int32, token ids, padded on the right.
    marks: [n, seq_len] uint8, bits of REAL, START (of a context) and TARGET (of the loss); 0 for padding.
    whole: whether each row is one text for an encoder, which numbers positions itself.
    """

    ids: Tensor
    marks: Tensor
    whole: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """A row as arguments of the model and the loss, each [seq_len] int64.

        position_ids restart with every context. attention_mask is 1 for real tokens. loss_mask is 1 for targets, and
        the first token of a context is none. ``whole`` rows have input_ids and attention_mask alone.
        """
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
        """Real tokens, [n, seq_len]: 1 for each, 0 for padding."""
        return (self.marks & REAL > 0).long()

    @property
    def lengths(self) -> Tensor:
        """The number of real tokens in each row, [n]."""
        return self.marks.count_nonzero(1)

    @property
    def tokens(self) -> int:
        return int(self.marks.count_nonzero())

    @property
    def packed(self) -> bool:
        """Whether any row holds more than one context."""
        return any(bool((marks[:, 1:] & START).any()) for marks in self.marks.split(4096))

    def split(self, counts: Sequence[int]) -> list["Rows"]:
        """Consecutive parts of the rows, with ``counts`` rows each."""
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
    folder: Path | None = None,
) -> Rows:
    """About ``tokens`` tokens of a corpus, in rows of ``seq_len``.

    For training the number of rows depends on ``tokens`` alone, since a corpus that runs out is read again.

    Args:
        data: a file, a folder, a glob or a Hub data set (``owner/name`` or ``owner/name:config``); `Sources` of them,
            each with ``@weight`` behind it if it should give more or fewer tokens than others; or the documents.
        held_out: whether to take the files or the split set aside for evaluation, if there are any.
        shuffle_seed: decides the order of everything. None is for evaluation: it keeps the order of the corpus, gives
            every document rows of its own, and ends with the corpus; without ``folder``, rows are no longer than the
            longest text.
        whole: for encoders. Every row is one text between the tokens that the tokenizer puts around a text, and a
            text that is longer than a row becomes several.
        folder: where the rows are kept, and mapped into memory from. If the folder already has rows of the same
            request, these are taken, and the corpus is not read. None keeps the rows in memory.

    Raises:
        DijiangError: no such data, no text in it, less than one row, or ``folder`` holds rows of another request.
    """
    if seq_len < 2:
        raise DijiangError(f"seq_len is {seq_len}: a row needs at least 2 tokens to have one to predict")
    if seq_len > LONGEST_ROW:
        raise DijiangError(f"seq_len is {seq_len}: a row has at most {LONGEST_ROW:,} tokens, give a shorter --seq-len")
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
    wanted = min(max(-(-tokens // seq_len), 1), sys.maxsize)
    if whole:
        packed = _whole(contexts, tokenizer, seq_len)
    else:
        packed = _with_targets(_packed(contexts, tokenizer, seq_len, alone=shuffle_seed is None))
    with count_bar("reading text (tokens)", wanted * seq_len) as advance:
        rows = _counted(itertools.islice(packed, wanted), advance)
        if folder is None:
            kept = list(rows)
            width = seq_len
            if shuffle_seed is None:  # no text may be as long as the rows, whose ends would only be padding
                width = max((int(np.count_nonzero(row.marks)) for row in kept), default=seq_len)
            found = _rows(kept, width, whole)
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
    """Raises DijiangError if a file or folder does not exist, or has no text. Data sets on the Hub are not checked."""
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
    """Rows of seq_len tokens, filled with one context after another, and padded where they end early.

    The part of a context that goes on in the next row is a context of its own there. A context that would only get
    less than an eighth of a row starts the next row instead, and with ``alone`` every context starts a row.
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
    """A row for each context, between the tokenizer's special tokens.

    A long context gets several rows, and its last part is dropped if it fills less than an eighth of a row.
    """
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
    """The rows with a target. Others, such as a part of a chat before its answers, have nothing to learn from."""
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


def _rows(rows: Sequence[Tokens], width: int, whole: bool = False) -> Rows:
    """The first ``width`` tokens of rows."""
    ids = np.array([row.ids[:width] for row in rows], np.int32).reshape(-1, width)
    marks = np.array([row.marks[:width] for row in rows], np.uint8).reshape(-1, width)
    return Rows(torch.from_numpy(ids), torch.from_numpy(marks), whole)


def _write(rows: Iterable[Tokens], folder: Path, request: dict[str, Any]) -> None:
    """Writes the rows' arrays to ids.bin and marks.bin, 5 bytes per token, and the request to rows.json."""
    count = 0
    with open(folder / "ids.bin", "wb") as ids, open(folder / "marks.bin", "wb") as marks:
        for row in rows:
            ids.write(row.ids.tobytes())
            marks.write(row.marks.tobytes())
            count += 1
    write_json(folder / "rows.json", {**request, "rows": count})


def _stored(folder: Path, request: dict[str, Any]) -> Rows:
    """The rows that `_write` wrote, mapped into memory. Raises DijiangError if they are of another request."""
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
