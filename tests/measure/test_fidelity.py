"""Perplexity, divergence and agreement: the same as from all logits at once, without their memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dijiang_convert.data.rows import Rows
from dijiang_convert.measure.fidelity import measure
from dijiang_convert.training import logits
from tests.models import load, tokens


def naive(model: Any, other: Any, ids: torch.Tensor, lengths: list[int]) -> dict[str, torch.Tensor]:
    """Each row alone and whole, without its padding."""
    names = ("loss", "count", "baseline_loss", "kl", "agreement")
    totals = {name: torch.zeros(ids.shape[1] - 1, dtype=torch.float64) for name in names}
    for row, length in zip(ids, lengths, strict=True):
        with torch.no_grad():
            log_p, log_q = (each(input_ids=row[None, :length]).logits[0, :-1].double().log_softmax(-1)
                            for each in (model, other))  # fmt: skip
        nats = (F.nll_loss(x, row[1:length], reduction="none") for x in (log_p, log_q))
        kl = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
        same = (log_p.argmax(-1) == log_q.argmax(-1)).double()
        found = dict(zip(names, (next(nats), torch.ones(length - 1), next(nats), kl, same), strict=True))
        for name, value in found.items():
            totals[name][: length - 1] += value
    return totals


@pytest.mark.parametrize("name", ["llama", "neox"])
def test_sums_are_those_of_whole_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "LEAST_ROWS", 7)
    monkeypatch.setitem(logits.CHUNK_ELEMENTS, "cpu", 1)  # chunks of 7 positions, which end within rows
    model, other = load(name).eval(), load(name, attention="softmax").eval()
    ids, lengths = tokens(3, 150), [150, 90, 2]
    marks = (torch.arange(150) < torch.tensor(lengths)[:, None]).to(torch.uint8)
    found = measure(model, Rows(ids.int(), marks), other)
    expected = naive(model, other, ids, lengths)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-3, rtol=1e-4)
    assert found["kl"].sum() > 1e-3 and 0 < found["agreement"].sum() <= found["count"].sum() == sum(lengths) - 3
    alone = measure(model, Rows(ids.int(), marks), None)
    assert torch.equal(alone["loss"], found["loss"]) and not alone["kl"].any()
