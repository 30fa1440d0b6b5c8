"""What the lab measures, against the softmax model: predictions, recall from afar, and each layer's own error."""

import math
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from dijiang_convert.data.rows import Rows
from dijiang_convert.measure.fidelity import measure
from dijiang_convert.modeling.interface import dijiang_attention, dijiang_mask, softmax_attention
from dijiang_convert.training.attention_transfer import attention, normalized_error


@torch.no_grad()
def fidelity(model: Any, rows: Rows, original: Any) -> dict[str, Any]:
    """Perplexity, its ratio to the original's (by eighths of a row too), KL(original ‖ model) a token, and how often
    both choose the same token."""
    totals = measure(model.eval(), rows, original)
    count = totals["count"].sum()
    loss, base = float(totals["loss"].sum() / count), float(totals["baseline_loss"].sum() / count)
    parts = [(totals["loss"] - totals["baseline_loss"]), totals["kl"], totals["count"]]
    difference, kl, number = (part.tensor_split(8) for part in parts)
    filled = [i for i in range(8) if number[i].sum() > 0]
    return {
        "perplexity": math.exp(loss),
        "original": math.exp(base),
        "ratio": math.exp(loss - base),
        "kl": float(totals["kl"].sum() / count),
        "top1": float(totals["agreement"].sum() / count),
        "ratio_by_position": [math.exp(difference[i].sum() / number[i].sum()) for i in filled],
        "kl_by_position": [float(kl[i].sum() / number[i].sum()) for i in filled],
    }


def transfer_errors(model: Any, rows: Rows, batch: int = 8) -> list[float]:
    """‖o − ô‖² / ‖ô‖² of each converted layer on the original's q, k, v; empty where nothing is converted."""
    errors: list[float] = []

    def compare(module: Any, *tensors: Any, dijiang: Any = None, **kwargs: Any) -> tuple[Tensor, None]:
        target, _ = softmax_attention(module, *tensors, **kwargs)
        if hasattr(module, "dijiang"):
            output, _ = dijiang_attention(module, *tensors, dijiang=dijiang, **kwargs)
            errors.append(float(normalized_error(output, target)))
        return target, None

    AttentionInterface.register("dijiang_compare", compare)
    AttentionMaskInterface.register("dijiang_compare", dijiang_mask)
    full = rows.ids[rows.lengths == rows.ids.shape[1]]
    with torch.no_grad(), attention(model.eval(), "dijiang_compare"):
        model(input_ids=full[:batch].long(), use_cache=False)
    return errors


@torch.no_grad()
def planted_pairs(model: Any, rows: Rows, distances: list[int], samples: int = 100) -> dict[str, dict[str, float]]:
    """Whether a pair of tokens planted ``distance`` tokens ago is remembered: "… a b … a" should go on with b.

    The pairs are drawn from the corpus' own tokens and planted into its text. By distance: accuracy (b is the first
    choice) and gain (how much likelier than without the plant b became, in nats).
    """
    generator = torch.Generator().manual_seed(0)
    full = rows.ids[rows.lengths == rows.ids.shape[1]]
    full = full[torch.randint(len(full), (samples,), generator=generator)].long()
    pool = torch.tensor(sorted(set(rows.ids[rows.mask.bool()].tolist())))
    pairs = pool[torch.randint(len(pool), (2, samples), generator=generator)]
    plain = full.clone()
    plain[:, -1] = pairs[0]
    log_plain = _last(model, plain)
    result = {}
    for distance in distances:
        if distance + 8 > full.shape[1]:
            continue
        planted = plain.clone()
        planted[:, -1 - distance], planted[:, -distance] = pairs[0], pairs[1]
        log_p = _last(model, planted)
        gain = (log_p - log_plain).gather(1, pairs[1][:, None]).mean()
        result[str(distance)] = {
            "accuracy": float((log_p.argmax(-1) == pairs[1]).float().mean()),
            "gain": float(gain),
        }
    return result


def _last(model: Any, ids: Tensor) -> Tensor:
    """Log-probabilities of what follows each row."""
    pieces = [model(input_ids=part, use_cache=False).logits[:, -1].float() for part in ids.split(32)]
    return torch.cat(pieces).log_softmax(-1)
