"""Stage 2 for models that predict no next token, encoders most of all: the same hidden states, the same embeddings."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_transfer import normalized_error
from .logits import hidden_states, tokens


def output_loss(
    student: Any,
    teacher: Any,
    inputs: dict[str, Any],
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """The normalised squared error of the last hidden states, and 1 − cosine of the embeddings they make, averaged over
    rows. ``within`` makes ``teacher`` the original, where it is the student otherwise."""
    real = inputs.get("attention_mask")
    with torch.no_grad(), within():
        target = hidden_states(teacher, **tokens(inputs))
    found = hidden_states(student, **tokens(inputs))
    error = normalized_error(found[:, :, None], target[:, :, None], real)
    return error + (1 - embedding_cosine(found, target, real)).mean()


def embedding(hidden: Tensor, real: Tensor | None) -> Tensor:
    """The mean of hidden states [B, N, hidden] over the tokens that ``real`` [B, N] marks, [B, hidden]."""
    if real is None:
        return hidden.float().mean(1)
    mask = real[..., None].float()
    return (hidden.float() * mask).sum(1) / mask.sum(1).clamp_min(1)


def embedding_cosine(found: Tensor, target: Tensor, real: Tensor | None) -> Tensor:
    """Of both models' embeddings, [B]."""
    return F.cosine_similarity(embedding(found, real), embedding(target, real), dim=-1)
