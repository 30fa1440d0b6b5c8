"""Pushing to the loopback Hub with the real client."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.hf_api import RepoFile
from safetensors.numpy import save

from dijiang_convert.errors import DijiangError
from dijiang_convert.push import PushResult, push
from tests.hub import Hub
from tests.push.pushing import ALLOWED, INDEX, SHARDS, size
from tests.refusals import message


def test_push_creates_the_repository_with_one_commit(checkpoint: Path, hub: Hub) -> None:
    before = hub.bytes_received
    result = push(checkpoint, "push/new")

    first, initial = hub.history("push/new")
    assert initial.message == "initial commit" and initial.parent is None
    assert result == PushResult("push/new", first.sha, size(checkpoint, *ALLOWED), f"{hub.url}/push/new")
    assert hub.bytes_received - before == result.bytes_uploaded
    assert not hub.repos["push/new"].private

    held = hub.files("push/new")
    assert set(held) == ALLOWED | {".gitattributes"}
    assert all(held[name] == (checkpoint / name).read_bytes() for name in ALLOWED)
    fetched = hf_hub_download("push/new", SHARDS[0], revision=result.commit)
    assert Path(fetched).read_bytes() == (checkpoint / SHARDS[0]).read_bytes()


def test_only_allowed_files_leave(checkpoint: Path, hub: Hub) -> None:
    for name in (
        ".env",
        ".hidden.json",
        "optimizer.pt",
        "pytorch_model.bin",
        "training_args.bin",
        "trainer_state.json",
        "optimizer.safetensors",
        "notes.md",
        "runs/events.json",
        "checkpoint-100/model.safetensors",
        "checkpoint-100/config.json",
        "__pycache__/modeling_dijiang.py",
    ):
        path = checkpoint / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("private")
    push(str(checkpoint), "push/allowed")
    assert set(hub.files("push/allowed")) == ALLOWED | {".gitattributes"}


def test_modules_of_sentence_transformers_come_along(checkpoint: Path, hub: Hub) -> None:
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}  # the last has no files
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (checkpoint / "modules.json").write_text(json.dumps(modules))
    (checkpoint / "1_Pooling").mkdir()
    (checkpoint / "1_Pooling" / "config.json").write_text("{}")
    (checkpoint / "1_Pooling" / ".hidden.json").write_text("{}")
    push(checkpoint, "push/modules")
    assert set(hub.files("push/modules")) == ALLOWED | {".gitattributes", "modules.json", "1_Pooling/config.json"}
    (checkpoint / "modules.json").write_text(json.dumps([{**modules[1], "path": "../secrets"}]))
    (checkpoint.parent / "secrets").mkdir()
    with pytest.raises(DijiangError, match="names ../secrets, no folder of"):
        push(checkpoint, "push/modules")


def test_second_push_transfers_nothing(checkpoint: Path, hub: Hub) -> None:
    first = push(checkpoint, "push/twice")
    before = hub.bytes_received
    hub.requests.clear()
    second = push(checkpoint, "push/twice")
    assert second == PushResult("push/twice", first.commit, 0, first.url)
    assert hub.bytes_received == before
    assert len(hub.history("push/twice")) == 2  # the initial commit and the first push
    asked = [request.path for request in hub.requests]
    assert asked and not any(path.startswith(("/lfs", "/api/models/push/twice/commit")) for path in asked)


@pytest.mark.parametrize("name", [SHARDS[1], "modeling_dijiang.py"])
def test_push_sends_only_what_changed(name: str, checkpoint: Path, hub: Hub) -> None:
    repo = f"push/changed-{Path(name).suffix[1:]}"
    push(checkpoint, repo)
    data = bytearray((checkpoint / name).read_bytes())
    data[-1] ^= 1  # the same size: only the content tells
    (checkpoint / name).write_bytes(data)
    before = hub.bytes_received
    result = push(checkpoint, repo)
    assert result.bytes_uploaded == len(data) == hub.bytes_received - before
    assert result.commit == hub.history(repo)[0].sha and len(hub.history(repo)) == 3
    assert hub.files(repo)[name] == bytes(data)


def test_shards_of_another_version_are_removed(checkpoint: Path, hub: Hub) -> None:
    """A stray model.safetensors would be loaded in place of the index; other files are the owner's."""
    old = {"model.safetensors": b"old", "model-00003-of-00003.safetensors": b"old", "notes.md": b"mine"}
    hub.add_repo("push/stale", old)
    push(checkpoint, "push/stale")
    assert set(hub.files("push/stale")) == ALLOWED | {"notes.md"}
    assert len(hub.history("push/stale")) == 2


