"""Measures a model on text that no stage trains on, for the report: perplexity by position, and a few continuations.

The text is set aside here as well, so that the rows to measure on and the rows to train on share none. Drawing is left
to `report`.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.loading import generates, load_converted
from ..checkpoint.shards import write_json
from ..data.images import Images
from ..data.rows import Rows, token_rows
from ..errors import DijiangError
from ..files import new_file
from ..training.attention_transfer import attention
from ..training.teachers import holds_original
from .fidelity import measure
from .likeness import Likeness, likeness

PROBES = "probes.json"
MOST_TOKENS = 32_768  # tokens to measure on, at most
SHARE = 20  # at most one token in 20 of the run is measured on: three forward passes of these are below 5 % of the run
PARTS, PART_TOKENS = 16, 512  # a row has at most 16 parts, and at least 512 tokens are measured in each
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 3, 32, 48
PIECE = 32  # as many equal tokens, one after another, count as the same text


@dataclass(frozen=True)
class Probe:
    """What `probe` measured.

    perplexity: over all positions. by_position: (where a part of the row ends, in tokens; the perplexity in that part).
    texts: the model's continuation of each prompt.
    """

    perplexity: float
    by_position: list[tuple[int, float]]
    texts: list[str]


@dataclass(frozen=True)
class HeldOut:
    """Text or images that no stage trains on.

    rows: the rows or images to measure on. prompts: [prompts, tokens], token ids from the rows; empty for images.
    """

    rows: Rows | Images
    prompts: Tensor


def hold_out(
    data: str | Sequence[str], tokenizer: PreTrainedTokenizerBase, rows: Sequence[Rows], tokens: int
) -> tuple[HeldOut | None, list[Tensor | None]]:
    """Finds text to measure on: the held-out part of the data, or else the last rows of the training text.

    These rows and the training rows share no text. Rows of the held-out part that share text with training rows are
    dropped; where the last training rows are taken, all training rows that share text with them are.

    Args:
        data: as `token_rows` takes it.
        rows: the rows of each stage, of any lengths. The rows to measure on are as long as the longest.
        tokens: tokens of the whole plan.

    Returns:
        What to measure on, or None if there is too little text; and for each of ``rows`` a mask [n] of those to train
        on, or None for all.
    """
    longest = max(rows, key=_length)
    length, every = _length(longest), [None for _ in rows]
    left: list[Tensor | None] = [*every]
    count = min(MOST_TOKENS, tokens // SHARE) // length
    if count < 1:
        return None, left
    try:
        aside = token_rows(
            data, tokenizer, seq_len=length, tokens=count * length, held_out=True, shuffle_seed=None,
            whole=longest.whole,
        )  # fmt: skip
        known = torch.stack([in_common(each, aside)[1] for each in rows]).any(0)
        aside = select(aside, ~known)
    except DijiangError:  # the held-out part is shorter than a row
        aside = select(longest, torch.zeros(len(longest), dtype=torch.bool))
    if aside.tokens < count * length // 2:  # the held-out part is missing or too short
        count = min(count, len(longest) // SHARE)
        aside = select(longest, torch.arange(len(longest)) >= len(longest) - count)
        left = [~in_common(each, aside)[0] for each in rows]
    if len(aside) == 0 or any(mask is not None and mask.sum() < len(mask) // 2 for mask in left):
        return None, [*every]
    return HeldOut(aside, _prompts(aside)), left


def kept_aside(
    path: Path, data: str | Sequence[str], tokenizer: PreTrainedTokenizerBase, rows: Sequence[Rows], tokens: int
) -> tuple[HeldOut | None, list[Rows]]:
    """`hold_out` with its result kept in the file ``path``, so that a resumed run trains on the same rows.

    Returns what to measure on, or None, and the rows to train on for each of ``rows``.
    """
    if not path.is_file():
        held, masks = hold_out(data, tokenizer, rows, tokens)
        found = None
        if held is not None:
            assert isinstance(held.rows, Rows)
            found = (held.rows.ids, held.rows.marks, held.rows.whole, held.prompts)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        torch.save({"held": found, "masks": masks}, partial)
        partial.replace(path)
    kept = torch.load(path, weights_only=True)
    held = None if kept["held"] is None else HeldOut(Rows(*kept["held"][:3]), kept["held"][3])
    pairs = zip(rows, kept["masks"], strict=True)
    return held, [each if mask is None else select(each, mask) for each, mask in pairs]


def images_aside(images: Images, tokens: int) -> HeldOut:
    """Cuts the held-out ``images`` to as many as suit a plan of ``tokens`` tokens."""
    images.items = images.items[: max(min(MOST_TOKENS, tokens // SHARE) // images.tokens_each, 1)]
    return HeldOut(images, torch.empty(0, 0))


def _length(rows: Rows) -> int:
    return rows.ids.shape[1]


def _prompts(rows: Rows) -> Tensor:
    """At most PROMPTS short passages, spread evenly over the rows, [prompts, tokens]."""
    size = min(PROMPT_TOKENS, rows.ids.shape[1])
    pieces = rows.ids.unfold(1, size, size)
    whole = torch.arange(1, pieces.shape[1] + 1) * size <= rows.lengths[:, None]
    found = pieces[whole]
    return found[torch.linspace(0, len(found) - 1, min(PROMPTS, len(found))).long()]


def select(rows: Rows, chosen: Tensor) -> Rows:
    """The rows that ``chosen`` marks. chosen: [n], a boolean mask."""
    values: dict[str, Any] = {field.name: getattr(rows, field.name) for field in dataclasses.fields(rows)}
    parts: dict[str, Any] = {name: value[chosen] for name, value in values.items() if isinstance(value, Tensor)}
    return dataclasses.replace(rows, **parts)


def in_common(rows: Rows, others: Rows) -> tuple[Tensor, Tensor]:
    """Masks, [rows] and [others], of the rows on each side that share text with the other side.

    Passages of `PIECE` tokens are compared by their hashes, end to end from ``rows`` and at every offset from
    ``others``. So all common text of twice that length is found. Padding is no text.
    """
    length = min(PIECE, _length(rows), _length(others))
    weights = torch.randint(2**62, (length,), generator=torch.Generator().manual_seed(0))  # a linear hash modulo 2^64
    theirs, real = _pieces(others.ids, others.lengths, length, 1, weights)
    found, known = list[Tensor](), torch.zeros_like(real)
    for ids, lengths in zip(rows.ids.split(1024), rows.lengths.split(1024), strict=True):  # training has many
        mine, real_too = _pieces(ids, lengths, length, length, weights)
        hits = torch.isin(mine, theirs[real]) & real_too
        known |= torch.isin(theirs, mine[hits]) & real
        found.append(hits.any(1))
    return torch.cat(found), known.any(1)


def _pieces(ids: Tensor, lengths: Tensor, length: int, step: int, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Hashes of the passages of each row, [n, passages], and a mask of the passages without padding.

    ids: [n, seq_len], token ids. lengths: [n], real tokens of each row. weights: [length], factors of the hash.
    step: tokens from the start of one passage to that of the next.
    """
    hashes = (ids.unfold(1, length, step) * weights).sum(-1)
    ends = torch.arange(hashes.shape[1]) * step + length
    return hashes, ends <= lengths[:, None]


