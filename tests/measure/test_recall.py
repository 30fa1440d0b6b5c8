"""Recall: a model that copies has all of it, one that forgets has none, and distances are what they say."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from dijiang_convert import DijiangError, convert, evaluate
from dijiang_convert.cli import app
from dijiang_convert.data.demo_text import documents
from dijiang_convert.demo import MODEL
from dijiang_convert.measure.recall import DISTANCES, PASSAGE, recall

VOCABULARY = 50


class Copier:
    """Predicts what followed the last token where it, with the one before, was ``distance`` tokens ago; else
    anything."""

    device = torch.device("cpu")

    def __init__(self, distance: int, sure: float) -> None:
        self.distance, self.sure = distance, sure

    def __call__(self, input_ids: Tensor, logits_to_keep: int, **options: Any) -> Any:
        ids = input_ids[0]
        logits = torch.zeros(1, len(ids), VOCABULARY)
        for i in range(self.distance + 1, len(ids)):
            past = i - self.distance
            if torch.equal(ids[i - 1 : i + 1], ids[past - 1 : past + 1]):
                logits[0, i, ids[past + 1]] = self.sure
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


def texts(count: int, length: int) -> Tensor:
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(3))


def test_what_a_copier_repeats() -> None:
    found = recall(Copier(1024, sure=30.0), texts(2, 2000))
    assert list(found) == [256, 1024, 1900]
    assert found[256].gain == pytest.approx(0, abs=0.7) and found[256].accuracy < 0.2
    # All but the first two tokens, which no pair of tokens announces.
    assert found[1024].accuracy == pytest.approx(1 - 2 / PASSAGE, abs=0.05)
    assert found[1024].gain == pytest.approx((1 - 2 / PASSAGE) * math.log(VOCABULARY), rel=0.1)


def test_a_model_that_forgets_gains_nothing() -> None:
    found = recall(Copier(5000, sure=30.0), texts(2, 700))
    assert list(found) == [256]
    assert found[256].gain == 0


def test_recall_is_measured_beside_the_original(tmp_path: Path) -> None:
    settings = ("window=16", "block=16", "memory=0")
    convert(str(MODEL), tmp_path / "out", settings=settings)
    found = evaluate(
        tmp_path / "out", baseline=str(MODEL), data=documents("validation"), seq_len=512, max_tokens=2048, recall=True,
        save=True,
    )  # fmt: skip
    assert found.recall is not None and found.baseline_recall is not None
    assert list(found.recall) == [DISTANCES[0]] and list(found.baseline_recall) == [DISTANCES[0]]
    original = evaluate(str(MODEL), data=documents("validation"), seq_len=512, max_tokens=2048)
    pairs = zip(found.perplexity_by_position, original.perplexity_by_position, strict=True)
    assert found.ratio_by_position == pytest.approx([own / theirs for own, theirs in pairs])
    assert found.ratio_by_position != pytest.approx([1.0] * 8, rel=1e-3)
    card = (tmp_path / "out/README.md").read_text()
    assert "repeats a passage read 256 tokens ago" in card and "; the original" in card
    assert " ".join(f"{x:.3f}" for x in found.ratio_by_position) in card


def test_the_ratio_by_position_of_a_model_to_itself_is_one() -> None:
    found = evaluate(str(MODEL), baseline=str(MODEL), data=documents("validation"), seq_len=256, max_tokens=1024)
    assert found.ratio_by_position == [1.0] * 8 and found.recall is None


def test_the_command_shows_it(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(documents("validation")[:5]))
    arguments = ["eval", str(MODEL), "--recall", "--data", str(tmp_path / "text.txt")]
    answer = CliRunner().invoke(app, [*arguments, "--seq-len", "64"])
    assert answer.exit_code == 1 and "--recall needs rows of 288 tokens" in answer.stderr
    answer = CliRunner().invoke(app, [*arguments, "--seq-len", "512", "--max-tokens", "1024"])
    assert answer.exit_code == 0, answer.stderr
    assert "recall, 256 tokens ago" in answer.stdout


def test_rows_too_short_for_it_are_refused() -> None:
    with pytest.raises(DijiangError, match="--recall needs rows"):
        evaluate(str(MODEL), data=documents("validation"), seq_len=128, max_tokens=512, recall=True)
