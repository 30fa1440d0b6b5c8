"""Where text comes from: files, folders, globs, and data sets of the Hub."""

from __future__ import annotations

import csv
import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerBase

from dijiang_convert.data.readers import Chat, Piece, Source, parse_source
from dijiang_convert.data.rows import token_rows
from tests.data.texts import read, refusal, words, write_texts
from tests.hub import Hub


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
        ("a.json", b"[1, 2]", "a.json: row 1 is a int, no object with 'text' or 'messages'"),
        ("a.json", b'{"text"', "can't read"),
        ("a.jsonl", b'{"body": "a", "title": "b"}', "no column 'text' or 'messages', only body, title"),
        ("a.jsonl", b'{"text": 3}', "'text' of row 1 is 3, not text"),
        ("a.jsonl", b'{"messages": "hello"}', "'messages' of row 1 is no list of objects with 'role' and 'content'"),
        ("a.jsonl", b'{"messages": [{"from": "a"}]}', "'messages' of row 1 is no list of objects"),
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


@pytest.mark.parametrize("name", ["corpus", "corpus/*", "corpus/*/*.jsonl"])
def test_folders_name_splits_too(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        Path("corpus", split).mkdir(parents=True)
        Path("corpus", split, "0.jsonl").write_text(json.dumps({"text": split}))
    for held_out, expected in ((False, "train"), (True, "test")):
        assert [piece.text for piece in Source(name).pieces(None, None, held_out)] == [expected]
    for split in ("train", "test"):  # a split that is named is all there is
        for held_out in (False, True):
            assert [piece.text for piece in Source(f"corpus/{split}").pieces(None, None, held_out)] == [split]


def test_what_datasets_saved_to_disk(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    rows = {"train": ["one", "two", "three"], "test": ["four"]}
    splits = {name: datasets.Dataset.from_dict({"id": texts, "text": texts}) for name, texts in rows.items()}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "both"))
    splits["train"].shuffle(seed=0).select(range(2)).save_to_disk(str(tmp_path / "some"), num_shards=2)
    assert read(str(tmp_path / "both")) == rows["train"]
    assert read(str(tmp_path / "both"), held_out=True) == rows["test"]
    assert read(str(tmp_path / "both" / "test")) == rows["test"]
    assert len(read(str(tmp_path / "some"))) == 2
    splits["train"].remove_columns("text").save_to_disk(str(tmp_path / "none"))
    assert "no column 'text' or 'messages', only id" in refusal(lambda: read(str(tmp_path / "none")))
    (tmp_path / "none" / "data-00000-of-00001.arrow").write_bytes(b"cut short")
    assert "can't read" in refusal(lambda: read(str(tmp_path / "none")))


def test_suffixes_in_capital_letters(tmp_path: Path) -> None:
    (tmp_path / "ONE.TXT").write_text("one")
    with gzip.open(tmp_path / "TWO.JSONL.GZ", "wt") as file:
        file.write('{"text": "two"}')
    assert read(str(tmp_path)) == ["one", "two"]


def test_rows_without_a_text_are_counted_and_others_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n{"text": null}\n{"text": "half a pair \\ud83d here"}\n{"text": null}\n')
    assert [piece.text for piece in Source(str(file)).pieces(None, None, False)] == ["a", "half a pair \ufffd here"]
    assert capsys.readouterr().err == f"{file}: 2 rows without a text are left out\n"
    file.write_text('{"messages": [{"role": "user", "content": [{"text": "\\ud83d!"}]}]}')
    (chat,) = Source(str(file)).pieces(None, None, False)
    assert isinstance(chat, Chat) and chat.messages == [{"role": "user", "content": "\ufffd!"}]
    for row, kind in (("[1]", "list"), ("5", "int"), ('"text"', "str")):
        file.write_text('{"text": "a"}\n' + row)
        assert refusal(lambda: [*Source(str(file)).pieces(None, None, False)]).endswith(
            f"row 2 is a {kind}, no object with 'text' or 'messages'"
        )
