"""A finetune run that is killed where a test says so. Each runs in a process forked from a server that has imported
all this, so that it starts at once."""

import contextlib
import functools
import io
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dijiang_convert.cli import app
from dijiang_convert.training import checkpoints, run_folder, schedule, trainer

with contextlib.suppress(ImportError):  # what the Trainer imports late
    import torch.utils.tensorboard

Moment = tuple[str, int]  # what is killed, the how manieth time it happens


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _before(count: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, but its ``count``-th call is the end."""
    calls = iter(range(1, 1_000_000))

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == count:
            die()
        return function(*args, **kwargs)

    return wrapped


def _half_written(count: int) -> Callable[..., None]:
    """torch.save, but its ``count``-th file of an optimizer is cut in two."""
    calls, save = iter(range(1, 1_000_000)), torch.save

    def wrapped(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if str(path).endswith("optimizer.pt") and next(calls) == count:
            whole = io.BytesIO()
            save(content, whole)
            Path(path).write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
            die()
        save(content, path, *args, **kwargs)

    return wrapped


def _half_removed(count: int, rmtree: Callable[..., None]) -> Callable[..., None]:
    """shutil.rmtree, but in its ``count``-th call it gets through one file."""
    calls = iter(range(1, 1_000_000))

    def wrapped(path: Any, *args: Any, **kwargs: Any) -> None:
        files = sorted(each for each in Path(path).rglob("*") if each.is_file()) if Path(path).is_dir() else []
        if files and next(calls) == count:
            files[0].unlink()
            die()
        rmtree(path, *args, **kwargs)

    return wrapped


def kill_at(moment: Moment) -> None:
    what, count = moment
    if what == "step":
        plain = trainer._ProgressCallback.on_step_end
        trainer._ProgressCallback.on_step_end = _before(count, plain)  # type: ignore[method-assign]
    elif what == "checkpoint half written":
        torch.save = _half_written(count)
    elif what == "checkpoint written, not marked":
        plain = checkpoints.Checkpoints.on_save
        checkpoints.Checkpoints.on_save = _before(count, plain)  # type: ignore[method-assign]
    elif what == "old folder half removed":
        shutil.rmtree = _half_removed(count, shutil.rmtree)  # type: ignore[assignment]
    elif what == "model after a stage half written":
        run_folder.write_json = _before(count + 1, run_folder.write_json)  # the first is the plan's
    elif what == "result half written":
        run_folder._link = _before(count, run_folder._link)
    elif what == "result in its place":
        rename = Path.rename
        Path.rename = lambda path, to: die() if Path(to).name.endswith(".run.partial") else rename(path, to)  # type: ignore
    else:
        raise ValueError(what)


def run(arguments: list[str], moment: Moment | None, signal_at: int | None, log: str) -> None:
    """The command, with its output in a file. signal_at: the step of a stage in which Ctrl-C is pressed."""
    schedule.LEAST_STEPS = 8
    sys.stdout = sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115
    if moment:
        kill_at(moment)
    if signal_at:
        plain = trainer._ProgressCallback.on_step_end

        def press(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            plain(self, args, state, control, **kwargs)
            if state.global_step == signal_at:
                os.kill(os.getpid(), signal.SIGINT)

        trainer._ProgressCallback.on_step_end = press  # type: ignore[method-assign]
    app(arguments)
