"""What was measured of a checkpoint, kept beside it for its model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

EVALUATION = "evaluation.json"

# What may be measured, by its name in `EvalResult` and `Likeness`, and what the card calls it.
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

# What is no single figure: results of lm-eval's tasks, ratios over equal parts of a row, recall by distance.
DETAILS = ("tasks", "ratio_by_position", "recall", "baseline_recall")


def read_quality(folder: Path) -> list[dict[str, Any]]:
    """Measurements: what made them ("by"), the text or Hub data set, its tokens, and figures."""
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
    """Keeps a measurement in place of an older one of the same kind; of text that is not on the Hub, not its name.

    figures: those of `FIGURES` are kept, and those of `DETAILS`.
    """
    made = {"by": by, "dataset": dataset, "tokens": tokens, "figures": _known(figures)}
    made |= {name: figures[name] for name in DETAILS if figures.get(name)}
    others = [each for each in read_quality(folder) if (each.get("by"), each.get("dataset")) != (by, dataset)]
    text = json.dumps([*others, made], indent=2, ensure_ascii=False)
    (folder / EVALUATION).write_text(text + "\n", encoding="utf-8")


def _known(figures: dict[str, Any]) -> dict[str, float]:
    return {name: float(figures[name]) for name in FIGURES if figures.get(name) is not None}
