"""Training data: what is read, how it is packed and mixed, and that it is kept on disk and found again."""

from __future__ import annotations

import csv
import gzip
import json
import random
import re
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from tokenizers.processors import ByteLevel
from transformers import PreTrainedTokenizerBase
from typer.testing import CliRunner

from dijiang_convert import DijiangError, convert, finetune
from dijiang_convert.checkpoint.loading import load_tokenizer
from dijiang_convert.cli import app
from dijiang_convert.data import mixture as contexts_module
from dijiang_convert.data import rows as data_module
from dijiang_convert.data.chat import chat_tokens
from dijiang_convert.data.readers import Chat, Piece, Source, Sources, hub_names, parse_source
from dijiang_convert.data.rows import Rows, token_rows
from dijiang_convert.demo import MODEL
from tests.hub import Hub

MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}</s>{% endgeneration %}{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "def add(a, b):"},
    {"role": "assistant", "content": "return a + b"},
    {"role": "user", "content": "thanks\n\n  bye"},
    {"role": "assistant", "content": "  import this  \n"},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(str(MODEL))


@pytest.fixture
def chatty() -> PreTrainedTokenizerBase:
    """A tokenizer with a chat template that marks answers."""
    own = load_tokenizer(str(MODEL))
    own.chat_template = MARKED
    return own


def words(count: int, first: int = 0) -> list[str]:
    """Documents that all differ, of a few to a few hundred tokens."""
    return [" ".join(f"w{i}x{j}" for j in range(2 + i * 7 % 40)) for i in range(first, first + count)]


def write_lines(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def write_texts(path: Path, texts: Sequence[str]) -> str:
    return write_lines(path, [{"text": text} for text in texts])


def contexts(rows: Rows) -> list[list[int]]:
    """Token ids of every context in the rows, in their order."""
    found: list[list[int]] = []
    for row in (rows[i] for i in range(len(rows))):
        columns = (row[key].tolist() for key in ("input_ids", "position_ids", "attention_mask"))
        for token, position, real in zip(*columns, strict=True):
            if real and position == 0:
                found.append([])
            if real:
                found[-1].append(token)
    return found


def texts_in(rows: Rows, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in contexts(rows)]


def read(name: str, held_out: bool = False) -> list[str]:
    return [piece.text for piece in Source(name).pieces(None, None, held_out) if isinstance(piece, Piece)]


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(DijiangError) as error:
        call()
    message = str(error.value)
    assert message and "\n" not in message
    return message


# ------------------------------------------------------------------------------------------------------- sources


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    texts = ['one,\n"two"', "dré\tvier", "x" * 200_000]  # the last is longer than csv reads on its own
    rows = [{"id": i, "text": text} for i, text in enumerate([*texts[:1], "", None, *texts[1:]])]
    lines = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "a.jsonl").write_text(lines + "\n\n")
    (tmp_path / "lines.json").write_text(lines)
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "line.json").write_text(json.dumps(rows))
    (tmp_path / "bom.jsonl").write_text(lines, encoding="utf-8-sig")
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["id", "text"])
        writer.writeheader()
        writer.writerows(rows)
    for path in tmp_path.iterdir():
        assert read(str(path)) == texts, path.name


def test_a_text_file_is_one_document_read_in_pieces(tmp_path: Path) -> None:
    text = "".join(f"line {i} – ü\n" for i in range(1000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.md.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "empty.txt").write_text("")
    for name in ("a.txt", "b.md.gz"):
        assert read(str(tmp_path / name)) == [text]
        pieces: list[Any] = list(Source(str(tmp_path / name)).pieces(100, None, False))
        assert "".join(piece.text for piece in pieces) == text
        assert max(len(piece.text) for piece in pieces) == 100
        assert [piece.first for piece in pieces] == [True] + [False] * (len(pieces) - 1)
        assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert list(Source(str(tmp_path / "empty.txt")).pieces(100, None, False)) == []


def test_a_row_of_text_is_cut_like_a_file(tmp_path: Path) -> None:
    name = write_texts(tmp_path / "a.jsonl", ["abcdefg", "hi"])
    pieces = list(Source(name).pieces(3, None, False))
    assert pieces == [
        Piece("abc", True, False), Piece("def", False, False), Piece("g", False, True), Piece("hi", True, True),
    ]  # fmt: skip


def test_one_object_in_a_json_file_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps({"text": "only"}, indent=1))
    assert read(str(tmp_path / "one.json")) == ["only"]


