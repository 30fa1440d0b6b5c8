"""Stage 1, attention transfer: every layer learns to give what its softmax attention gives.

Both are computed on the same q, k, v; the softmax output is passed on, so that each layer sees the original's input
and all learn at once, independently. Only the kernel's parameters train.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ..modeling.modeling_dijiang import dijiang_attention, dijiang_mask, softmax_attention

NAME = "dijiang_transfer"
_LOSSES: ContextVar[list[Tensor] | None] = ContextVar("losses", default=None)
_NOTE: ContextVar[Callable[[Tensor], None] | None] = ContextVar("note", default=None)


def transfer_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Softmax attention that notes how far the module's kernel is from it."""
    call = kwargs.pop("dijiang", None)
    with torch.no_grad():
        target, _ = softmax_attention(module, query, key, value, attention_mask, **kwargs)
    losses = _LOSSES.get()
    if losses is not None and hasattr(module, "dijiang"):
        output, _ = dijiang_attention(module, query, key, value, attention_mask, dijiang=call, **kwargs)
        losses.append(normalized_error(output, target, attention_mask))
    return target, None


def normalized_error(output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """‖o − ô‖² / ‖ô‖² a head over all real tokens, averaged over heads. Shapes [B, N, H, V], mask [B, N]."""
    output, target = output.float(), target.float()
    if mask is not None:
        real = mask[:, -output.shape[1] :, None, None]
        output, target = output * real, target * real
    error = (output - target).square().sum((0, 1, 3))
    return (error / target.square().sum((0, 1, 3)).clamp_min(1e-12)).mean()


def attention_transfer_loss(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """The mean over layers of `normalized_error`. The model must be `transferring`."""
    losses: list[Tensor] = []
    token = _LOSSES.set(losses)
    try:
        model(input_ids=inputs["input_ids"], attention_mask=inputs.get("attention_mask"), use_cache=False)
    finally:
        _LOSSES.reset(token)
    errors, note = torch.stack(losses), _NOTE.get()
    if note is not None:
        note(errors.detach())
    return errors.mean()


@contextmanager
def transferring(model: PreTrainedModel, note: Callable[[Tensor], None] | None = None) -> Iterator[None]:
    """Inside, the model computes softmax attention and its kernels' error. ``note`` gets that of every layer
    [layers], once a batch."""
    token = _NOTE.set(note)
    try:
        with attention(model, NAME):
            yield
    finally:
        _NOTE.reset(token)


@contextmanager
def attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Inside, the model runs another attention function: "sdpa" makes it the softmax model its base weights are."""
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


AttentionInterface.register(NAME, transfer_attention)
AttentionMaskInterface.register(NAME, dijiang_mask)
