"""What a run leaves: a log that survives interruptions, held-out text that no stage saw, a report without paths."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from dijiang_convert import DijiangError, convert, finetune
from dijiang_convert.checkpoint.card import write_card
from dijiang_convert.checkpoint.loading import load_tokenizer
from dijiang_convert.checkpoint.quality import read_quality
from dijiang_convert.checkpoint.shards import read_checkpoint, write_json
from dijiang_convert.data.demo_text import documents
from dijiang_convert.data.mixture import REAL, TARGET
from dijiang_convert.data.rows import Rows, token_rows
from dijiang_convert.demo import MODEL
from dijiang_convert.measure import report as report_module
from dijiang_convert.measure.probe import Probe, hold_out, in_common, select
from dijiang_convert.push import push
from dijiang_convert.training import schedule, trainer
from dijiang_convert.training.log import TrainingLog, read_log
from tests.hub import Hub

SEQ_LEN = 128
OPTIONS: dict[str, Any] = {"seq_len": SEQ_LEN, "tokens": 8000}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True, scope="module")
def few_steps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "LEAST_STEPS", 8)
        patch.setattr(schedule, "MICRO_BATCH_TOKENS", 2 * SEQ_LEN)
        yield


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "<demo>"
    convert(str(MODEL), out, recipe="frequency", settings=["window=8", "block=8", "memory=8"])
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a held-out part."""
    folder = tmp_path_factory.mktemp("text")
    for i, document in enumerate(documents("train")[:8]):
        (folder / f"{i}.txt").write_text(document, encoding="utf-8")
    (folder / "validation.txt").write_text(documents("validation")[0], encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tuned(converted: Path, text: Path) -> Path:
    out = converted.parent / "tuned"
    finetune(converted, out, data=str(text), **OPTIONS)
    return out


class Page(HTMLParser):
    """Checks that tags are closed in order, and keeps texts, images and links."""

    VOID = ("meta", "img", "br")

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.images: list[str] = []
        self.links: list[str] = []
        self.feed(content)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        values = dict(attrs)
        if tag == "img":
            self.images.append(str(values["src"]))
        self.links += [str(value) for key, value in values.items() if key in ("href", "src") and tag != "img"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


# --------------------------------------------------------------------------------------------------------- the log


def test_every_logged_step_is_a_line_with_what_happened(tuned: Path) -> None:
    lines = read_log(tuned / "training.jsonl")
    assert [line["stage"] for line in lines] == sorted((line["stage"] for line in lines), reverse=True)
    assert {(line["stage"], line["index"]) for line in lines} == {("transfer", 0), ("distill", 1)}
    for index in (0, 1):
        mine = [line for line in lines if line["index"] == index]
        steps = [line["step"] for line in mine]
        assert steps == sorted(set(steps)) and steps[0] == 1
        assert [line["seconds"] for line in mine] == sorted(line["seconds"] for line in mine)
        per_step = {line["tokens"] / line["step"] for line in mine}
        assert len(per_step) == 1 and per_step.pop() % SEQ_LEN == 0
        assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in mine)
    transfer, distill = lines[0], lines[-1]
    assert "learning_rate" not in transfer and transfer["kernel_learning_rate"] > 0
    assert distill["learning_rate"] != distill["kernel_learning_rate"]
    assert "layer_errors" not in distill


def test_the_loss_of_attention_transfer_is_the_mean_of_its_layers(tuned: Path) -> None:
    """Over the accumulated batches of a step, too."""
    lines = [line for line in read_log(tuned / "training.jsonl") if line["stage"] == "transfer"]
    for line in lines:
        assert len(line["layer_errors"]) == 4
        assert sum(line["layer_errors"]) / 4 == pytest.approx(line["loss"], rel=1e-4)


@pytest.mark.parametrize("stopped_in", ["transfer", "distill"])
def test_a_resumed_run_has_one_continuous_log(
    converted: Path, text: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_in: str
) -> None:
    class Stop(trainer._ProgressCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.stage.name == stopped_in and state.global_step == self.steps - 1:
                raise KeyboardInterrupt
            super().on_step_end(args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_ProgressCallback", Stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(converted, tmp_path / "out", data=str(text), **OPTIONS)
    with (tmp_path / "out.run" / "training.jsonl").open("a") as file:
        file.write('{"stage": "cut off')
    finetune(converted, tmp_path / "out", data=str(text), resume=True, **OPTIONS)
    unbroken, resumed = read_log(tuned / "training.jsonl"), read_log(tmp_path / "out" / "training.jsonl")
    assert [(x["index"], x["step"], x["tokens"]) for x in resumed] == [
        (x["index"], x["step"], x["tokens"]) for x in unbroken
    ]
    assert [x["loss"] for x in resumed] == pytest.approx([x["loss"] for x in unbroken], rel=1e-2)
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert len(page.images) == 3  # what was measured before the interruption is still there
    assert {"original", "before", "after"} <= set(page.texts)


def test_lines_after_the_step_that_is_resumed_from_go(tmp_path: Path) -> None:
    class State:
        global_step, is_world_process_zero = 2, True

    path, stage = tmp_path / "training.jsonl", trainer.Stage("a", "cross_entropy", 10)
    steps = [(0, 1), (0, 9), (1, 1), (1, 2), (1, 3), (2, 1)]
    path.write_text("".join(json.dumps({"index": i, "step": n, "seconds": 5.0 * n}) + "\n" for i, n in steps))
    log = TrainingLog(path, stage, 1)
    log.on_train_begin(None, State(), None)
    assert [(line["index"], line["step"]) for line in read_log(path)] == [(0, 1), (0, 9), (1, 1), (1, 2)]


# --------------------------------------------------------------------------------------------------- held-out text


def rows_of(ids: list[list[int]], lengths: list[int] | None = None) -> Rows:
    tokens = torch.tensor(ids, dtype=torch.int32)
    ends = torch.tensor(lengths or [len(row) for row in ids])[:, None]
    return Rows(tokens, torch.where(torch.arange(tokens.shape[1]) < ends, REAL | TARGET, 0).to(torch.uint8))


def test_common_text_is_found_at_any_offset_and_padding_is_none() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randint(1, 1000, (100,), generator=generator).tolist() for _ in range(3))
    moved = [0] * 7 + a[20:90] + [0] * 23
    mine, theirs = in_common(rows_of([a, b]), rows_of([c, moved]))
    assert mine.tolist() == [True, False] and theirs.tolist() == [False, True]
    padded = in_common(rows_of([a[:40] + [0] * 60], [40]), rows_of([b[:40] + [0] * 60], [40]))
    assert not padded[0].any() and not padded[1].any()


def pieces(rows: Rows, length: int = 64) -> set[tuple[int, ...]]:
    return {tuple(row[i : i + length].tolist()) for row in rows.ids for i in range(rows.ids.shape[1] - length + 1)}


def test_rows_set_aside_share_no_text_with_training_rows_of_any_length() -> None:
    tokenizer, data = load_tokenizer(MODEL), documents("train")[:8]
    rows = [token_rows(data, tokenizer, seq_len=n, tokens=40_000, shuffle_seed=n) for n in (128, 256)]
    held, masks = hold_out(data, tokenizer, rows, 80_000)
    assert held is not None
    left = [select(each, mask) for each, mask in zip(rows, masks, strict=True) if mask is not None]
    assert held.rows.ids.shape[1] == 256 and len(held.rows) >= 3
    assert all(len(all_) > len(some) > 0.8 * len(all_) for all_, some in zip(rows, left, strict=True))
    theirs = pieces(held.rows)
    assert theirs & pieces(rows[0])
    assert not any(theirs & pieces(each) for each in left)
    assert held.prompts.shape == (3, 32)
    assert all(tuple(prompt.tolist()) in pieces(held.rows, 32) for prompt in held.prompts)


def test_a_held_out_part_of_the_data_is_used_and_training_loses_nothing(text: Path) -> None:
    tokenizer = load_tokenizer(MODEL)
    rows = token_rows(str(text), tokenizer, seq_len=128, tokens=20_000)
    held, left = hold_out(str(text), tokenizer, [rows], 20_000)
    assert held is not None
    assert left == [None]  # all of them
    aside = tokenizer(documents("validation")[0])["input_ids"]
    assert held.rows.ids[0].tolist() == aside[:128]


def test_nothing_is_set_aside_where_all_text_is_the_same() -> None:
    tokenizer, data = load_tokenizer(MODEL), ["x = 1\n" * 9000]
    rows = token_rows(data, tokenizer, seq_len=512, tokens=20_000)
    held, left = hold_out(data, tokenizer, [rows], 20_000)
    assert held is None
    assert left == [None]  # all of them


# ------------------------------------------------------------------------------------------------------ the report


def test_the_report_is_one_well_formed_file_that_shows_everything(tuned: Path) -> None:
    page = Page((tuned / "report.html").read_text(encoding="utf-8"))
    assert len(page.images) == 3 and all(image.startswith("data:image/png;base64,iVBORw0") for image in page.images)
    assert not page.links  # nothing is fetched
    said = "\n".join(page.texts)
    for expected in (
        "transfer",
        "distill",
        "attention_transfer",
        "learning_rate: 0.00025",
        "window: 8",
        "transformers",
    ):
        assert expected in said
    record = read_checkpoint(tuned)["dijiang"]
    assert f"{record['history'][1]['last_loss']:.4g}" in said
    assert said.count("prompt") == 3
    held = documents("validation")[0]
    prompts = [page.texts[i + 1] for i, each in enumerate(page.texts) if each == "prompt"]
    assert all(prompt in held for prompt in prompts)
    for name in ("loss", "transfer", "perplexity"):
        assert (tuned / "plots" / f"{name}.png").read_bytes().startswith(PNG)


def test_training_shows_in_the_perplexity_of_the_report(tuned: Path) -> None:
    cells = re.findall(r"<td>(original|before|after)</td><td>([\d.]+)</td>", (tuned / "report.html").read_text())
    figures = {name: float(value) for name, value in cells}
    assert figures["original"] < figures["after"] < figures["before"]


def test_nothing_that_is_left_tells_a_path_of_this_machine(tuned: Path, text: Path, tmp_path: Path) -> None:
    for name in ("report.html", "training.jsonl", "README.md", "config.json"):
        content = (tuned / name).read_text(encoding="utf-8")
        for path in (text.parent, tuned.parent, MODEL.parent, Path.home()):
            assert f"{path}/" not in content and str(text) not in content


def test_what_a_model_says_can_not_break_the_page(tuned: Path, tmp_path: Path) -> None:
    shutil.copytree(tuned, tmp_path / "copy")
    bad = "</pre><script>alert(1)</script>&amp;$title"
    config = read_checkpoint(tuned)
    config["dijiang"]["recipe"] = config["dijiang"]["source"] = bad
    write_json(tmp_path / "copy" / "config.json", config)
    probes = {"after": Probe(2.0, [(8, 2.0)], [bad])}
    report_module.write_report(tmp_path / "copy", probes, [bad], {"name": bad}, {"text": bad}, bad)
    content = (tmp_path / "copy" / "report.html").read_text()
    page = Page(content)
    assert "<script" not in content
    assert page.texts.count(bad) >= 4


def test_a_stage_without_attention_transfer_has_no_heat_map(converted: Path, text: Path, tmp_path: Path) -> None:
    finetune(converted, tmp_path / "out", data=str(text), stages=["distill"], **OPTIONS)
    assert sorted(path.name for path in (tmp_path / "out" / "plots").iterdir()) == ["loss.png", "perplexity.png"]


def test_a_run_too_short_to_measure_says_so(converted: Path, text: Path, tmp_path: Path) -> None:
    finetune(converted, tmp_path / "out", data=str(text), seq_len=SEQ_LEN, tokens=1000, stages=["transfer"])
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert any("too short" in each for each in page.texts)
    assert len(page.images) == 2


def test_without_a_report_only_the_log_is_left(tuned: Path, text: Path, tmp_path: Path) -> None:
    """That of the run: the report of the checkpoint that it starts from is not this one's."""
    finetune(tuned, tmp_path / "out", data=str(text), stages=["transfer"], report=False, **OPTIONS)
    assert not (tmp_path / "out" / "report.html").exists() and not (tmp_path / "out" / "plots").exists()
    assert {line["stage"] for line in read_log(tmp_path / "out" / "training.jsonl")} == {"transfer"}
    assert "plots/" not in (tmp_path / "out" / "README.md").read_text()


def test_a_checkpoint_trained_before_has_no_original_to_show(tuned: Path, text: Path, tmp_path: Path) -> None:
    finetune(tuned, tmp_path / "out", data=str(text), stages=["transfer"], **OPTIONS)
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert "original" not in page.texts and {"before", "after"} <= set(page.texts)
    assert any("its weights were trained before" in each for each in page.texts)


def test_a_report_that_fails_costs_no_training(
    converted: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no canvas")

    monkeypatch.setitem(finetune.__globals__, "write_report", fail)
    with pytest.raises(RuntimeError, match="no canvas"):
        finetune(converted, tmp_path / "out", data=str(text), stages=["transfer"], **OPTIONS)
    assert (tmp_path / "out" / "config.json").is_file() and (tmp_path / "out" / "training.jsonl").is_file()


# --------------------------------------------------------------------------------------------------------- the Hub


def test_the_card_shows_the_plots_that_are_there(tuned: Path, tmp_path: Path) -> None:
    readme = (tuned / "README.md").read_text()
    assert all(f"](plots/{name}.png)" in readme for name in ("loss", "transfer", "perplexity"))
    shutil.copytree(tuned, tmp_path / "copy")
    (tmp_path / "copy" / "plots" / "transfer.png").unlink()
    write_card(tmp_path / "copy")
    assert "transfer.png" not in (tmp_path / "copy" / "README.md").read_text()


def test_the_card_tells_the_quality_that_the_report_shows(tuned: Path) -> None:
    (measured,) = read_quality(tuned)
    assert measured["by"] == "finetune" and measured["dataset"] is None and measured["tokens"] > 0
    figures = {name: f"{value:.4g}" for name, value in measured["figures"].items()}
    shown = re.findall(r"<td>(?:original|before|after)</td><td>([\d.]+)</td>", (tuned / "report.html").read_text())
    assert [figures[f"{name}perplexity"] for name in ("baseline_", "untrained_", "")] == shown
    readme = (tuned / "README.md").read_text()
    assert f"| the original's | {figures['baseline_perplexity']} |" in readme and "model-index:" in readme


def test_push_sends_the_plots_and_keeps_the_text_at_home(tuned: Path, hub: Hub) -> None:
    push(tuned, "report/plots")
    sent = set(hub.files("report/plots"))
    assert {f"plots/{name}.png" for name in ("loss", "transfer", "perplexity")} <= sent
    assert not [name for name in sent if name.endswith((".jsonl", ".html", ".pt")) or name.startswith("runs/")]
    assert push(tuned, "report/plots").bytes_uploaded == 0


@pytest.mark.parametrize("path", ["/home/me/corpus", "~/corpus", r"C:\corpus"])
def test_push_refuses_to_tell_where_text_lies_on_this_machine(tuned: Path, hub: Hub, tmp_path: Path, path: str) -> None:
    shutil.copytree(tuned, tmp_path / "copy")
    config = read_checkpoint(tuned)
    config["dijiang"]["data"] = path
    write_json(tmp_path / "copy" / "config.json", config)
    with pytest.raises(DijiangError, match="on this machine: take it out"):
        push(tmp_path / "copy", "report/path")
