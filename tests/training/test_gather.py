"""The rows of a run: each stage has its own, and a resumed run has the very same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dijiang_convert import convert, finetune
from dijiang_convert.cli import app
from dijiang_convert.data import rows as data_module
from dijiang_convert.data.readers import Sources, hub_names
from dijiang_convert.data.rows import Rows, token_rows
from dijiang_convert.demo import MODEL
from tests.data.texts import contexts, refusal, words, write_texts


def texts_in(rows: Rows, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in contexts(rows)]


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