def test_folders_and_globs(tmp_path: Path) -> None:
    for name in ("b/two.txt", "b/.hidden/no.txt", "one.txt", "three.md", "four.bin", "b/five[1].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(Path(name).stem)
    assert read(str(tmp_path)) == ["five[1]", "two", "one", "three"]
    assert read(f"{tmp_path}/*.txt") == ["one"]
    assert read(f"{tmp_path}/**/*.txt") == ["five[1]", "two", "one"]
    assert read(f"{tmp_path}/[bo]*") == ["five[1]", "two", "one"]
    assert read(str(tmp_path / "b/five[1].txt")) == ["five[1]"]


def test_an_order_shuffles_files_and_none_keeps_them(tmp_path: Path) -> None:
    names = [f"{i}.txt" for i in range(8)]
    for name in names:
        (tmp_path / name).write_text(name)

    def first(order: random.Random | None) -> Any:
        return next(Source(str(tmp_path)).pieces(None, order, False))

    assert first(None).text == names[0]
    assert first(random.Random(3)) == first(random.Random(3))
    assert len({first(random.Random(seed)).text for seed in range(20)}) > 4


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("home")
    assert read("~/a.txt") == read("~/*.txt") == ["home"]


def test_files_set_aside_are_told_by_whole_words(tmp_path: Path) -> None:
    for name in ("train", "latest", "interval", "my-test", "validation-00001", "dev.2"):
        (tmp_path / f"{name}.txt").write_text(name)
    for name in (str(tmp_path), f"{tmp_path}/*.txt"):
        assert read(name) == ["interval", "latest", "train"]
        assert read(name, held_out=True) == ["dev.2", "my-test", "validation-00001"]
    assert read(f"{tmp_path}/my-*.txt") == ["my-test"]  # all there is


@pytest.mark.parametrize(
    ("text", "name", "weight"),
    [
        ("a.txt", "a.txt", 1), ("a.txt@3", "a.txt", 3), ("a@b.txt@.5", "a@b.txt", 0.5), ("o/n:c@1e-1", "o/n:c", 0.1),
        ("odd@2", "odd@2", 1), ("odd@2@4", "odd@2", 4), ("*@7.txt", "*@7.txt", 1), ("odd@*", "odd@*", 1),
    ],
)  # fmt: skip
def test_the_weight_is_behind_the_last_at_unless_that_exists(
    text: str, name: str, weight: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("odd@2", "b@7.txt"):
        Path(path).touch()
    assert parse_source(text) == Source(name, weight)


@pytest.mark.parametrize("weight", ["", "0", "-1", "nan", "inf", "many", "txt"])
def test_bad_weights(weight: str) -> None:
    message = refusal(lambda: parse_source(f"a@{weight}"))
    assert message == f"a@{weight}: no such file, and {weight!r} is no weight: after the @ give a number above 0"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.bin", b"x", "a.bin is not text: give .txt, .md, .jsonl"),
        ("a.jsonl", b'{"text": "a"}\n{"txt', "a.jsonl: line 2: "),
        ("a.json", b"[1, 2]", "a.json holds a int, no object with 'text' or 'messages'"),
        ("a.json", b'{"text"', "can't read"),
        ("a.jsonl", b'{"body": "a", "title": "b"}', "no column 'text' or 'messages', only body, title"),
        ("a.jsonl", b'{"text": 3}', "'text' is 3, not text"),
        ("a.jsonl", b'{"messages": "hello"}', "'messages' is no list of objects with 'role' and 'content'"),
        ("a.jsonl", b'{"messages": [{"from": "a"}]}', "'messages' is no list of objects"),
        ("a.csv", b"a,b\n1,2\n", "only a, b"),
        ("a.parquet", b"PAR1 and no more", "a.parquet: "),
        ("a.txt", b"\xff\xfe\x00", "a.txt: "),
        ("a.txt.gz", b"no gzip", "a.txt.gz: "),
        ("a.txt.gz", gzip.compress(b"cut" * 1000, mtime=0)[:-12], "a.txt.gz: "),
        ("a.jsonl", b"", "has no word to learn from"),
        ("a.csv", b"", "has no word to learn from"),
        ("a.txt", b"", "has no word to learn from"),
        ("a.jsonl", b'{"text": null}\n{"text": ""}', "has no word to learn from"),
    ],
)
def test_what_can_not_be_read_is_named(
    name: str, content: bytes, expected: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / name).write_bytes(content)
    message = refusal(lambda: token_rows(str(tmp_path / name), tokenizer, seq_len=8, tokens=8))
    assert expected in message and name in message


def test_a_parquet_file_without_text_names_its_columns(tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"body": ["a"], "title": ["b"]}), tmp_path / "a.parquet")
    assert "only body, title" in refusal(lambda: read(str(tmp_path / "a.parquet")))


