"""Measures how long the stages of a run take, by two optimizer steps of each on random rows. Nothing is kept."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..checkpoint.loading import generates, load_converted
from ..data.images import Images, random_images
from ..data.mixture import REAL, START, TARGET
from ..data.rows import Rows
from ..recipe import Stage
from ..training import schedule
from .estimate import StageCost
from .log import StageCallback
from .trainer import run_stage

TRIAL_SECONDS = 5.0  # a shorter step is timed again with more rows, up to this time or the rows of a forward pass


def timed(costs: Sequence[StageCost], plan: Sequence[Stage], folder: Path, copies: Sequence[bool]) -> list[StageCost]:
    """The costs with their seconds, from the second of two real optimizer steps of each stage.

    The steps are of one row. If that is quick, they are repeated with as many rows as TRIAL_SECONDS allow.

    Args:
        costs, plan: the stages, and what else they cost.
        folder: the checkpoint, whose base weights also stand in for a teacher's.
        copies: for each stage, whether it has a second model in memory.
    """
    result = []
    for cost, stage, copy in zip(costs, plan, copies, strict=True):
        seconds, rows = _step_seconds(folder, stage, 1, copy), 1
        most = min(schedule.share_out(stage).micro, int(TRIAL_SECONDS / seconds))
        if most > 1:
            seconds, rows = _step_seconds(folder, stage, most, copy), most
        result.append(replace(cost, seconds=seconds / rows * cost.rows * cost.steps))
    return result


def _step_seconds(folder: Path, stage: Stage, rows: int, copy: bool) -> float:
    model = load_converted(folder)
    teacher = load_converted(folder, attention="softmax").eval().requires_grad_(False) if copy else None
    size = rows * stage.seq_len
    stage = replace(stage, batch_tokens=size, tokens=size * schedule.LEAST_STEPS)
    data = random_rows(model, stage.seq_len, 2 * rows)
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as temporary:
        run_stage(model, stage, data, teacher=teacher, folder=Path(temporary), log=watch)
    return watch.seconds


def random_rows(model: PreTrainedModel, seq_len: int, count: int) -> Rows | Images:
    """``count`` rows of random tokens, each one context, or random images for a model of images."""
    if model.main_input_name == "pixel_values":
        return random_images(model.config, count)
    config: Any = model.config.get_text_config()
    ids = torch.randint(config.vocab_size, (count, seq_len), generator=torch.Generator().manual_seed(0))
    marks = torch.full((count, seq_len), REAL | TARGET, dtype=torch.uint8)
    marks[:, 0] = REAL | START
    return Rows(ids.int(), marks, whole=not generates(model))


class Stopwatch(StageCallback):
    """Times the second optimizer step, stops training after it, and keeps the Trainer from saving."""

    keeps = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = _now() - self.start
        control.should_save = False
        control.should_training_stop = state.global_step >= 2


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
