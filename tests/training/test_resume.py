"""A run that is killed, interrupted or diverges goes on from its last step, and ends where an unbroken one does."""

import multiprocessing
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dijiang_convert import DijiangError, finetune
from dijiang_convert.modeling.attention import DiJiangAttention
from dijiang_convert.training import checkpoints, schedule, trainer
from tests.models import checkpoint
from tests.training.resume_worker import Moment, run

SIZES = ["--seq-len", "32", "--tokens", "1500"]
LAUNCHER = multiprocessing.get_context("forkserver")
LAUNCHER.set_forkserver_preload(["tests.training.resume_worker", "dijiang_convert.finetune"])

# In this order: each resumed run gets a little further than the one before.
MOMENTS: list[Moment] = [
    ("step", 2),
    ("checkpoint half written", 1),
    ("checkpoint written, not marked", 2),
    ("old folder half removed", 1),
    ("step", 6),
    ("model after a stage half written", 1),
    ("old folder half removed", 2),
    ("checkpoint half written", 2),
    ("step", 4),
    ("model after a stage half written", 1),
    ("result half written", 3),
    ("result in its place", 1),
    ("old folder half removed", 1),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(f"the {n} words of {n * n % 97} and {n % 7} more" for n in range(400)))
    return str(path)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "LEAST_STEPS", 8)


class Runner:
    """Runs `dijiang finetune` in processes of its own."""

    def __init__(self, folder: Path, text: str) -> None:
        self.folder, self.text = folder, text

    def __call__(
        self, name: str, *options: str, moment: Moment | None = None, signal_at: int | None = None
    ) -> tuple[int | None, str]:
        """The exit code and what was printed."""
        log = self.folder / "log.txt"
        arguments = [
            "finetune",
            str(checkpoint("llama")),
            "--data",
            self.text,
            "--out",
            str(self.folder / name),
            *SIZES,
        ]
        process = LAUNCHER.Process(target=run, args=([*arguments, *options], moment, signal_at, str(log)))  # type: ignore[attr-defined]
        process.start()
        process.join()
        return process.exitcode, log.read_text()

    def weights(self, name: str) -> dict[str, bytes]:
        """The bytes of every weight file of a result, and of its config with the losses."""
        return {
            path.name: path.read_bytes()
            for path in sorted((self.folder / name).iterdir())
            if path.suffix == ".safetensors" or path.name == "config.json"
        }


@pytest.fixture
def runner(tmp_path: Path, text: str) -> Runner:
    return Runner(tmp_path, text)


@pytest.mark.parametrize(("train", "moments"), [("--lora", MOMENTS), ("--full", MOMENTS[4:9])])
def test_killed_again_and_again_it_ends_with_the_same_bytes(runner: Runner, train: str, moments: list[Moment]) -> None:
    code, log = runner("unbroken", train)
    assert code == 0, log
    resume: list[str] = []
    for moment in moments:
        code, log = runner("killed", train, *resume, moment=moment)
        assert code == -signal.SIGKILL, (moment, code, log)
        resume = ["--resume"]
    code, log = runner("killed", train, *resume)
    assert code == 0 or "is finished" in log, log  # where the last kill came after the result was in its place
    assert runner.weights("killed") == runner.weights("unbroken")
    assert len(runner.weights("killed")) > 1
    left = [path.name for path in runner.folder.iterdir() if path.name.startswith((".killed", "killed."))]
    assert left in ([], [".killed.run.partial"])


def test_ctrl_c_saves_the_step_and_says_how_to_go_on(runner: Runner) -> None:
    assert runner("unbroken")[0] == 0
    code, log = runner("stopped", signal_at=5)
    assert code == 1
    (error,) = [line for line in log.splitlines() if line.startswith("error: ")]
    assert "--resume" in error
    assert "Traceback" not in log
    latest = checkpoints.last_checkpoint(runner.folder / "stopped.run" / "stage-0")
    assert latest is not None
    assert latest.name == "checkpoint-5"
    assert runner("stopped", "--resume")[0] == 0
    weights = runner.weights("stopped")
    for name, content in runner.weights("unbroken").items():
        assert weights[name] == content or name == "config.json"  # where a loss is that of fewer steps


@pytest.fixture
def tuned(text: str, tmp_path: Path) -> Callable[..., Any]:
    """finetune, in this process."""

    def tune(**options: Any) -> Any:
        given = {"data": text, "seq_len": 32, "tokens": 1500, "report": False, **options}
        return finetune(checkpoint("llama"), tmp_path / "out", **given)

    return tune


