"""Runs one stage of a recipe on transformers' Trainer: which parameters train, how fast, on what loss."""

import contextlib
import importlib.util
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D

from ..errors import DijiangError
from ..models import hidden_size
from ..progress import console
from ..recipe import Stage
from .attention_transfer import attention, attention_transfer_loss, transferring
from .data import Rows
from .log import StageCallback
from .logits import cross_entropy_loss, distillation_loss

REFERENCE_WIDTH = 1024  # hidden_size that a recipe's learning_rate is given for; Adam wants it ∝ 1 / width
LEAST_STEPS = 150  # short runs take smaller batches rather than fewer steps
MICRO_BATCH_TOKENS = 16384  # of one forward pass; larger batches are accumulated

Loss = Callable[[Any, dict[str, Any]], Tensor]


@dataclass(frozen=True)
class StageResult:
    """``losses`` is (tokens seen, loss) along the way."""

    name: str
    tokens: int
    first_loss: float
    last_loss: float
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    losses: list[tuple[int, float]]


@dataclass(frozen=True)
class Batches:
    """How a stage's rows are shared out: ``rows`` an optimizer step, ``accumulation`` forward passes of ``micro``."""

    rows: int
    micro: int
    accumulation: int
    steps: int


def share_out(stage: Stage) -> Batches:
    """The batches of a stage."""
    batch = max(min(stage.batch_tokens // stage.seq_len, stage.tokens // stage.seq_len // LEAST_STEPS), 1)
    micro = max(min(batch, MICRO_BATCH_TOKENS // stage.seq_len), 1)
    rows = micro * (batch // micro)
    return Batches(rows, micro, batch // micro, max(stage.tokens // (rows * stage.seq_len), 1))


def run_stage(
    model: PreTrainedModel,
    stage: Stage,
    rows: Rows,
    *,
    teacher: PreTrainedModel | None,
    folder: Path,
    resume: bool = False,
    seed: int = 0,
    log: StageCallback | None = None,
) -> tuple[PreTrainedModel, StageResult]:
    """Trains ``model`` on rows of text and returns it, adapters merged, with what happened.

    teacher: a frozen softmax model for distillation; None lets the model be its own, with adapters and kernels off.
    folder: where the Trainer keeps its checkpoints, for ``resume``.
    log: takes down every logged step.
    """
    start = time.perf_counter()
    dtype = model.dtype
    if stage.train == "full":
        model.float()  # optimizer steps are smaller than half precision can tell
    transformers.set_seed(seed)  # adapters start at random
    trained: Any = _prepare(model, stage)
    batches = share_out(stage)
    steps, step_tokens = batches.steps, batches.rows * stage.seq_len
    progress = _ProgressCallback(stage, steps, step_tokens)
    trainer = _StageTrainer(
        stage=stage,
        loss=_loss(stage, model, teacher),
        model=trained,
        args=_arguments(stage, folder, steps, batches.micro, batches.accumulation, seed),
        train_dataset=rows,
        callbacks=[progress, *([log] if log else [])],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    note = log.note_errors if log else None
    with transferring(model, note) if stage.objective == "attention_transfer" else contextlib.nullcontext():
        checkpoints = list(folder.glob("checkpoint-*"))
        trainer.train(resume_from_checkpoint=bool(resume and checkpoints))
    losses = progress.losses
    if not all(torch.isfinite(torch.tensor(loss)) for _, loss in losses):
        raise DijiangError(f"stage {stage.name} diverged: the loss is not finite; lower --set learning_rate")
    if isinstance(trained, PeftModel):
        model = trained.merge_and_unload()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(True)
        parameter.grad = None
        if ".dijiang." not in name:
            parameter.data = parameter.data.to(dtype)
    seconds, seen = time.perf_counter() - start, steps * step_tokens
    return model, StageResult(
        name=stage.name,
        tokens=seen,
        first_loss=losses[0][1],
        last_loss=losses[-1][1],
        seconds=seconds,
        tokens_per_second=(seen - progress.first_step * step_tokens) / seconds,
        peak_memory_bytes=peak_memory(),
        losses=losses,
    )


def _prepare(model: PreTrainedModel, stage: Stage) -> PreTrainedModel | PeftModel:
    """Sets what trains. LoRA wraps the projections; the kernels train whole, as modules that peft saves."""
    model.train()
    if stage.train == "lora":
        kernels = any(True for name, _ in model.named_parameters() if ".dijiang." in name)
        config = LoraConfig(
            r=stage.lora_rank,
            lora_alpha=stage.lora_alpha,
            target_modules=lora_targets(model, stage.lora_targets),
            modules_to_save=["dijiang"] if kernels else None,
        )
        return get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(stage.train == "full" or ".dijiang." in name)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise DijiangError(f"stage {stage.name} trains the kernel, and this recipe's kernel has no parameters")
    return model


def lora_targets(model: nn.Module, which: str) -> list[str]:
    """Names of the linear layers that get adapters: of converted attention modules, or "all" but the output head."""
    attentions = [name.removesuffix("dijiang") for name, _ in model.named_modules() if name.endswith(".dijiang")]
    linear = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    if which == "attention":
        return [name for name in linear if name.startswith(tuple(attentions))]
    return [name for name in linear if "." in name]  # the head is at the top level


def _loss(stage: Stage, model: PreTrainedModel, teacher: PreTrainedModel | None) -> Loss:
    if stage.objective == "attention_transfer":
        return attention_transfer_loss
    if stage.objective == "cross_entropy":
        return cross_entropy_loss

    def teach(student: Any) -> Callable[..., Tensor]:
        if teacher is not None:
            return lambda **tokens: teacher(**tokens).logits

        def own(**tokens: Any) -> Tensor:
            with student.disable_adapter(), attention(model, "sdpa"):
                return student(**tokens).logits

        return own

    return lambda student, inputs: distillation_loss(student, teach(student), inputs, stage.cross_entropy_weight)


class _StageTrainer(Trainer):
    """Trainer with the stage's loss, and a learning rate of their own for the kernels."""

    def __init__(self, stage: Stage, loss: Loss, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stage, self.loss = stage, loss
        self.model_accepts_loss_kwargs = False  # the loss is a mean: Trainer divides accumulated ones

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = self.loss(self.accelerator.unwrap_model(model), inputs)
        return (loss, None) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            wrapped: Any = self.model
            trainable = [(name, p) for name, p in wrapped.named_parameters() if p.requires_grad]
            kernel = [p for name, p in trainable if ".dijiang." in name]
            rest = [p for name, p in trainable if ".dijiang." not in name]
            model = wrapped.get_base_model() if isinstance(wrapped, PeftModel) else wrapped
            scale = REFERENCE_WIDTH / hidden_size(model)
            groups = [
                {"params": kernel, "lr": self.stage.kernel_learning_rate, "weight_decay": 0.0},
                {"params": rest, "lr": self.stage.learning_rate * scale, "weight_decay": self.stage.weight_decay},
            ]
            self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.95))
        return self.optimizer


def _arguments(stage: Stage, folder: Path, steps: int, micro: int, accumulation: int, seed: int) -> TrainingArguments:
    cuda = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        learning_rate=stage.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=round(stage.warmup * steps),
        max_grad_norm=1.0,
        bf16=cuda and torch.cuda.is_bf16_supported(),
        activation_checkpointing=cuda and stage.objective != "attention_transfer",
        activation_checkpointing_kwargs={"use_reentrant": False} if cuda else None,
        logging_steps=max(steps // 100, 1),
        logging_first_step=True,
        save_steps=max(min(steps // 4, 500), 1),
        save_total_limit=1,
        report_to=["tensorboard"] if importlib.util.find_spec("tensorboard") else [],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
        seed=seed,
        data_seed=seed,
    )


class _ProgressCallback(TrainerCallback):
    """A bar with loss and speed on stderr, and the losses for the result."""

    def __init__(self, stage: Stage, steps: int, step_tokens: int) -> None:
        self.stage, self.steps, self.step_tokens = stage, steps, step_tokens
        self.losses: list[tuple[int, float]] = []
        self.first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first_step, self.start = state.global_step, time.perf_counter()
        self.losses = [
            (e["step"] * self.step_tokens, e["loss"]) for e in state.log_history if "loss" in e and "step" in e
        ]
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}")
        self.bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task(self.stage.name, total=self.steps, completed=self.first_step, note="")
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        speed = (state.global_step - self.first_step) * self.step_tokens / (time.perf_counter() - self.start)
        loss = f"loss {self.losses[-1][1]:.4f}  " if self.losses else ""
        self.bar.update(self.task, completed=state.global_step, note=f"{loss}{speed:,.0f} tokens/s")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append((state.global_step * self.step_tokens, float(logs["loss"])))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop()

    def stop(self) -> None:
        self.bar.stop()


def peak_memory() -> int:
    """Bytes at the peak so far: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit
