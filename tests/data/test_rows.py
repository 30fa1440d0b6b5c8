"""Rows of tokens: how texts are packed, ordered and mixed, and that rows are kept on disk and found again."""

from __future__ import annotations

import json
import random
import tracemalloc
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from dijiang_convert import DijiangError
from dijiang_convert.data import mixture as contexts_module
from dijiang_convert.data import rows as data_module
from dijiang_convert.data.readers import Piece, Source, Sources
from dijiang_convert.data.rows import token_rows
from tests.data.texts import contexts, refusal, words, write_texts


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


def test_every_token_gathered_is_told(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(data_module, "count_bar", lambda title, total: nullcontext(told.append))
    rows = token_rows(words(50), tokenizer, seq_len=32, tokens=1000)
    assert sum(told) == rows.tokens and len(told) == len(rows)


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


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DijiangError("stopped")], ids=repr)
def test_half_a_set_of_rows_is_never_taken_for_a_whole_one(
    error: BaseException, two: Sources, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"seq_len": 32, "tokens": 3000, "folder": tmp_path / "run" / "rows"}
    count = 0

    def stop(tokens: int) -> None:
        nonlocal count
        count += 1
        if count == 20:
            raise error

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(data_module, "count_bar", lambda title, total: nullcontext(stop))
        token_rows(two, tokenizer, **options)
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
