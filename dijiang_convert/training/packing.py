"""Whether a model keeps the documents of a packed row apart: what training on such rows relies on."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import DijiangError

DOCUMENT = 8  # tokens of each of the two documents tried
TOLERANCE = 0.02  # of the spread of logits: far above rounding in half precision, far below what a text does


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Tries it: two rows that end in the same document must end in the same logits, whatever came before.

    Raises DijiangError where they don't: some architectures hand positions to no mask (opt, where it is not converted),
    others mix tokens outside of attention.
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
