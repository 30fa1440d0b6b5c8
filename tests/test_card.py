"""The model card, read back with the client that the Hub's own tools use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from dijiang_convert.card import write_card
from dijiang_convert.errors import DijiangError

RECORD: dict[str, Any] = {
    "version": "0.1.0",
    "source": "EleutherAI/pythia-410m",
    "source_revision": "9879c9b5f8bea9051dcb0e68dff21493d67e9d4f",
    "recipe": "default",
    "kernel": {"window": 64, "decay": True},
    "layers": list(range(24)),
    "heads": 16,
    "kv_heads": 8,
    "head_dim": 64,
    "value_dim": 64,
    "history": [
        {"stage": "attention_transfer", "tokens": 20_000_000, "first_loss": 0.91234567, "last_loss": 0.12},
        {"stage": "logits", "tokens": 20_000_000, "first_loss": 3.1, "last_loss": 2.75},
    ],
    "license": "apache-2.0",
    "requires_transformers": "5.23",
}


def card(folder: Path, record: Any = RECORD, **config: Any) -> ModelCard:
    (folder / "config.json").write_text(json.dumps({"model_type": "dijiang_gpt_neox", "dijiang": record} | config))
    write_card(folder)
    made: ModelCard = ModelCard.load(folder / "README.md")
    return made


def test_metadata(tmp_path: Path) -> None:
    assert card(tmp_path).data.to_dict() == {
        "base_model": "EleutherAI/pythia-410m",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["dijiang", "linear-attention", "custom_code"],
    }


@pytest.mark.parametrize("source", ["pythia-410m", "/data/pythia-410m", "yes: no", "a/b/c", None])
def test_folder_is_no_base_model(source: str | None, tmp_path: Path) -> None:
    data = card(tmp_path, RECORD | {"source": source}).data.to_dict()
    assert "base_model" not in data and "base_model_relation" not in data


@pytest.mark.parametrize("licence", [None, ["mit", "other"]])
def test_unknown_license_is_left_out(licence: Any, tmp_path: Path) -> None:
    assert "license" not in card(tmp_path, RECORD | {"license": licence}).data.to_dict()


def test_body_tells_what_was_done(tmp_path: Path) -> None:
    text = card(tmp_path).text
    link = "[EleutherAI/pythia-410m](https://huggingface.co/EleutherAI/pythia-410m)"
    assert text.lstrip().startswith("# pythia-410m with DiJiang linear attention\n")
    assert f"| source | {link} at commit `{RECORD['source_revision']}` |" in text
    assert "| recipe | `default` |" in text
    assert "| layers converted | 24 (0 to 23) |" in text
    assert "| kv heads | `8` |" in text
    assert "| kernel: window | `64` |" in text
    assert "| kernel: decay | `True` |" in text
    assert "| dijiang_convert | `0.1.0` |" in text
    assert "| stage | tokens | first loss | last loss |" in text
    assert "| attention_transfer | 20,000,000 | 0.9123 | 0.12 |" in text
    assert "| logits | 20,000,000 | 3.1 | 2.75 |" in text
    assert "the last 64 tokens" in text
    assert "Not trained" not in text


def test_body_tells_how_to_load_and_cite(tmp_path: Path) -> None:
    text = card(tmp_path).text
    assert "AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)" in text
    assert "AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)" in text  # else it asks, and waits
    assert "transformers 5.23 or later" in text
    assert "{2403.19928}" in text
    assert "{DiJiang: Efficient Large Language Models through Compact Kernelization}" in text
    for author in ("Chen, Hanting", "Liu, Zhicheng", "Wang, Xutao", "Tian, Yuchuan", "Wang, Yunhe"):
        assert author in text


def test_untrained_checkpoint_says_so(tmp_path: Path) -> None:
    text = card(tmp_path, RECORD | {"history": []}).text
    assert "Not trained since the conversion" in text and "| stage |" not in text


@pytest.mark.parametrize(
    ("auto_map", "auto_class", "task"),
    [
        ({"AutoModel": "m.A", "AutoModelForCausalLM": "m.B"}, "AutoModelForCausalLM", "text-generation"),
        ({"AutoModel": "m.A", "AutoModelForMaskedLM": "m.B"}, "AutoModelForMaskedLM", "fill-mask"),
        ({"AutoConfig": "c.C", "AutoModel": "m.A"}, "AutoModel", "feature-extraction"),
    ],
)
def test_task_follows_auto_map(auto_map: dict[str, str], auto_class: str, task: str, tmp_path: Path) -> None:
    made = card(tmp_path, auto_map=auto_map)
    assert made.data.to_dict()["pipeline_tag"] == task
    assert f"model = {auto_class}.from_pretrained(" in made.text


@pytest.mark.parametrize("missing", [*RECORD, "everything"])
def test_missing_keys_never_crash(missing: str, tmp_path: Path) -> None:
    record = {} if missing == "everything" else {name: value for name, value in RECORD.items() if name != missing}
    made = card(tmp_path, record)
    assert made.data.to_dict()["library_name"] == "transformers"
    assert "## Limits" in made.text and "None" not in made.text


@pytest.mark.parametrize("record", [None, {"kernel": None, "layers": None, "history": None}, {"history": [{}]}])
def test_null_values_never_crash(record: Any, tmp_path: Path) -> None:
    assert "None" not in card(tmp_path, record).text


@pytest.mark.parametrize(("layers", "told"), [([3], "1 (3)"), ([0, 1, 2], "3 (0 to 2)"), ([0, 2, 5], "3 (0, 2, 5)")])
def test_layers(layers: list[int], told: str, tmp_path: Path) -> None:
    assert f"| layers converted | {told} |" in card(tmp_path, RECORD | {"layers": layers}).text


def test_table_cells_are_escaped(tmp_path: Path) -> None:
    assert r"| a\|b |" in card(tmp_path, RECORD | {"history": [{"stage": "a|b", "tokens": 1}]}).text


def test_card_is_rewritten(tmp_path: Path) -> None:
    first = card(tmp_path).text
    assert card(tmp_path).text == first
    assert card(tmp_path, RECORD | {"recipe": "pure"}).text != first


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(DijiangError, match=r"config\.json"):
        write_card(tmp_path)
