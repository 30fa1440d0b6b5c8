"""Pushing over a network that fails: what was sent is not sent again, and nothing is committed twice."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from dijiang_convert.errors import DijiangError
from dijiang_convert.push import push
from tests.hub import Hub
from tests.push.pushing import ALLOWED, NUMBERS, SHARDS, size
from tests.refusals import message

MOMENTS = (
    ("arrived", "/api/repos/create"),
    ("done", "/api/repos/create"),
    ("arrived", "/preupload/"),
    ("arrived", "/objects/batch"),
    ("arrived", "/lfs/"),
    ("done", "/lfs/"),
    ("arrived", "/lfs-verify"),
    ("arrived", "/api/validate-yaml"),
    ("arrived", "/commit/"),
    ("done", "/commit/"),
    ("arrived", "/tag/"),
    ("done", "/tag/"),
)


@pytest.mark.parametrize("moment", range(len(MOMENTS)), ids=[f"{when} {path}" for when, path in MOMENTS])
def test_a_killed_push_is_run_again(moment: int, checkpoint: Path, hub: Hub) -> None:
    """Killed at any moment it leaves the old version or the new one, and then ends in one right commit."""
    repo, (when, where) = f"push/killed-{moment}", MOMENTS[moment]
    child: subprocess.Popen[bytes]
    begun = threading.Event()

    def kill(now: str, method: str, path: str) -> None:
        if now == when and where in path and begun.wait(10):
            child.kill()
            child.wait()

    code = f"from dijiang_convert.push import push; push({str(checkpoint)!r}, {repo!r}, tag='v1')"
    with hub.watching(kill):
        child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
        begun.set()
        assert child.wait(60) == -signal.SIGKILL
    if repo in hub.repos:
        assert set(hub.files(repo)) in ({".gitattributes"}, ALLOWED | {".gitattributes"})
    with hub.lock:
        there = {f"/lfs/{oid}" for oid in hub.objects}
        hub.requests.clear()
    push(checkpoint, repo, tag="v1")
    assert not there & {request.path for request in hub.requests}  # what had arrived is not sent again
    assert [commit.message for commit in hub.history(repo)] == ["Upload DiJiang checkpoint", "initial commit"]
    assert {name: data for name, data in hub.files(repo, "v1").items() if name != ".gitattributes"} == {
        name: (checkpoint / name).read_bytes() for name in ALLOWED
    }


@pytest.mark.parametrize(
    "path",
    [
        "/api/repos/create", "/api/models/*/tree/*", "/api/models/*/branch/*", "/api/models/*/refs", "*/preupload/*",
        "*/objects/batch", "/lfs/", "/lfs-verify", "*/commit/*", "*/tag/*",
    ],
)  # fmt: skip
@pytest.mark.parametrize("status", [429, 503, 0])
def test_failures_that_pass_are_waited_out(
    status: int, path: str, checkpoint: Path, hub: Hub, waits: list[float]
) -> None:
    repo = f"push/passing-{next(NUMBERS)}"
    with hub.failing(path, status, headers={"Retry-After": "2"}, times=2) as fault:
        result = push(checkpoint, repo, revision="dev", tag="v1")
    assert fault.met == 2 and waits
    assert set(hub.files(repo, "v1")) == ALLOWED | {".gitattributes"}
    assert len(hub.history(repo, "dev")) == 2 and result.commit == hub.history(repo, "dev")[0].sha
    assert hub.repos[repo].tags == {"v1": result.commit}


@pytest.mark.parametrize("status", [0, 500, 503])
def test_a_commit_whose_answer_was_lost_is_found(status: int, checkpoint: Path, hub: Hub, waits: list[float]) -> None:
    repo = f"push/lost-{status}"
    with hub.failing("*/commit/*", status, late=True, times=1) as fault:
        result = push(checkpoint, repo)
    assert fault.met == 1 and len(hub.history(repo)) == 2
    assert result.commit == hub.history(repo)[0].sha and result.bytes_uploaded == size(checkpoint, *ALLOWED)


@pytest.mark.parametrize(
    ("path", "status", "told"),
    [
        ("/api/repos/create", 401, "the Hub wants a valid token for REPO (out of order): run `hf auth login`"),
        ("/api/repos/create", 403, "this token may not do that to REPO (out of order): run `hf auth login`"),
        ("*/commit/*", 403, "this token may not do that to REPO (out of order)"),
        ("*/commit/*", 409, "REPO changed at the same time (out of order): try again"),
        ("*/commit/*", 413, "the Hub refused the request for REPO with status 413 (out of order)"),
        ("*/commit/*", 500, "the Hub failed on REPO with status 500 (out of order): try again later"),
        ("/lfs/", 403, "this token may not do that to REPO (out of order)"),
        ("/lfs/", 500, "the Hub failed on REPO with status 500 (out of order): try again later"),
        ("*/objects/batch", 429, "the Hub limits how often REPO may be asked for (out of order): try again"),
    ],
)
def test_what_a_person_is_told(
    path: str, status: int, told: str, checkpoint: Path, hub: Hub, waits: list[float]
) -> None:
    repo = f"push/told-{next(NUMBERS)}"
    with hub.failing(path, status), pytest.raises(DijiangError) as call:
        push(checkpoint, repo)
    assert told.replace("REPO", repo) in message(call)
    push(checkpoint, repo)
    assert len(hub.history(repo)) == 2


def test_large_files_go_in_parts(checkpoint: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "part_size", 500)
    large = save({"layer.0": np.arange(1000, dtype=np.float32)})
    (checkpoint / SHARDS[0]).write_bytes(large)
    before = hub.bytes_received
    hub.requests.clear()
    push(checkpoint, "push/parts")
    assert hub.files("push/parts")[SHARDS[0]] == large
    assert hub.bytes_received - before == size(checkpoint, *ALLOWED)
    parts = [request for request in hub.requests if request.path.startswith("/lfs-part/")]
    assert len(parts) >= -(-len(large) // 500)


def test_a_part_that_fails_is_sent_again(
    checkpoint: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    monkeypatch.setattr(hub, "part_size", 500)
    (checkpoint / SHARDS[0]).write_bytes(save({"layer.0": np.arange(999, dtype=np.float32)}))
    with hub.failing("/lfs-part/*/2", 500, times=1), hub.failing("/lfs-complete/", 0, times=1):
        push(checkpoint, "push/parts-failing")
    assert hub.files("push/parts-failing")[SHARDS[0]] == (checkpoint / SHARDS[0]).read_bytes()


def test_what_the_hub_leaves_out_is_told(checkpoint: Path, hub: Hub) -> None:
    hub.add_repo("push/ignoring", {".gitignore": "merges.txt\n"})
    with pytest.raises(DijiangError) as call:
        push(checkpoint, "push/ignoring")
    assert message(call) == "push/ignoring left out merges.txt: see whether a .gitignore there names it"
