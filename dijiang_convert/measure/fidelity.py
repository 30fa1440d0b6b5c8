"""Compares a model's distribution of the next token with its original's, by position.

`likeness` does it for models that predict no next token.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data.rows import Rows
from ..progress import count_bar

BATCH_TOKENS = 4096  # most tokens of a forward pass, unless one row has more


@torch.no_grad()
def measure(model: PreTrainedModel, rows: Rows, other: PreTrainedModel | None) -> dict[str, Tensor]:
    """Sums over rows at each position, [seq_len − 1] each. Padding, on the right, does not count.

    The sums are "count", of predicted tokens; "loss" of the model and "baseline_loss" of ``other``, in nats; "kl",
    KL(other ‖ model) in nats; and "agreement", of tokens for which both have the same first choice. Without ``other``
    the last three are 0.
    """
    length = rows.ids.shape[1]
    names = ("loss", "count", "baseline_loss", "kl", "agreement")
    totals = {name: torch.zeros(length - 1, dtype=torch.float64) for name in names}
    size = max(BATCH_TOKENS // length, 1)
    with count_bar("evaluating (rows)", len(rows)) as advance:
        for ids, mask in zip(rows.ids.split(size), rows.mask.split(size), strict=True):
            ids, real = ids.to(model.device, torch.long), mask[:, 1:].to(model.device)
            log_p = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            found = {"loss": -log_p.gather(-1, ids[:, 1:, None])[..., 0], "count": torch.ones_like(log_p[..., 0])}
            if other is not None:
                log_q = other(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
                found["baseline_loss"] = -log_q.gather(-1, ids[:, 1:, None])[..., 0]
                found["kl"] = (log_q.exp() * (log_q - log_p)).sum(-1)
                found["agreement"] = (log_p.argmax(-1) == log_q.argmax(-1)).float()
            for name, value in found.items():
                totals[name] += (value * real).double().sum(0).cpu()
            advance(len(ids))
    return totals
