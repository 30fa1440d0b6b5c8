"""Measures how well a model repeats what it has read: `dijiang eval --recall`.

A passage of random tokens is put into a text, and the same passage again at the end. How much likelier the second
becomes through the first is what the model remembers. A model that copies perfectly makes every token certain.
"""

from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ..progress import count_bar

PASSAGE = 32  # tokens of the passage
DISTANCES = (256, 1024, 1900, 4000, 7500)  # tokens from a passage to its repetition
TEXTS = 8  # texts that `dijiang eval` measures at most


@dataclass(frozen=True)
class Recall:
    """gain: nats per token by which the passage becomes likelier. accuracy: share of its tokens that are the
    model's first choice."""

    gain: float
    accuracy: float


@torch.no_grad()
def recall(model: Any, texts: Tensor) -> dict[int, Recall]:
    """The recall at each of `DISTANCES` that fits into the texts.

    texts: [n, N], token ids without padding.
    """
    texts = texts.long()
    length, generator = texts.shape[1], torch.Generator().manual_seed(0)
    known = texts.unique()
    distances = [distance for distance in DISTANCES if distance + PASSAGE <= length]
    if not distances:
        return {}
    gains: dict[int, list[float]] = {distance: [] for distance in distances}
    right: dict[int, list[float]] = {distance: [] for distance in distances}
    with count_bar("recall (texts)", len(texts) * (1 + len(distances))) as advance:
        for text in texts:
            passage = known[torch.randint(len(known), (PASSAGE,), generator=generator)]
            without = torch.cat([text[:-PASSAGE], passage])
            before = _predict_passage(model, without).gather(1, passage[:, None]).mean()
            advance(1)
            for distance in distances:
                planted, start = without.clone(), length - PASSAGE - distance
                planted[start : start + PASSAGE] = passage
                after = _predict_passage(model, planted)
                gains[distance].append(float(after.gather(1, passage[:, None]).mean() - before))
                right[distance].append(float((after.argmax(-1) == passage).double().mean()))
                advance(1)
    return {distance: Recall(fmean(gains[distance]), fmean(right[distance])) for distance in distances}


def _predict_passage(model: Any, text: Tensor) -> Tensor:
    """Log-probabilities [PASSAGE, vocabulary] of the last tokens of a text, each given all tokens before it.

    text: [N], token ids.
    """
    ids = text[None].to(model.device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=PASSAGE + 1).logits[0, -PASSAGE - 1 : -1]
    return logits.double().log_softmax(-1).cpu()