def test_push_to_a_branch(checkpoint: Path, hub: Hub) -> None:
    main = push(checkpoint, "push/branch")
    (checkpoint / "config.json").write_text((checkpoint / "config.json").read_text() + "\n")
    result = push(checkpoint, "push/branch", revision="stage/2")
    assert result.url == f"{hub.url}/push/branch/tree/stage/2"
    assert result.bytes_uploaded == size(checkpoint, "config.json")  # the branch starts from main
    assert hub.repos["push/branch"].branches == {"main": main.commit, "stage/2": result.commit}
    assert push(checkpoint, "push/branch", revision="stage/2").bytes_uploaded == 0
    assert hub.repos["push/branch"].branches["main"] == main.commit


def test_private(checkpoint: Path, hub: Hub) -> None:
    push(checkpoint, "push/secret", private=True)
    assert hub.repos["push/secret"].private
    assert push(checkpoint, "push/secret", private=True).bytes_uploaded == 0

    hub.add_repo("push/public", {"README.md": "open"})
    with pytest.raises(DijiangError) as call:
        push(checkpoint, "push/public", private=True)
    assert "push/public is public" in message(call)
    assert set(hub.files("push/public")) == {"README.md"}


def test_missing_card_is_written(checkpoint: Path, hub: Hub) -> None:
    (checkpoint / "README.md").unlink()
    push(checkpoint, "push/card")
    assert b"base_model: EleutherAI/pythia-70m" in hub.files("push/card")["README.md"]
    info = HfApi().model_info("push/card")
    assert info.card_data is not None and info.card_data.base_model == "EleutherAI/pythia-70m"


def test_single_weight_file(checkpoint: Path, hub: Hub) -> None:
    (checkpoint / INDEX).unlink()
    for shard in SHARDS[1:]:
        (checkpoint / shard).unlink()
    (checkpoint / SHARDS[0]).rename(checkpoint / "model.safetensors")
    push(checkpoint, "push/single")
    assert {name for name in hub.files("push/single") if "safetensors" in name} == {"model.safetensors"}


@pytest.mark.parametrize(
    ("breakage", "told"),
    [
        ("no folder", "no such folder: "),
        ("no config", "is not a converted checkpoint"),
        ("not converted", "is not a converted checkpoint"),
        ("no shard", f"lacks {SHARDS[1]}, which {INDEX} names"),
        ("shard outside", "names ../secret.safetensors, outside its folder"),
        ("no index", f"has neither {INDEX} nor model.safetensors"),
        ("empty index", "names no weights"),
        ("broken index", "is no readable JSON"),
        ("stray weights", "has model.safetensors beside its index"),
    ],
)
def test_other_folders_are_refused(breakage: str, told: str, checkpoint: Path, hub: Hub) -> None:
    folder = checkpoint
    match breakage:
        case "no folder":
            folder = checkpoint / "nowhere"
        case "no config":
            (checkpoint / "config.json").unlink()
        case "not converted":
            (checkpoint / "config.json").write_text('{"model_type": "gpt_neox"}')
        case "no shard":
            (checkpoint / SHARDS[1]).unlink()
        case "shard outside":
            (checkpoint.parent / "secret.safetensors").touch()
            (checkpoint / INDEX).write_text('{"weight_map": {"a": "../secret.safetensors"}}')
        case "no index":
            (checkpoint / INDEX).unlink()
        case "empty index":
            (checkpoint / INDEX).write_text("{}")
        case "broken index":
            (checkpoint / INDEX).write_text("{")
        case "stray weights":
            (checkpoint / "model.safetensors").touch()
    hub.requests.clear()
    with pytest.raises(DijiangError) as call:
        push(folder, "push/refused")
    assert told in message(call) and str(folder) in message(call)
    assert hub.requests == [] and "push/refused" not in hub.repos


@pytest.mark.parametrize("repo", ["name", "a/b/c", "", "./name", "owner/"])
def test_repository_name_is_checked(repo: str, checkpoint: Path, hub: Hub) -> None:
    hub.requests.clear()
    with pytest.raises(DijiangError) as call:
        push(checkpoint, repo)
    assert "owner/name" in message(call)
    assert hub.requests == []


