"""The objective distillation for models that predict no next token, such as encoders.

They learn the original's last hidden states, and the embeddings that these make; `logits` is for all other models.

Shape legend: B batch, N tokens.
"""

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
    """`normalized_error` of the last hidden states plus 1 − `embedding_cosine`, averaged over rows.

    inputs: a batch of an encoder's `Rows`, or of `Images`.
    within: a context in which ``teacher`` is the original, where it is the student otherwise.
    """
    real = inputs.get("attention_mask")
    with torch.no_grad(), within():
        target = hidden_states(teacher, **tokens(inputs))
    found = hidden_states(student, **tokens(inputs))
    error = normalized_error(found[:, :, None], target[:, :, None], real)
    return error + (1 - embedding_cosine(found, target, real)).mean()


def embedding(hidden: Tensor, real: Tensor | None) -> Tensor:
    """The mean of the hidden states over real tokens, [B, hidden].

    hidden: [B, N, hidden] hidden states.
    real: [B, N], 1 for real tokens, or None if all are.
    """
    if real is None:
        return hidden.float().mean(1)
    mask = real[..., None].float()
    return (hidden.float() * mask).sum(1) / mask.sum(1).clamp_min(1)


def embedding_cosine(found: Tensor, target: Tensor, real: Tensor | None) -> Tensor:
    """The cosine of two models' embeddings, [B].

    found, target: [B, N, hidden] hidden states.
    real: [B, N], 1 for real tokens, or None if all are.
    """
    return F.cosine_similarity(embedding(found, real), embedding(target, real), dim=-1)
