"""What a model can repeat: `dijiang eval --recall`.

A passage of random tokens is planted into a text, and again at its end. How much likelier its tokens became than
without the first plant is what the model remembers of it; a model that copies perfectly makes each of them certain.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .progress import count_bar

PASSAGE = 32  # tokens
DISTANCES = (256, 1024, 1900, 4000, 7500)  # tokens from a passage to its repetition
TEXTS = 8


@dataclass(frozen=True)
class Recall:
    """gain: nats a token that the passage became likelier. accuracy: how often its next token is the first choice."""

    gain: float
    accuracy: float


@torch.no_grad()
def recall(model: Any, texts: Tensor) -> dict[int, Recall]:
    """By distance, of `DISTANCES` that fit into texts [n, N] of real tokens."""
    texts = texts.long()
    length, generator = texts.shape[1], torch.Generator().manual_seed(0)
    known = texts.unique()
    found = {}
    distances = [distance for distance in DISTANCES if distance + PASSAGE <= length]
    with count_bar("recall (texts)", len(distances) * len(texts)) as advance:
        for distance in distances:
            gain, right = [], []
            for text in texts:
                passage = known[torch.randint(len(known), (PASSAGE,), generator=generator)]
                without = torch.cat([text[:-PASSAGE], passage])
                planted = without.clone()
                start = length - PASSAGE - distance
                planted[start : start + PASSAGE] = passage
                before, after = (_predict_passage(model, x[None].to(model.device)) for x in (without, planted))
                gain.append(_mean_of(after, passage) - _mean_of(before, passage))
                right.append((after.argmax(-1) == passage).double().mean())
                advance(1)
            found[distance] = Recall(float(torch.stack(gain).mean()), float(torch.stack(right).mean()))
    return found


def _predict_passage(model: Any, ids: Tensor) -> Tensor:
    """Log-probabilities of the last tokens of one text, each given those before it: [PASSAGE, vocabulary]."""
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=PASSAGE + 1).logits[0, -PASSAGE - 1 : -1]
    return logits.double().log_softmax(-1).cpu()


def _mean_of(log_p: Tensor, tokens: Tensor) -> Tensor:
    return log_p.gather(1, tokens[:, None]).mean()
