"""Downloads from a Hub and over a network that fail: what arrives is whole, and what was fetched once is not lost."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from dijiang_convert.convert import convert
from dijiang_convert.errors import DijiangError
from dijiang_convert.source.download import cache_folder
from dijiang_convert.source.resolve import check_space, download, read_config, resolve
from tests.hub import Hub
from tests.hub.store import Blob
from tests.refusals import message
from tests.source.repositories import BASE, names, resolve_elsewhere
from tests.sources_on_disk import llama_config, write_source

LARGE = random.Random(0).randbytes(20_000)  # of weights; nothing here looks inside

NUMBERS = itertools.count()


@pytest.fixture
def repo(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> str:
    """A repository of its own; the client writes down what arrives in pieces of 1,000 bytes, not of 10 MB."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    name = f"download/repo-{next(NUMBERS)}"
    hub.add_repo(name, BASE | {"model.safetensors": LARGE, "README.md": "---\nlicense: mit\n---\n"})
    return name


def weights(name: str) -> bytes:
    folder = download(resolve(name)).folder
    assert folder is not None
    return (folder / "model.safetensors").read_bytes()


def test_files_come_from_another_host_that_sees_no_token(repo: str, hub: Hub) -> None:
    before = hub.bytes_sent
    assert weights(repo) == LARGE
    assert hub.bytes_sent - before == len(LARGE) + sum(len(hub.files(repo)[name]) for name in (*BASE, "README.md"))
    assert hub.leaks == [] and any(request.path.startswith("/files/") for request in hub.requests)
    assert not list(cache_folder(repo).rglob("*.incomplete"))


def test_a_moved_repository_is_followed(repo: str, hub: Hub) -> None:
    hub.moved["download/old-name"] = repo
    assert weights("download/old-name") == LARGE


@pytest.mark.parametrize("times", [1, 3])
def test_goes_on_after_a_cut(times: int, repo: str, hub: Hub, waits: list[float]) -> None:
    before = hub.bytes_sent
    with hub.failing("/files/", cut=5500, times=times) as fault:
        assert weights(repo) == LARGE
    assert fault.met == times
    ranges = [request.range for request in hub.requests if request.path.startswith("/files/") and request.range]
    assert ranges[-times:] == [f"bytes={5000 * i}-" for i in range(1, times + 1)]
    assert hub.bytes_sent - before < len(LARGE) + 500 * times + 500


def test_a_lost_connection_loses_no_file_that_was_whole(repo: str, hub: Hub, waits: list[float]) -> None:
    with hub.failing("/files/", status=0) as fault, pytest.raises(DijiangError) as call:
        weights(repo)
    assert fault.met > 1 and f"cannot reach {hub.url} for {repo}" in message(call)
    hub.requests.clear()
    assert weights(repo) == LARGE
    fetched = [request.path for request in hub.requests if request.method == "GET" and "/api/" not in request.path]
    assert len(fetched) == 1 and fetched[0].startswith("/files/")  # the weights alone


def test_a_server_without_ranges_starts_again(repo: str, hub: Hub, waits: list[float]) -> None:
    with hub.failing("/files/", cut=5500, times=1), hub.without_ranges():
        assert weights(repo) == LARGE


