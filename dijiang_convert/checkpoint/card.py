"""The model card of a checkpoint, written from what its own folder records.

The card says what was done and measured, and nothing that was not recorded. It has no name of its own, since a folder
is written under a temporary name and may be pushed under any. What a person wrote into it stays (see `card_parts`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ..errors import DijiangError, printable
from ..files import new_file, read_json
from ..kernel_keys import OF_THE_STATE
from ..source.names import is_hub_id
from .card_parts import Card, merge, parse, written
from .quality import FIGURES, read_quality

PAPER = "https://arxiv.org/abs/2403.19928"
BIBTEX = """\
@misc{chen2024dijiang,
  title         = {DiJiang: Efficient Large Language Models through Compact Kernelization},
  author        = {Chen, Hanting and Liu, Zhicheng and Wang, Xutao and Tian, Yuchuan and Wang, Yunhe},
  year          = {2024},
  eprint        = {2403.19928},
  archivePrefix = {arXiv},
}"""

CHECKPOINT = '"owner/name"  # this repository, or the folder that it lies in'  # until it is pushed

SHAPE = ("heads", "kv_heads", "head_dim", "value_dim")
STAGE = ("stage", "tokens", "first_loss", "last_loss")

# The card shows these plots, which the report of a training run draws.
PLOTS = {
    "loss.png": "loss of every stage against tokens",
    "transfer.png": "error of every layer in attention transfer",
    "perplexity.png": "perplexity on held-out text by position: original, before and after training",
}

# Each Auto class that a checkpoint may offer has a task on the Hub.
TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForImageClassification": "image-classification",
    "AutoModel": "feature-extraction",
}


def write_card(folder: Path) -> None:
    """Write the README.md of the checkpoint in `folder`; of one that is there, a person's parts stay.

    Raises:
        DijiangError: `folder` has no readable config.json.
    """
    path = folder / "README.md"
    card = written(_parts(folder))
    if path.is_file():
        card = merge(card, read_card(path), str(path))
    with new_file(path) as partial:
        partial.write_text(card.text(), encoding="utf-8")


def card_for(repo: str, path: Path, there: str | None) -> str:
    """The card at `path` as it is to lie in `repo`, where `there` is now.

    Raises:
        DijiangError: a part of it was edited both here and there.
    """
    card = read_card(path)
    here = dict(card.marks)
    for name, value in card.parts.items():
        if isinstance(value, str) and CHECKPOINT in value and not card.is_yours(name):
            filled = {name: value.replace(CHECKPOINT, f'"{repo}"')}
            card.parts |= filled
            here |= written(filled).marks
    return merge(Card(card.parts, here), parse(there or ""), f"on the Hub in {repo}").text()


def read_card(path: Path) -> Card:
    """Raises DijiangError where its metadata is no YAML."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DijiangError(f"{path} has metadata that is no YAML ({reason}): mend it, or remove the file") from error


def _parts(folder: Path) -> dict[str, Any]:
    """Metadata as "key:", and sections by their headings."""
    from huggingface_hub import ModelCardData

    config = read_json(folder / "config.json")
    record, measured = config.get("dijiang") or {}, read_quality(folder)
    auto_class = _auto_class(config)
    library, task = "transformers", TASKS[auto_class]
    if (folder / "modules.json").is_file():
        library, task = "sentence-transformers", "sentence-similarity"
    elif task == "feature-extraction" and (folder / "preprocessor_config.json").is_file():
        task = "image-feature-extraction"
    source = str(record.get("source") or "")
    # The Hub links a card to its base model; a folder's name means nothing there.
    more: dict[str, Any] = {"base_model": source, "base_model_relation": "finetune"} if is_hub_id(source) else {}
    for name in ("license", "license_name", "license_link", "language"):
        value = record.get(name)
        if isinstance(value, str) or (name == "language" and isinstance(value, list)):
            more[name] = value
    datasets = {name for entry in record.get("history") or [] for name in entry.get("datasets") or []}
    if datasets:
        more["datasets"] = sorted(datasets)
    if results := _results(task, measured):
        more |= {"model_name": f"{_name(record)}-dijiang", "eval_results": results}
    data = ModelCardData(
        library_name=library,
        pipeline_tag=task,
        tags=["dijiang", "linear-attention", "custom_code"],
        **more,
    )
    sections = [
        _title(record), _usage(_example(folder, auto_class), record), _made(record), *_quality(measured),
        *_plots(folder), _limits(record, measured), _cite(),
    ]  # fmt: skip
    headings = ["", *(section.splitlines()[0] for section in sections[1:])]
    metadata = yaml.safe_load(data.to_yaml())
    return {f"{key}:": value for key, value in metadata.items()} | dict(zip(headings, sections, strict=True))