def test_push_without_token(checkpoint: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(DijiangError) as call:
        push(checkpoint, "push/anonymous")
    assert "set HF_TOKEN" in message(call)


def test_token_that_may_not_write(checkpoint: Path, hub: Hub) -> None:
    said = f"You don't have the rights to create a model under the namespace push ({hub.token})"
    with hub.failing("/api/repos/create", 403, said), pytest.raises(DijiangError) as call:
        push(checkpoint, "push/forbidden")
    assert "this token may not" in message(call) and "namespace push" in message(call)
    assert hub.token not in message(call)


def test_failing_upload_commits_nothing(checkpoint: Path, hub: Hub) -> None:
    (checkpoint / SHARDS[0]).write_bytes(save({"layer.0": np.full((3,), 7, dtype=np.float32)}))
    with hub.failing("/lfs/", 403, "signature expired"), pytest.raises(DijiangError) as call:
        push(checkpoint, "push/broken")
    assert "signature expired" in message(call) and "push/broken" in message(call)
    assert len(hub.history("push/broken")) == 1
    assert push(checkpoint, "push/broken").bytes_uploaded == size(checkpoint, *ALLOWED)


def test_commit_of_someone_else_meanwhile_is_not_mixed_in(checkpoint: Path, hub: Hub) -> None:
    push(checkpoint, "push/race")
    (checkpoint / "merges.txt").write_text("c d\n")
    repo = hub.repos["push/race"]

    def someone(when: str, method: str, path: str) -> None:
        if when == "arrived" and "/preupload/" in path and len(hub.history("push/race")) == 2:
            repo.commit("main", "Someone else's", repo.at("main").files)

    with hub.watching(someone), pytest.raises(DijiangError) as call:
        push(checkpoint, "push/race")
    assert "changed at the same time" in message(call) and "try again" in message(call)
    assert hub.history("push/race")[0].message == "Someone else's"
    push(checkpoint, "push/race")
    assert hub.files("push/race")["merges.txt"] == b"c d\n"


def test_tag(checkpoint: Path, hub: Hub) -> None:
    first = push(checkpoint, "push/tagged", tag="v1")
    assert hub.repos["push/tagged"].tags == {"v1": first.commit}
    hub.requests.clear()
    assert push(checkpoint, "push/tagged", tag="v1").bytes_uploaded == 0
    assert not any(request.method == "POST" and "/tag/" in request.path for request in hub.requests)
    assert hf_hub_download("push/tagged", "config.json", revision="v1")

    (checkpoint / "merges.txt").write_text("c d\n")
    before = hub.bytes_received
    with pytest.raises(DijiangError) as call:
        push(checkpoint, "push/tagged", tag="v1")
    told = f"push/tagged has this tag on another commit, {first.commit[:12]}: choose another --tag"
    assert message(call) == told and hub.bytes_received == before
    second = push(checkpoint, "push/tagged", tag="v2")
    assert hub.repos["push/tagged"].tags == {"v1": first.commit, "v2": second.commit}


@pytest.mark.parametrize("name", ["config.json", "README.md", "tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("secret", ["hf_" + "aB3" * 11 + "x", "the client's own"])
def test_tokens_do_not_leave(name: str, secret: str, checkpoint: Path, hub: Hub) -> None:
    path = checkpoint / name
    path.touch()
    secret = hub.token if secret == "the client's own" else secret
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"token": secret}) if before.startswith("{") else before + secret)
    hub.requests.clear()
    with pytest.raises(DijiangError) as call:
        push(checkpoint, "push/secrets")
    assert message(call) == f"{name} of {checkpoint} holds a Hub token: take it out, then push"
    assert hub.requests == []


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_local_paths_do_not_leave(name: str, checkpoint: Path, hub: Hub) -> None:
    path = checkpoint / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | {"_name_or_path": str(checkpoint)}))
    with pytest.raises(DijiangError) as call:
        push(checkpoint, f"push/paths-{name.split('.')[0]}")
    assert f"{name} of {checkpoint} tells of {checkpoint} on this machine" in message(call)
    assert not any(repo.startswith("push/paths") for repo in hub.repos)
    path.write_text(json.dumps(content | {"_name_or_path": "/fsx/of/its/authors"}))  # not of this machine
    push(checkpoint, f"elsewhere/{name.split('.')[0]}")


def test_invalid_card_is_told_in_one_line(checkpoint: Path, hub: Hub) -> None:
    (checkpoint / "README.md").write_text("---\nlicense: [unclosed\n---\n")
    with pytest.raises(DijiangError) as call:
        push(checkpoint, "push/card-invalid")
    assert "README.md has metadata that is no YAML" in message(call) and "push/card-invalid" not in hub.repos


def test_a_card_that_the_hub_refuses_is_told_in_one_line(checkpoint: Path, hub: Hub) -> None:
    (checkpoint / "README.md").write_text("---\nlicense: mine\n---\n")
    with pytest.raises(DijiangError) as call:
        push(checkpoint, "push/card-refused")
    assert '"license" must be one of' in message(call)


def test_loopback_hub_lists_what_it_holds(hub: Hub) -> None:
    api = HfApi()
    files = {"config.json": b"{}", "onnx/model.onnx": b"onnx", "onnx/deep/a.txt": b"a"}
    sha = hub.add_repo("push/listed", files)
    assert api.whoami()["name"] == hub.user
    assert [branch.target_commit for branch in api.list_repo_refs("push/listed").branches] == [sha]
    assert [entry.path for entry in api.list_repo_tree("push/listed")] == ["config.json", "onnx"]
    inner = api.list_repo_tree("push/listed", "onnx")
    assert [entry.path for entry in inner] == ["onnx/deep", "onnx/model.onnx"]
    assert api.list_repo_files("push/listed") == ["config.json", "onnx/deep/a.txt", "onnx/model.onnx"]
    (entry,) = api.get_paths_info("push/listed", ["onnx/model.onnx", "nowhere"])
    assert isinstance(entry, RepoFile) and entry.lfs is not None and entry.size == entry.lfs.size == 4
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("push/listed", "nowhere.json")
