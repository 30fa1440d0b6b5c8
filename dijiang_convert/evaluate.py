"""`dijiang eval`: perplexity on held-out text, and against the original its ratio, KL divergence and agreement."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from .checkpoint.card import write_card
from .checkpoint.loading import generates, load_any, load_tokenizer, silence
from .checkpoint.quality import add_quality
from .checkpoint.shards import read_checkpoint
from .data.images import open_images
from .data.readers import Sources, hub_names
from .data.rows import Rows, token_rows
from .errors import DijiangError
from .measure.fidelity import measure
from .measure.likeness import Likeness, likeness
from .measure.recall import DISTANCES, PASSAGE, TEXTS, Recall
from .measure.recall import recall as measure_recall
from .modeling.configuration_dijiang import read_section
from .progress import say
from .source.resolve import download, resolve
from .training.plan import held_whole, source_context

DEFAULT_DATA = "emozilla/pg19-test"  # books; no part of any recipe's corpus


@dataclass(frozen=True)
class EvalResult:
    """Perplexity a token; the other figures need a baseline. Encoders have no perplexity: theirs is a `likeness`.

    kl_divergence: KL(baseline ‖ model) in nats a token; top1_agreement: share of tokens where both would choose the
    same. perplexity_by_position, ratio_by_position: over 8 equal parts of a row. recall: how well a passage is
    repeated, by how many tokens ago it was read (see `recall`), and baseline_recall how well the original does it.
    """

    perplexity: float | None
    tokens: int
    seq_len: int
    perplexity_by_position: list[float]
    baseline_perplexity: float | None = None
    perplexity_ratio: float | None = None
    kl_divergence: float | None = None
    top1_agreement: float | None = None
    ratio_by_position: list[float] | None = None
    recall: dict[int, Recall] | None = None
    baseline_recall: dict[int, Recall] | None = None
    likeness: Likeness | None = None
    tasks: dict[str, Any] = field(default_factory=dict)


def evaluate(
    checkpoint: str | Path,
    *,
    baseline: str | None = None,
    data: str | Sequence[str] | None = None,
    seq_len: int | None = None,
    max_tokens: int = 100_000,
    recall: bool = False,
    tasks: Sequence[str] = (),
    save: bool = False,
) -> EvalResult:
    """Measures a checkpoint on text (a file, the held-out ones of a folder or glob, a Hub data set, or documents).

    Args:
        checkpoint: converted, or any causal language model.
        baseline: the original model, to compare with. Encoders need one: they are measured by it alone.
        seq_len: tokens a row; by default the model's context, at most 2,048.
        recall: also plant passages into the rows, and see how well they are repeated.
        tasks: names of lm-eval tasks; needs ``pip install lm-eval``.
        save: keep the figures with the checkpoint, and write them into its model card.

    Raises:
        DijiangError: no such model or data, or less text than one row.
    """
    if save:
        read_checkpoint(checkpoint)
    silence()
    result = _evaluate(checkpoint, baseline, data, seq_len, max_tokens, recall, tasks)
    if save:
        folder = Path(checkpoint).expanduser()
        figures = dataclasses.asdict(result) | (dataclasses.asdict(result.likeness) if result.likeness else {})
        text = data if data is not None else DEFAULT_DATA
        names = hub_names(Sources([text])) if isinstance(text, str) else []
        add_quality(folder, "eval", names[0] if names else None, result.tokens, figures)
        write_card(folder)
    return result


def _evaluate(
    checkpoint: str | Path,
    baseline: str | None,
    data: str | Sequence[str] | None,
    seq_len: int | None,
    max_tokens: int,
    wants_recall: bool,
    tasks: Sequence[str],
) -> EvalResult:
    model = load_any(str(checkpoint)).eval()
    other = load_any(baseline, model.device).eval() if baseline else None
    if other is None and not generates(model):
        raise DijiangError(f"{checkpoint} predicts no next token: give the original with --baseline, to compare with")
    if other is not None and model.main_input_name == "input_ids" and _vocabulary(other) != _vocabulary(model):
        raise DijiangError(f"{baseline} has another vocabulary than {checkpoint}: give the model it was converted from")
    if model.main_input_name == "pixel_values":
        if seq_len is not None or wants_recall:
            option = "--recall" if seq_len is None else f"--seq-len {seq_len}"
            raise DijiangError(f"{option} is of no use here: {checkpoint} takes images")
        return _evaluate_images(checkpoint, model, other, data, max_tokens)
    tokenizer = load_tokenizer(checkpoint)
    length = seq_len or min(getattr(model.config.get_text_config(), "max_position_embeddings", 2048), 2048)
    whole = not generates(model)
    if whole and seq_len is None:
        length = min(length, tokenizer.model_max_length)
    rows = token_rows(
        data if data is not None else DEFAULT_DATA, tokenizer,
        seq_len=length, tokens=max_tokens, held_out=True, shuffle_seed=None, whole=whole,
    )  # fmt: skip
    if whole:
        if tasks:
            raise DijiangError(f"{checkpoint} predicts no next token: lm-eval's tasks need that, leave --tasks out")
        if wants_recall:
            raise DijiangError(f"{checkpoint} predicts no next token: leave --recall out")
    texts = _recall_texts(rows, length) if wants_recall else None
    _tell_length(model, length)
    if whole:
        assert other is not None
        return EvalResult(None, rows.tokens, length, [], likeness=likeness(model, other, rows))
    totals = measure(model, rows, other)
    loss = totals["loss"].sum() / totals["count"].sum()
    result: dict[str, Any] = {
        "perplexity": math.exp(loss),
        "tokens": rows.tokens,
        "seq_len": length,
        "perplexity_by_position": _by_position(totals),
    }
    if other is not None:
        count = totals["count"].sum()
        base = float(totals["baseline_loss"].sum() / count)
        result |= {
            "baseline_perplexity": math.exp(base),
            "perplexity_ratio": math.exp(loss - base),
            "kl_divergence": float(totals["kl"].sum() / count),
            "top1_agreement": float(totals["agreement"].sum() / count),
            "ratio_by_position": _ratios(totals),
        }
    if texts is not None:
        result["recall"] = measure_recall(model, texts)
        if other is not None:
            result["baseline_recall"] = measure_recall(other, texts)
    return EvalResult(**result, tasks=_lm_eval(model, tokenizer, tasks) if tasks else {})


def _recall_texts(rows: Rows, length: int) -> Tensor:
    """The rows that recall is measured on, [n, length]. Raises DijiangError if there are none long enough."""
    texts = rows.ids[rows.lengths == length][:TEXTS]
    if not len(texts) or length < DISTANCES[0] + PASSAGE:
        raise DijiangError(
            f"--recall needs rows of {DISTANCES[0] + PASSAGE} tokens at least (they have {length}), and texts that "
            f"fill one (the longest has {int(rows.lengths.max())}): give longer texts, or leave --recall out"
        )
    return texts


def _tell_length(model: PreTrainedModel, length: int) -> None:
    """Says where rows of ``length`` tokens are longer than the original could read, or too short to show a loss."""
    if getattr(model.config, "dijiang", None) is None:
        return
    if length > (context := source_context(model.config)):
        say(f"rows of {length:,} tokens are longer than the original's context of {context:,}")
    if length <= (held := held_whole(*read_section(model.config))):
        say(f"rows of {length:,} tokens show no loss: the table holds {held:,}; take a longer --seq-len")


def _evaluate_images(
    checkpoint: str | Path, model: PreTrainedModel, other: PreTrainedModel | None, data: Any, max_tokens: int
) -> EvalResult:
    if data is None:
        raise DijiangError(f"{checkpoint} takes images: give a folder of them with --data")
    assert other is not None
    folder = Path(checkpoint) if Path(checkpoint).is_dir() else download(resolve(str(checkpoint))).folder
    assert folder is not None
    images = open_images(data, folder, model.config, held_out=True)
    images.items = images.items[: max(max_tokens // images.tokens_each, 1)]
    return EvalResult(None, images.tokens, images.tokens_each, [], likeness=likeness(model, other, images))


def _vocabulary(model: PreTrainedModel) -> int:
    config: Any = model.config.get_text_config()
    return config.vocab_size


def _by_position(totals: dict[str, Tensor], parts: int = 8) -> list[float]:
    """Perplexity over equal parts of a row; the last ones may hold no token of short documents."""
    parts = min(parts, len(totals["loss"]))
    pairs = zip(totals["loss"].tensor_split(parts), totals["count"].tensor_split(parts), strict=True)
    return [math.exp(loss.sum() / count.sum()) for loss, count in pairs if count.sum() > 0]


def _ratios(totals: dict[str, Tensor]) -> list[float]:
    """The ratio of perplexity to the baseline's, by position."""
    original = _by_position({**totals, "loss": totals["baseline_loss"]})
    return [own / other for own, other in zip(_by_position(totals), original, strict=True)]


def _lm_eval(model: PreTrainedModel, tokenizer: Any, tasks: Sequence[str]) -> dict[str, Any]:
    try:
        from lm_eval import simple_evaluate  # type: ignore[import-not-found]
        from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]
    except ImportError:
        raise DijiangError("--tasks needs lm-eval: pip install 'dijiang-convert[eval]'") from None
    try:
        results = simple_evaluate(model=HFLM(pretrained=model, tokenizer=tokenizer), tasks=list(tasks))
    except (ValueError, KeyError) as error:
        raise DijiangError(f"lm-eval can't run {', '.join(tasks)}: {' '.join(str(error).split())[:200]}") from error
    return json.loads(json.dumps(results["results"], default=str))
