"""Estimates what a run costs before it starts: steps and memory, from the config alone. `trial` measures the time.

The memory is that of the peak, which lies at the end of a forward pass and in the backward pass of one layer:

    weights          those of the model as loaded, of its adapters, and of a second model as teacher
    training         gradients and Adam's two moments, 12 bytes per trained parameter
    activations      tokens of a forward pass × numbers per token × bytes per number. The numbers are the inputs and
                     outputs of all projections; with activation checkpointing, a hidden state per layer and the
                     projections of one layer. To them comes the larger of two: one layer's kernel, which the backward
                     pass recomputes (`_kernel_numbers`), and a chunk of logits. Attention transfer keeps one layer's
                     kernel and nothing else.

`benchmarks/memory.py` compares the estimate with measurements. What Python and the libraries take is not counted.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..architecture.trace import skeleton
from ..checkpoint.loading import generates
from ..modeling import modeling_dijiang
from ..modeling.configuration_dijiang import Kernel, Layers, read_section
from ..recipe import Stage
from .adapters import lora_targets
from .logits import CHUNK_ELEMENTS, LEAST_ROWS
from .schedule import share_out
from .teachers import is_its_own_teacher

# These factors were fitted to what `benchmarks/memory.py` measures.
BACKWARD = 1.4  # what a layer keeps grows by this factor while its backward pass runs
FROZEN = 0.8  # what projections keep shrinks by this factor where most of their weights are frozen
LOGIT_COPIES = {"distillation": 5, "cross_entropy": 2}  # float32 tensors of a chunk of logits that are alive at once


@dataclass(frozen=True)
class StageCost:
    """What a stage will take.

    tokens: tokens that the stage trains on.
    steps, rows: optimizer steps, and rows of each over all processes.
    training_bytes: gradients and the optimizer's moments.
    memory_bytes: the peak, which is the sum of weights, training and activations.
    operations: floating-point operations of the whole stage.
    seconds: time of the whole stage, None where it was not measured.
    """

    name: str
    objective: str
    train: str
    tokens: int
    seq_len: int
    steps: int
    rows: int
    trainable_parameters: int
    weights_bytes: int
    training_bytes: int
    activation_bytes: int
    memory_bytes: int
    operations: int
    seconds: float | None = None


# ---------------------------------------------------------------------------------------------------------- memory


def plan_costs(plan: Sequence[Stage], config: Any, copies: Sequence[bool], processes: int = 1) -> list[StageCost]:
    """What each stage of a run will take.

    Args:
        config: the config of the converted checkpoint, as transformers parses it.
        copies: for each stage, whether a second, frozen model is in memory.
        processes: how many processes share the rows of a step. Memory is that of a process with the whole model.
    """
    model = skeleton(getattr(modeling_dijiang, config.architectures[0]), config)
    kernel, layers = read_section(config)
    width = (config.dtype or torch.float32).itemsize
    return [stage_cost(model, kernel, layers, s, width, copy, processes) for s, copy in zip(plan, copies, strict=True)]


def teacher_copies(plan: Sequence[Stage]) -> list[bool]:
    """For each stage of a recipe, whether it needs a second model in memory as its teacher."""
    trained = [{stage.train for stage in plan[:i]} for i in range(len(plan))]
    return [
        stage.objective == "distillation" and not is_its_own_teacher(stage, before)
        for stage, before in zip(plan, trained, strict=True)
    ]


def stage_cost(
    model: PreTrainedModel,
    kernel: Kernel,
    layers: Layers,
    stage: Stage,
    width: int,
    teacher_copy: bool,
    processes: int = 1,
) -> StageCost:
    """What one stage will take.

    Args:
        model: the converted model on the meta device.
        width: bytes per number of the base weights.
        teacher_copy: whether a second, frozen model is in memory.
        processes: how many processes share the rows of a step.
    """
    batches = share_out(stage, processes)
    of_kernel = sum(p.numel() for name, p in model.named_parameters() if ".dijiang." in name)
    base = sum(p.numel() for p in model.parameters()) - of_kernel
    stored = base * width + of_kernel * 4
    adapters = 0
    if stage.train == "lora":
        targets = [model.get_submodule(name) for name in lora_targets(model, stage.lora_targets)]
        adapters = stage.lora_rank * sum(sum(_features(module)) for module in targets)
    trainable = of_kernel + (base if stage.train == "full" else adapters)
    weights = (base + of_kernel) * 4 if stage.train == "full" else stored
    weights += 4 * (adapters + of_kernel) if adapters else 0  # peft trains a copy of the kernels
    weights += stored if teacher_copy else 0
    activations = _activations(model, kernel, layers, stage, batches.micro * stage.seq_len, width)
    return StageCost(
        name=stage.name,
        objective=stage.objective,
        train=stage.train,
        tokens=batches.steps * batches.rows * stage.seq_len,
        seq_len=stage.seq_len,
        steps=batches.steps,
        rows=batches.rows,
        trainable_parameters=trainable,
        weights_bytes=weights,
        training_bytes=12 * trainable,
        activation_bytes=activations,
        memory_bytes=weights + 12 * trainable + activations,
        operations=batches.steps * batches.rows * stage.seq_len * _operations(model, kernel, layers, stage),
    )


def _activations(model: PreTrainedModel, kernel: Kernel, layers: Layers, stage: Stage, tokens: int, width: int) -> int:
    """Bytes that autograd keeps of a forward pass over ``tokens`` tokens, and the backward pass of one layer adds."""
    config: Any = model.config.get_text_config()
    depth = getattr(config, "num_hidden_layers", len(layers.layers))
    vocabulary = config.vocab_size if generates(model) else 0
    of_kernel = int(4 * BACKWARD * tokens * _kernel_numbers(kernel, layers))
    if stage.objective == "attention_transfer":
        return of_kernel
    cuda = torch.cuda.is_available()  # on a GPU the Trainer computes in bfloat16 and checkpoints activations
    width = 2 if cuda else 4 if stage.train == "full" else width
    projections = width * sum(sum(_features(m)) for name, m in model.named_modules() if "." in name)
    projections = int(projections * tokens * (1 if stage.train == "full" else FROZEN))
    if cuda:
        projections = int(tokens * depth * width * config.hidden_size + BACKWARD * projections / depth)
    chunk = max(CHUNK_ELEMENTS["cuda" if cuda else "cpu"], LEAST_ROWS * vocabulary)
    logits = 4 * LOGIT_COPIES[stage.objective] * min(tokens * vocabulary, chunk)
    return projections + max(of_kernel, logits)


def _kernel_numbers(kernel: Kernel, layers: Layers) -> int:
    """Numbers per token that autograd keeps of one layer's kernel, for the layer with the largest memory.

    They were counted in the code of `feature_map`, `state` and `kernel`, or of `linear` where there is no window.
    """
    query, key, value, dim = layers.heads, layers.kv_heads, layers.value_dim, layers.head_dim
    if kernel.decay == "retnet":
        key = query
    memory = max((sum(heads) // len(heads) for heads in layers.memory), default=kernel.memory)
    exact, features = _rows(kernel, layers, memory)
    # A query head keeps its weights over the exact rows, its features twice, three queries and two outputs.
    numbers = query * (exact + 2 * features + 3 * dim + 2 * value)
    # A key/value head keeps six tensors of features, its keys and values twice, and for each block of tokens the exact
    # rows that the block reads and five states.
    numbers += key * (6 * features + 2 * dim + 2 * value)
    numbers += key * (exact * (dim + value) + 5 * features * value) // kernel.block
    if not kernel.window:
        numbers += query * (4 * kernel.block + 3 * features)
    return numbers + (4 * query * value if kernel.gate else 0)


def _rows(kernel: Kernel, layers: Layers, memory: int) -> tuple[int, int]:
    """How many exact rows a query reads at most, and how many features of the state."""
    exact = kernel.sinks + memory + kernel.window + kernel.block if kernel.window else 0
    return exact, layers.head_dim * (2 if kernel.signed else 1) if kernel.far else 0


def _operations(model: PreTrainedModel, kernel: Kernel, layers: Layers, stage: Stage) -> int:
    """Floating-point operations per token of a stage on a GPU, where a backward pass repeats the forward one.

    They are those of the linear layers and of attention's two products; experts that are no `nn.Linear` are left out.
    """
    linear = 2 * sum(math.prod(_features(module)) for module in model.modules())
    per_row = 2 * layers.heads * (layers.head_dim + layers.value_dim) * len(layers.layers)
    rows = min(sum(_rows(kernel, layers, kernel.memory)), stage.seq_len)
    teacher, student = linear + per_row * stage.seq_len // 2, linear + per_row * rows
    if stage.objective == "attention_transfer":
        return teacher + 3 * per_row * rows
    passes = 4 if stage.train == "full" else 3  # forward, forward again, gradients of activations, those of weights
    return passes * student + (teacher if stage.objective == "distillation" else 0)


def _features(module: nn.Module) -> tuple[int, int]:
    """Input and output size of a linear layer, (0, 0) for any other module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return tuple(module.weight.shape) if isinstance(module, Conv1D) else (0, 0)  # type: ignore[return-value]


