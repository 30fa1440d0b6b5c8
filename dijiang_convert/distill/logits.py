"""Stage 2, logit distillation: the whole model learns the softmax model's distribution of the next token."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def kl_divergence(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """KL(teacher ‖ student) a token, averaged over those that ``mask`` [B, N] marks. Logits [B, N, vocabulary]."""
    real = mask.bool()
    log_p, log_q = student[real].float().log_softmax(-1), teacher[real].float().log_softmax(-1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def cross_entropy(logits: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
    """Next-token loss, averaged over the targets that ``mask`` marks. Logits [B, N, vocabulary], input_ids and mask [B, N]."""
    real = mask[:, 1:].bool()
    return F.cross_entropy(logits[:, :-1][real].float(), input_ids[:, 1:][real])


def distillation_loss(student: Any, teacher: Any, inputs: dict[str, Any], cross_entropy_weight: float) -> Tensor:
    """KL to the teacher's logits, with a share of next-token loss mixed in. ``teacher`` gives logits for ``tokens``.

    Both judge the prediction of every target that loss_mask marks.
    """
    input_ids, mask = inputs["input_ids"], inputs["loss_mask"]
    with torch.no_grad():
        target = teacher(**tokens(inputs))
    logits = student(**tokens(inputs)).logits
    loss = kl_divergence(logits[:, :-1], target[:, :-1], mask[:, 1:])
    if cross_entropy_weight:
        loss = (1 - cross_entropy_weight) * loss + cross_entropy_weight * cross_entropy(logits, input_ids, mask)
    return loss


def tokens(inputs: dict[str, Any]) -> dict[str, Any]:
    """What of a batch the model gets. Padding is on the right: causal models need no mask for it, only losses do."""
    return {"input_ids": inputs["input_ids"], "position_ids": inputs["position_ids"], "use_cache": False}


def cross_entropy_loss(student: Any, inputs: dict[str, Any]) -> Tensor:
    """Plain language modelling."""
    logits = student(**tokens(inputs)).logits
    return cross_entropy(logits, inputs["input_ids"], inputs["loss_mask"])
