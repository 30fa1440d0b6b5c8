"""Keeps what was measured of a checkpoint in a file beside its weights, for the model card. It measures nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..files import new_file

EVALUATION = "evaluation.json"

# Single figures, by their names in `EvalResult` and `Likeness`, and their names in the card.
FIGURES = {
    "perplexity": "perplexity",
    "untrained_perplexity": "before training",
    "baseline_perplexity": "the original's",
    "perplexity_ratio": "ratio to the original's",
    "kl_divergence": "KL divergence from the original, nats a token",
    "top1_agreement": "same choice as the original",
    "hidden_error": "error of hidden states",
    "hidden_cosine": "cosine of hidden states",
    "embedding_cosine": "cosine of embeddings",
}

# Results of several figures: lm-eval's tasks, ratios over equal parts of a row, recall by distance.
DETAILS = ("tasks", "ratio_by_position", "recall", "baseline_recall")


def read_quality(folder: Path) -> list[dict[str, Any]]:
    """The measurements of a checkpoint; none if the file is missing or broken.

    Each has "by" (the command), "dataset" (on the Hub, or None), "tokens", "figures", and maybe some of DETAILS.
    """
    path = folder / EVALUATION
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else []
    except ValueError:
        return []
    return [each for each in content if isinstance(each, dict) and isinstance(each.get("figures"), dict)]


def add_quality(
    folder: Path,
    by: str,
    dataset: str | None,
    tokens: int,
    figures: dict[str, Any],
) -> None:
    """Adds a measurement, in place of an older one by the same command on the same data set.

    by: the command that measured. dataset: the data set on the Hub, or None for any other text.
    figures: results by name. Those in FIGURES and DETAILS are kept.
    """
    made = {"by": by, "dataset": dataset, "tokens": tokens, "figures": _known(figures)}
    made |= {name: figures[name] for name in DETAILS if figures.get(name)}
    others = [each for each in read_quality(folder) if (each.get("by"), each.get("dataset")) != (by, dataset)]
    text = json.dumps([*others, made], indent=2, ensure_ascii=False)
    with new_file(folder / EVALUATION) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def _known(figures: dict[str, Any]) -> dict[str, float]:
    return {name: float(figures[name]) for name in FIGURES if figures.get(name) is not None}
