"""The objective attention transfer: every converted layer learns the output of its softmax attention.

A layer computes both attentions from the same queries, keys and values, and passes the softmax output on. So every
layer sees the original's inputs, and all layers learn in one forward pass, independently of each other. Only the
kernels' parameters train. The model's next-token loss plays no part here; that is `logits`.

Shape legend: B batch, H query heads, G key/value heads, N tokens, D head_dim, V value head_dim.
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
    """What one forward pass collects.

    losses: a scalar for each converted layer so far.
    real: [B, N], 1 for real tokens, or None if all are. Causal models get no such mask: their padding is on the right.
    """

    losses: list[Tensor]
    real: Tensor | None


_COLLECTED: ContextVar[_Collected | None] = ContextVar("collected", default=None)
_NOTE: ContextVar[Callable[[Tensor], None] | None] = ContextVar("note", default=None)


def transfer_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Softmax attention that also collects the error of the module's kernel, if the module has one.

    The error's gradient is computed here as well, so that only one layer's graph is alive at a time. Arguments and
    result are those of `dijiang_attention`.
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
    """‖output − target‖² / ‖target‖², taken over the real tokens of each row and head, then averaged over both.

    Every row is divided by its own norm, so the mean over a batch does not depend on how the batch is divided.

    output, target: [B, N, H, V] outputs of attention.
    mask: [B, N], 1 for real tokens, or None if all are.
    """
    output, target = output.float(), target.float()
    if mask is not None:
        real = mask[..., None, None]
        output, target = output * real, target * real
    error = (output - target).square().sum((1, 3))
    return (error / target.square().sum((1, 3)).clamp_min(1e-12)).mean()


def attention_transfer_loss(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """The mean over converted layers of `normalized_error`. The model must be `transferring`, its base frozen.

    inputs: a batch of items of `Rows` or `Images`.
    """
    collected = _Collected([], inputs.get("attention_mask"))
    model.eval()  # dropout would disturb the softmax output that kernels learn
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
    """Inside the context, the model computes softmax attention and collects the error of its kernels.

    note: is called after each batch that is trained on, with [layers], the error of every converted layer.
    """
    token = _NOTE.set(note)
    try:
        with attention(model, NAME):
            yield
    finally:
        _NOTE.reset(token)


AttentionInterface.register(NAME, transfer_attention)
AttentionMaskInterface.register(NAME, dijiang_mask)
