"""Checkpoints that the Trainer writes within a stage: only whole ones count, and a signal leaves one behind.

What is in a checkpoint is the Trainer's business.
"""

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

from ..progress import say

GO_ON = "free some and go on with --resume"  # what to do about a full disk
WHOLE = "whole"  # An empty file that marks a whole checkpoint. It comes last: the Trainer writes folders in place.


def last_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint in a stage's folder that was written to its end, or None."""
    whole = [path for path in folder.glob("checkpoint-*") if (path / WHOLE).is_file()]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def remove_broken(folder: Path) -> None:
    """Removes every checkpoint but the last whole one: older ones, and what a killed run left in pieces."""
    for path in folder.glob("checkpoint-*"):
        if path != last_checkpoint(folder):
            shutil.rmtree(path)


class Checkpoints(TrainerCallback):
    """Marks a checkpoint as whole once every process has written its part, and then removes the one before."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            (self.folder / f"checkpoint-{state.global_step}" / WHOLE).touch()
            remove_broken(self.folder)


class StopOnSignal(TrainerCallback):
    """Ends training after the current step, with a checkpoint, on Ctrl-C or SIGTERM. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.asked = self.stopped = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside the context, signals are noted. Other threads than the main one can't handle signals in Python."""
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
            say("stopping after this step, to save it; Ctrl-C again stops at once")
        self.asked = True
        # A launcher passes the same Ctrl-C on as SIGTERM, so a SIGTERM is no second Ctrl-C.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._anyone_asked():
            self.stopped = True
            control.should_log = control.should_save = control.should_training_stop = True

    def _anyone_asked(self) -> bool:
        """Whether any process got a signal: signals reach processes at different steps, and all must stop at one."""
        here = PartialState()
        if here.num_processes == 1:
            return self.asked
        asked = torch.tensor(float(self.asked), device=here.device)
        torch.distributed.all_reduce(asked)
        return bool(asked)
