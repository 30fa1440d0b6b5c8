"""Compares a model's distribution of the next token with its original's, by position.

`likeness` does it for models that predict no next token.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data.rows import Rows
from ..progress import count_bar
from ..training.logits import head, hidden_states, parts

BATCH_TOKENS = 4096  # most tokens of a forward pass, unless one row has more


@torch.no_grad()
def measure(model: PreTrainedModel, rows: Rows, other: PreTrainedModel | None) -> dict[str, Tensor]:
    """Sums over rows at each position, [seq_len − 1] each. Padding, on the right, does not count.

    The sums are "count", of predicted tokens; "loss" of the model and "baseline_loss" of ``other``, in nats; "kl",
    KL(other ‖ model) in nats; and "agreement", of tokens for which both have the same first choice. Without ``other``
    the last three are 0. As in training, logits are never in memory all at once.
    """
    length = rows.ids.shape[1]
    names = ("loss", "count", "baseline_loss", "kl", "agreement")
    totals = {name: torch.zeros(length - 1, dtype=torch.float64) for name in names}
    size = max(BATCH_TOKENS // length, 1)
    with count_bar("evaluating (rows)", len(rows)) as advance:
        for ids, mask in zip(rows.ids.split(size), rows.mask.split(size), strict=True):
            ids, real = ids.to(model.device, torch.long), mask[:, 1:].to(model.device).bool()
            targets, positions = ids[:, 1:][real], real.nonzero()[:, 1].cpu()
            hidden = [
                hidden_states(each, input_ids=ids, use_cache=False)[:, :-1][real]
                for each in (model, other)
                if each is not None
            ]
            for part in parts(model, hidden[0]):
                log_p = head(model, hidden[0][part]).float().log_softmax(-1)
                chosen = targets[part, None]
                found = {"loss": -log_p.gather(-1, chosen)[:, 0], "count": torch.ones(len(chosen))}
                if other is not None:
                    log_q = head(other, hidden[1][part]).float().log_softmax(-1)
                    found["baseline_loss"] = -log_q.gather(-1, chosen)[:, 0]
                    found["agreement"] = (log_p.argmax(-1) == log_q.argmax(-1)).float()
                    found["kl"] = torch.linalg.vecdot(log_q.exp(), log_q - log_p)
                for name, value in found.items():
                    totals[name].index_add_(0, positions[part], value.double().cpu())
            advance(len(ids))
    return totals
