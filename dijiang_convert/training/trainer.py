"""Runs one stage of a recipe on transformers' Trainer: which parameters train, how fast, on what loss.

Under `accelerate launch` several processes share the rows of each optimizer step. Their number does not change the
result: the rows of a step, the order of rows, and the weight of each target in the loss stay the same. Which stages run
is decided in `plan`.
"""

import importlib.util
import math
import resource
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from ..checkpoint.loading import generates, hidden_size
from ..data.images import Images
from ..data.rows import Rows
from ..errors import DijiangError
from ..files import telling_full_disk
from ..progress import console, is_drawn, say
from ..recipe import Stage
from ..training import nonfinite, processes
from .adapters import lora_targets
from .attention import original, recomputing
from .attention_transfer import attention_transfer_loss, transferring
from .checkpoints import GO_ON, Checkpoints, StopOnSignal, last_checkpoint
from .log import StageCallback
from .logits import cross_entropy_loss, distillation_loss, inner_model, live_teacher
from .outputs import output_loss
from .packing import check_packing
from .schedule import Batches, share_out

REFERENCE_WIDTH = 1024  # a recipe's learning_rate is for this hidden_size; Adam's best rate is about ∝ 1 / width
LONGEST_GRADIENT = 1.0  # gradients of a larger norm are clipped to this norm

Loss = Callable[[Any, dict[str, Any]], Tensor]


@dataclass(frozen=True)
class StageResult:
    """What a stage did. losses: (tokens seen, loss) of each logged step. peak_memory_bytes: see `peak_memory`."""

    name: str
    tokens: int
    first_loss: float
    last_loss: float
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    losses: list[tuple[int, float]]


def row_order(rows: int, count: int, seed: int) -> list[int]:
    """The indices of ``count`` rows to train on: all rows in random order, then in another, until there are enough."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(rows, generator=generator) for _ in range(-(-count // rows))]
    return torch.cat(rounds)[:count].tolist()


def run_stage(
    model: PreTrainedModel,
    stage: Stage,
    rows: Rows | Images,
    *,
    teacher: PreTrainedModel | None,
    folder: Path,
    reload: Callable[[], PreTrainedModel] | None = None,
    seed: int = 0,
    log: StageCallback | None = None,
) -> tuple[PreTrainedModel | None, StageResult]:
    """Trains ``model`` on rows of text or images, and returns it with its adapters merged, and what the stage did.

    teacher: a frozen softmax model for distillation; None makes the model its own, with adapters and kernels off.
    folder: where the Trainer keeps its checkpoints; the stage goes on from the last whole one there.
    reload: loads ``model`` again as it was; needed where processes shard it. The trained model is then on the main
        process's CPU, and None on the other processes.
    log: a callback that gets every logged step.

    Raises DijiangError at the first gradient or loss that is not finite, and KeyboardInterrupt after a signal. Both
    leave the checkpoints written so far to resume from; after a signal that includes one of the last step.
    """
    start = time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    dtype, count = model.dtype, PartialState().num_processes
    if rows.packed and not processes.is_sharded():
        for each in (model, teacher):
            if each is not None:
                check_packing(each)
    trained = _prepare(model, stage, seed)
    batches, alone = share_out(stage, count), share_out(stage)
    if batches.rows != alone.rows:
        say(f"{stage.name}: {alone.rows} rows a step can't be shared by {count} processes, so it has {batches.rows}")
    step_tokens = batches.rows * stage.seq_len
    progress, stop = _ProgressCallback(stage, batches.steps, step_tokens), StopOnSignal()
    trainer = _StageTrainer(
        stage=stage,
        teacher=teacher,
        model=trained,
        args=_arguments(stage, folder, batches, seed),
        train_dataset=Subset(rows, row_order(len(rows), batches.steps * batches.rows, seed)),  # type: ignore[arg-type]
        callbacks=[progress, Checkpoints(folder), stop, *([log] if log else [])],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    latest = last_checkpoint(folder)
    attention, full_disk = _attention(stage, inner_model(trained), trainer.args, log), telling_full_disk(folder, GO_ON)
    listening = stop.listening() if log is None or log.keeps else nullcontext()  # a trial stops at once
    with listening, attention, full_disk:
        try:
            trainer.train(resume_from_checkpoint=str(latest) if latest else None)
        finally:
            progress.stop()
    if stop.stopped:
        raise KeyboardInterrupt
    losses = progress.losses
    whole: Any = trained
    if processes.is_sharded():
        assert reload is not None
        whole = processes.gather(trainer.accelerator, trainer.model_wrapped, lambda: _prepare(reload(), stage, seed))
    seconds, seen = time.perf_counter() - start, batches.steps * step_tokens
    return None if whole is None else _plain(whole, dtype), StageResult(
        name=stage.name,
        tokens=seen,
        first_loss=losses[0][1],
        last_loss=losses[-1][1],
        seconds=seconds,
        tokens_per_second=(seen - progress.first_step * step_tokens) / seconds,
        peak_memory_bytes=peak_memory(),
        losses=losses,
    )


def _plain(trained: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its adapters merged and nothing frozen, in ``dtype`` but for its kernels, which stay float32."""
    model = trained.merge_and_unload() if isinstance(trained, PeftModel) else trained
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(True)
        parameter.grad = None
        if ".dijiang." not in name:
            parameter.data = parameter.data.to(dtype)
    return model


