"""Text in, rows of tokens out: files, folders or a Hub data set, streamed, shuffled, packed.

For training, documents are cut into pieces of a few rows before shuffling, so that a run of few tokens sees all of a
corpus of long books, and packed end to end. For evaluation every document starts a row of its own.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import DijiangError

BUILDERS = {
    ".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet",
}  # fmt: skip
HELD_OUT = ("valid", "val", "test", "dev", "eval")
SHUFFLE_BUFFER = 10_000  # pieces
CHARS_PER_TOKEN = 4  # roughly; only sizes the pieces


@dataclass(frozen=True)
class Rows:
    """Rows of tokens [n, seq_len], the first ``lengths`` [n] of each real and the rest padding."""

    ids: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """attention_mask marks real tokens, loss_mask those that count as targets."""
        ids, mask = self.ids[index], self.mask[index]
        return {"input_ids": ids, "position_ids": torch.arange(len(ids)), "attention_mask": mask, "loss_mask": mask}

    @property
    def mask(self) -> Tensor:
        """[n, seq_len], 1 for real tokens."""
        return (torch.arange(self.ids.shape[1]) < self.lengths[:, None]).long()

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())


def token_rows(
    data: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    tokens: int,
    held_out: bool = False,
    shuffle_seed: int | None = 0,
    progress: Callable[[int], None] = lambda count: None,
) -> Rows:
    """About the first ``tokens`` tokens of a corpus as rows of seq_len.

    Args:
        data: a file, a folder, a Hub data set's id (``owner/name`` or ``owner/name:config``), or the documents.
        held_out: take the files (or the split) set aside for evaluation, where there are any.
        shuffle_seed: None keeps the corpus' order and gives every document rows of its own, for evaluation.
        progress: called with every number of tokens gathered.

    Raises:
        DijiangError: no such data, no text in it, or less than one row.
    """
    rows: list[list[int]] = [[]]
    count = 0
    pieces = _pieces(_documents(data, tokenizer, held_out), seq_len, shuffle_seed)
    # A document that would only get a scrap of a row starts the next one.
    scrap = seq_len if shuffle_seed is None else seq_len // 8
    try:
        for ids, first in _tokenized(pieces, tokenizer):
            if rows[-1] and first and seq_len - len(rows[-1]) < scrap:
                rows.append([])
            while ids:
                if len(rows[-1]) == seq_len:
                    rows.append([])
                taken = ids[: seq_len - len(rows[-1])]
                rows[-1] += taken
                ids = ids[len(taken) :]
                count += len(taken)
                progress(len(taken))
            if count >= tokens + seq_len:
                break
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise DijiangError(f"can't read {_name(data)}: {' '.join(str(error).split())[:200]}") from error
    if count < seq_len:
        raise DijiangError(
            f"{_name(data)} has {count} tokens, less than one row of {seq_len}: give more text or a smaller --seq-len"
        )
    rows = [row for row in rows if len(row) > 1][: max(-(-tokens // seq_len), 1)]
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    lengths = torch.tensor([len(row) for row in rows])
    return Rows(torch.tensor([row + [padding] * (seq_len - len(row)) for row in rows]), lengths)


def _documents(data: str | Sequence[str], tokenizer: PreTrainedTokenizerBase, held_out: bool) -> Iterator[str]:
    if not isinstance(data, str):
        yield from (text for text in data if text)
        return
    for rows in _tables(data, held_out):
        for row in rows:
            if isinstance(row.get("text"), str):
                if row["text"]:
                    yield row["text"]
            elif row.get("messages") is not None:
                if not tokenizer.chat_template:
                    raise DijiangError(f"{data} holds chats, and the tokenizer has no chat template: give plain text")
                yield str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
            else:
                raise DijiangError(f"{data} has no column 'text' or 'messages', only {', '.join(map(str, row))}")


def _tables(data: str, held_out: bool) -> Iterator[Iterable[dict[str, Any]]]:
    """Row streams of a file, of each kind of file in a folder, or of a Hub data set."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    path = Path(data).expanduser()
    if path.exists():
        by_builder: dict[str, list[str]] = {}
        for file in _files(path, held_out):
            by_builder.setdefault(BUILDERS[file.suffix], []).append(str(file))
        for builder, files in by_builder.items():
            options = {"sample_by": "document"} if builder == "text" else {}
            yield load_dataset(builder, data_files=files, split="train", streaming=True, **options)
        return
    if "/" not in data or data.startswith(("/", ".", "~")):
        raise DijiangError(f"no such file, folder or data set: {data}")
    name, _, config = data.partition(":")
    try:
        splits = load_dataset(name, config or None, streaming=True)
        aside = [split for split in splits if any(word in str(split).lower() for word in HELD_OUT)]
        others = [split for split in splits if split not in aside]
        yield splits[(aside or others if held_out else others or aside)[0]]
    except (DatasetNotFoundError, ConnectionError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DijiangError(f"can't reach the data set {data} ({reason}): give a file or folder with --data") from None


def _files(path: Path, held_out: bool) -> list[Path]:
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise DijiangError(f"{path} is not text: give {', '.join(BUILDERS)}")
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix in BUILDERS and file.is_file())
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    aside = [file for file in files if any(word in file.stem.lower() for word in HELD_OUT)]
    chosen = aside if held_out and aside else [file for file in files if file not in aside] or files
    if not chosen:
        raise DijiangError(f"no text in {path}: it needs files ending in {', '.join(BUILDERS)}")
    return chosen


def _pieces(documents: Iterator[str], seq_len: int, seed: int | None) -> Iterator[tuple[str, bool, bool]]:
    """(text, starts a document, ends it), shuffled through a buffer unless the seed is None."""

    def cut() -> Iterator[tuple[str, bool, bool]]:
        size = 4 * seq_len * CHARS_PER_TOKEN
        for text in documents:
            starts = range(0, len(text), size)
            for start in starts:
                yield text[start : start + size], start == 0, start == starts[-1]

    if seed is None:
        yield from ((text, True, True) for text in documents)
        return
    generator = torch.Generator().manual_seed(seed)
    buffer: list[tuple[str, bool, bool]] = []
    for piece in cut():
        buffer.append(piece)
        if len(buffer) > SHUFFLE_BUFFER:
            yield buffer.pop(_random_index(len(buffer), generator))
    for index in torch.randperm(len(buffer), generator=generator).tolist():
        yield buffer[index]


def _random_index(length: int, generator: torch.Generator) -> int:
    return int(torch.randint(length, (1,), generator=generator))


def _tokenized(
    pieces: Iterable[tuple[str, bool, bool]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], bool]]:
    """(ids, starts a document). One token parts documents: the one that the tokenizer starts them with, or its end."""
    starts_with = tokenizer("a", verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id]
    end = [] if starts_with or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text, first, last in pieces:
        ids = tokenizer(text, add_special_tokens=first, verbose=False)["input_ids"]
        yield ids + end if last else ids, first


def _name(data: str | Sequence[str]) -> str:
    return data if isinstance(data, str) else "the text"