def test_a_run_stops_at_the_first_number_that_is_not_finite_and_names_the_layer(
    tuned: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also: its checkpoint is of the step before, and it goes on from there."""
    step, plain = [0], DiJiangAttention.forward

    def breaks(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = plain(self, *args, **kwargs)
        return out * torch.inf if step[0] == 5 and self is second[0] else out

    second: list[Any] = []

    class Follow(trainer._ProgressCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            step[0] = state.global_step
            second[:] = [model.get_submodule("model.layers.1.self_attn.dijiang")]

    with monkeypatch.context() as patch:
        patch.setattr(DiJiangAttention, "forward", breaks)
        patch.setattr(trainer, "_ProgressCallback", Follow)
        with pytest.raises(DijiangError) as error:
            tuned()
    message = str(error.value)
    assert re.search(r"stage transfer, step 6: .*first in model\.layers\.1\.self_attn\.dijiang:", message), message
    assert "--resume --set transfer.kernel_learning_rate=0.0033" in message
    assert "\n" not in message
    run_folder = tmp_path / "out.run"
    latest = checkpoints.last_checkpoint(run_folder / "stage-0")
    assert latest is not None
    assert int(latest.name.rpartition("-")[2]) <= 5
    assert tuned(resume=True).stages[0].last_loss > 0


@pytest.mark.parametrize(("stage", "tokens"), [("transfer", 352), ("distill", 352), ("transfer", 64)])
def test_weights_that_a_step_broke_are_not_kept(
    tuned: Callable[..., Any], tmp_path: Path, stage: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second step breaks them, and a checkpoint is written after it. Of two steps it is the last."""

    class Break(trainer._ProgressCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 1:
                for name, parameter in model.named_parameters():
                    if parameter.requires_grad and "layers.1.self_attn.dijiang" in name:
                        parameter.data.fill_(torch.inf)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_ProgressCallback", Break)
        with pytest.raises(DijiangError) as error:
            tuned(stages=[stage], tokens=tokens)
    assert re.search(rf"stage {stage}, step 2: .*first in model\.layers\.1\.self_attn\.dijiang", str(error.value))
    latest = checkpoints.last_checkpoint(tmp_path / "out.run" / "stage-0")
    assert latest is None or latest.name == "checkpoint-1"
    assert tuned(stages=[stage], tokens=tokens, resume=True).stages[0].last_loss < 1


def test_a_gradient_that_is_not_finite_is_found_where_it_arises(
    tuned: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Break(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * torch.nan

    plain = DiJiangAttention.forward

    def breaks(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = plain(self, *args, **kwargs)
        return Break.apply(out) if getattr(self, "broken", False) else out  # type: ignore[no-untyped-call]

    loaded = trainer._prepare

    def mark(model: Any, stage: Any, seed: int) -> Any:
        for i, layer in enumerate(model.model.layers):
            layer.self_attn.dijiang.broken = i == 0
        return loaded(model, stage, seed)

    monkeypatch.setattr(DiJiangAttention, "forward", breaks)
    monkeypatch.setattr(trainer, "_prepare", mark)
    with pytest.raises(DijiangError, match=r"step 1: .*first in model\.layers\.0\.self_attn\.dijiang"):
        tuned(stages=["transfer"])


def test_other_learning_rates_on_resume_are_taken_and_said(
    tuned: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[float] = []

    class Watch(trainer._ProgressCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            seen.append(optimizer.param_groups[0]["lr"])
            if stop and state.global_step == 6:
                raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_ProgressCallback", Watch)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        tuned(stages=["transfer"])
    before, stop = list(seen), False
    seen.clear()
    tuned(stages=["transfer"], settings=["kernel_learning_rate=0.001"], resume=True)
    assert "kernel_learning_rate is 0.001 from here on, it was 0.01" in capsys.readouterr().err
    assert seen[0] == pytest.approx(before[-1] / 10)  # both of the seventh step
    with pytest.raises(DijiangError, match="nothing to resume"):
        tuned(stages=["transfer"], resume=True)


@pytest.mark.parametrize(
    "change", [{"tokens": 1600}, {"seed": 1}, {"data": ["some words of another text " * 200]}, {"train": "full"}]
)
def test_another_run_is_not_resumed(
    tuned: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer._ProgressCallback, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            tuned()
    with pytest.raises(DijiangError, match=f"from another run, of another .*{next(iter(change))}"):
        tuned(resume=True, **change)


def test_an_unfinished_run_is_not_thrown_away_unasked(
    tuned: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer._ProgressCallback, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            tuned(tokens=64, stages=["transfer"])
    with pytest.raises(DijiangError, match="out.run holds an unfinished run: go on with --resume, or .* --force"):
        tuned(tokens=64, stages=["transfer"])
    assert (tmp_path / "out.run" / "rows-0").is_dir()
    tuned(tokens=64, stages=["transfer"], force=True)
    assert not (tmp_path / "out.run").exists()


def test_a_run_killed_before_its_report_is_there_is_resumed_for_it(
    tuned: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    options = {"tokens": 64, "stages": ["transfer"], "report": True}
    with monkeypatch.context() as patch:
        patch.setitem(finetune.__globals__, "write_report", stop)
        with pytest.raises(KeyboardInterrupt):
            tuned(**options)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors")}
    tuned(resume=True, **options)
    assert (tmp_path / "out" / "report.html").is_file()
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors")} != {}
    assert not (tmp_path / "out.run").exists()


def test_a_run_that_was_killed_at_its_start_over_an_older_result_is_not_called_finished(
    tuned: Callable[..., Any], tmp_path: Path
) -> None:
    options = {"tokens": 64, "stages": ["transfer"], "force": True}
    tuned(**options)
    (tmp_path / "out.run").mkdir()
    (tmp_path / ".out.run.partial").mkdir()
    with pytest.raises(DijiangError, match="nothing to resume: no .*out.run; run without --resume"):
        tuned(**options, resume=True)
    tuned(**options)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
