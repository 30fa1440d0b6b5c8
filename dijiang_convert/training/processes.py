"""Several processes: what `accelerate launch` sets up, and what a converted model needs of it.

Data parallelism (DDP) copies the model; FSDP2 and DeepSpeed ZeRO-3 shard it. Under FSDP2 the kernels stay whole on
every process: they are small, they must compute in float32 where the policy casts all it shards, and attention
transfer asks for their gradients outside of any sharded module's backward pass. Their gradients are averaged here.
"""

import importlib.util
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

KERNELS = r".*\.dijiang"


def start() -> PartialState:
    """Joins the processes that were launched together; without a GPU they train on CPUs.

    Raises DijiangError for what `accelerate launch` was asked for and can't be had here.
    """
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and importlib.util.find_spec("deepspeed") is None:
        raise DijiangError("the launch asks for DeepSpeed, which is not installed: pip install deepspeed, or use FSDP2")
    if parse_flag_from_env("ACCELERATE_USE_MEGATRON_LM"):
        raise DijiangError("the launch asks for Megatron-LM: use DDP, FSDP2 or DeepSpeed")
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
    """Whether no process will hold the whole model while it trains."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP") or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")


def keep_kernels_whole(accelerator: Accelerator) -> None:
    """Before a model is prepared. Gradients of what is sharded are added up in float32."""
    if accelerator.is_fsdp2:
        plugin = accelerator.state.fsdp_plugin
        plugin.ignored_modules = KERNELS
        if accelerator.mixed_precision == "bf16":
            plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)


def prepare_teacher(accelerator: Accelerator, teacher: PreTrainedModel) -> PreTrainedModel:
    """A frozen second model, sharded like the one that trains under FSDP2, else whole on every device."""
    return fsdp2_prepare_model(accelerator, teacher) if accelerator.is_fsdp2 else teacher.to(accelerator.device)


def average_whole_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Averages over processes the gradients that FSDP2 leaves alone."""
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    if gradients:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        for gradient, averaged in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(averaged.view_as(gradient))


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of all gradients of all processes' shards; nothing is changed."""
    norms = []
    for part in _by_sharding(parameters):
        norm = get_total_norm([p.grad for p in part if p.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, longest: float) -> None:
    """Shortens gradients of that norm to ``longest``."""
    for part in _by_sharding(parameters):
        clip_grads_with_norm_(part, longest, norm)


def _by_sharding(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters with a gradient, sharded and whole ones apart: one operation can't take both."""
    trained = [p for p in parameters if p.grad is not None]
    parts = [[p for p in trained if isinstance(p.grad, DTensor) is sharded] for sharded in (True, False)]
    return [part for part in parts if part]


def gather(accelerator: Accelerator, wrapped: nn.Module, build: Callable[[], nn.Module]) -> nn.Module | None:
    """The sharded model in one piece, on the main process' CPU; None on the others.

    build: makes the same model anew, unsharded; called on the main process alone.
    """
    state = accelerator.get_state_dict(wrapped)
    if not accelerator.is_main_process:
        return None
    model = build()
    model.load_state_dict(state)
    return model


def supported(accelerator: Accelerator) -> bool:
    """DDP on any device, FSDP2, DeepSpeed, or one process; and what was asked for, or it would be DDP in silence."""
    kind = accelerator.distributed_type
    if is_sharded():
        return kind in (DistributedType.DEEPSPEED, DistributedType.FSDP)
    return kind == DistributedType.NO or kind.startswith("MULTI_")
