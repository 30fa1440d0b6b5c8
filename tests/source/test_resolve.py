"""Sources: aliases, Hub ids and folders, and what of a repository is downloaded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from dijiang_convert.errors import DijiangError
from dijiang_convert.source.names import ALIASES, PLAIN_IDS, is_hub_id, parse_name
from dijiang_convert.source.resolve import Source, download, read_config, resolve
from tests.hub import Hub
from tests.refusals import message
from tests.source.repositories import BASE, CONFIG, WEIGHTS, names


def index_of(*shards: str) -> str:
    return json.dumps({"metadata": {}, "weight_map": {f"layer.{i}": shard for i, shard in enumerate(shards)}})


def test_aliases_are_the_models_of_the_paper() -> None:
    expected = {
        "opt-125m": "facebook/opt-125m",
        "opt-350m": "facebook/opt-350m",
        "opt-1.3b": "facebook/opt-1.3b",
        "opt-2.7b": "facebook/opt-2.7b",
        "opt-6.7b": "facebook/opt-6.7b",
        "tinyllama-1.1b": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
        "llama2-7b": "meta-llama/Llama-2-7b-hf",
        "llama2-13b": "meta-llama/Llama-2-13b-hf",
    }
    for size in ("70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b"):
        expected[f"pythia-{size}"] = f"EleutherAI/pythia-{size}"
        expected[f"pythia-{size}-deduped"] = f"EleutherAI/pythia-{size}-deduped"
    assert expected == ALIASES
    assert len(ALIASES) == 24
    assert all(is_hub_id(repo_id) for repo_id in ALIASES.values())


@pytest.mark.parametrize(
    ("text", "is_id"),
    [
        ("EleutherAI/pythia-410m", True),
        ("gpt2", False),
        ("a/b/c", False),
        ("./a", False),
        ("../a", False),
        ("a/", False),
        ("a b/c", False),
    ],
)
def test_hub_id(text: str, is_id: bool) -> None:
    assert is_hub_id(text) is is_id


def test_alias_resolves_to_its_repository_and_commit(hub: Hub) -> None:
    sha = hub.add_repo("EleutherAI/pythia-410m", BASE)
    assert resolve("pythia-410m") == Source("pythia-410m", "EleutherAI/pythia-410m", sha, None)
    assert resolve("Pythia-410M").repo_id == "EleutherAI/pythia-410m"


def test_revision_is_pinned_to_its_commit(hub: Hub) -> None:
    old = hub.add_repo("sources/pinned", BASE)
    hub.repos["sources/pinned"].branches["step1000"] = old
    new = hub.add_repo("sources/pinned", BASE | {"config.json": '{"model_type": "opt"}'})
    assert old != new

    assert resolve("sources/pinned").revision == new
    assert resolve("sources/pinned", "step1000").revision == old
    assert resolve("sources/pinned", old).revision == old
    assert read_config(resolve("sources/pinned", "step1000"))["model_type"] == "gpt_neox"

    # What was resolved stays what is read, whatever happens to the branch meanwhile.
    source = resolve("sources/pinned")
    hub.add_repo("sources/pinned", BASE | {"config.json": '{"model_type": "later"}'})
    assert read_config(source)["model_type"] == "opt"


@pytest.mark.parametrize(
    ("text", "repo_id", "revision"),
    [
        ("https://huggingface.co/owner/na.me", "owner/na.me", None),
        ("http://www.huggingface.co/owner/name/", "owner/name", None),
        ("https://hf.co/owner/name/tree/step1000", "owner/name", "step1000"),
        ("https://huggingface.co/owner/name/blob/main/config.json?raw=true", "owner/name", "main"),
        ("owner/name@step1000", "owner/name", "step1000"),
        ("owner/name@refs/pr/1", "owner/name", "refs/pr/1"),
        ("gpt2", "openai-community/gpt2", None),
        ("bert-base-uncased", "google-bert/bert-base-uncased", None),
        ("Pythia-70M", "EleutherAI/pythia-70m", None),
        ("https://example.com/owner/name", "https://example.com/owner/name", None),
        ("name@main", "name@main", None),
    ],
)
def test_what_people_call_a_model(text: str, repo_id: str, revision: str | None) -> None:
    assert parse_name(text, None) == (repo_id, revision)
    if revision is not None:
        assert parse_name(text, revision) == (repo_id, revision)
        with pytest.raises(DijiangError) as call:
            parse_name(text, "other")
        assert message(call).endswith(f"is at {revision}, and --revision says other: give one of them")


def test_an_address_and_an_id_with_a_revision_are_found(hub: Hub) -> None:
    old = hub.add_repo("sources/named", BASE)
    hub.repos["sources/named"].branches["step1000"] = old
    new = hub.add_repo("sources/named", BASE | {"config.json": '{"model_type": "opt"}'})
    assert resolve("https://huggingface.co/sources/named").revision == new
    for text in ("sources/named@step1000", "https://huggingface.co/sources/named/tree/step1000"):
        assert resolve(text) == Source("named", "sources/named", old, None)
    assert resolve("sources/named@step1000").name == "named"


def test_license_comes_from_the_model_card(hub: Hub) -> None:
    hub.add_repo("sources/licensed", BASE | {"README.md": "---\nlicense: apache-2.0\n---\n\nA model.\n"})
    hub.add_repo("sources/unlicensed", BASE)
    assert resolve("sources/licensed").card.get("license") == "apache-2.0"
    assert resolve("sources/unlicensed").card.get("license") is None


def test_plain_ids_have_one_owner_each() -> None:
    assert all(is_hub_id(repo_id) and repo_id.endswith(f"/{name}") for name, repo_id in PLAIN_IDS.items())
    assert not PLAIN_IDS.keys() & ALIASES.keys()


def test_near_miss_of_an_alias_is_suggested() -> None:
    with pytest.raises(DijiangError) as call:
        resolve("pythia-410")
    assert "pythia-410m" in message(call) and "owner/name" in message(call)


def test_name_without_owner_is_refused_with_what_it_could_be(hub: Hub) -> None:
    hub.requests.clear()
    with pytest.raises(DijiangError) as call:
        resolve("xyzzy")
    assert message(call).endswith("give one of these, as pythia-410m or EleutherAI/pythia-410m")
    assert hub.requests == []


@pytest.mark.parametrize("path", ["./no", "../no", "/no", "~/no/where", "~nobody/no", "owner/name/"])
def test_path_that_does_not_exist(path: str, hub: Hub) -> None:
    hub.requests.clear()
    with pytest.raises(DijiangError) as call:
        resolve(path)
    assert message(call) == f"no such folder: {path}"
    assert hub.requests == []


def test_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(DijiangError) as call:
        resolve(str(tmp_path / "model.gguf"))
    assert "is a file" in message(call)


def test_folder_goes_before_alias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "pythia-410m"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("pythia-410m") == Source("pythia-410m", None, None, Path("pythia-410m"))
    monkeypatch.chdir(folder)
    assert resolve(".").name == "pythia-410m"


def test_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DijiangError) as call:
        resolve(str(tmp_path), "main")
    assert "only the Hub has revisions" in message(call)


def test_config_is_read_without_weights(hub: Hub) -> None:
    hub.add_repo("sources/config", BASE | {"model.safetensors": WEIGHTS})
    hub.requests.clear()
    assert read_config(resolve("sources/config")) == json.loads(CONFIG)
    asked = [request.path for request in hub.requests]
    assert any(path.endswith("/config.json") for path in asked)
    assert not any("safetensors" in path for path in asked)


def test_repository_without_config(hub: Hub) -> None:
    hub.add_repo("sources/no-config", {"README.md": "nothing"})
    with pytest.raises(DijiangError) as call:
        read_config(resolve("sources/no-config"))
    assert "sources/no-config has no config.json" in message(call)


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(DijiangError) as call:
        read_config(resolve(str(tmp_path)))
    assert f"{tmp_path} has no config.json" in message(call)


@pytest.mark.parametrize("content", ["{not json", "[1, 2]", b"\xff\xfe\x00"])
def test_invalid_config(content: str | bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DijiangError) as call:
        read_config(resolve(str(tmp_path)))
    assert "config.json" in message(call) and "JSON" in message(call)


def test_download_takes_safetensors_and_nothing_foreign(hub: Hub) -> None:
    wanted: dict[str, str | bytes] = BASE | {
        "generation_config.json": "{}",
        "tokenizer.model": b"sentencepiece",
        "merges.txt": "a b",
        "chat_template.jinja": "{{ messages }}",
        "LICENSE": "text",
        "model.safetensors": WEIGHTS,
    }
    foreign: dict[str, str | bytes] = {
        "pytorch_model.bin": b"pickle",
        "pytorch_model.bin.index.json": index_of("pytorch_model.bin"),
        "model.fp16.safetensors": WEIGHTS,
        "consolidated.safetensors": WEIGHTS,
        "tf_model.h5": b"tf",
        "flax_model.msgpack": b"flax",
        "model.onnx": b"onnx",
        "model.gguf": b"gguf",
        "original/consolidated.00.pth": b"pth",
        "original/params.json": "{}",
        "onnx/model.onnx": b"onnx",
        "onnx/config.json": "{}",
        "training.py": "import os",
    }
    hub.add_repo("sources/mixed", wanted | foreign)
    resolved = resolve("sources/mixed")
    hub.requests.clear()
    source = download(resolved)

    assert names(source) == set(wanted)
    assert source.folder is not None and (source.folder / "model.safetensors").read_bytes() == WEIGHTS
    assert dataclasses.replace(source, folder=None) == resolved
    asked = " ".join(request.path for request in hub.requests)
    assert not any(name in asked for name in foreign)


def test_second_download_asks_for_no_file(hub: Hub) -> None:
    hub.add_repo("sources/cached", BASE | {"model.safetensors": WEIGHTS})
    first = download(resolve("sources/cached"))
    hub.requests.clear()
    assert download(resolve("sources/cached")) == first
    assert not any("/resolve/" in request.path for request in hub.requests)
    assert read_config(first) == json.loads(CONFIG)


def test_download_takes_the_shards_of_the_index(hub: Hub) -> None:
    shards = {f"model-0000{i}-of-00002.safetensors": WEIGHTS + bytes([i]) for i in (1, 2)}
    index = {"model.safetensors.index.json": index_of(*shards)}
    foreign = {"consolidated.safetensors": b"x", "pytorch_model.bin": b"x"}
    hub.add_repo("sources/shards", BASE | shards | index | foreign)
    assert names(download(resolve("sources/shards"))) == {*BASE, *shards, *index}


def test_download_falls_back_to_bin(hub: Hub) -> None:
    hub.add_repo("sources/bin", BASE | {"pytorch_model.bin": b"pickle", "tf_model.h5": b"tf"})
    assert names(download(resolve("sources/bin"))) == {*BASE, "pytorch_model.bin"}

    shards = {f"pytorch_model-0000{i}-of-00002.bin": bytes([i]) for i in (1, 2)}
    index = {"pytorch_model.bin.index.json": index_of(*shards)}
    hub.add_repo("sources/bin-shards", BASE | shards | index | {"flax_model.msgpack": b"flax"})
    assert names(download(resolve("sources/bin-shards"))) == {*BASE, *shards, *index}


def test_download_without_weights_or_with_a_missing_shard(hub: Hub) -> None:
    hub.add_repo("sources/empty", BASE | {"tf_model.h5": b"tf"})
    with pytest.raises(DijiangError) as call:
        download(resolve("sources/empty"))
    assert "sources/empty has no model.safetensors or pytorch_model.bin" in message(call)

    shard = "model-00001-of-00001.safetensors"
    hub.add_repo("sources/torn", BASE | {"model.safetensors.index.json": index_of(shard)})
    with pytest.raises(DijiangError) as call:
        download(resolve("sources/torn"))
    assert f"sources/torn lacks {shard}" in message(call)


def test_download_of_a_folder_is_the_folder(tmp_path: Path) -> None:
    source = resolve(str(tmp_path))
    assert download(source) is source
