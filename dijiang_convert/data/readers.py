"""Reads text and chats from files, folders, globs and Hub data sets, as a stream of pieces.

A document is cut into pieces, so that neither a document of gigabytes nor shuffling needs much memory. A chat stays
whole. Tokens are made in `mixture`.
"""

import csv
import glob
import gzip
import json
import math
import os
import random
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from ..errors import DijiangError
from ..progress import say
from ..source.hub import TIMEOUT, hub_errors

HELD_OUT = {"valid", "validation", "val", "test", "dev", "eval", "evaluation"}  # words of names
COLUMNS = ("text", "messages", "tools")  # the columns that are read
RECORDS = {"dataset_info.json", "dataset_dict.json", "state.json"}  # what `save_to_disk` of datasets puts beside rows
UNREADABLE = (OSError, ValueError, EOFError, NotImplementedError, zlib.error, csv.Error)  # what READERS may raise


class Sources(tuple[str, ...]):
    """Names of corpora as on the command line: ``Sources(["books/*.txt@3", "owner/name"])``.

    The type tells names from a list of documents.
    """


class Piece(NamedTuple):
    """A document or a part of one. first, last: whether the document starts, and ends, with this piece."""

    text: str
    first: bool = True
    last: bool = True


class Chat(NamedTuple):
    """A conversation as chat templates take it. where: the file or data set, for error messages."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    where: str


@dataclass(frozen=True)
class Source:
    """A corpus.

    name: a file, a folder, a glob, or a Hub data set (``owner/name`` or ``owner/name:config``).
    weight: the corpus's share of the tokens relative to other corpora.
    texts: the documents themselves, in place of what ``name`` says.
    """

    name: str
    weight: float = 1.0
    texts: Sequence[str] | None = None

    def pieces(self, size: int | None, order: random.Random | None, held_out: bool) -> Iterator[Piece | Chat]:
        """Reads it once, in pieces of at most ``size`` characters.

        Args:
            size: None keeps documents whole.
            order: shuffles files and the shards of a data set; None keeps their order.
            held_out: whether to take the files or the split set aside for evaluation, if there are any.

        Raises:
            DijiangError: no such data, no column of text in it, or a file that can't be read.
        """
        if self.texts is not None:
            for text in self.texts:
                yield from _cut(text, size)
        elif (files := self.files(held_out)) is not None:
            if order is not None:
                order.shuffle(files)
            for file in files:
                yield from _file_pieces(file, size)
        else:
            yield from _documents(_hub_rows(self.name, order, held_out), self.name, size)

    def files(self, held_out: bool = False) -> list[Path] | None:
        """The files to read, sorted; None for a Hub data set. Raises DijiangError if there are none."""
        path = Path(self.name).expanduser()
        if path.is_file():
            if _kind(path) not in READERS:
                raise DijiangError(f"{path} is not text: give {', '.join(READERS)}")
            return [path]
        if os.path.isdir(path):
            found = _files_in(path)
        elif matches := _matches(self.name):
            found = sorted({file for match in matches for file in (_files_in(match) if match.is_dir() else [match])})
        elif _is_hub_name(self.name):
            return None
        else:
            raise DijiangError(f"no such file, folder or data set: {self.name}")
        found = [file for file in found if _kind(file) in READERS]
        root = path if path.is_dir() else _fixed_part(path)
        aside = [file for file in found if any(map(_set_aside, file.relative_to(root).parts))]
        chosen = aside if held_out and aside else [file for file in found if file not in aside] or found
        if not chosen:
            raise DijiangError(f"no text in {self.name}: it needs files ending in {', '.join(READERS)}")
        return chosen


def parse_source(text: str) -> Source:
    """The source that ``name`` or ``name@weight`` means. A text that names existing files is all name.

    Raises DijiangError for a weight that is no positive number.
    """
    name, at, weight = text.rpartition("@")
    if not at or os.path.exists(os.path.expanduser(text)) or _matches(text):
        return Source(text)
    try:
        share = float(weight)
    except ValueError:
        share = math.nan
    if not (name and 0 < share < math.inf):
        raise DijiangError(f"{text}: no such file, and {weight!r} is no weight: after the @ give a number above 0")
    return Source(name, share)


def hub_names(corpus: Sequence[str]) -> list[str]:
    """The data sets on the Hub that a corpus names; none if it consists of documents."""
    found = [parse_source(text).name for text in corpus] if isinstance(corpus, Sources) else []
    return [name.partition(":")[0] for name in found if not os.path.exists(name) and _is_hub_name(name)]


def _is_hub_name(name: str) -> bool:
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+(:[^/]+)?", name)) and _kind(Path(name)) not in READERS


def _matches(pattern: str) -> list[Path]:
    return [Path(match) for match in glob.glob(os.path.expanduser(pattern), recursive=True)]


def _fixed_part(pattern: Path) -> Path:
    """The folder that all files of a glob lie in: what is below it tells training text from that held out."""
    while glob.has_magic(str(pattern)):
        pattern = pattern.parent
    return pattern


def _files_in(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if any(_kind(file) == ".arrow" for file in files):
        files = [file for file in files if file.name not in RECORDS]
    return [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def _kind(path: Path) -> str:
    """The suffix that tells a file's format, in small letters and without .gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _set_aside(name: str) -> bool:
    """Whether the name of a file, folder or split says that it is for evaluation."""
    return not HELD_OUT.isdisjoint(re.findall("[a-z]+", name.lower()))


