"""Stage 1, attention transfer: every layer learns to give what its softmax attention gives.

Both are computed on the same q, k, v; the softmax output is passed on, so that each layer sees the original's input
and all learn at once, independently. Only the kernel's parameters train.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ..modeling.interface import dijiang_attention, dijiang_mask, softmax_attention
from .attention import attention
from .gradients import gradients, with_gradients
from .logits import hidden_states, tokens

NAME = "dijiang_transfer"


class _Collected(NamedTuple):
    """One number a converted layer, and which tokens [B, N] are real. (Padding is on the right, so that the causal
    model needs no mask for it, and rows may be packed.)"""

    losses: list[Tensor]
    real: Tensor | None


_COLLECTED: ContextVar[_Collected | None] = ContextVar("collected", default=None)
_NOTE: ContextVar[Callable[[Tensor], None] | None] = ContextVar("note", default=None)


def transfer_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Softmax attention that notes how far the module's kernel is from it.

    The error's gradient is computed here too, so that only one layer's graph is alive at a time.
    """
    call = kwargs.pop("dijiang", None)
    with torch.no_grad():
        target, _ = softmax_attention(module, query, key, value, attention_mask, **kwargs)
    collected = _COLLECTED.get()
    if collected is not None and hasattr(module, "dijiang"):
        output, _ = dijiang_attention(module, query, key, value, attention_mask, dijiang=call, **kwargs)
        loss = normalized_error(output, target, collected.real)
        if loss.requires_grad:
            parameters = [p for p in module.dijiang.parameters() if p.requires_grad]  # type: ignore[union-attr]
            loss = with_gradients(loss.detach(), parameters, gradients(loss, parameters))
        collected.losses.append(loss)
    return target, None


def normalized_error(output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """‖o − ô‖² / ‖ô‖² a head and row over all real tokens, averaged over both. Shapes [B, N, H, V], mask [B, N].

    A row by itself: so the mean over a batch is the same however the batch is divided.
    """
    output, target = output.float(), target.float()
    if mask is not None:
        real = mask[..., None, None]
        output, target = output * real, target * real
    error = (output - target).square().sum((1, 3))
    return (error / target.square().sum((1, 3)).clamp_min(1e-12)).mean()


def attention_transfer_loss(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """The mean over layers of `normalized_error`. The model must be `transferring`, its base frozen."""
    collected = _Collected([], inputs.get("attention_mask"))
    model.eval()  # the original's dropout is no part of what there is to learn
    token = _COLLECTED.set(collected)
    try:
        hidden_states(model, **tokens(inputs))
    finally:
        _COLLECTED.reset(token)
    errors, note = torch.stack(collected.losses), _NOTE.get()
    if note is not None and torch.is_grad_enabled():
        note(errors.detach())
    return errors.mean()


@contextmanager
def transferring(model: PreTrainedModel, note: Callable[[Tensor], None] | None = None) -> Iterator[None]:
    """Inside, the model computes softmax attention and its kernels' error. ``note`` gets that of every layer
    [layers], once a batch that is trained on."""
    token = _NOTE.set(note)
    try:
        with attention(model, NAME):
            yield
    finally:
        _NOTE.reset(token)


AttentionInterface.register(NAME, transfer_attention)
AttentionMaskInterface.register(NAME, dijiang_mask)
