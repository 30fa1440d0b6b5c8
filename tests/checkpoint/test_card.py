"""The model card, read back with the client that the Hub's own tools use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from huggingface_hub import ModelCard

from dijiang_convert.checkpoint.card import card_for, write_card
from dijiang_convert.checkpoint.quality import EVALUATION, add_quality, read_quality
from dijiang_convert.errors import DijiangError
from tests.hub import Hub

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


def test_body_tells_whether_there_is_a_state(tmp_path: Path) -> None:
    kernel = {"window": 64, "sinks": 4, "memory": 464, "decay": "learned"}
    with_state = card(tmp_path, RECORD | {"kernel": {**kernel, "far": True}}).text
    assert "All others are added up in a state." in with_state and "| kernel: decay | `learned` |" in with_state
    without = card(tmp_path, RECORD | {"kernel": {**kernel, "far": False}}).text
    assert "of the keys that mattered most" in without and "All other tokens are forgotten." in without
    assert "kernel: decay" not in without and "| kernel: memory | `464` |" in without


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


def test_metadata_of_the_source_and_of_the_training(tmp_path: Path) -> None:
    history = [{"stage": "logits", "datasets": ["b/two", "a/one"]}, {"stage": "more", "datasets": ["a/one"]}]
    inherited = {"license": "other", "license_name": "llama", "license_link": "LICENSE", "language": ["en", "de"]}
    data = card(tmp_path, RECORD | inherited | {"history": history}).data.to_dict()
    assert {name: data[name] for name in inherited} == inherited
    assert data["datasets"] == ["a/one", "b/two"]
    assert card(tmp_path, RECORD | {"language": "en"}).data.to_dict()["language"] == "en"


def test_versions(tmp_path: Path) -> None:
    text = card(tmp_path, RECORD | {"made_with": {"torch": "2.13.0", "transformers": "5.24.0"}}).text
    assert "| torch | `2.13.0` |" in text and "| transformers | `5.24.0` |" in text


# ------------------------------------------------------------------------------------------------- what was measured

FOUND = {
    "perplexity": 12.5,
    "baseline_perplexity": 12.0,
    "perplexity_ratio": 1.0417,
    "kl_divergence": 0.03,
    "tokens": 9,
}


def test_quality(tmp_path: Path) -> None:
    assert "It was not measured" in card(tmp_path).text
    add_quality(tmp_path, "finetune", None, 4096, {"perplexity": 13, "untrained_perplexity": 40.0})
    tasks = {"lambada": {"acc,none": 0.5, "acc_stderr,none": 0.01, "alias": "lambada"}}
    add_quality(tmp_path, "eval", "emozilla/pg19-test", 100_000, {**FOUND, "tasks": tasks})
    made = card(tmp_path)
    assert "It was not measured" not in made.text
    assert "By `dijiang finetune` on 4,096 tokens of text that was held out:" in made.text
    where = "[emozilla/pg19-test](https://huggingface.co/datasets/emozilla/pg19-test)"
    assert f"By `dijiang eval` on 100,000 tokens of {where}:" in made.text
    for row in ("| before training | 40 |", "| the original's | 12 |", "| lambada: acc | 0.5 |"):
        assert row in made.text
    results = made.data.eval_results
    assert results is not None and made.data.model_name == "pythia-410m-dijiang"
    found = {(each.dataset_type, each.metric_type): each.metric_value for each in results}
    assert found == {
        ("text", "perplexity"): 13.0,
        ("text", "untrained_perplexity"): 40.0,
        **{("emozilla/pg19-test", name): FOUND[name] for name in FOUND if name != "tokens"},
        ("lambada", "acc"): 0.5,
    }


def test_a_newer_measurement_replaces_its_like(tmp_path: Path) -> None:
    for value in (20.0, 10.0):
        add_quality(tmp_path, "eval", "a/one", 5, {"perplexity": value})
    add_quality(tmp_path, "eval", "a/two", 5, {"perplexity": 30.0})
    assert [each["figures"]["perplexity"] for each in read_quality(tmp_path)] == [10.0, 30.0]


def test_damaged_measurements_are_left_out(tmp_path: Path) -> None:
    for content in ("{", "{}", '[1, {"by": "x"}]'):
        (tmp_path / EVALUATION).write_text(content)
        assert "## Quality" not in card(tmp_path).text


def refusal(card: ModelCard, hub: Hub) -> str:
    """What the Hub says against a card; here one that knows the same mistakes."""
    body = json.dumps({"repoType": "model", "content": str(card)}).encode()
    try:
        with urlopen(Request(f"{hub.url}/api/validate-yaml", data=body)):
            return ""
    except HTTPError as error:
        return error.read().decode()


def test_the_hub_takes_the_metadata(tmp_path: Path, hub: Hub) -> None:
    add_quality(tmp_path, "eval", "emozilla/pg19-test", 100_000, {**FOUND, "tasks": {"lambada": {"acc,none": 0.5}}})
    add_quality(tmp_path, "finetune", None, 10, FOUND)
    for language in ("en", ["en", "de"]):
        history = [{"stage": "a", "datasets": ["a/b"]}]
        assert refusal(card(tmp_path, RECORD | {"language": language, "history": history}), hub) == ""
    made = card(tmp_path)
    made.data.license = "mine"
    assert "license" in refusal(made, hub)


# --------------------------------------------------------------------------------------------- what a person edited


def edited(folder: Path, *changes: tuple[str, str]) -> None:
    text = (folder / "README.md").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    (folder / "README.md").write_text(text)


MINE = (
    ("license: apache-2.0", "license: mit\nthumbnail: cat.png"),  # changed and added
    ("library_name: transformers\n", ""),  # removed
    ("## Citation", "## For whom\n\nFor cats.\n\n## Citation"),
    ("Recalling details from far back is its weak point.", "It forgets."),
)


def check_mine(text: str) -> None:
    data = ModelCard(text).data.to_dict()
    assert data["license"] == "mit" and data["thumbnail"] == "cat.png" and "library_name" not in data
    assert text.count("For cats.") == 1 and text.index("## For whom") < text.index("## Citation")
    assert "It forgets." in text and "weak point" not in text


def test_edits_stay(tmp_path: Path) -> None:
    card(tmp_path)
    edited(tmp_path, *MINE)
    add_quality(tmp_path, "eval", None, 5, FOUND)
    made = card(tmp_path, RECORD | {"recipe": "pure"})
    check_mine(made.content)
    assert "| recipe | `pure` |" in made.text and "## Quality" in made.text  # the rest is new
    assert made.text.index("## How it was made") < made.text.index("## Quality") < made.text.index("## Limits")
    assert card(tmp_path, RECORD | {"recipe": "pure"}).content == made.content


def test_a_section_that_was_removed_stays_so(tmp_path: Path) -> None:
    text = card(tmp_path).content
    start, end = text.index("## Limits"), text.index("## Citation")
    (tmp_path / "README.md").write_text(text[:start] + text[end:])
    for _ in range(2):
        assert "\n## Limits" not in card(tmp_path, RECORD | {"recipe": "pure"}).content


def test_a_part_of_ours_that_is_no_longer_written_goes(tmp_path: Path) -> None:
    add_quality(tmp_path, "eval", None, 5, FOUND)
    assert "model-index" in card(tmp_path).content
    (tmp_path / EVALUATION).unlink()
    text = card(tmp_path).content
    assert "model-index" not in text and "## Quality" not in text


def test_a_card_that_is_all_a_persons(tmp_path: Path) -> None:
    mine = "---\nlicense: mit\n---\n\n# Mine\n\n```\n## no heading\n```\n\n## Use\n\nLike this.\n\n## Use\n\nOr so.\n"
    (tmp_path / "README.md").write_text(mine.replace("\n", "\r\n"))
    text = card(tmp_path).content
    assert "license: mit" in text and "# Mine" in text and "DiJiang linear attention\n" not in text.splitlines()[0]
    assert text.index("## no heading") < text.index("Like this.") < text.index("Or so.") < text.index("## Limits")
    assert card(tmp_path).content == text


def test_edits_on_the_hub_stay(tmp_path: Path, hub: Hub) -> None:
    """Of a card that was pushed, edited there, and is pushed again from another checkpoint."""
    path = tmp_path / "README.md"
    card(tmp_path)
    there = card_for("me/x", path, None)
    assert 'checkpoint = "me/x"' in there
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "README.md").write_text(there)
    edited(tmp_path / "web", *MINE)
    web = (tmp_path / "web" / "README.md").read_text()

    card(tmp_path, RECORD | {"recipe": "pure"})
    again = card_for("me/x", path, web)
    check_mine(again)
    assert "| recipe | `pure` |" in again and 'checkpoint = "me/x"' in again
    assert card_for("me/x", path, again) == again  # the second push changes nothing

    edited(tmp_path, ("## Use", "## Use\n\nHere."))
    assert "Here." in card_for("me/x", path, again)


def test_edits_here_and_on_the_hub(tmp_path: Path) -> None:
    card(tmp_path)
    path = tmp_path / "README.md"
    edited(tmp_path, ("## Limits", "## Limits\n\nFirst."))
    there = card_for("me/x", path, None)
    edited(tmp_path, ("First.", "Second."))
    assert "Second." in card_for("me/x", path, there)  # nobody changed it there since
    there = card_for("me/x", path, there)
    assert "Third." in card_for("me/x", path, there.replace("Second.", "Third."))  # nobody changed it here since
    edited(tmp_path, ("Second.", "Fourth."))
    with pytest.raises(DijiangError) as call:
        card_for("me/x", path, there.replace("Second.", "Third."))
    assert str(call.value) == "README.md: Limits was edited here and on the Hub in me/x: make both the same"


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(DijiangError, match=r"config\.json"):
        write_card(tmp_path)
