"""Text in, blocks of tokens out: files, folders or a Hub data set, streamed, shuffled, packed.

Documents are cut into pieces of a few blocks before shuffling, so that a run of few tokens sees all of a corpus of long
books, and packed end to end with the tokenizer's end-of-text between documents.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
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


def token_blocks(
    data: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    tokens: int,
    held_out: bool = False,
    shuffle_seed: int | None = 0,
    progress: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """The first ``tokens`` tokens of a corpus as blocks [n, seq_len], int64.

    Args:
        data: a file, a folder, a Hub data set's id, or the documents themselves.
        held_out: take the files (or the split) set aside for evaluation, where there are any.
        shuffle_seed: None keeps the corpus' order.
        progress: called with every number of tokens gathered.

    Raises:
        DijiangError: no such data, no text in it, or less than one block.
    """
    wanted = max(tokens // seq_len, 1) * seq_len
    gathered: list[int] = []
    try:
        for piece in _tokenized(_pieces(_documents(data, tokenizer, held_out), seq_len, shuffle_seed), tokenizer):
            gathered += piece
            progress(len(piece))
            if len(gathered) >= wanted:
                break
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise DijiangError(f"can't read {_name(data)}: {' '.join(str(error).split())[:200]}") from error
    if len(gathered) < seq_len:
        raise DijiangError(
            f"{_name(data)} has {len(gathered)} tokens, less than one block of {seq_len}: give more text or --seq-len"
        )
    count = min(len(gathered), wanted) // seq_len
    return torch.tensor(gathered[: count * seq_len]).view(count, seq_len)


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
                yield tokenizer.apply_chat_template(row["messages"], tokenize=False)
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
    try:
        yield load_dataset(data, split="train", streaming=True)
    except (DatasetNotFoundError, ConnectionError, OSError) as error:
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


def _tokenized(pieces: Iterable[tuple[str, bool, bool]], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text, first, last in pieces:
        ids = tokenizer(text, add_special_tokens=first, verbose=False)["input_ids"]
        if last and (not ids or ids[-1:] != end):
            ids = ids + end
        yield ids


def _name(data: str | Sequence[str]) -> str:
    return data if isinstance(data, str) else "the text"