def probe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held: HeldOut) -> Probe:
    """Measures a model on the rows, and lets it continue the prompts by greedy decoding."""
    model.eval()
    assert isinstance(held.rows, Rows)
    totals = measure(model, held.rows, None)
    parts = max(min(PARTS, held.rows.tokens // PART_TOKENS, len(totals["loss"])), 1)
    ends = np.cumsum([len(part) for part in totals["loss"].tensor_split(parts)]).tolist()
    sums = zip(ends, totals["loss"].tensor_split(parts), totals["count"].tensor_split(parts), strict=True)
    by_position = [(end + 1, math.exp(loss.sum() / count.sum())) for end, loss, count in sums if count.sum() > 0]
    perplexity = math.exp(totals["loss"].sum() / totals["count"].sum())
    return Probe(perplexity, by_position, _continue(model, tokenizer, held.prompts))


def probe_likeness(model: PreTrainedModel, folder: Path, held: HeldOut) -> Likeness | None:
    """The likeness of a model to its original, which is the checkpoint in ``folder`` with softmax attention.

    None if that checkpoint no longer holds the original's weights.
    """
    if not holds_original(folder):
        return None
    return likeness(model.eval(), load_converted(folder, attention="softmax").eval(), held.rows)


def first_probes(folder: Path, tokenizer: PreTrainedTokenizerBase | None, held: HeldOut) -> dict[str, Probe | Likeness]:
    """Measures a checkpoint "before" training, and the "original" if the checkpoint still has its weights.

    Models that predict no next token have one `Likeness` of the two, as "before". tokenizer: None for images.
    """
    model = load_converted(folder)
    if not generates(model) or tokenizer is None:
        like = probe_likeness(model, folder, held)
        return {} if like is None else {"before": like}
    probes: dict[str, Probe | Likeness] = {"before": probe(model, tokenizer, held)}
    if holds_original(folder):
        with attention(model, "softmax"):
            probes["original"] = probe(model, tokenizer, held)
    return probes


def write_probes(path: Path, probes: Mapping[str, Probe | Likeness]) -> None:
    """Keeps what was measured before training, for the run that resumes this one."""
    with new_file(path) as partial:
        write_json(partial, {name: dataclasses.asdict(each) for name, each in probes.items()})


def read_probes(path: Path) -> dict[str, Probe | Likeness]:
    """What `write_probes` kept; nothing if there is no file."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {name: (Probe if "texts" in values else Likeness)(**values) for name, values in kept.items()}


def _continue(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Tensor) -> list[str]:
    if len(prompts) == 0:
        return []
    ids = prompts.to(model.device, torch.long)
    generator: Any = model
    out = generator.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )  # fmt: skip
    return [str(text) for text in tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)]
