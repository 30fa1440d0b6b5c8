"""Stage 2, logit distillation: the whole model learns the softmax model's distribution of the next token."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) a token, averaged. Logits [B, N, vocabulary]."""
    student, teacher = student.float().flatten(0, 1), teacher.float().flatten(0, 1)
    loss = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True)
    return loss / student.shape[0]


def cross_entropy(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Next-token loss, averaged. Logits [B, N, vocabulary], input_ids [B, N]."""
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), input_ids[:, 1:].flatten())


def distillation_loss(student: Any, teacher: Any, inputs: dict[str, Any], cross_entropy_weight: float) -> Tensor:
    """KL to the teacher's logits, with a share of next-token loss mixed in. ``teacher(input_ids)`` gives logits."""
    input_ids = inputs["input_ids"]
    with torch.no_grad():
        target = teacher(input_ids)
    logits = student(input_ids=input_ids, use_cache=False).logits
    loss = kl_divergence(logits, target)
    if cross_entropy_weight:
        loss = (1 - cross_entropy_weight) * loss + cross_entropy_weight * cross_entropy(logits, input_ids)
    return loss
