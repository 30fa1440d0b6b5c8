"""Rows with padding, wherever it is: each equals the row alone, as a whole and through a cache.

Sequences are much longer than the window of 16 and what the memory holds.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import KINDS, MODELS, difference, load, logits_of, tokens

TOLERANCE = 1e-4
LENGTH = 310


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return load(*request.param.split("-", 1)).double()  # rows of 8 bits make of a rounding error a step of theirs


@pytest.fixture(scope="module", params=KINDS)
def default(request: pytest.FixtureRequest) -> Any:
    return load(request.param)


def positions_of(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize("positions", ["given", "derived"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(model: Any, side: str, positions: str) -> None:
    """Rows of a padded batch equal the rows alone, and so does what follows in the cache."""
    ids, tail, lengths = tokens(3, LENGTH), tokens(3, 24, seed=1), (LENGTH, 90, 200)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        part = slice(LENGTH - length, LENGTH) if side == "left" else slice(0, length)
        mask[row, part] = 1
    ids = torch.where(mask.bool(), ids, 0)
    given = {"position_ids": positions_of(mask)} if positions == "given" else {}
    with torch.no_grad():
        out = model(ids, attention_mask=mask, use_cache=True, **given)
        assert difference(logits_of(model, ids, attention_mask=mask, **given), out.logits) <= TOLERANCE
    cache, after = out.past_key_values, []
    for start, stop in ((0, 1), (1, 20), *((n, n + 1) for n in range(20, 24))):
        mask = torch.cat([mask, torch.ones(3, stop - start, dtype=torch.long)], 1)
        given = {"position_ids": positions_of(mask)[:, start - stop :]} if positions == "given" else {}
        with torch.no_grad():
            after.append(
                model(tail[:, start:stop], attention_mask=mask, past_key_values=cache, use_cache=True, **given).logits
            )
    for row, length in enumerate(lengths):
        alone = ids[row : row + 1, mask[row, :LENGTH].bool()]
        expected = logits_of(model, torch.cat([alone, tail[row : row + 1]], 1))[0]
        assert difference(out.logits[row, mask[row, :LENGTH].bool()], expected[:length]) <= TOLERANCE
        assert difference(torch.cat(after, 1)[row], expected[length:]) <= TOLERANCE


def test_padding_in_the_middle(model: Any) -> None:
    """A chat of turns that are unequally long for the rows of a batch."""
    turns = [(120, 40), (3, 17), (1, 1), (20, 90), (64, 5), (1, 1), (1, 1), (2, 30)]
    mask, cache = torch.zeros(2, 0, dtype=torch.long), None
    rows: list[list[Tensor]] = [[], []]
    logits: list[list[Tensor]] = [[], []]
    for number, lengths in enumerate(turns):
        ids, new = tokens(2, max(lengths), seed=number), torch.zeros(2, max(lengths), dtype=torch.long)
        for row, length in enumerate(lengths):
            new[row, :length] = 1  # padded to the right, as between turns
        mask = torch.cat([mask, new], 1)
        with torch.no_grad():
            out = model(ids * new, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        for row, length in enumerate(lengths):
            rows[row].append(ids[row, :length])
            logits[row].append(out.logits[row, :length])
    for row in range(2):
        alone = torch.cat(rows[row])[None]
        assert alone.shape[1] > 150
        assert difference(torch.cat(logits[row]), logits_of(model, alone)[0]) <= TOLERANCE


@torch.no_grad()
def test_padding_inside_the_window(model: Any) -> None:
    """A row that is padded inside the window at first, decoded far beyond it."""
    ids, mask = tokens(2, 90), torch.ones(2, 90, dtype=torch.long)
    mask[0, :12] = 0
    expected = logits_of(model, ids, attention_mask=mask)
    out = model(ids[:, :20], attention_mask=mask[:, :20], use_cache=True)
    cache, parts = out.past_key_values, [out.logits]
    for i in range(20, 90):
        given = mask[:, : i + 1]
        parts.append(model(ids[:, i, None], past_key_values=cache, use_cache=True, attention_mask=given).logits)
    assert difference(torch.cat(parts, 1)[:, 12:], expected[:, 12:]) <= TOLERANCE


def test_masks_of_ones_change_nothing(default: Any) -> None:
    ids = tokens(2, LENGTH)
    expected = logits_of(default, ids)
    for mask in (torch.ones_like(ids), torch.ones_like(ids).bool(), torch.ones(2, LENGTH)):
        assert torch.equal(logits_of(default, ids, attention_mask=mask), expected)