# ------------------------------------------------------------------------------------------------------- files


def _file_pieces(file: Path, size: int | None) -> Iterator[Piece | Chat]:
    rows = READERS[_kind(file)]
    try:
        if rows is not None:
            yield from _documents(rows(file), str(file), size)
            return
        with _open(file) as stream:
            size = -1 if size is None else size
            text, first = stream.read(size), True
            while text:
                following = stream.read(size)
                yield Piece(text, first, not following)
                text, first = following, False
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise DijiangError(f"can't read {file}: {reason}: repair it or leave it out") from error


def _open(file: Path) -> IO[str]:
    opened: Any = gzip.open if file.suffix.lower() == ".gz" else open
    return opened(file, "rt", encoding="utf-8-sig", newline="" if _kind(file) == ".csv" else None)


def _json_rows(file: Path) -> Iterator[Any]:
    """The rows of JSON lines, or of one JSON list or object, whatever the suffix of the file."""
    with _open(file) as stream:
        start = stream.readline()
        try:
            row = json.loads(start)
        except ValueError:
            row = json.loads(start + stream.read()) if start.strip() else []
        yield from row if isinstance(row, list) else [row]
        for number, line in enumerate(stream, 2):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from None


def _csv_rows(file: Path) -> Iterator[Any]:
    csv.field_size_limit(sys.maxsize)  # the default is 131,072 characters
    with _open(file) as stream:
        yield from csv.DictReader(stream)


def _parquet_rows(file: Path) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    with ParquetFile(file) as table:
        names = table.schema_arrow.names
        wanted = [name for name in names if name in COLUMNS]
        if not wanted:
            yield dict.fromkeys(names)  # an empty row, for an error that names all columns
        for batch in table.iter_batches(batch_size=256, columns=wanted):
            yield from batch.to_pylist()


def _arrow_rows(file: Path) -> Iterator[Any]:
    """The rows of a file that `save_to_disk` of datasets wrote."""
    import pyarrow as pa  # type: ignore[import-untyped]

    with pa.memory_map(str(file)) as mapped, pa.ipc.open_stream(mapped) as batches:
        wanted = [name for name in batches.schema.names if name in COLUMNS]
        for batch in batches:
            yield from batch.select(wanted or batches.schema.names).to_pylist()


