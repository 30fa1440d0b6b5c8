"""What a model does on text that no stage trains on: perplexity by position and a few continuations, for the report."""

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
from ..training.attention_transfer import attention
from .fidelity import measure
from .likeness import Likeness, likeness

PROBES = "probes.json"
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
    """Rows that no stage trains on, and prompts [prompts, tokens] from them; or images."""

    rows: Rows | Images
    prompts: Tensor


def hold_out(
    data: str | Sequence[str], tokenizer: PreTrainedTokenizerBase, rows: Sequence[Rows], tokens: int
) -> tuple[HeldOut | None, list[Tensor | None]]:
    """Finds text to probe with: the data's held-out part, or else the last rows of the training text.

    Whichever it is, training rows and these share no text: from ``rows`` goes what does with rows that were set aside.

    Args:
        rows: gathered for training, of any lengths. Those to probe with are as long as the longest.
        tokens: of the whole plan.

    Returns:
        None where there is too little text; and a mask [n] of the rows to train on for each of ``rows``, None for all.
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
    except DijiangError:  # a held-out part of less than a row
        aside = select(longest, torch.zeros(len(longest), dtype=torch.bool))
    if aside.tokens < count * length // 2:  # no such part, or too little of it
        count = min(count, len(longest) // SHARE)
        aside = select(longest, torch.arange(len(longest)) >= len(longest) - count)
        left = [~in_common(each, aside)[0] for each in rows]
    if len(aside) == 0 or any(mask is not None and mask.sum() < len(mask) // 2 for mask in left):
        return None, [*every]
    return HeldOut(aside, _prompts(aside)), left


def kept_aside(
    path: Path, data: str | Sequence[str], tokenizer: PreTrainedTokenizerBase, rows: Sequence[Rows], tokens: int
) -> tuple[HeldOut | None, list[Rows]]:
    """`hold_out` with its answer kept in a file, so that a resumed run trains on the same rows; and the rows left to
    train on."""
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
    """Some of the held-out images, for a plan of so many tokens."""
    images.items = images.items[: max(min(MOST_TOKENS, tokens // SHARE) // images.tokens_each, 1)]
    return HeldOut(images, torch.empty(0, 0))


def _length(rows: Rows) -> int:
    return rows.ids.shape[1]


def _prompts(rows: Rows) -> Tensor:
    """A few pieces of the text, spread over it."""
    size = min(PROMPT_TOKENS, rows.ids.shape[1])
    pieces = rows.ids.unfold(1, size, size)
    whole = torch.arange(1, pieces.shape[1] + 1) * size <= rows.lengths[:, None]
    found = pieces[whole]
    return found[torch.linspace(0, len(found) - 1, min(PROMPTS, len(found))).long()]


def select(rows: Rows, chosen: Tensor) -> Rows:
    """Those of the rows that ``chosen`` [n] marks."""
    values: dict[str, Any] = {field.name: getattr(rows, field.name) for field in dataclasses.fields(rows)}
    parts: dict[str, Any] = {name: value[chosen] for name, value in values.items() if isinstance(value, Tensor)}
    return dataclasses.replace(rows, **parts)


def in_common(rows: Rows, others: Rows) -> tuple[Tensor, Tensor]:
    """Which of both share text: `PIECE` tokens, taken one after the other from ``rows`` and at any offset from
    ``others``, so that whatever is twice as long is found. Padding is no text. Returns masks [rows], [others]."""
    length = min(PIECE, _length(rows), _length(others))
    weights = torch.randint(2**62, (length,), generator=torch.Generator().manual_seed(0))  # of a hash, modulo 2^64
    theirs, real = _pieces(others.ids, others.lengths, length, 1, weights)
    found, known = list[Tensor](), torch.zeros_like(real)
    for ids, lengths in zip(rows.ids.split(1024), rows.lengths.split(1024), strict=True):  # they may be many
        mine, real_too = _pieces(ids, lengths, length, length, weights)
        hits = torch.isin(mine, theirs[real]) & real_too
        known |= torch.isin(theirs, mine[hits]) & real
        found.append(hits.any(1))
    return torch.cat(found), known.any(1)


def _pieces(ids: Tensor, lengths: Tensor, length: int, step: int, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Hashes of each row's pieces [n, pieces], and which hold no padding."""
    hashes = (ids.unfold(1, length, step) * weights).sum(-1)
    ends = torch.arange(hashes.shape[1]) * step + length
    return hashes, ends <= lengths[:, None]


def probe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held: HeldOut) -> Probe:
    """Measures a model on the rows and lets it continue the prompts, taking the likeliest token every time."""
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
    """How like the original's a model's output is, where the original is in the checkpoint ``folder``: as long as no
    stage has trained its base weights."""
    other = load_converted(folder, attention="softmax").eval()
    return None if was_trained(other) else likeness(model.eval(), other, held.rows)


def was_trained(model: Any) -> bool:
    """Whether base weights of a converted model are no more the original's."""
    return any(step["train"] != "kernel" for step in model.config.dijiang["history"])


def first_probes(folder: Path, tokenizer: PreTrainedTokenizerBase | None, held: HeldOut) -> dict[str, Probe | Likeness]:
    """Of a checkpoint before training; and of the original, which the same model is with softmax attention as long as
    no stage has trained its base weights."""
    model = load_converted(folder)
    if not generates(model) or tokenizer is None:
        like = probe_likeness(model, folder, held)
        return {} if like is None else {"before": like}
    probes: dict[str, Probe | Likeness] = {"before": probe(model, tokenizer, held)}
    if not was_trained(model):
        with attention(model, "softmax"):
            probes["original"] = probe(model, tokenizer, held)
    return probes


def write_probes(path: Path, probes: Mapping[str, Probe | Likeness]) -> None:
    """Keeps what was measured before training, for the run that resumes this one."""
    write_json(path, {name: dataclasses.asdict(each) for name, each in probes.items()})


def read_probes(path: Path) -> dict[str, Probe | Likeness]:
    """What `write_probes` kept, if it did."""
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
