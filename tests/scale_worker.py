"""Runs short stages on however many processes it is launched with, and writes their losses and weights.

python -m tests.scale_worker CHECKPOINT TEXT OUT MICRO_ROWS PROCESSES
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState

from dijiang_convert.checkpoint.loading import load_converted, silence
from dijiang_convert.cli import app
from dijiang_convert.data.mixture import REAL, START, TARGET
from dijiang_convert.data.rows import Rows
from dijiang_convert.recipe import Stage
from dijiang_convert.training import processes, schedule, trainer

SEQ_LEN, BATCH, STEPS = 96, 8, 6  # far more than the window and the block
SIZES: dict[str, Any] = {"tokens": STEPS * BATCH * SEQ_LEN, "seq_len": SEQ_LEN, "batch_tokens": BATCH * SEQ_LEN}
STAGES = (
    Stage("transfer", "attention_transfer", **SIZES),
    Stage("lora", "distillation", train="lora", **SIZES),
    Stage("full", "distillation", train="full", cross_entropy_weight=0.5, **SIZES),
)


def rows() -> Rows:
    """Of very different lengths, so that a mean of means is not the mean."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 256, (20, SEQ_LEN), generator=generator)
    lengths = torch.randint(4, SEQ_LEN + 1, (20, 1), generator=generator)
    marks = torch.where(torch.arange(SEQ_LEN) < lengths, REAL | TARGET, 0)
    marks[:, 0] = REAL | START
    return Rows(ids, marks.to(torch.uint8))


def run(checkpoint: str, folder: Path, stage: Stage, **options: Any) -> Any:
    def load() -> Any:
        return load_converted(checkpoint)

    guide = load_converted(checkpoint, attention="softmax").requires_grad_(False) if stage.train == "full" else None
    return trainer.run_stage(load(), stage, rows(), teacher=guide, folder=folder, reload=load, **options)


class SignalToTheLast(trainer._ProgressCallback):
    """One process of them all gets Ctrl-C in the fourth step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        here = PartialState()
        if state.global_step == 4 and here.is_last_process:
            os.kill(os.getpid(), signal.SIGINT)


def with_checkpointing(arguments: Any) -> Any:
    """`_arguments`, with activation checkpointing in the LoRA stage as on a GPU."""

    def made(stage: Stage, *args: Any) -> Any:
        result = arguments(stage, *args)
        for name in ("gradient_checkpointing", "activation_checkpointing"):  # the old name, and that since 5.23
            setattr(result, name, stage.train == "lora")
            setattr(result, f"{name}_kwargs", {"use_reentrant": False})
        return result

    return made


def run_all(checkpoint: str, out: Path, micro_rows: int, interrupt: bool) -> None:
    """Each stage; where there are several processes it is interrupted and resumed."""
    schedule.LEAST_STEPS, schedule.MICRO_BATCH_TOKENS = 1, micro_rows * SEQ_LEN
    if interrupt:
        trainer._arguments = with_checkpointing(trainer._arguments)
    plain = trainer._ProgressCallback
    for stage in STAGES:
        if interrupt:
            trainer._ProgressCallback = SignalToTheLast
            try:
                run(checkpoint, out / stage.name, stage)
                raise AssertionError("was not interrupted")
            except KeyboardInterrupt:
                trainer._ProgressCallback = plain
        model, result = run(checkpoint, out / stage.name, stage)
        if PartialState().is_main_process:
            torch.save({"losses": result.losses, "weights": model.state_dict()}, out / f"{stage.name}.pt")


def run_command(checkpoint: str, text: str, out: Path) -> None:
    """What a user runs: all stages of a recipe, from text to a checkpoint."""
    schedule.LEAST_STEPS = 4
    options = ["--data", text, "--seq-len", str(SEQ_LEN), "--tokens", "4500", "--out", str(out / "tuned"), "--json"]
    app(["finetune", checkpoint, *options], standalone_mode=False)


def shard_on_cpus() -> None:
    """accelerate turns FSDP on for GPUs alone. PyTorch's FSDP2 works on CPUs too, so it is told these are GPUs."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    os.environ["ACCELERATE_USE_CPU"] = "false"
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


if __name__ == "__main__":
    checkpoint, text, out, micro_rows, count = sys.argv[1:]
    if processes.is_sharded():
        shard_on_cpus()
    silence()
    assert processes.start().num_processes == int(count)
    run_all(checkpoint, Path(out), int(micro_rows), interrupt=int(count) > 1)
    run_command(checkpoint, text, Path(out))