READERS: dict[str, Callable[[Path], Iterator[Any]] | None] = {
    ".txt": None, ".md": None, ".jsonl": _json_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- rows


def _documents(rows: Iterable[Any], where: str, size: int | None) -> Iterator[Piece | Chat]:
    """The documents of rows, in pieces, and their chats. Raises DijiangError for a row that has neither column."""
    empty = 0
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise DijiangError(f"{where}: row {number} is a {kind}, no object with 'text' or 'messages'")
        text, messages = row.get("text"), row.get("messages")
        if isinstance(text, str):
            yield from _cut(_encodable(text), size)
        elif messages is not None:
            if not (isinstance(messages, list) and all(isinstance(m, dict) and m.get("role") for m in messages)):
                raise DijiangError(
                    f"{where}: 'messages' of row {number} is no list of objects with 'role' and 'content'"
                )
            if messages:
                yield _chat(_encodable(messages), _encodable(row.get("tools")), where, number)
        elif "text" not in row and "messages" not in row:
            names = ", ".join(map(str, row)) or "nothing"
            raise DijiangError(f"{where} has no column 'text' or 'messages', only {names}: rename the one to train on")
        elif text is not None:
            raise DijiangError(f"{where}: 'text' of row {number} is {text!r:.40}, not text")
        else:
            empty += 1
    if empty:
        say(f"{where}: {empty:,} rows without a text are left out")


def _chat(messages: list[dict[str, Any]], tools: Any, where: str, number: int) -> Chat:
    """A conversation with each content as one text, and with tools as a list where they came as JSON text.

    Raises DijiangError for content that is no text, and for tools that are no list.
    """
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            texts = [part.get("text") if isinstance(part, dict) else part for part in content]
            if not all(isinstance(text, str) for text in texts):  # as of a part that is an image
                raise DijiangError(
                    f"{where}: a message of row {number} has content that is no text: leave images and such out"
                )
            message["content"] = "".join(map(str, texts))
        if message.get("weight", 1) not in (None, 0, 1):
            raise DijiangError(f"{where}: a message of row {number} has weight {message['weight']}: give 0 or 1")
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools or None
    except ValueError:
        tools = False
    if not isinstance(tools, list | None):
        raise DijiangError(f"{where}: 'tools' of row {number} is no list of tools")
    return Chat(messages, tools or None, where)


def _encodable(value: Any) -> Any:
    """Text, or text within lists and mappings. Halves of surrogate pairs, which JSON may hold and no tokenizer takes,
    become U+FFFD."""
    if isinstance(value, list):
        return [_encodable(each) for each in value]
    if isinstance(value, dict):
        return {key: _encodable(each) for key, each in value.items()}
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def _cut(text: str, size: int | None) -> Iterator[Piece]:
    size = size or max(len(text), 1)
    for start in range(0, len(text), size):
        yield Piece(text[start : start + size], start == 0, start + size >= len(text))


def _hub_rows(name: str, order: random.Random | None, held_out: bool) -> Iterator[Any]:
    """The rows of a data set's split on the Hub, streamed."""
    import datasets
    from huggingface_hub import HfApi

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # `datasets` also raises what it logs
    path, _, config = name.partition(":")
    with hub_errors(f"datasets/{path}"):
        HfApi().dataset_info(path, timeout=TIMEOUT)  # unlike `datasets`, HfApi says what is wrong
        try:
            splits = datasets.load_dataset(path, config or None, streaming=True)
            aside = [split for split in splits if _set_aside(str(split))]
            others = [split for split in splits if split not in aside]
            rows = splits[(aside or others if held_out else others or aside)[0]]
            if order is not None:
                rows = rows.shuffle(seed=order.randrange(2**32), buffer_size=1)  # shards; `mixture` shuffles pieces
            yield from rows
        except ValueError as error:
            if isinstance(error, OSError):  # `hub_errors` handles errors of the connection
                raise
            reason = " ".join(str(error).split())[:200]
            raise DijiangError(f"can't read the data set {name}: {reason}") from error
