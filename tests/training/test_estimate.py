"""What a run says before it starts: what trains, memory as it is measured, and a dry run that writes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from benchmarks.memory import compare, converted
from dijiang_convert import DijiangError, finetune, inspect
from dijiang_convert.checkpoint.loading import converted_config, load_converted
from dijiang_convert.cli import app
from dijiang_convert.data.demo_text import documents
from dijiang_convert.recipe import Stage, load_recipe
from dijiang_convert.training import trainer
from dijiang_convert.training.estimate import StageCost, duration, plan_costs, teacher_copies, told, warning
from dijiang_convert.training.trial import random_rows, timed

KINDS = {
    "transfer": Stage("transfer", "attention_transfer", 1_000_000, seq_len=256, batch_tokens=1024),
    "lora": Stage("lora", "cross_entropy", 1_000_000, "lora", seq_len=256, batch_tokens=1024),
    "lora-all": Stage("lora-all", "cross_entropy", 10_000, "lora", lora_targets="all", lora_rank=4, seq_len=256),
    "full": Stage("full", "cross_entropy", 1_000_000, "full", seq_len=256, batch_tokens=1024),
    "distill-full": Stage("distill-full", "distillation", 1_000_000, "full", seq_len=256, batch_tokens=1024),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer: how many are alive at a time does not matter."""
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=640, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=1024,
    )  # fmt: skip
    return converted(config, tmp_path_factory.mktemp("estimate"))


@pytest.mark.parametrize("kind", ["transfer", "lora", "full", "distill-full"])
def test_estimated_memory_is_near_what_is_measured(folder: Path, kind: str) -> None:
    estimated, measured = compare(folder, KINDS[kind])
    assert estimated == pytest.approx(measured, rel=0.35)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_estimated_operations_are_near_what_torch_counts(folder: Path, train: str) -> None:
    """On a GPU, where the forward pass is repeated in the backward pass, as here."""
    stage = Stage("distill", "distillation", 512, train, seq_len=512)
    (cost,) = plan_costs([stage], converted_config(folder), [True])
    model, teacher = load_converted(folder), load_converted(folder, attention="softmax").requires_grad_(False)
    student = trainer._prepare(model, stage, 0)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if train == "lora":
        student.enable_input_require_grads()
    inputs = {name: value[None] for name, value in random_rows(model, 512, 1)[0].items()}
    with FlopCounterMode(display=False) as counter:
        trainer._loss(stage, student, teacher)(student, inputs).backward()
    assert cost.operations == pytest.approx(counter.get_total_flops(), rel=0.35)


@pytest.mark.parametrize("kind", list(KINDS))
def test_trainable_parameters_are_those_that_train(folder: Path, kind: str) -> None:
    stage = KINDS[kind]
    (cost,) = plan_costs([stage], converted_config(folder), [False])
    trained = trainer._prepare(load_converted(folder), stage, 0)
    assert cost.trainable_parameters == sum(p.numel() for p in trained.parameters() if p.requires_grad)


def test_steps_and_rows_are_those_of_the_trainer(folder: Path) -> None:
    stage = Stage("a", "cross_entropy", 4_000_000, "lora", seq_len=512, batch_tokens=4096)
    (cost,) = plan_costs([stage], converted_config(folder), [False])
    assert (cost.rows, cost.steps) == (8, 976)
    assert cost.tokens == cost.steps * cost.rows * 512


def test_a_second_model_is_needed_where_the_base_does_not_stay(folder: Path) -> None:
    transfer, lora, full = KINDS["transfer"], Stage("d", "distillation", 10, "lora"), KINDS["distill-full"]
    assert teacher_copies([transfer, lora]) == [False, False]
    assert teacher_copies([transfer, lora, lora]) == [False, False, True]
    assert teacher_copies([full, KINDS["full"]]) == [True, False]
    assert teacher_copies([transfer, Stage("k", "distillation", 10, "kernel")]) == [False, False]
    alone, beside = (plan_costs([lora], converted_config(folder), [copy])[0] for copy in (False, True))
    weights = sum(p.nbytes for p in load_converted(folder).parameters())
    assert beside.memory_bytes - alone.memory_bytes == weights


def cost(**changes: Any) -> StageCost:
    values: dict[str, Any] = {
        "name": "distill",
        "objective": "distillation",
        "train": "lora",
        "tokens": 1,
        "seq_len": 512,
    }
    values |= {"steps": 1, "rows": 8, "trainable_parameters": 1, "weights_bytes": 1, "training_bytes": 1}
    values |= {"activation_bytes": 10**10, "memory_bytes": 10**10 + 2, "operations": 1}
    return StageCost(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({}, "--set distill.batch_tokens=1024"),
        ({"rows": 1}, "--set distill.seq_len=256"),
        ({"train": "full", "activation_bytes": 1}, "--lora instead of --full"),
        ({"activation_bytes": 1}, "a machine with more memory"),
    ],
)
def test_what_does_not_fit_is_one_line_with_a_remedy(changes: dict[str, Any], remedy: str) -> None:
    costs = [cost(name="transfer", memory_bytes=5), cost(**changes)]
    assert warning(costs, 2 * 10**10) is None
    line = warning(costs, 10**9)
    assert line is not None and "\n" not in line
    assert line.startswith("stage distill wants about 10.0 GB, and 1.0 GB are free") and line.endswith(remedy)