def _prepare(model: PreTrainedModel, stage: Stage, seed: int) -> PreTrainedModel | PeftModel:
    """Chooses what trains. LoRA wraps projections; beside it kernels train whole, as peft's modules_to_save."""
    if stage.train == "full":
        model.float()  # half precision would round optimizer steps away
    transformers.set_seed(seed)  # adapters start at random
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


def _attention(
    stage: Stage, model: PreTrainedModel, args: TrainingArguments, log: StageCallback | None
) -> AbstractContextManager[None]:
    """The context in which the model trains, which chooses its attention function."""
    if stage.objective == "attention_transfer":
        return transferring(model, log.note_errors if log else None)
    return nullcontext() if args.gradient_checkpointing else recomputing(model)


def _loss(stage: Stage, trained: Any, teacher: PreTrainedModel | None) -> Loss:
    """The loss of a batch, a mean over its `targets`, as a function of the student and the batch.

    The student is ``trained`` inside of DDP's or another wrapper, whose forward pass alone synchronises gradients.
    """
    if stage.objective == "attention_transfer":
        return attention_transfer_loss
    if stage.objective == "cross_entropy":
        return cross_entropy_loss

    def distil_outputs(student: Any, inputs: dict[str, Any]) -> Tensor:
        if teacher is not None:
            return output_loss(student, teacher, inputs)
        return output_loss(student, trained, inputs, within=lambda: original(trained))

    def distil(student: Any, inputs: dict[str, Any]) -> Tensor:
        if teacher is not None:
            target = live_teacher(teacher, inputs)
        else:
            target = live_teacher(trained, inputs, within=lambda: original(trained))
        return distillation_loss(student, target, inputs, stage.cross_entropy_weight)

    return distil if generates(inner_model(trained)) else distil_outputs


def targets(stage: Stage, inputs: dict[str, Tensor]) -> Tensor:
    """The number of targets that a batch's loss is the mean over: tokens to predict, or rows if none is predicted."""
    if stage.objective == "attention_transfer" or "loss_mask" not in inputs:
        return torch.tensor(len(next(iter(inputs.values()))))
    return inputs["loss_mask"][:, 1:].sum()