def test_a_parquet_file_that_is_cut_short(tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"text": words(1000)}), tmp_path / "a.parquet")
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[200:400] = bytes(200)
    (tmp_path / "a.parquet").write_bytes(content)
    assert "a.parquet: " in refusal(lambda: read(str(tmp_path / "a.parquet")))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("/no/such/file.txt", "no such file, folder or data set: /no/such/file.txt"),
        ("no/such.jsonl", "no such file, folder or data set"),  # not asked for on the Hub
        ("nothing", "no such file, folder or data set"),
        ("none/*.txt", "no such file, folder or data set"),
        ("a/b/c", "no such file, folder or data set"),
    ],
)
def test_no_such_data(name: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in refusal(lambda: read(name))


def test_a_folder_without_text(tmp_path: Path) -> None:
    (tmp_path / "a.bin").touch()
    assert "no text in" in refusal(lambda: read(str(tmp_path)))


def test_hub_data_sets_are_streamed(hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    lines = {name: json.dumps({"text": name}) for name in ("train-0.jsonl", "train-1.jsonl", "test.jsonl")}
    hub.add_repo("data/splits", lines)
    assert sorted(read("data/splits")) == ["train-0.jsonl", "train-1.jsonl"]
    assert read("data/splits", held_out=True) == ["test.jsonl"]
    card = "---\nconfigs:\n- {config_name: one, data_files: a.jsonl}\n- {config_name: two, data_files: b.jsonl}\n---\n"
    hub.add_repo("data/configs", {"README.md": card, "a.jsonl": '{"text": "a"}', "b.jsonl": '{"text": "b"}'})
    assert read("data/configs:two") == ["b"]
    assert "['one', 'two']" in refusal(lambda: read("data/configs"))
    assert capfd.readouterr() == ("", "")


def test_the_seed_orders_the_shards_of_a_data_set(hub: Hub, tokenizer: PreTrainedTokenizerBase) -> None:
    hub.add_repo("data/shards", {f"train-{i}.jsonl": json.dumps({"text": f"{i} " * 20}) for i in range(6)})

    def first(seed: int) -> list[int]:
        return token_rows("data/shards", tokenizer, seq_len=16, tokens=64, shuffle_seed=seed).ids.flatten().tolist()

    assert first(1) == first(1)
    assert len({tuple(first(seed)) for seed in range(5)}) > 1


def test_data_sets_that_can_not_be_had(hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    assert "datasets/data/missing is not on the Hub, or is private" in refusal(lambda: read("data/missing"))
    hub.add_repo("data/gated", {"train.jsonl": "{}"})
    hub.gate("data/gated")
    assert "gated" in refusal(lambda: read("data/gated"))
    hub.add_repo("data/broken", {"train.jsonl": '{"text": "a"}\n{"text'})
    assert "can't read the data set data/broken: " in refusal(lambda: read("data/broken"))
    hub.add_repo("data/columns", {"train.jsonl": '{"body": "a"}'})
    assert "data/columns has no column 'text' or 'messages', only body" in refusal(lambda: read("data/columns"))
    with hub.failing("/api/datasets/data/down", 503):
        assert "status 503" in refusal(lambda: read("data/down"))
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("seq_len", [16, 33, 512])
def test_training_rows_hold_every_document_once_a_reading(
    tokenizer: Any, seq_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those longer than a row, or than what is left of it, go on in the next one, where positions start anew."""
    monkeypatch.setattr(data_module, "PIECE_ROWS", 100)
    documents = words(60)
    end = tokenizer.eos_token_id
    wanted = sorted([*tokenizer(text)["input_ids"], end] for text in documents)
    tokens = 3 * sum(map(len, wanted))
    rows = token_rows(documents, tokenizer, seq_len=seq_len, tokens=tokens)
    assert len(rows) == -(-tokens // seq_len)
    found: list[list[int]] = [[]]
    for token in (token for context in contexts(rows) for token in context):
        found[-1].append(token)
        if token == end:
            found.append([])
    assert sorted(found[:60]) == sorted(found[60:120]) == wanted
    assert all(len(context) <= seq_len for context in contexts(rows))
    assert {int(rows[i]["position_ids"][0]) for i in range(len(rows))} == {0}


def test_positions_masks_and_padding_of_a_packed_row(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts_module, "_shuffled", lambda pieces, order: pieces)
    documents = ["a b", "c " * 9, "d " * 60]
    lengths = [len(tokenizer(text)["input_ids"]) + 1 for text in documents]
    seq_len = 40
    rows = token_rows(documents, tokenizer, seq_len=seq_len, tokens=3 * seq_len)
    one, two = rows[0], rows[1]
    filled = lengths[0] + lengths[1]
    assert filled < seq_len * 7 // 8 < sum(lengths)
    expected = [*range(lengths[0]), *range(lengths[1]), *range(seq_len - filled)]
    assert one["position_ids"].tolist() == expected
    assert one["loss_mask"].tolist() == [int(position > 0) for position in expected]
    assert one["attention_mask"].tolist() == [1] * seq_len
    assert two["position_ids"].tolist()[:5] == [0, 1, 2, 3, 4]  # of the third document, which goes on
    assert two["loss_mask"].tolist()[:3] == [0, 1, 1]
    assert {value.dtype for value in one.values()} == {torch.long}
    assert {tuple(value.shape) for value in one.values()} == {(seq_len,)}


def test_padding_counts_nowhere(tokenizer: Any) -> None:
    """A document that would get but a scrap of the row starts the next; one that fits in the scrap does not."""
    texts = ["a " * 27, "b " * 20, "c"]
    lengths = [len(tokenizer(text)["input_ids"]) + 1 for text in texts]
    seq_len = lengths[0] + 3
    assert lengths[1] > 3 >= lengths[2] and seq_len // 8 > 3
    make = data_module._packed
    given = [contexts_module._context(tokenizer(text)["input_ids"] + [0]) for text in (texts[0], texts[1])]
    first, second = make(given, tokenizer, seq_len, alone=False)
    rows = data_module._rows([first, second], seq_len)
    assert rows[0]["attention_mask"].tolist() == [1] * lengths[0] + [0] * 3
    assert rows[0]["loss_mask"].tolist() == [0] + [1] * (lengths[0] - 1) + [0] * 3
    assert rows.lengths.tolist() == lengths[:2] and rows.tokens == sum(lengths[:2])
    given[1] = contexts_module._context(tokenizer(texts[2])["input_ids"] + [0])
    (only,) = make(given, tokenizer, seq_len, alone=False)
    assert data_module._rows([only], seq_len)[0]["position_ids"].tolist()[lengths[0] :][: lengths[2]] == list(
        range(lengths[2])
    )


def test_evaluation_rows_start_with_a_document_and_keep_their_order(tokenizer: Any) -> None:
    documents = words(12)
    rows = token_rows(documents, tokenizer, seq_len=64, tokens=64 * 100, shuffle_seed=None)
    expected = []
    for text in documents:
        ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        expected += [part for part in (ids[i : i + 64] for i in range(0, len(ids), 64)) if len(part) > 1]
    assert contexts(rows) == expected
    assert rows.lengths.tolist() == [len(part) for part in expected]
    for i in range(len(rows)):
        row, length = rows[i], len(expected[i])
        assert row["position_ids"].tolist() == list(range(64))
        assert row["attention_mask"].tolist() == rows.mask[i].tolist() == [1] * length + [0] * (64 - length)
    few = token_rows(documents, tokenizer, seq_len=64, tokens=130, shuffle_seed=None)
    assert contexts(few) == expected[:3]
    assert contexts(token_rows(documents, tokenizer, seq_len=64, tokens=1, shuffle_seed=None)) == expected[:1]


def test_the_tokens_that_part_documents(tokenizer: Any) -> None:
    """The end-of-text token, unless the tokenizer puts tokens of its own around a text."""
    end = tokenizer.eos_token_id
    assert contexts_module.ends(tokenizer) == ([], [end])

    class Around:
        bos_token_id, eos_token_id = 1, 2

        def __init__(self, before: list[int], after: list[int]) -> None:
            self.before, self.after = before, after

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [*self.before, 7, *self.after] if add_special_tokens else [7]}

    for before, after, expected in (([1], [], ([1], [])), ([1], [2], ([1], [2])), ([], [2], ([], [2]))):
        assert contexts_module.ends(Around(before, after)) == expected  # type: ignore[arg-type]


def test_a_long_text_has_its_ends_once(tokenizer: Any) -> None:
    """However many pieces it is cut into, each a context of its own."""
    text = " ".join(map(str, range(3000)))
    stream = contexts_module.Stream(Source("the text", texts=[text]), 0, tokenizer, 256, held_out=False)
    found = [context.ids.tolist() for context in stream.once(random.Random(3))]
    assert len(found) == -(-len(text) // 256)
    (last,) = (ids for ids in found if tokenizer.eos_token_id in ids)
    assert last[-1] == tokenizer.eos_token_id and tokenizer.decode(last[:-1]) == text[len(text) // 256 * 256 :]


def test_less_than_a_row(tokenizer: Any, tmp_path: Path) -> None:
    for options in ({}, {"shuffle_seed": None}):
        message = refusal(
            lambda options=options: token_rows(["few words"], tokenizer, seq_len=50, tokens=99, **options)
        )
        assert "the text has" in message and "less than one row of 50" in message
    names = Sources([write_texts(tmp_path / f"{i}.jsonl", ["few words"]) for i in range(2)])
    assert "less than one row of 50" in refusal(lambda: token_rows(names, tokenizer, seq_len=50, tokens=900))
    assert "the text has no word to learn from" in refusal(
        lambda: token_rows(["", ""], tokenizer, seq_len=50, tokens=9)
    )
    assert "at least 2" in refusal(lambda: token_rows(["few words"], tokenizer, seq_len=1, tokens=9))


def test_every_token_gathered_is_told(tokenizer: Any) -> None:
    told: list[int] = []
    rows = token_rows(words(50), tokenizer, seq_len=32, tokens=1000, progress=told.append)
    assert sum(told) == rows.tokens and len(told) == len(rows)


# ------------------------------------------------------------------------------------------------------- order, mixing


@pytest.fixture
def two(tmp_path: Path) -> Sources:
    """A corpus of words that start with w, and one of others."""
    write_texts(tmp_path / "w.jsonl", words(400))
    write_texts(tmp_path / "v.jsonl", [text.replace("w", "v") for text in words(400)])
    return Sources([str(tmp_path / "w.jsonl"), f"{tmp_path / 'v.jsonl'}@3"])


def test_the_same_seed_gives_the_same_bytes(
    two: Sources, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contexts_module, "SHUFFLE_CHARS", 20_000)  # much less than the corpora
    files = {}
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        rows = token_rows(two, tokenizer, seq_len=32, tokens=12_000, shuffle_seed=seed, folder=tmp_path / name)
        files[name] = [(tmp_path / name / part).read_bytes() for part in ("ids.bin", "marks.bin")]
        in_memory = token_rows(two, tokenizer, seq_len=32, tokens=12_000, shuffle_seed=seed)
        assert torch.equal(rows.ids, in_memory.ids) and torch.equal(rows.marks, in_memory.marks)
    assert files["one"] == files["again"]
    assert files["one"] != files["other"]


def test_how_texts_are_batched_does_not_show(two: Sources, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = token_rows(two, tokenizer, seq_len=32, tokens=5000)
    monkeypatch.setattr(contexts_module, "BATCH_CHARS", 64)
    assert torch.equal(rows.ids, token_rows(two, tokenizer, seq_len=32, tokens=5000).ids)


def test_shuffling_reaches_across_the_buffer_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts_module, "SHUFFLE_CHARS", 50 * 210)
    pieces = [Piece(f"{i:010}") for i in range(300)]
    shuffled = list(contexts_module._shuffled(iter(pieces), random.Random(0)))
    assert sorted(shuffled) == pieces
    assert shuffled != pieces
    moved = [int(piece.text) - i for i, piece in enumerate(shuffled)]
    assert max(moved) <= 50 < -min(moved)  # none comes earlier than the buffer reaches, some wait much longer
    assert sum(abs(move) for move in moved) / 300 > 20


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (1, 9)])
def test_weights_are_shares_of_tokens(
    weights: tuple[int, int], two: Sources, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    names = Sources(f"{name.partition('@')[0]}@{weight}" for name, weight in zip(two, weights, strict=True))
    rows = token_rows(names, tokenizer, seq_len=64, tokens=20_000)
    of_w = [ids for ids in contexts(rows) if "w" in tokenizer.decode(ids)]
    share = sum(map(len, of_w)) / rows.tokens
    assert share == pytest.approx(weights[0] / sum(weights), abs=0.02)
    assert rows.tokens > 0.97 * rows.ids.numel()
    half = rows.split([len(rows) // 2, len(rows) - len(rows) // 2])[0]  # at any time, not only in the end
    of_w = [ids for ids in contexts(half) if "w" in tokenizer.decode(ids)]
    assert sum(map(len, of_w)) / half.tokens == pytest.approx(weights[0] / sum(weights), abs=0.03)


def test_a_source_that_runs_out_is_read_again_and_told(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    small = write_texts(tmp_path / "small [1].jsonl", words(10))
    large = write_texts(tmp_path / "large.jsonl", [text.replace("w", "v") for text in words(2000)])
    rows = token_rows(Sources([small, large]), tokenizer, seq_len=64, tokens=12_000)
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    size = sum(len(tokenizer(text)["input_ids"]) + 1 for text in words(10))
    assert told.startswith(f"{small}: it has {size:,} tokens for a share of ")
    assert told.endswith(f"so it is read {6000 / size:.1f} times\n")
    of_small = [ids for ids in contexts(rows) if "w" in tokenizer.decode(ids)]
    assert sum(map(len, of_small)) / rows.tokens == pytest.approx(0.5, abs=0.02)
    assert len(rows) == -(-12_000 // 64)


def test_every_reading_has_an_order_of_its_own(tokenizer: Any) -> None:
    documents = [f"{i} {i}" for i in range(30)]
    stream = contexts_module.Stream(Source("the text", texts=documents), 0, tokenizer, 1000, False).forever(5)
    one, two = ([tuple(next(stream).ids) for _ in range(30)] for _ in range(2))
    assert sorted(one) == sorted(two)
    assert one != two


def test_a_corpus_that_suffices_is_not_told(two: Sources, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    token_rows(two, tokenizer, seq_len=64, tokens=4000)
    assert capsys.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------------- chats


def answers(row: dict[str, torch.Tensor], tokenizer: Any) -> list[str]:
    """Runs of targets, as text."""
    found: list[list[int]] = []
    before = 0
    for token, target in zip(row["input_ids"].tolist(), row["loss_mask"].tolist(), strict=True):
        if target:
            found.append([token]) if not before else found[-1].append(token)
        before = target
    return [tokenizer.decode(ids) for ids in found]


@pytest.mark.parametrize("template", [MARKED, PLAIN])
def test_only_answers_are_learnt(template: str, chatty: Any, tmp_path: Path) -> None:
    chatty.chat_template = template
    name = write_lines(tmp_path / "chats.jsonl", [{"messages": CHAT}])
    whole = chatty.apply_chat_template(CHAT, tokenize=False)
    length = len(chatty(whole, add_special_tokens=False)["input_ids"])
    rows = token_rows(name, chatty, seq_len=length, tokens=length)
    assert chatty.decode(rows[0]["input_ids"]) == whole  # nothing before, after or twice
    assert rows[0]["position_ids"].tolist() == list(range(length))
    assert answers(rows[0], chatty) == ["return a + b</s>", "  import this  \n</s>"]


@pytest.mark.parametrize("spaces_have_extent", [True, False])
def test_prefixes_find_what_marks_tell(spaces_have_extent: bool, chatty: Any) -> None:
    chatty.backend_tokenizer.post_processor = ByteLevel(trim_offsets=not spaces_have_extent)
    marked = chat_tokens(Chat(CHAT, None, "x"), chatty)
    chatty.chat_template = PLAIN
    assert chat_tokens(Chat(CHAT, None, "x"), chatty) == marked
    ids, mask = marked
    assert mask is not None
    answers = chatty.decode([token for token, target in zip(ids, mask, strict=True) if target])
    assert answers.replace("  import", " import") == "return a + b</s> import this  \n</s>"


def test_chats_are_read_from_parquet_and_mixed_with_text(chatty: Any, tmp_path: Path) -> None:
    pa.parquet.write_table(pa.Table.from_pylist([{"messages": CHAT, "score": 1.0}] * 50), tmp_path / "chats.parquet")
    text = write_texts(tmp_path / "w.jsonl", words(100))
    rows = token_rows(Sources([str(tmp_path / "chats.parquet"), text]), chatty, seq_len=256, tokens=4096)
    found = {answer for i in range(len(rows)) for answer in answers(rows[i], chatty)}
    assert "return a + b</s>" in found
    assert any(re.search(r"w\d+x3 w\d+x4", answer) for answer in found)


def test_a_column_of_tools_reaches_the_template(chatty: Any, tmp_path: Path) -> None:
    chatty.chat_template = "{% if tools %}{{ tools[0]['name'] }}{% endif %}" + MARKED
    chat = {"messages": CHAT, "tools": [{"name": "calculator"}]}
    rows = token_rows(write_lines(tmp_path / "a.jsonl", [chat]), chatty, seq_len=64, tokens=64)
    assert any("calculator" in chatty.decode(rows[i]["input_ids"]) for i in range(len(rows)))


def test_a_template_that_rewords_the_past_is_refused(chatty: Any, tmp_path: Path) -> None:
    """As those that drop the thoughts of all answers but the last."""
    chatty.chat_template = PLAIN.replace("</s>{% endif %}", "{% if loop.last %}!{% endif %}</s>{% endif %}")
    message = refusal(
        lambda: token_rows(write_lines(tmp_path / "a.jsonl", [{"messages": CHAT}]), chatty, seq_len=8, tokens=8)
    )
    assert "can't tell the answers of the chats in" in message and "a.jsonl" in message
    assert "{% generation %}" in message
    token_rows(str(tmp_path / "a.jsonl"), chatty, seq_len=8, tokens=8, shuffle_seed=None)  # evaluation needs none


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (None, CHAT, "has no chat template: give plain text"),
        ("{{ raise_exception('roles must\nalternate') }}", CHAT, "does not fit the tokenizer's chat template: roles"),
        ("{{ messages[0]['content']['x'].y }}", CHAT, "does not fit"),
        (MARKED, CHAT[:2], "has no answer of an assistant to learn from"),
        (PLAIN, [CHAT[2], CHAT[1]], "has no answer of an assistant to learn from"),
    ],
)
def test_chats_that_teach_nothing(template: Any, messages: Any, expected: str, chatty: Any, tmp_path: Path) -> None:
    chatty.chat_template = template
    name = write_lines(tmp_path / "a.jsonl", [{"messages": messages}])
    message = refusal(lambda: token_rows(name, chatty, seq_len=8, tokens=8))
    assert expected in message and "a.jsonl" in message


def test_chats_without_answers_are_left_out_and_counted(
    chatty: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    silent = {"messages": [{"role": "user", "content": "anyone?"}]}
    name = write_lines(tmp_path / "a.jsonl", [{"messages": CHAT}, silent, silent])
    rows = token_rows(name, chatty, seq_len=16, tokens=160)
    assert "anyone" not in chatty.decode(rows.ids.flatten())
    assert "2 chats without an answer to learn from are left out" in capsys.readouterr().err


def test_rows_without_a_target_are_left_out(chatty: Any, tmp_path: Path) -> None:
    """A long question fills rows that no loss could be computed on."""
    chat = [{"role": "user", "content": "why " * 500}, CHAT[2]]
    rows = token_rows(write_lines(tmp_path / "a.jsonl", [{"messages": chat}] * 3), chatty, seq_len=32, tokens=640)
    assert len(rows) == 20
    assert all(rows[i]["loss_mask"][1:].any() for i in range(len(rows)))


def test_rows_that_never_have_a_target_end_the_run(chatty: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(data_module, "LOST_ROWS", 50)
    chatty.chat_template = MARKED.replace("</s>{% endgeneration %}", "{% endgeneration %}")
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": ""}]
    out: Any = {"input_ids": []}
    seq_len = 1
    while len(out["input_ids"]) < 2 * seq_len:  # the only target is the first token of the second row
        chat[2]["content"] += " c"
        out = chatty.apply_chat_template(chat, return_assistant_tokens_mask=True)
        seq_len = out["assistant_masks"].index(1)
    assert len(out["input_ids"]) == 2 * seq_len and sum(out["assistant_masks"]) == 1
    name = write_lines(tmp_path / "a.jsonl", [{"messages": chat}])
    message = refusal(lambda: token_rows(name, chatty, seq_len=seq_len, tokens=100))
    assert "50 rows one after another have nothing to learn from" in message


# ------------------------------------------------------------------------------------------------------- on disk


def test_rows_on_disk_are_found_again_without_the_corpus(two: Sources, tokenizer: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"seq_len": 32, "tokens": 3000, "folder": tmp_path / "rows"}
    rows = token_rows(two, tokenizer, **options)
    for name in two:
        Path(name.partition("@")[0]).unlink()
    again = token_rows(two, tokenizer, **options)
    assert torch.equal(again.ids, rows.ids) and torch.equal(again.marks, rows.marks)
    assert again[3].keys() == rows[3].keys() and all(torch.equal(again[3][k], rows[3][k]) for k in rows[3])
    assert sum(path.stat().st_size for path in (tmp_path / "rows").glob("*.bin")) == 5 * rows.ids.numel()


@pytest.mark.parametrize("change", [{"shuffle_seed": 1}, {"tokens": 4000}, {"seq_len": 16}, {"data": Sources(["x"])}])
def test_rows_of_another_request_are_refused(
    change: dict[str, Any], two: Sources, tokenizer: Any, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"data": two, "seq_len": 32, "tokens": 3000, "folder": tmp_path / "rows"}
    token_rows(tokenizer=tokenizer, **options)
    message = refusal(lambda: token_rows(tokenizer=tokenizer, **{**options, **change}))
    assert "holds rows of another run" in message and "drop --resume" in message


@pytest.mark.parametrize("error", [KeyboardInterrupt, DijiangError])
def test_half_a_set_of_rows_is_never_taken_for_a_whole_one(
    error: type[BaseException], two: Sources, tokenizer: Any, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"seq_len": 32, "tokens": 3000, "folder": tmp_path / "run" / "rows"}
    count = 0

    def stop(tokens: int) -> None:
        nonlocal count
        count += 1
        if count == 20:
            raise error

    with pytest.raises(error):
        token_rows(two, tokenizer, progress=stop, **options)
    assert list((tmp_path / "run").iterdir()) == []
    whole = token_rows(two, tokenizer, **options)
    assert torch.equal(whole.ids, token_rows(two, tokenizer, seq_len=32, tokens=3000).ids)


def test_a_process_that_is_killed_leaves_no_set_of_rows(two: Sources, tokenizer: Any, tmp_path: Path) -> None:
    """Its partial folder has another name."""
    partial = tmp_path / ".rows.abc.partial"
    partial.mkdir()
    (partial / "ids.bin").write_bytes(b"half")
    assert len(token_rows(two, tokenizer, seq_len=32, tokens=64, folder=tmp_path / "rows")) == 2


def test_memory_does_not_grow_with_tokens(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts_module, "SHUFFLE_CHARS", 2**18)
    monkeypatch.setattr(contexts_module, "BATCH_CHARS", 2**15)
    line = json.dumps({"text": "some words of a line that is repeated " * 20}) + "\n"
    (tmp_path / "a.jsonl").write_text(line * 4000)
    (tmp_path / "book.txt").write_text("some words of a line that is repeated\n" * 80_000)
    for data in ("a.jsonl", "book.txt"):
        peaks = []
        for tokens in (20_000, 20_000, 200_000):  # the first call loads what all need
            tracemalloc.start()
            rows = token_rows(
                str(tmp_path / data), tokenizer, seq_len=128, tokens=tokens, folder=tmp_path / f"{data}{len(peaks)}"
            )
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            assert len(rows) == -(-tokens // 128)
        assert peaks[2] < 1.2 * peaks[1], (data, peaks)


# ------------------------------------------------------------------------------------------------------- finetune


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a third stage that has longer rows and, in the recipe, a corpus of its own."""
    folder = tmp_path_factory.mktemp("converted")
    stages = [
        {"name": "transfer", "objective": "attention_transfer", "tokens": 1000, "seq_len": 16},
        {"name": "distill", "objective": "distillation", "tokens": 3000, "seq_len": 16},
        {"name": "extend", "objective": "cross_entropy", "tokens": 900, "seq_len": 64, "data": ["long.txt"]},
    ]
    (folder / "own.yaml").write_text(json.dumps({"data": ["a.jsonl", "b.jsonl@3"], "stages": stages}))
    convert(str(MODEL), folder / "demo", recipe=str(folder / "own.yaml"))
    return folder / "demo"


@pytest.fixture
def corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "a.jsonl", words(300))
    write_texts(tmp_path / "b.jsonl", [text.replace("w", "v") for text in words(300)])
    (tmp_path / "long.txt").write_text(" ".join(f"long{i}" for i in range(3000)))
    (tmp_path / "mine.txt").write_text(" ".join(f"mine{i}" for i in range(3000)))
    return tmp_path


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Rows]]:
    """The rows that every stage would train on, by its name; after the last one the run is stopped."""
    found: dict[str, Rows] = {}

    def run_stage(model: Any, stage: Any, rows: Rows, **options: Any) -> Any:
        found[stage.name] = Rows(rows.ids.clone(), rows.marks.clone())
        if stage.name == "extend":
            raise KeyboardInterrupt
        return model, None

    class Run(finetune.__globals__["RunFolder"]):  # type: ignore[misc]
        def record(self, *arguments: Any) -> None:
            pass

    monkeypatch.setitem(finetune.__globals__, "run_stage", run_stage)
    monkeypatch.setitem(finetune.__globals__, "RunFolder", Run)
    yield found


def test_every_stage_has_rows_of_its_own_corpus_and_length(
    converted: Path, corpora: Path, stages: dict[str, Rows], tokenizer: Any
) -> None:
    with pytest.raises(KeyboardInterrupt):
        finetune(converted, "out", report=False)
    assert {name: tuple(rows.ids.shape) for name, rows in stages.items()} == {
        "transfer": (63, 16), "distill": (188, 16), "extend": (15, 64),
    }  # fmt: skip
    for name, letters in (("transfer", "wv"), ("distill", "wv"), ("extend", "long")):
        text = " ".join(texts_in(stages[name], tokenizer))
        assert all(letter in text for letter in letters)
        assert ("long" in text) == (name == "extend")
    both = token_rows(Sources(["a.jsonl", "b.jsonl@3"]), tokenizer, seq_len=16, tokens=251 * 16)
    assert torch.equal(torch.cat([stages["transfer"].ids, stages["distill"].ids]), both.ids)  # and none twice


@pytest.mark.parametrize(
    ("options", "mine"),
    [
        ({"data": "mine.txt"}, {"transfer", "distill", "extend"}),
        ({"data": Sources(["mine.txt"])}, {"transfer", "distill", "extend"}),
        ({"data": "mine.txt", "settings": ["extend.data=long.txt"]}, {"transfer", "distill"}),
        ({"settings": ["transfer.data=mine.txt"]}, {"transfer"}),
        ({"settings": ["data=[mine.txt@2]"]}, {"transfer", "distill", "extend"}),
        ({"data": [f"mine{i}" * 30 for i in range(300)]}, {"transfer", "distill", "extend"}),
    ],
)
def test_data_given_replaces_that_of_recipe_and_stages(
    options: dict[str, Any], mine: set[str], converted: Path, corpora: Path, stages: dict[str, Rows], tokenizer: Any
) -> None:
    with pytest.raises(KeyboardInterrupt):
        finetune(converted, "out", report=False, **options)
    assert {name for name, rows in stages.items() if "mine" in tokenizer.decode(rows.ids.flatten())} == mine


def test_a_resumed_run_has_the_very_same_rows_whatever_happened_to_the_corpus(
    converted: Path, corpora: Path, stages: dict[str, Rows]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        finetune(converted, "out", report=False)
    before = dict(stages)
    for path in ("a.jsonl", "b.jsonl", "long.txt"):
        Path(path).unlink()
    stages.clear()
    with pytest.raises(KeyboardInterrupt):
        finetune(converted, "out", resume=True, report=False)
    for name in ("transfer", "distill", "extend"):
        assert torch.equal(stages[name].ids, before[name].ids) and torch.equal(stages[name].marks, before[name].marks)
    for options in ({"seed": 1}, {"data": "mine.txt"}):
        assert "another run" in refusal(
            lambda options=options: finetune(converted, "out", resume=True, report=False, **options)
        )
    assert Path("out.run/rows-0/ids.bin").is_file()  # which that leaves alone


def test_a_run_stopped_while_gathering_gathers_again(
    converted: Path, corpora: Path, stages: dict[str, Rows], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        finetune(converted, "unbroken", report=False)
    unbroken = dict(stages)
    with monkeypatch.context() as patch:

        def stop(rows: Any, progress: Any) -> Iterator[Any]:
            yield next(iter(rows))
            raise KeyboardInterrupt

        patch.setattr(data_module, "_counted", stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(converted, "out", report=False)
    assert not list(Path("out.run").glob("rows-*"))
    with pytest.raises(KeyboardInterrupt):
        finetune(converted, "out", resume=True, report=False)
    assert all(torch.equal(stages[name].ids, unbroken[name].ids) for name in unbroken)


def test_a_mistyped_corpus_costs_nothing(converted: Path, corpora: Path, stages: dict[str, Rows]) -> None:
    """Neither what an earlier run left nor a folder that would be in the way."""
    assert "no such file" in refusal(lambda: finetune(converted, "out", data="mne.txt"))
    assert not Path("out.run").exists()
    with pytest.raises(KeyboardInterrupt):
        finetune(converted, "out", report=False)
    assert "no such file" in refusal(lambda: finetune(converted, "out", settings=["extend.data=lng.txt"]))
    assert Path("out.run/rows-1/ids.bin").is_file()
    Path("mine.txt").write_text("short")
    assert "less than one row" in refusal(lambda: finetune(converted, "fresh", data="mine.txt"))
    assert not Path("fresh.run").exists()


def test_the_command_line_takes_several_corpora(
    converted: Path, corpora: Path, stages: dict[str, Rows], tokenizer: Any
) -> None:
    options = ["--data", "mine.txt@3", "--data", "a.jsonl", "--stage", "extend"]
    done = CliRunner().invoke(app, ["finetune", str(converted), "--out", "out", *options])
    assert done.exit_code == 1 and "stopped" in done.stderr
    text = tokenizer.decode(stages["extend"].ids.flatten())
    assert 2 * text.count("w") < text.count("mine")
    done = CliRunner().invoke(app, ["finetune", str(converted), "--out", "new", "--data", "a.jsonl@lots"])
    assert done.exit_code == 1
    assert done.stderr == (
        "error: a.jsonl@lots: no such file, and 'lots' is no weight: after the @ give a number above 0\n"
    )


def test_data_sets_of_the_hub_are_told_from_texts_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "texts").mkdir()
    names = ["owner/name", "owner/split:train@3", "my/texts", "books/*.txt@2", "owner/books.jsonl", "~/mine"]
    assert hub_names(Sources(names)) == ["owner/name", "owner/split"]
    assert hub_names(["owner/name", "documents"]) == []  # given as they are