def test_a_gated_repository_opens_to_who_was_let_in(repo: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gate(repo, granted=True)
    assert weights(repo) == LARGE
    other = hub.add_repo(f"{repo}-2", {"model.safetensors": LARGE[::-1]} | BASE)
    hub.gate(f"{repo}-2", granted=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(DijiangError) as call:
        download(resolve(f"{repo}-2", other))
    assert message(call).startswith(
        f"{repo}-2 is gated: ask for access at {hub.url}/{repo}-2, then run `hf auth login`"
    )


def test_a_hub_that_does_not_answer_is_asked_again(
    repo: str, hub: Hub, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dijiang_convert.source.resolve.TIMEOUT", 0.2)
    with hub.failing("/api/models/", seconds=0.5, times=2):
        assert resolve(repo).revision == hub.history(repo)[0].sha
    assert waits == [1, 2]


def test_a_slow_hub_is_waited_for(repo: str, hub: Hub) -> None:
    with hub.failing("/files/", seconds=0.3), hub.failing("/api/models/", seconds=0.3, times=1):
        assert weights(repo) == LARGE


@pytest.mark.parametrize("path", ["/api/models/", "/download/", "/files/"])
@pytest.mark.parametrize("status", [429, 500, 503, 0])
def test_failures_that_pass_are_waited_out(status: int, path: str, repo: str, hub: Hub, waits: list[float]) -> None:
    with hub.failing(path, status, times=2) as fault:
        assert weights(repo) == LARGE
    assert fault.met == 2 and sum(waits) <= 10
    assert waits or path == "/download/"  # the client itself asks once more without a pause there


@pytest.mark.parametrize("path", ["/api/models/", "/files/"])
@pytest.mark.parametrize("header", [{"Retry-After": "7"}, {"RateLimit": '"api";r=0;t=7'}])
def test_the_hub_says_how_long_to_wait(
    header: dict[str, str], path: str, repo: str, hub: Hub, waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with hub.failing(path, 429, headers=header, times=1):
        assert weights(repo) == LARGE
    assert waits == [8]
    told = capsys.readouterr().err
    assert path == "/files/" or "429" in told and ": trying again in 8 s\n" in told  # of files the client tells itself


def test_nobody_waits_for_an_hour(repo: str, hub: Hub, waits: list[float]) -> None:
    limit = hub.failing("/api/models/", 429, "We had to rate limit you", headers={"Retry-After": "3600"})
    with limit, pytest.raises(DijiangError) as call:
        resolve(repo)
    assert waits == []
    assert message(call) == (
        f"the Hub limits how often {repo} may be asked for (We had to rate limit you): try again in a few minutes"
    )


@pytest.mark.parametrize(
    ("status", "code", "told"),
    [
        (401, None, "the Hub wants a valid token for REPO (out of order): run `hf auth login` or set HF_TOKEN"),
        (403, None, "this token may not do that to REPO (out of order): run `hf auth login` with one that may"),
        (403, "GatedRepo", "REPO is gated: ask for access at HUB/REPO, then run `hf auth login` or set HF_TOKEN"),
        (404, "RepoNotFound", "REPO is not on the Hub, or is private: check the name, or run"),
        (404, "RevisionNotFound", "has no revision"),
        (500, None, "the Hub failed on REPO with status 500 (out of order): try again later"),
        (503, None, "the Hub failed on REPO with status 503 (out of order): try again later"),
    ],
)
@pytest.mark.parametrize("path", ["/api/models/", "/download/"])
def test_what_a_person_is_told(
    path: str, status: int, code: str | None, told: str, repo: str, hub: Hub, waits: list[float]
) -> None:
    source = resolve(repo)
    with hub.failing(path, status, code=code), pytest.raises(DijiangError) as call:
        download(source)
    assert told.replace("REPO", repo).replace("HUB", hub.url) in message(call)


def test_an_address_that_expired_is_asked_for_anew(repo: str, hub: Hub, waits: list[float]) -> None:
    with hub.failing("/files/", 403, "Request has expired"), pytest.raises(DijiangError) as call:
        weights(repo)
    assert "Request has expired" in message(call) and "signature" not in message(call)
    assert weights(repo) == LARGE


# -------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize(("path", "name"), [("/files/", "model.safetensors"), ("/*/tokenizer.json", "tokenizer.json")])
def test_damage_on_the_way_never_becomes_a_file(path: str, name: str, repo: str, hub: Hub) -> None:
    with hub.failing(path, flip=True), pytest.raises(DijiangError) as call:
        weights(repo)
    assert message(call) == (
        f"{name} of {repo} is damaged (its hash is not the one that the Hub lists) and was removed: "
        "run this again, and check any proxy if it stays so"
    )
    assert not list(cache_folder(repo).rglob("*.incomplete")) and not list(cache_folder(repo).rglob(name))
    assert weights(repo) == LARGE


def test_damage_never_becomes_a_checkpoint(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("download/damaged", write_source(tmp_path / "source", llama_config(num_hidden_layers=1)))
    with hub.failing("/files/", flip=True), pytest.raises(DijiangError, match="model.safetensors of .* is damaged"):
        convert("download/damaged", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert convert("download/damaged", tmp_path / "out").source_revision == hub.history("download/damaged")[0].sha

    # What others put into the cache is read before it becomes one, too.
    (blob,) = (path for path in (cache_folder("download/damaged") / "blobs").iterdir() if len(path.name) == 64)
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(data)
    with pytest.raises(DijiangError, match="model.safetensors of .* is damaged"):
        convert("download/damaged", tmp_path / "again")
    assert not (tmp_path / "again").exists()
    convert("download/damaged", tmp_path / "again")


def test_a_damaged_blob_of_another_commit_is_found(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("download/two", BASE | {"model.safetensors": LARGE})
    download(resolve("download/two"))
    hub.add_repo("download/two", BASE | {"model.safetensors": LARGE, "added.json": "{}"})
    (blob,) = (path for path in (cache_folder("download/two") / "blobs").iterdir() if len(path.name) == 64)
    blob.write_bytes(LARGE[::-1])
    with pytest.raises(DijiangError, match="model.safetensors of download/two is damaged"):
        download(resolve("download/two"), tmp_path / "out")
    folder = download(resolve("download/two"), tmp_path / "out").folder
    assert folder is not None and (folder / "model.safetensors").read_bytes() == LARGE


def test_hashes_that_are_none_are_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """They become names of files in the cache."""
    hub.add_repo("download/hashes", BASE | {"model.safetensors": LARGE})
    weights = hub.repos["download/hashes"].at("main").files["model.safetensors"]
    for change in (
        lambda patch: patch.setitem(vars(weights), "sha256", "../../escaped"),
        lambda patch: patch.setattr(Blob, "oid", "../../escaped"),
    ):
        with monkeypatch.context() as patch:
            change(patch)
            with pytest.raises(DijiangError) as call:
                download(resolve("download/hashes"))
        assert "without a hash: check HF_ENDPOINT" in message(call)


def test_a_file_that_is_too_short_is_no_file(repo: str, hub: Hub, waits: list[float]) -> None:
    """Where the listing and what is served differ in length."""
    blob = hub.repos[repo].at("main").files["model.safetensors"]
    hub.objects[blob.sha256] = LARGE[:-10]
    with pytest.raises(DijiangError):
        weights(repo)
    assert not list(cache_folder(repo).rglob("model.safetensors"))


def test_modules_of_sentence_transformers_come_along(hub: Hub) -> None:
    modules = json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "../onnx"}])
    wanted = {"modules.json": modules, "1_Pooling/config.json": "{}", "2_Dense/model.safetensors": LARGE}
    other = {"onnx/model.onnx": b"o", "1_Pooling/notes.md": "", "3_Other/config.json": "{}", "2_Dense/a/b.json": "{}"}
    hub.add_repo("download/modules", BASE | {"model.safetensors": LARGE} | wanted | other)
    assert names(download(resolve("download/modules"))) == {*BASE, "model.safetensors", *wanted}


def test_files_of_the_same_content_do_not_mix(hub: Hub, tmp_path: Path) -> None:
    """Nor do two processes that want the same file."""
    data = LARGE * 50
    modules = json.dumps([{"path": f"m{i}"} for i in range(4)])
    same = {f"m{i}/model.safetensors": data for i in range(4)}
    hub.add_repo("download/same", BASE | {"modules.json": modules, "model.safetensors": data} | same)
    code = "from dijiang_convert.source.resolve import download, resolve; download(resolve('download/same'))"
    before = hub.bytes_sent
    with hub.failing("/files/", seconds=0.3):
        children = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
        assert [child.wait(60) for child in children] == [0, 0]
    assert weights("download/same") == data
    assert hub.bytes_sent - before < 1.1 * len(data)


def test_names_stay_in_their_folder(hub: Hub, tmp_path: Path) -> None:
    evil = {
        "../escaped.json": "{}",
        "/etc/escaped.json": "{}",
        "..\\escaped.json": "{}",
        "sub/../../escaped.json": "{}",
    }
    hub.add_repo("download/evil", BASE | {"model.safetensors": LARGE} | evil)
    assert names(download(resolve("download/evil"))) == {*BASE, "model.safetensors"}

    for name in ("../escaped.safetensors", "/tmp/escaped.safetensors", "..\\escaped.safetensors"):
        index = json.dumps({"weight_map": {"a": name}})
        hub.add_repo("download/evil-index", BASE | {"model.safetensors.index.json": index, name: LARGE})
        with pytest.raises(DijiangError) as call:
            download(resolve("download/evil-index"))
        assert "outside its folder" in message(call)
    assert not list(Path(constants.HF_HUB_CACHE).parent.rglob("escaped*"))


# -------------------------------------------------------------------------------------------- before it starts


def test_size_is_told_before_it_starts(repo: str, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    source = resolve(repo)
    download(source)
    told = capsys.readouterr().err
    assert told == f"downloading {repo}: 4 files, 20.1 kB\n"
    download(source)
    assert capsys.readouterr().err == ""


def test_a_full_disk_is_told_before_anything_travels(repo: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve(repo)
    hub.requests.clear()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=len(LARGE) - 1))
    with pytest.raises(DijiangError) as call:
        download(source)
    assert "no space left for" in message(call) and "HF_HOME" in message(call)
    assert not any("/files/" in request.path for request in hub.requests)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=len(LARGE) + 10_000))
    with pytest.raises(DijiangError, match="no space left for"):  # for the cache and the result, on one disk
        download(source, Path(constants.HF_HOME) / "not" / "there" / "yet")
    download(source)
    check_space({Path(constants.HF_HOME): 10_000})


# -------------------------------------------------------------------------------------------- offline


def test_offline_from_the_cache(hub: Hub, tmp_path: Path) -> None:
    readme = "---\nlicense: mit\nlanguage:\n- en\n---\n"
    hub.add_repo("download/offline", BASE | {"model.safetensors": LARGE, "README.md": readme})
    hub.repos["download/offline"].branches["step1"] = sha = hub.history("download/offline")[0].sha
    download(resolve("download/offline"))
    download(resolve("download/offline", "step1"))
    hub.requests.clear()
    code = """
    for revision in (None, 'main', 'step1', SHA):
        source = resolve('download/offline', revision)
        folder = download(source).folder
        print(source.revision, source.card, read_config(source)['model_type'], len(list(folder.iterdir())))
    """.replace("SHA", repr(sha)).strip()
    done = resolve_elsewhere(code, HF_HUB_OFFLINE="1")
    assert done.stdout.splitlines() == [f"{sha} {{'license': 'mit', 'language': ['en']}} gpt_neox 4"] * 4, done.stderr
    assert hub.requests == []

    done = resolve_elsewhere("resolve('download/offline', 'step2')", HF_HUB_OFFLINE="1")
    assert done.stdout.startswith("download/offline at step2 was not downloaded before, and offline mode is on")


def test_offline_with_half_a_download(hub: Hub) -> None:
    hub.add_repo("download/half", BASE | {"model.safetensors": LARGE})
    source = resolve("download/half")
    read_config(source)
    done = resolve_elsewhere(f"download(resolve('download/half', {source.revision!r}))", HF_HUB_OFFLINE="1")
    assert done.stdout.startswith("download/half has no model.safetensors or pytorch_model.bin in the cache"), done


def test_a_converted_source_is_the_same_offline(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path / "source", llama_config(num_hidden_layers=1))
    (source / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n")
    hub.add_repo("download/converted", source)
    convert("download/converted", tmp_path / "online")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    convert("download/converted", tmp_path / "offline")
    assert hub.requests == []
    made = {path.name: path.read_bytes() for path in (tmp_path / "online").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "offline").iterdir()} == made
    record = json.loads(made["config.json"])["dijiang"]
    assert record["license"] == "apache-2.0" and record["language"] == "en"
