"""Several processes: they give what one gives, under DDP and FSDP2, and are started from the configurations shipped.

Processes are CPUs here, over gloo.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dijiang_convert import DijiangError
from dijiang_convert.checkpoint.shards import read_shard
from dijiang_convert.files import ACCELERATE, weight_files
from dijiang_convert.recipe import Stage
from dijiang_convert.training import processes, schedule, trainer
from dijiang_convert.training.attention_transfer import normalized_error
from tests import scale_worker
from tests.models import WINDOW, checkpoint, load, tokens

ROOT = Path(__file__).parents[1]
LAUNCHES = ("ddp", "fsdp2")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(f"the {n} words of {n * n % 97} and {n % 7} more" for n in range(400)))
    return path


@pytest.fixture(scope="module")
def alone(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What one process gives, its step in one forward pass."""
    out = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "LEAST_STEPS", schedule.LEAST_STEPS)
        patch.setattr(schedule, "MICRO_BATCH_TOKENS", schedule.MICRO_BATCH_TOKENS)
        scale_worker.run_all(str(checkpoint("llama", "no-rows")), out, scale_worker.BATCH, interrupt=False)
        scale_worker.run_command(str(checkpoint("llama", "no-rows")), str(text), out)
        yield out


@pytest.fixture(scope="module", params=LAUNCHES)
def launched(request: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What two give, in two forward passes each, interrupted and resumed in every stage; and their stdout."""
    out = tmp_path_factory.mktemp(request.param)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", ACCELERATE / f"{request.param}.yaml"]
    worker = ["--num_processes", "2", "-m", "tests.scale_worker", checkpoint("llama", "no-rows"), text, out, "2", "2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([*map(str, launch + worker)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return out, ran.stdout


@pytest.mark.parametrize("stage", [stage.name for stage in scale_worker.STAGES])
def test_two_processes_take_the_steps_that_one_takes(alone: Path, launched: tuple[Path, str], stage: str) -> None:
    one, two = torch.load(alone / f"{stage}.pt"), torch.load(launched[0] / f"{stage}.pt")
    assert len(one["losses"]) == scale_worker.STEPS
    assert [tokens for tokens, _ in one["losses"]] == [tokens for tokens, _ in two["losses"]]
    for (_, loss), (_, expected) in zip(two["losses"], one["losses"], strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)
    differ = 0
    for name, weight in one["weights"].items():
        differ += int((~torch.isclose(two["weights"][name], weight, rtol=1e-4, atol=1e-5)).sum())
    count = sum(weight.numel() for weight in one["weights"].values())
    assert differ <= 1e-4 * count  # Adam makes a whole step of a gradient that is rounding alone


def test_the_command_writes_one_result_and_says_so_once(alone: Path, launched: tuple[Path, str]) -> None:
    out, stdout = launched
    (line,) = [line for line in stdout.splitlines() if line.startswith("{")]
    assert [stage["name"] for stage in json.loads(line)["stages"]] == ["transfer", "distill"]
    assert not list(out.glob("*.run"))
    one, two = (
        {t.name: t.load() for path in weight_files(folder / "tuned") for t in read_shard(path)}
        for folder in (alone, out)
    )
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert two[name].dtype == weight.dtype
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-5, msg=name)


def test_transfer_loss_of_a_batch_is_the_mean_of_its_rows() -> None:
    output, target = torch.randn(4, 5, 2, 3), torch.randn(4, 5, 2, 3) * torch.tensor([1.0, 9, 2, 5]).view(4, 1, 1, 1)
    mask = torch.arange(5) < torch.tensor([5, 2, 3, 4])[:, None]
    rows = [normalized_error(output[i : i + 1], target[i : i + 1], mask[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(normalized_error(output, target, mask), torch.stack(rows).mean())


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_a_step_has_the_same_rows_on_any_number_of_processes(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "MICRO_BATCH_TOKENS", 5 * 32)
    stage = Stage("s", "distillation", tokens=24 * 32 * 1000, seq_len=32, batch_tokens=24 * 32)
    batches = schedule.share_out(stage, count)
    assert (batches.rows, batches.steps) == (24, 1000)
    assert batches.micro * batches.accumulation * count == 24
    assert batches.micro <= 5


def test_a_step_that_cannot_be_divided_gets_fewer_rows_but_one_each() -> None:
    stage = Stage("s", "distillation", tokens=7 * 32 * 1000, seq_len=32, batch_tokens=7 * 32)
    assert [schedule.share_out(stage, count).rows for count in (1, 2, 7, 8)] == [7, 6, 7, 8]
    assert schedule.share_out(stage, 2).steps == 7 * 1000 // 6


def test_rows_come_in_rounds_of_all() -> None:
    order = trainer.row_order(5, 13, seed=1)
    assert [sorted(order[i : i + 5]) for i in (0, 5)] == [[0, 1, 2, 3, 4]] * 2
    assert len(order) == 13
    assert order[:5] != order[5:10]
    assert order == trainer.row_order(5, 13, seed=1) != trainer.row_order(5, 13, seed=2)


@pytest.mark.parametrize("variant", ["frequency", "pure", "paper", "window-only"])
@pytest.mark.parametrize("length", [WINDOW // 2, WINDOW + 8])
def test_everything_trained_gets_a_gradient(variant: str, length: int) -> None:
    """DDP waits for all of them, also where no key is far."""
    model = load("llama", variant).train()
    model(tokens(2, length), use_cache=False).logits.logsumexp(-1).mean().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "asks for DeepSpeed: use DDP or FSDP2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version: 2"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            "fsdp_cpu_ram_efficient_loading: false",
        ),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
    ],
)
def test_a_launch_that_is_not_supported_is_refused_in_one_line(
    asked: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DijiangError, match=message) as error:
        processes.start()
    assert "\n" not in str(error.value)


def test_the_shipped_configurations_name_what_they_are_for() -> None:
    kinds = {path.stem: yaml.safe_load(path.read_text())["distributed_type"] for path in ACCELERATE.glob("*.yaml")}
    assert kinds == {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}
