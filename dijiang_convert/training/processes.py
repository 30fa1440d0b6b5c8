"""Training in several processes: what `accelerate launch` sets up, and what a converted model needs besides.

Data parallelism (DDP) copies the model; FSDP2 shards it. Under FSDP2 the kernels stay whole on every process, for three
reasons: they are small; they compute in float32, and FSDP2's mixed precision would cast what it shards; and attention
transfer takes their gradients outside of any sharded module's backward pass. This module averages the kernels'
gradients over the processes.
"""

import os
from collections.abc import Callable, Iterable

import torch
import torch.distributed
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import fsdp2_prepare_model, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import PreTrainedModel

from ..errors import DijiangError

KERNELS = r".*\.dijiang"  # regular expression of the kernels' module names


def start() -> PartialState:
    """Joins the processes that `accelerate launch` has started. Without a GPU they train on CPUs.

    Raises DijiangError where the launch asks for something that is not supported.
    """
    for name in ("DeepSpeed", "Megatron-LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name.upper().replace('-', '_')}"):
            raise DijiangError(f"the launch asks for {name}: use DDP or FSDP2")
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise DijiangError("the launch asks for FSDP 1: set fsdp_version: 2 in its configuration")
        if parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):
            raise DijiangError("every process loads its own kernels: set fsdp_cpu_ram_efficient_loading: false")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    here = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if here.num_processes != launched:
        raise DijiangError(f"{launched} processes were launched and {here.num_processes} can work together here")
    return here


def is_sharded() -> bool:
    """Whether the launch asks for FSDP, with which no process holds the whole model in training."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def keep_kernels_whole(accelerator: Accelerator) -> None:
    """Keeps FSDP2 from sharding kernels, and lets it reduce gradients in float32. Call it before preparing a model."""
    if accelerator.is_fsdp2:
        plugin = accelerator.state.fsdp_plugin
        plugin.ignored_modules = KERNELS
        if accelerator.mixed_precision == "bf16":
            plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)


def prepare_teacher(accelerator: Accelerator, teacher: PreTrainedModel) -> PreTrainedModel:
    """Places a frozen second model: sharded under FSDP2, else whole on the device of each process."""
    return fsdp2_prepare_model(accelerator, teacher) if accelerator.is_fsdp2 else teacher.to(accelerator.device)


def average_whole_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Averages over processes the gradients of unsharded parameters, which FSDP2 does not reduce."""
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    if gradients:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        for gradient, averaged in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(averaged.view_as(gradient))


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of all gradients, over the shards of all processes. No gradient is changed."""
    norms = []
    for part in _by_sharding(parameters):
        norm = get_total_norm([p.grad for p in part if p.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, longest: float) -> None:
    """Scales gradients, whose norm is ``norm``, down to a norm of at most ``longest``."""
    for part in _by_sharding(parameters):
        clip_grads_with_norm_(part, longest, norm)


def _by_sharding(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters with a gradient, sharded and whole ones apart: one operation of torch can't take both."""
    trained = [p for p in parameters if p.grad is not None]
    parts = [[p for p in trained if isinstance(p.grad, DTensor) is sharded] for sharded in (True, False)]
    return [part for part in parts if part]


def gather(accelerator: Accelerator, wrapped: nn.Module, build: Callable[[], nn.Module]) -> nn.Module | None:
    """The sharded model in one piece, on the main process's CPU; None on the other processes.

    build: returns the same model, unsharded, to load the weights into. The main process alone calls it.
    """
    state = accelerator.get_state_dict(wrapped)
    if not accelerator.is_main_process:
        return None
    model = build()
    model.load_state_dict(state)
    return model


def supported(accelerator: Accelerator) -> bool:
    """Whether this can train: one process, DDP on any device, or the FSDP2 that the launch asks for.

    A launch that asks for sharding and does not get it is not supported: it would run as DDP without a word.
    """
    kind = accelerator.distributed_type
    if is_sharded():
        return kind == DistributedType.FSDP
    return kind == DistributedType.NO or kind.startswith("MULTI_")