def test_times_add_up_and_read_well() -> None:
    assert [duration(s) for s in (4, 98, 150, 7200, 360_000)] == ["4 s", "98 s", "2 min", "2.0 h", "100.0 h"]
    lines = list(told([cost(seconds=60.0), cost(seconds=30.0)], 10**11))
    assert len(lines) == 3 and lines[0].endswith("about 10 GB, 60 s")
    assert lines[2] == "about 90 s in all, on this machine as busy as it is now"
    assert len(list(told([cost(seconds=60.0), cost()], 10**11))) == 2
    assert list(told([cost()], 10**9))[1].startswith("warning: stage distill wants")


# ---------------------------------------------------------------------------------------------------------- dry run


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(timed.__globals__, "TRIAL_SECONDS", 0.0)
    yield


@pytest.mark.usefixtures("quick")
def test_a_dry_run_tells_the_plan_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    before = sorted(path for path in folder.parent.rglob("*"))
    options = ["--out", str(tmp_path / "out"), "--seq-len", "128", "--tokens", "40000", "--full", "--dry-run"]
    done = CliRunner().invoke(app, ["finetune", str(folder), *options, "--json"])
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["dry_run"] and result["stages"] == [] and result["free_bytes"] > 0
    transfer, distill = result["plan"]
    assert (transfer["name"], distill["name"]) == ("transfer", "distill")
    assert distill["tokens"] == pytest.approx(30_000, rel=0.02)
    assert distill["trainable_parameters"] > transfer["trainable_parameters"] > 0
    assert transfer["seconds"] > 0 and distill["seconds"] > 0
    assert distill["memory_bytes"] == sum(distill[f"{part}_bytes"] for part in ("weights", "training", "activation"))
    assert not list(tmp_path.iterdir())
    assert sorted(path for path in folder.parent.rglob("*")) == before
    shown = CliRunner().invoke(app, ["finetune", str(folder), *options])
    assert shown.stdout.startswith("transfer: attention transfer on ") and "in all" in shown.stdout


def test_what_does_not_fit_is_not_tried(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(finetune.__globals__, "free_memory", lambda: 1000)
    result = finetune(folder, tmp_path / "out", dry_run=True)
    assert [stage.seconds for stage in result.plan] == [None, None]


def test_a_run_states_its_plan_first(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = documents("train")[:2]
    result = finetune(folder, tmp_path / "out", data=data, seq_len=128, tokens=1000, stages=["transfer"], report=False)
    said = capsys.readouterr()
    assert (
        said.err.startswith("transfer: attention transfer on ")
        and f"{result.plan[0].trainable_parameters:,}" in said.err
    )
    assert not said.out
    assert result.plan[0].tokens == result.stages[0].tokens


def test_the_steps_of_several_processes_are_told(folder: Path) -> None:
    stage = Stage("a", "cross_entropy", 1000 * 128, "lora", seq_len=128)
    (cost,) = plan_costs([stage], converted_config(folder), [False], processes=4)
    assert (cost.rows, cost.steps) == (4, 250)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"data": "no-such.txt"}, "no such file"),
        ({"teacher": "./no-such"}, "no such folder: ./no-such"),
        ({"teacher": "./no-such", "stages": ["transfer"]}, "--teacher ./no-such is of no use"),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_what_is_wrong_is_said_before_anything_runs(
    folder: Path, tmp_path: Path, options: dict[str, Any], expected: str, dry_run: bool
) -> None:
    given = {"data": documents("train")[:1], "tokens": 256, "seq_len": 128, **options}
    with pytest.raises(DijiangError, match=expected):
        finetune(folder, tmp_path / "out", dry_run=dry_run, **given)
    assert not list(tmp_path.iterdir())


def test_a_teacher_of_other_tokens_is_refused_before_anything_runs(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama", "vocab_size": 1000}')
    with pytest.raises(DijiangError, match="has a vocabulary of 1,000 and the checkpoint one of 1,024"):
        finetune(folder, tmp_path / "out", teacher=str(other), dry_run=True)


def test_inspect_uses_the_same_formula(folder: Path) -> None:
    found = inspect(str(folder.parent / "source"), recipe="frequency")
    plan = load_recipe("frequency").stages
    costs = plan_costs(plan, converted_config(folder), teacher_copies(plan))
    assert found.finetune_bytes == max(cost.memory_bytes for cost in costs)
    assert found.finetune_operations == sum(cost.operations for cost in costs)
    assert found.finetune_tokens == sum(cost.tokens for cost in costs)
    weights = (folder.parent / "source" / "model.safetensors").stat().st_size
    assert found.weights_bytes == pytest.approx(weights, rel=0.01)
