"""What a run costs, told before it starts: steps and memory, from the config alone. (Time is tried, in `trial`.)

Memory is that of the largest moment, the end of a forward pass and the backward pass of one layer:

    weights          as loaded, adapters and a teacher's own copy with them
    training         gradients and Adam's two moments, 12 bytes a trained number
    activations      tokens of a forward pass × numbers a token × bytes: what goes into and comes out of every layer's
                     projections, or with activation checkpointing a hidden state a layer and one layer's projections;
                     and the larger of one layer's kernel, which is computed again in the backward pass
                     (`_kernel_numbers`), and a chunk of logits. Attention transfer has one layer's kernel at a time.

`benchmarks/memory.py` compares it with what is measured. What Python and the libraries take is not counted.
"""

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

# Fitted to what `benchmarks/memory.py` measures:
BACKWARD = 1.4  # of what a layer keeps, while its backward pass runs
FROZEN = 0.8  # of what projections keep where most of their weights don't train
LOGIT_COPIES = {"distillation": 5, "cross_entropy": 2}  # tensors of a chunk of logits that are alive at once


@dataclass(frozen=True)
class StageCost:
    """A stage before it runs. rows: of an optimizer step; seconds: None where it was not tried.

    memory_bytes: at the peak, the sum of weights, training (gradients and optimizer) and activations.
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
    seconds: float | None = None


# ---------------------------------------------------------------------------------------------------------- memory


def plan_costs(plan: Sequence[Stage], config: Any, copies: Sequence[bool], processes: int = 1) -> list[StageCost]:
    """What each stage of a run takes, from the config of the converted checkpoint as transformers parses it.

    Args:
        copies: which stages have a second, frozen model in memory.
        processes: that share the rows of a step. Memory is that of one which holds a whole model.
    """
    model = skeleton(getattr(modeling_dijiang, config.architectures[0]), config)
    kernel, layers = read_section(config)
    width = (config.dtype or torch.float32).itemsize
    return [stage_cost(model, kernel, layers, s, width, copy, processes) for s, copy in zip(plan, copies, strict=True)]


def teacher_copies(plan: Sequence[Stage]) -> list[bool]:
    """Which stages of a recipe need a teacher in memory beside the model. With adapters and kernels off it is its own,
    as long as no stage before changed its base."""
    trained = [{stage.train for stage in plan[:i]} for i in range(len(plan))]
    return [
        stage.objective == "distillation" and (stage.train == "full" or not before <= {"kernel"})
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
    """What a stage takes.

    Args:
        model: with its kernels, on the meta device.
        width: bytes of a number of the base weights.
        teacher_copy: whether a second, frozen model is in memory.
        processes: that share the rows of a step.
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
    )


def _activations(model: PreTrainedModel, kernel: Kernel, layers: Layers, stage: Stage, tokens: int, width: int) -> int:
    """Bytes of a forward pass over so many tokens."""
    config: Any = model.config.get_text_config()
    depth = getattr(config, "num_hidden_layers", len(layers.layers))
    vocabulary = config.vocab_size if generates(model) else 0
    of_kernel = int(4 * BACKWARD * tokens * _kernel_numbers(kernel, layers))
    if stage.objective == "attention_transfer":
        return of_kernel
    cuda = torch.cuda.is_available()  # where the Trainer computes in bfloat16 and checkpoints activations
    width = 2 if cuda else 4 if stage.train == "full" else width
    projections = width * sum(sum(_features(m)) for name, m in model.named_modules() if "." in name)
    projections = int(projections * tokens * (1 if stage.train == "full" else FROZEN))
    if cuda:
        projections = int(tokens * depth * width * config.hidden_size + BACKWARD * projections / depth)
    chunk = max(CHUNK_ELEMENTS["cuda" if cuda else "cpu"], LEAST_ROWS * vocabulary)
    logits = 4 * LOGIT_COPIES[stage.objective] * min(tokens * vocabulary, chunk)
    return projections + max(of_kernel, logits)


def _kernel_numbers(kernel: Kernel, layers: Layers) -> int:
    """What autograd keeps of a layer's kernel for a token, as numbers: the tensors of `feature_map`, `state` and
    `kernel` (without a window `linear`), counted; of the layer with the largest memory."""
    query, key, value, dim = layers.heads, layers.kv_heads, layers.value_dim, layers.head_dim
    if kernel.decay == "retnet":
        key = query
    features = dim * (2 if kernel.signed else 1) if kernel.far else 0
    memory = max((sum(heads) // len(heads) for heads in layers.memory), default=kernel.memory)
    exact = kernel.sinks + memory + kernel.window + kernel.block if kernel.window else 0
    # Of a query: its weights and what they are of, itself, and its features.
    numbers = query * (exact + 2 * features + 3 * dim + 2 * value)
    # Of a key: features, their logarithms and decays; of a block: the rows that it reads, and the state.
    numbers += key * (6 * features + 2 * dim + 2 * value)
    numbers += key * (exact * (dim + value) + 5 * features * value) // kernel.block
    if not kernel.window:
        numbers += query * (4 * kernel.block + 3 * features)
    return numbers + (4 * query * value if kernel.gate else 0)


def _features(module: nn.Module) -> tuple[int, int]:
    """Numbers in and out of a linear layer; none for other modules."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return tuple(module.weight.shape) if isinstance(module, Conv1D) else (0, 0)  # type: ignore[return-value]


def free_memory() -> int:
    """Bytes: of the GPU where there is one, else what the machine can give without swapping."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available


def warning(costs: Sequence[StageCost], free: int) -> str | None:
    """One line where a stage won't fit in ``free`` bytes, with what would help."""
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
    """As many figures as an estimate has: 45 s, 12 min, 3.5 h."""
    if seconds < 99:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def told(costs: Sequence[StageCost], free: int) -> Iterator[str]:
    """The plan for a person, a line a stage, with a warning where it won't fit in ``free`` bytes."""
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