def _results(task: str, measured: list[dict[str, Any]]) -> list[Any]:
    """What the Hub shows of measurements beside a model."""
    from huggingface_hub import EvalResult

    found = {}
    for each in measured:
        text = each.get("dataset")
        kind, name = (text, text) if text else ("text", "held-out text")
        for metric, value in each["figures"].items():
            if metric in FIGURES:
                found[kind, metric] = EvalResult(task, kind, name, metric, value, metric_name=FIGURES[metric])
        for benchmark, metric, value in _scores(each):
            found[benchmark, metric] = EvalResult(task, benchmark, benchmark, metric, value)
    return list(found.values())


def _scores(measurement: dict[str, Any]) -> list[tuple[str, str, float]]:
    """(task, metric, value) of lm-eval's results, which it names "metric,filter"."""
    return [
        (task, metric.removesuffix(",none"), value)
        for task, scores in (measurement.get("tasks") or {}).items()
        for metric, value in scores.items()
        if isinstance(value, float) and "stderr" not in metric
    ]


def _quality(measured: list[dict[str, Any]]) -> list[str]:
    if not measured:
        return []
    parts = ["## Quality"]
    for each in measured:
        text = each.get("dataset")
        is_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(text or ""), re.ASCII)
        where = f"[{text}](https://huggingface.co/datasets/{text})" if is_name else "text that was held out"
        rows = [(title, _figure(each["figures"][name])) for name, title in FIGURES.items() if name in each["figures"]]
        rows += _details(each)
        rows += [(_plain(f"{task}: {metric}"), _figure(value)) for task, metric, value in _scores(each)]
        by, count = _code(f"dijiang {each.get('by')}"), each.get("tokens", 0)
        told = f"By {by} on {count:,} tokens of {where}:"
        parts += [told, _table(("measured", "value"), rows)]
    return ["\n\n".join(parts)]


def _details(measurement: dict[str, Any]) -> list[tuple[str, str]]:
    """Table rows: the perplexity ratio by position, and how well passages read before are repeated."""
    rows = []
    if ratios := measurement.get("ratio_by_position"):
        rows.append((f"ratio by position, over {len(ratios)} parts of a row", " ".join(f"{x:.3f}" for x in ratios)))
    original = measurement.get("baseline_recall") or {}
    for distance, found in (measurement.get("recall") or {}).items():
        told = f"{found['gain']:.1f} nats a token, {found['accuracy']:.0%} right"
        if theirs := original.get(distance):
            told += f"; the original {theirs['gain']:.1f}, {theirs['accuracy']:.0%}"
        rows.append((f"repeats a passage read {int(distance):,} tokens ago", told))
    return rows


def _auto_class(config: dict[str, Any]) -> str:
    """The Auto class of the head whose weights the checkpoint has, or else the first that it offers."""
    offered, own = config.get("auto_map") or {}, (config.get("architectures") or [""])[0]
    named = [name for name in TASKS if str(offered.get(name)).rpartition(".")[2] == own]
    return next((name for name in (*named, *TASKS) if name in offered), "AutoModelForCausalLM")


def _example(folder: Path, auto_class: str) -> str:
    """Code that loads the model."""
    if (folder / "modules.json").is_file():
        return f"""\
from sentence_transformers import SentenceTransformer

checkpoint = {CHECKPOINT}
model = SentenceTransformer(checkpoint, trust_remote_code=True)"""
    reader, name = "AutoTokenizer", "tokenizer"
    if (folder / "preprocessor_config.json").is_file():
        reader, name = "AutoImageProcessor", "processor"
    return f"""\
from transformers import {reader}, {auto_class}

checkpoint = {CHECKPOINT}
{name} = {reader}.from_pretrained(checkpoint, trust_remote_code=True)
model = {auto_class}.from_pretrained(checkpoint, trust_remote_code=True)"""


def _source(record: dict[str, Any]) -> str:
    """The source as a link, if it is on the Hub, with its commit, if that is known."""
    source = str(record.get("source") or "an unrecorded model")
    name = f"[{source}](https://huggingface.co/{source})" if is_hub_id(source) else _code(source)
    revision = record.get("source_revision")
    return f"{name} at commit {_code(revision)}" if revision else name


def _title(record: dict[str, Any]) -> str:
    kind, chosen = "DiJiang linear attention", ""
    if _exact_alone(record):
        kind, chosen = "attention over a table of fixed size", ", of the keys that mattered most"
    cost = "A converted layer keeps a table of fixed size: a new token costs the same however long the context is."
    if softmax := (record.get("calibration") or {}).get("softmax"):
        cost += f"\n{len(softmax)} of its layers stayed softmax: their cache grows with the context."
    if not record.get("causal", True):
        cost = "Time and memory of a converted layer grow linearly with length."
    return f"""\
# {_plain(_name(record)) or "A model"} with {kind}

This is {_source(record)} with its softmax attention replaced by {kind}{chosen}
([paper]({PAPER})); all other weights start from the source's.
{cost}"""


def _exact_alone(record: dict[str, Any]) -> bool:
    """Whether converted layers have no state."""
    return (record.get("kernel") or {}).get("far", True) is False


def _name(record: dict[str, Any]) -> str:
    return printable(str(record.get("source") or "").rstrip("/").split("/")[-1])


def _usage(example: str, record: dict[str, Any]) -> str:
    needed = record.get("requires_transformers")
    version = f"transformers {_plain(needed)} or later" if needed else "a recent transformers"
    return f"""\
## Use

It needs {version}, and `trust_remote_code=True`, since the attention's code comes with the checkpoint.

```python
{example}
```"""


def _made(record: dict[str, Any]) -> str:
    rows = [("source", _source(record)), ("recipe", _code(record.get("recipe")))]
    rows += [("layers converted", _layers(record.get("layers")))]
    rows += [(name.replace("_", " "), _code(record.get(name))) for name in SHAPE]
    unused = OF_THE_STATE if _exact_alone(record) else ()
    kernel = record.get("kernel") or {}
    rows += [(f"kernel: {name}", _code(value)) for name, value in kernel.items() if name not in unused]
    rows += [("dijiang_convert", _code(record.get("version")))]
    rows += [(name, _code(version)) for name, version in (record.get("made_with") or {}).items()]
    parts = ["## How it was made", _table(("setting", "value"), rows), *_calibration(record), _training(record)]
    return "\n\n".join(parts)


def _calibration(record: dict[str, Any]) -> list[str]:
    """What calibration measured, and what each layer got by it."""
    found = record.get("calibration") or {}
    if "worth" not in found:
        return []
    memory = dict(zip(record.get("layers") or [], record.get("memory") or [], strict=False))
    kept = {layer: ", ".join(_figure(rows) for rows in heads) for layer, heads in memory.items()}
    rows = [
        (layer, f"{sum(worth):.1%}", "stays softmax" if int(layer) in found["softmax"] else kept.get(int(layer), ""))
        for layer, worth in found["worth"].items()
    ]
    told = (
        f"Calibrated on {found['tokens']:,} tokens. With small tables in all layers KL to the source was "
        f"{found['kl']:.3f} nats a token, and {found['repeated_kl']:.3f} where the text repeats an earlier passage. "
        "What each layer has of that:"
    )
    return [told, _table(("layer", "of what is lost", "rows of memory by key/value head"), rows)]


def _training(record: dict[str, Any]) -> str:
    rows = [tuple(_figure(entry.get(name)) for name in STAGE) for entry in record.get("history") or []]
    if not rows:
        return "Not trained since the conversion: `dijiang finetune` brings it nearer to its source."
    header = tuple(name.replace("_", " ") for name in STAGE)
    return "Training since the conversion:\n\n" + _table(header, rows)


def _plots(folder: Path) -> list[str]:
    """What the last training run drew, if it did."""
    shown = [f"![{alt}](plots/{name})" for name, alt in PLOTS.items() if (folder / "plots" / name).is_file()]
    return ["\n\n".join(["## The last training run", *shown])] if shown else []


def _limits(record: dict[str, Any], measured: list[dict[str, Any]]) -> str:
    kernel = record.get("kernel") or {}
    near = ""
    if kernel.get("window"):
        parts = [f"the last {kernel['window']} tokens"]
        parts += [f"the first {kernel['sinks']}"] if kernel.get("sinks") else []
        mean = " on average" if record.get("memory") else ""
        parts += [f"{kernel['memory']} others{mean} that mattered most"] if kernel.get("memory") else []
        near = f" Attended to one by one are {', '.join(parts)}."
    what = "All other tokens are forgotten." if _exact_alone(record) else "All others are added up in a state."
    if near:
        near += f" {what}"
    unmeasured = "" if measured else "\n- It was not measured: `dijiang eval --save` compares it to its source."
    return f"""\
## Limits

- This attention approximates softmax attention.{near} Recalling details from far back is its weak point.
- It has the source's knowledge, biases and licence terms, and no safety training beyond the source's.
- Attention weights (`output_attentions`) do not exist in this form and are not returned.{unmeasured}"""


def _cite() -> str:
    return f"## Citation\n\n```bibtex\n{BIBTEX}\n```"


def _layers(layers: Any) -> str:
    if not isinstance(layers, list) or not layers:
        return "not recorded"
    listed = ", ".join(str(layer) for layer in layers)
    if layers == list(range(layers[0], layers[0] + len(layers))) and len(layers) > 1:
        listed = f"{layers[0]} to {layers[-1]}"
    return f"{len(layers)} ({listed})"


def _code(value: Any) -> str:
    """A value as code, which ends only after more ` than the value has in a row."""
    if value is None:
        return "not recorded"
    text = printable(str(value))
    marks = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{marks} {text} {marks}" if len(marks) > 1 else f"`{text}`"


def _plain(value: Any) -> str:
    """A value as text of which Markdown and HTML make nothing else."""
    return re.sub(r"([\\`*<>\[\]&#])", r"\\\1", printable(str(value)))


def _figure(value: Any) -> str:
    match value:
        case None:
            return ""
        case float():
            return f"{value:.4g}"
        case int():
            return f"{value:,}"
        case _:
            return _plain(value)


def _table(header: tuple[str, ...], rows: list[Any]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