def free_memory() -> int:
    """Free bytes of the GPU if there is one, else the bytes that the system can give without swapping."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available


def warning(costs: Sequence[StageCost], free: int) -> str | None:
    """One line that says which stage won't fit in ``free`` bytes and what would help, or None if all fit."""
    worst = max(costs, key=lambda cost: cost.memory_bytes)
    if worst.memory_bytes <= free:
        return None
    if worst.activation_bytes < worst.memory_bytes / 2:
        remedy = "--lora instead of --full" if worst.train == "full" else "a machine with more memory"
    elif worst.rows > 1:
        remedy = f"--set {worst.name}.batch_tokens={max(worst.rows // 4, 1) * worst.seq_len}"
    else:
        remedy = f"--set {worst.name}.seq_len={worst.seq_len // 2}"
    return (
        f"stage {worst.name} wants about {worst.memory_bytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: "
        f"it won't fit; try {remedy}"
    )


# ---------------------------------------------------------------------------------------------------------- showing


def duration(seconds: float) -> str:
    """A time as text, in as many figures as an estimate deserves: 45 s, 12 min, 3.5 h."""
    if seconds < 99:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def told(costs: Sequence[StageCost], free: int) -> Iterator[str]:
    """The plan as lines for a person: one per stage, a warning if a stage won't fit in ``free`` bytes, and the time."""
    for cost in costs:
        line = (
            f"{cost.name}: {cost.objective.replace('_', ' ')} on {cost.tokens:,} tokens, {cost.steps:,} steps of "
            f"{cost.rows:,} x {cost.seq_len:,}; {cost.trainable_parameters:,} parameters train; "
            f"about {cost.memory_bytes / 1e9:.2g} GB"
        )
        yield line if cost.seconds is None else f"{line}, {duration(cost.seconds)}"
    wont_fit = warning(costs, free)
    if wont_fit is not None:
        yield f"warning: {wont_fit}"
    seconds = [cost.seconds for cost in costs if cost.seconds is not None]
    if len(seconds) == len(costs):
        yield f"about {duration(sum(seconds))} in all, on this machine as busy as it is now"