class _StageTrainer(Trainer):
    """A Trainer with the stage's loss and a learning rate for kernels. It raises where numbers are not finite."""

    def __init__(self, stage: Stage, teacher: PreTrainedModel | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stage = stage
        self.model_accepts_loss_kwargs = False  # tells the Trainer to divide by the accumulated passes
        self.step_inputs: list[dict[str, Any]] = []
        if not processes.supported(self.accelerator):
            raise DijiangError(f"can't shard or share a model on {self.args.device}: FSDP2 needs GPUs")
        processes.keep_kernels_whole(self.accelerator)
        if teacher is not None:
            teacher = processes.prepare_teacher(self.accelerator, teacher)
        self.loss = _loss(stage, self.model, teacher)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The batches of a step on this process, and the number of their targets over all processes."""
        self.step_inputs, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = torch.stack([targets(self.stage, inputs) for inputs in self.step_inputs]).sum()
        return self.step_inputs, self.accelerator.reduce(count.to(device))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss, weighted so that its mean over the forward passes of a step is the mean over the step's targets."""
        loss = self.loss(model, inputs)
        passes = self.current_gradient_accumulation_steps * self.accelerator.num_processes
        loss = loss * (targets(self.stage, inputs).to(loss.device) * passes / num_items_in_batch.clamp(min=1))
        return (loss, None) if return_outputs else loss

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Runs before each optimizer step, and raises DijiangError before one whose gradient is not finite."""
        if self.accelerator.is_fsdp2:
            processes.average_whole_gradients(model.parameters())
        norm = processes.gradient_norm(model.parameters())
        if not norm.isfinite():
            raise DijiangError(self._diverged(model, self.state.global_step + 1))
        processes.clip_gradients(model.parameters(), norm, self.args.max_grad_norm)
        return norm

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Saves good weights only: those after a step must give a finite loss on the rows of that step."""
        with torch.no_grad():
            loss = torch.stack([self.loss(model, self._prepare_inputs(inputs)) for inputs in self.step_inputs]).sum()
        if not self.accelerator.reduce(loss).isfinite():
            raise DijiangError(self._diverged(model, self.state.global_step))
        super()._save_checkpoint(model, trial)

    def _diverged(self, model: nn.Module, step: int) -> str:
        def rerun() -> None:
            for inputs in self.step_inputs:
                self.loss(model, self._prepare_inputs(inputs))

        where = nonfinite.find(model, rerun)
        rate = "kernel_learning_rate" if self.stage.train == "kernel" or ".dijiang" in where else "learning_rate"
        return (
            f"stage {self.stage.name}, step {step}: not finite, first in {where}: go on from the "
            f"last checkpoint with --resume --set {self.stage.name}.{rate}={getattr(self.stage, rate) / 3:.2g}"
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Loads both, but keeps this run's learning rates, which may differ from those of the checkpoint."""
        optimizer: Any = self.optimizer
        rates = [group.get("initial_lr") for group in optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        scheduler: Any = self.lr_scheduler
        if checkpoint and isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            scheduler.base_lrs = rates
            for group, rate, factor in zip(optimizer.param_groups, rates, scheduler.lr_lambdas, strict=True):
                group["initial_lr"], group["lr"] = rate, rate * factor(scheduler.last_epoch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not math.isfinite(logs.get("loss", 0.0)):
            raise DijiangError(self._diverged(self.model_wrapped, self.state.global_step))
        super().log(logs, start_time)

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


def _arguments(stage: Stage, folder: Path, batches: Batches, seed: int) -> TrainingArguments:
    cuda, steps = torch.cuda.is_available(), batches.steps
    every = max(steps // 100, 1)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batches.micro,
        gradient_accumulation_steps=batches.accumulation,
        train_sampling_strategy="sequential",  # the rows come in `row_order`
        learning_rate=stage.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=round(stage.warmup * steps),
        max_grad_norm=LONGEST_GRADIENT,
        bf16=cuda and torch.cuda.is_bf16_supported(),
        # Every release of transformers 5 knows these two arguments.
        gradient_checkpointing=cuda and stage.objective != "attention_transfer",
        gradient_checkpointing_kwargs={"use_reentrant": False} if cuda else None,
        ddp_find_unused_parameters=False,  # DDP would search outputs, which lack the losses of attention transfer
        ddp_broadcast_buffers=False,
        logging_steps=every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_steps=max(min(steps // 4, 500) // every, 1) * every,  # a loss is logged at each save
        save_total_limit=None,  # `Checkpoints` removes older ones
        report_to=["tensorboard"] if importlib.util.find_spec("tensorboard") else [],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
        seed=seed,
        data_seed=seed,
    )
    # A process uses one GPU and never torch's DataParallel; `accelerate launch` starts a process for each GPU.
    arguments._setup_devices  # noqa: B018
    arguments._n_gpu = 1
    return arguments


class _ProgressCallback(TrainerCallback):
    """Shows a bar with loss and speed on stderr, and collects the losses for `StageResult`."""

    def __init__(self, stage: Stage, steps: int, step_tokens: int) -> None:
        self.stage, self.steps, self.step_tokens = stage, steps, step_tokens
        self.losses: list[tuple[int, float]] = []
        self.first_step = 0
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first_step, self.start = state.global_step, time.perf_counter()
        self.losses = [
            (e["step"] * self.step_tokens, e["loss"]) for e in state.log_history if "loss" in e and "step" in e
        ]
        columns = TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[note]}")
        shown = is_drawn() and state.is_world_process_zero
        self.bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=not shown)
        self.task = self.bar.add_task(self.stage.name, total=self.steps, completed=self.first_step, note="")
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        speed = (state.global_step - self.first_step) * self.step_tokens / (time.perf_counter() - self.start)
        loss = f"loss {self.losses[-1][1]:.4f}  " if self.losses else ""
        self.bar.update(self.task, completed=state.global_step, note=f"{loss}{speed:,.0f} tokens/s")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append((state.global_step * self.step_tokens, float(logs["loss"])))

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def peak_memory() -> int:
    """The peak so far, in bytes: what torch allocated on the GPU if there is one, else the resident process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit
