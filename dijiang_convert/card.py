"""The model card of a checkpoint, written from what its own config.json records.

The card says what was done and nothing that was not recorded: no benchmark figures, no claim about quality.
It has no name of its own, since a folder is written under a temporary name and may be pushed under any.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .sources import is_hub_id, read_json

PAPER = "https://arxiv.org/abs/2403.19928"
BIBTEX = """\
@misc{chen2024dijiang,
  title         = {DiJiang: Efficient Large Language Models through Compact Kernelization},
  author        = {Chen, Hanting and Liu, Zhicheng and Wang, Xutao and Tian, Yuchuan and Wang, Yunhe},
  year          = {2024},
  eprint        = {2403.19928},
  archivePrefix = {arXiv},
}"""

SHAPE = ("heads", "kv_heads", "head_dim", "value_dim")
STAGE = ("stage", "tokens", "first_loss", "last_loss")

# Of a training run, as the report draws them.
PLOTS = {
    "loss.png": "loss of every stage against tokens",
    "transfer.png": "error of every layer in attention transfer",
    "perplexity.png": "perplexity on held-out text by position: original, before and after training",
}

# What the checkpoint's auto_map offers, best first, and the Hub's name for that task.
TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModel": "feature-extraction",
}


def write_card(folder: Path) -> None:
    """Write the README.md of the checkpoint in `folder`, replacing any that is there.

    Raises:
        DijiangError: `folder` has no readable config.json.
    """
    from huggingface_hub import ModelCard, ModelCardData

    config = read_json(folder / "config.json")
    record = config.get("dijiang") or {}
    auto_class = _auto_class(config)
    source = str(record.get("source") or "")
    # The Hub links a card to its base model; a folder's name means nothing there.
    base: dict[str, Any] = {"base_model": source, "base_model_relation": "finetune"} if is_hub_id(source) else {}
    licence = record.get("license")
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=TASKS[auto_class],
        tags=["dijiang", "linear-attention", "custom_code"],
        license=licence if isinstance(licence, str) else None,
        **base,
    )
    body = "\n\n".join(
        [_title(record), _usage(auto_class, record), _made(record), *_plots(folder), _limits(record), _cite()]
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n").save(folder / "README.md")


def _auto_class(config: dict[str, Any]) -> str:
    offered = config.get("auto_map") or {}
    return next((name for name in TASKS if name in offered), "AutoModelForCausalLM")


def _source(record: dict[str, Any]) -> str:
    """The source as a link, if it is on the Hub, with its commit, if that is known."""
    source = str(record.get("source") or "an unrecorded model")
    name = f"[{source}](https://huggingface.co/{source})" if is_hub_id(source) else f"`{source}`"
    revision = record.get("source_revision")
    return f"{name} at commit `{revision}`" if revision else name


def _title(record: dict[str, Any]) -> str:
    name = str(record.get("source") or "").rstrip("/").split("/")[-1] or "A model"
    return f"""\
# {name} with DiJiang linear attention

This is {_source(record)} with its softmax attention replaced by DiJiang linear attention
([paper]({PAPER})); all other weights start from the source's.
A converted layer keeps a state of fixed size: a new token costs the same however long the context is."""


def _usage(auto_class: str, record: dict[str, Any]) -> str:
    needed = record.get("requires_transformers")
    version = f"transformers {needed} or later" if needed else "a recent transformers"
    return f"""\
## Use

It needs {version}, and `trust_remote_code=True`, since the attention's code comes with the checkpoint.

```python
from transformers import AutoTokenizer, {auto_class}

checkpoint = "owner/name"  # this repository, or the folder that it lies in
tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
model = {auto_class}.from_pretrained(checkpoint, trust_remote_code=True)
```"""


def _made(record: dict[str, Any]) -> str:
    rows = [("source", _source(record)), ("recipe", _code(record.get("recipe")))]
    rows += [("layers converted", _layers(record.get("layers")))]
    rows += [(name.replace("_", " "), _code(record.get(name))) for name in SHAPE]
    rows += [(f"kernel: {name}", _code(value)) for name, value in (record.get("kernel") or {}).items()]
    rows += [("dijiang_convert", _code(record.get("version")))]
    return "## How it was made\n\n" + _table(("setting", "value"), rows) + "\n\n" + _training(record)


def _training(record: dict[str, Any]) -> str:
    rows = [tuple(_figure(entry.get(name)) for name in STAGE) for entry in record.get("history") or []]
    if not rows:
        return "Not trained since the conversion: expect poor text until `dijiang finetune` has run."
    header = tuple(name.replace("_", " ") for name in STAGE)
    return "Training since the conversion:\n\n" + _table(header, rows)


def _plots(folder: Path) -> list[str]:
    """What the last training run drew, if it did."""
    shown = [f"![{alt}](plots/{name})" for name, alt in PLOTS.items() if (folder / "plots" / name).is_file()]
    return ["\n\n".join(["## The last training run", *shown])] if shown else []


def _limits(record: dict[str, Any]) -> str:
    window = (record.get("kernel") or {}).get("window")
    near = f" Only the last {window} tokens are attended to exactly." if window else ""
    return f"""\
## Limits

- Linear attention approximates softmax attention.{near} Recalling details from far back is its weak point.
- It has the source's knowledge, biases and licence terms, and no safety training beyond the source's.
- Attention weights (`output_attentions`) do not exist in this form and are not returned.
- This card tells how it was made, not how good it is: `dijiang eval` compares it to its source."""


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
    return "not recorded" if value is None else f"`{value}`"


def _figure(value: Any) -> str:
    match value:
        case None:
            return ""
        case float():
            return f"{value:.4g}"
        case int():
            return f"{value:,}"
        case _:
            return str(value)


def _table(header: tuple[str, ...], rows: list[Any]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
