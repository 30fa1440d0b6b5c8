"""Compares a model that predicts no next token (an encoder, or a decoder without a head) with its original.

`fidelity` does it for models that predict the next token.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..data.images import Images
from ..data.rows import Rows
from ..progress import count_bar
from ..training.logits import body
from ..training.outputs import embedding_cosine

BATCH_TOKENS = 4096  # most tokens of a forward pass, unless one row has more


@dataclass(frozen=True)
class Likeness:
    """How similar the outputs of two models are.

    hidden_error: squared error of the last hidden states over the squared norm of the other model's.
    hidden_cosine: cosine of a token's hidden states, averaged over tokens.
    embedding_cosine: cosine of a text's mean hidden states, averaged over texts.
    top1_agreement: share of tokens (for a classifier, of texts) for which both heads have the same first choice; None
        without a head.
    """

    hidden_error: float
    hidden_cosine: float
    embedding_cosine: float
    top1_agreement: float | None = None


@torch.no_grad()
def likeness(model: PreTrainedModel, other: PreTrainedModel, rows: Rows | Images) -> Likeness:
    """Compares the last hidden states of two models on an encoder's rows or on images, and their heads' choices."""
    sums = defaultdict[str, float](float)
    with count_bar("comparing (rows)", len(rows)) as advance:
        for inputs in _batches(rows, model.device):
            (hidden, chosen), (target, wanted) = (_outputs(each, inputs) for each in (model, other))
            mask = inputs.get("attention_mask")
            real = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device) if mask is None else mask.bool()
            a, b = hidden[real], target[real]
            sums["error"] += (a - b).square().sum().item()
            sums["norm"] += b.square().sum().item()
            sums["cosine"] += F.cosine_similarity(a, b, dim=-1).sum().item()
            sums["embedding"] += embedding_cosine(hidden, target, real).sum().item()
            if chosen is not None and wanted is not None:
                same = (chosen == wanted)[real] if chosen.dim() == 2 else chosen == wanted
                sums["same"] += same.sum().item()
                sums["choices"] += same.numel()
            sums["tokens"] += len(a)
            sums["texts"] += len(hidden)
            advance(len(hidden))
    return Likeness(
        hidden_error=sums["error"] / sums["norm"],
        hidden_cosine=sums["cosine"] / sums["tokens"],
        embedding_cosine=sums["embedding"] / sums["texts"],
        top1_agreement=sums["same"] / sums["choices"] if sums["choices"] else None,
    )


def _batches(rows: Rows | Images, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """The rows or images in batches of about `BATCH_TOKENS` tokens."""
    size = max(BATCH_TOKENS * len(rows) // max(rows.tokens, 1), 1)
    for start in range(0, len(rows), size):
        items = [rows[i] for i in range(start, min(start + size, len(rows)))]
        yield {name: torch.stack([item[name] for item in items]).to(device) for name in items[0]}


def _outputs(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """The last hidden states [B, N, hidden], and the head's first choice for each token [B, N] or text [B], if any."""
    found: list[Any] = []
    handle = body(model).register_forward_hook(lambda module, args, output: found.append(output.last_hidden_state))
    try:
        logits = getattr(model(**inputs), "logits", None)
    finally:
        handle.remove()
    return found[0].float(), None if logits is None else logits.argmax(-1)
