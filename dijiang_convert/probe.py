"""What a model does on text that no stage trains on: perplexity by position and a few continuations, for the report."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .distill.attention_transfer import attention
from .distill.data import Rows, token_rows
from .errors import DijiangError
from .evaluate import measure

MOST_TOKENS = 32_768
SHARE = 20  # at most a token in so many: three forward passes of it are below 5 % of the run
PARTS, PART_TOKENS = 16, 512  # of a row at most, and measured in each at least
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 3, 32, 48
PIECE = 32  # so many tokens in a row are the same text wherever they are found


@dataclass(frozen=True)
class Probe:
    """by_position: (end of a part of the row in tokens, perplexity in it); texts: what follows each prompt."""

    perplexity: float
    by_position: list[tuple[int, float]]
    texts: list[str]


@dataclass(frozen=True)
class HeldOut:
    """Rows that no stage trains on, and prompts [prompts, tokens] from them."""

    rows: Rows
    prompts: Tensor


def hold_out(
    data: str | Sequence[str], tokenizer: PreTrainedTokenizerBase, rows: Mapping[int, Rows], tokens: int
) -> tuple[HeldOut | None, dict[int, Rows]]:
    """Finds text to probe with: the data's held-out part, or else the last rows of the training text.

    Whichever it is, training rows and these share no text: from ``rows`` goes what does with rows that were set aside.

    Args:
        rows: gathered for training, by length.
        tokens: of the whole plan.

    Returns:
        None where there is too little text, and the rows to train on.
    """
    length = max(rows)
    count = min(MOST_TOKENS, tokens // SHARE) // length
    if count < 1:
        return None, dict(rows)
    try:
        aside = token_rows(data, tokenizer, seq_len=length, tokens=count * length, held_out=True, shuffle_seed=None)
        known = torch.stack([in_common(each, aside)[1] for each in rows.values()]).any(0)
        aside, left = select(aside, ~known), dict(rows)
    except DijiangError:  # a held-out part of less than a row
        aside = None
    if aside is None or aside.tokens < count * length // 2:  # no such part, or too little of it
        all_rows = rows[length]
        count = min(count, len(all_rows) // SHARE)
        aside = select(all_rows, torch.arange(len(all_rows)) >= len(all_rows) - count)
        left = {n: select(each, ~in_common(each, aside)[0]) for n, each in rows.items()}
    if len(aside) == 0 or any(len(left[n]) < len(rows[n]) // 2 for n in rows):
        return None, dict(rows)
    return HeldOut(aside, _prompts(aside)), left


def _prompts(rows: Rows) -> Tensor:
    """A few pieces of the text, spread over it."""
    size = min(PROMPT_TOKENS, rows.ids.shape[1])
    pieces = rows.ids.unfold(1, size, size)
    whole = torch.arange(1, pieces.shape[1] + 1) * size <= rows.lengths[:, None]
    found = pieces[whole]
    return found[torch.linspace(0, len(found) - 1, min(PROMPTS, len(found))).long()]


def select(rows: Rows, chosen: Tensor) -> Rows:
    """Those of the rows that ``chosen`` [n] marks."""
    values = {field.name: getattr(rows, field.name) for field in dataclasses.fields(rows)}
    return dataclasses.replace(rows, **{k: v[chosen] if isinstance(v, Tensor) else v for k, v in values.items()})


def in_common(rows: Rows, others: Rows) -> tuple[Tensor, Tensor]:
    """Which of both share text: `PIECE` tokens, taken one after the other from ``rows`` and at any offset from
    ``others``, so that whatever is twice as long is found. Padding is no text. Returns masks [rows], [others]."""
    length = min(PIECE, rows.ids.shape[1], others.ids.shape[1])
    weights = torch.randint(2**62, (length,), generator=torch.Generator().manual_seed(0))  # of a hash, modulo 2^64
    (mine, real), (theirs, real_too) = _pieces(rows, length, length, weights), _pieces(others, length, 1, weights)
    found = torch.isin(mine, theirs[real_too]) & real
    return found.any(1), (torch.isin(theirs, mine[found]) & real_too).any(1)


def _pieces(rows: Rows, length: int, step: int, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Hashes of each row's pieces [n, pieces], and which hold no padding."""
    hashes = (rows.ids.unfold(1, length, step) * weights).sum(-1)
    ends = torch.arange(hashes.shape[1]) * step + length
    return hashes, ends <= rows.lengths[:, None]


def probe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held: HeldOut) -> Probe:
    """Measures a model on the rows and lets it continue the prompts, taking the likeliest token every time."""
    model.eval()
    totals = measure(model, held.rows, None)
    parts = max(min(PARTS, held.rows.tokens // PART_TOKENS, len(totals["loss"])), 1)
    ends = np.cumsum([len(part) for part in totals["loss"].tensor_split(parts)]).tolist()
    sums = zip(ends, totals["loss"].tensor_split(parts), totals["count"].tensor_split(parts), strict=True)
    by_position = [(end + 1, math.exp(loss.sum() / count.sum())) for end, loss, count in sums if count.sum() > 0]
    perplexity = math.exp(totals["loss"].sum() / totals["count"].sum())
    return Probe(perplexity, by_position, _continue(model, tokenizer, held.prompts))


def first_probes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held: HeldOut, intact: bool
) -> dict[str, Probe]:
    """Before training; and of the original, which the same model is with softmax attention as long as its base weights
    are intact."""
    probes = {"before": probe(model, tokenizer, held)}
    if intact:
        with attention(model, "sdpa"):
            probes["original"] = probe(model, tokenizer, held)
    return probes


def _continue(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Tensor) -> list[str]:
    if len(prompts) == 0:
        return []
    ids = prompts.to(model.device)
    generator: Any = model
    out = generator.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )  # fmt: skip
    return [str(text) for text in tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)]
