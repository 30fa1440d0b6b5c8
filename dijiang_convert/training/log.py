"""The training log: one JSON object per line, for every step that the Trainer logs. `measure.report` draws it."""

import json
import time
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from ..files import new_file
from ..recipe import Stage


class StageCallback(TrainerCallback):
    """A callback of the Trainer that also gets the error of every layer in attention transfer.

    keeps: whether a signal lets the current step end, for its checkpoint to be kept.
    """

    keeps = True

    def note_errors(self, errors: Tensor) -> None:
        """errors: [layers], the `normalized_error` of each converted layer on one batch of this process."""


class TrainingLog(StageCallback):
    """Appends a stage's logged steps to a .jsonl file that all stages of a run share.

    A line has stage, index (the stage's place in the plan), step, tokens (seen in this stage so far), loss (the mean
    since the line before), learning rates, grad_norm and seconds. In attention transfer it also has layer_errors, one
    number for each converted layer, from the main process's rows. When a stage is resumed, the lines of later steps
    are dropped, since these steps are done again.
    """

    def __init__(self, path: Path, stage: Stage, index: int) -> None:
        self.path, self.stage, self.index = path, stage, index
        self.errors: Tensor | None = None
        self.noted = 0

    def note_errors(self, errors: Tensor) -> None:
        """Adds errors [layers] to the mean that the next line will have."""
        self.errors = errors if self.errors is None else self.errors + errors
        self.noted += 1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        lines = read_log(self.path)
        kept = [
            x for x in lines if x["index"] < self.index or (x["index"] == self.index and x["step"] <= state.global_step)
        ]
        before = max((line["seconds"] for line in kept if line["index"] == self.index), default=0.0)
        self.start = time.perf_counter() - before
        if state.is_world_process_zero:
            with new_file(self.path) as partial:
                partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        line = {
            "stage": self.stage.name,
            "index": self.index,
            "step": state.global_step,
            "tokens": state.global_step * rows * self.stage.seq_len,
            "loss": float(logs["loss"]),
            **self._learning_rates(optimizer),
            "grad_norm": float(logs["grad_norm"]) if "grad_norm" in logs else None,
            "seconds": round(time.perf_counter() - self.start, 3),
        }
        if self.errors is not None:
            line["layer_errors"] = (self.errors / self.noted).tolist()
            self.errors, self.noted = None, 0
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _learning_rates(self, optimizer: Any) -> dict[str, float]:
        """The rates of the optimizer's groups: the kernels, if they have parameters, then the rest, if it trains."""
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        if self.stage.train == "kernel" or len(rates) == 2:
            return {"kernel_learning_rate": rates[0]} | ({"learning_rate": rates[1]} if len(rates) == 2 else {})
        return {"learning_rate": rates[0]}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a training log, none if there is no file. A line that an interruption cut short is left out."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines
