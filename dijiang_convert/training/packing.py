"""Checks that a model keeps the documents of a packed row apart. Training on packed rows relies on it."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import DijiangError

DOCUMENT = 8  # tokens of each document in the rows that are tried
# Logits may differ by this many of their standard deviations. Half precision rounds by far less, and a model that sees
# the other document gives logits that differ by far more.
TOLERANCE = 0.02


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Runs two rows that end in the same document, after different ones: they must end in the same logits.

    Raises DijiangError if they don't. Some architectures give positions to no mask (OPT, in layers that are not
    converted), others mix tokens outside of attention.
    """
    training = model.training
    model.eval()
    try:
        logits: Tensor = model(**_rows(model.device), use_cache=False).logits[:, DOCUMENT:].float()
    finally:
        model.train(training)
    if (logits[0] - logits[1]).abs().max() > TOLERANCE * logits.std():
        raise DijiangError(
            f"{model.config.model_type} lets documents of a packed row see each other: put one document in a row"
        )


def _rows(device: torch.device) -> dict[str, Tensor]:
    first, second, common = torch.arange(3, 3 + 3 * DOCUMENT, device=device).unflatten(0, (3, DOCUMENT))
    ids = torch.stack([torch.cat([first, common]), torch.cat([second, common])])
    return {"input_ids": ids, "position_ids": torch.arange(DOCUMENT, device=device).repeat(2, 2)}
