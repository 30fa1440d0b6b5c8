"""The Trainer's checkpoints of a stage: only whole ones count, and a signal leaves one behind."""

import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from accelerate import PartialState
from transformers import TrainerCallback

from ..progress import console

WHOLE = "whole"  # an empty file, written last: the Trainer writes its folders in place


def last_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint that was written to its end."""
    whole = [path for path in folder.glob("checkpoint-*") if (path / WHOLE).is_file()]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def remove_broken(folder: Path) -> None:
    """What a killed run left half-written or half-removed."""
    for path in folder.glob("checkpoint-*"):
        if path != last_checkpoint(folder):
            shutil.rmtree(path)


class Checkpoints(TrainerCallback):
    """Marks a checkpoint as whole once every process has written its part; then the one before goes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            (self.folder / f"checkpoint-{state.global_step}" / WHOLE).touch()
            remove_broken(self.folder)


class StopOnSignal(TrainerCallback):
    """Ctrl-C or SIGTERM: the step under way is finished and saved. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.asked = self.stopped = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, signals are noted. (Python lets only the main thread handle them.)"""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if not self.asked:
            console.print("stopping after this step, to save it; Ctrl-C again stops at once")
        self.asked = True
        # A launcher passes Ctrl-C on as SIGTERM: that is no second wish.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._anyone_asked():
            self.stopped = True
            control.should_log = control.should_save = control.should_training_stop = True

    def _anyone_asked(self) -> bool:
        """Signals reach processes at different steps; all must stop at the same one."""
        here = PartialState()
        if here.num_processes == 1:
            return self.asked
        asked = torch.tensor(float(self.asked), device=here.device)
        torch.distributed.all_reduce(asked)
        return bool(asked)
