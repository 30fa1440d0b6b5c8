"""How near a model's distribution of the next token is to its original's, by position."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data.rows import Rows
from ..progress import count_bar

BATCH_TOKENS = 4096


@torch.no_grad()
def measure(model: PreTrainedModel, rows: Rows, other: PreTrainedModel | None) -> dict[str, Tensor]:
    """Sums over rows, by position: each value is [seq_len − 1]. Padding, on the right, does not count."""
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
