"""Copying that begins before a conversion does: the same files in the end, and nothing left where it is not wanted."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from dijiang_convert.cli import app
from dijiang_convert.files import copy_file
from dijiang_convert.head_start import AT_ONCE, head_start
from tests.sources_on_disk import neox_config, write_source

SHARDS = {"a.safetensors": b"a" * 3000, "b.safetensors": b"b" * 5000}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for name, content in SHARDS.items():
        (folder / name).write_bytes(content)
    weight_map = {name: name for name in SHARDS}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    return folder


def test_what_was_copied_is_taken(source: Path, tmp_path: Path) -> None:
    written: list[int] = []
    with head_start(str(source), tmp_path / "out", force=False) as lay:
        (tmp_path / "taken").mkdir()
        for name in SHARDS:
            lay(source / name, tmp_path / "taken" / name, written.append)
    assert {path.name: path.read_bytes() for path in (tmp_path / "taken").iterdir()} == SHARDS
    assert sum(written) == 8000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "taken"]


def test_an_error_comes_out_where_the_file_is_taken(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    raises = pytest.raises(OSError, match="No space left")
    with head_start(str(source), tmp_path / "out", force=False) as lay, raises:
        lay(source / "a.safetensors", tmp_path / "a", lambda count: None)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_copying_stops_where_the_conversion_does(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the pieces that are under way."""
    begun, go_on, pieces = threading.Event(), threading.Event(), []

    def slow(reading: int, writing: int, count: int) -> int:
        pieces.append(os.write(writing, os.read(reading, 1)))
        begun.set()
        assert go_on.wait(60)
        return 1

    monkeypatch.setattr(os, "copy_file_range", slow)
    with pytest.raises(KeyboardInterrupt), head_start(str(source), tmp_path / "out", force=False):
        assert begun.wait(60)
        threading.Timer(0.1, go_on.set).start()
        raise KeyboardInterrupt
    assert len(pieces) <= AT_ONCE
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def no_space(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=7999))


def pickled(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source / "model.safetensors.index.json").unlink()
    (source / "pytorch_model.bin").write_bytes(b"b")


def no_config(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source / "config.json").unlink()


def no_shard(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source / "b.safetensors").unlink()


def out_is_there(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(source, source.parent / "out")


def can_not_write(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)


@pytest.mark.parametrize("spoil", [no_space, pickled, no_config, no_shard, out_is_there, can_not_write])
def test_nothing_begins_where_a_conversion_would_not(
    spoil: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(source, monkeypatch)
    before = sorted(tmp_path.rglob("*"))
    with head_start(str(source), tmp_path / "out", force=False) as lay:
        assert lay is copy_file and sorted(tmp_path.rglob("*")) == before


def test_the_command_copies_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_source(tmp_path / "source", neox_config(), shard_size="60KB")
    real, threads, count = os.copy_file_range, set[str](), 0

    def noting(reading: int, writing: int, size: int) -> int:
        nonlocal count
        threads.add(threading.current_thread().name)
        count += (done := real(reading, writing, size))
        return done

    monkeypatch.setattr(os, "copy_file_range", noting)
    done = CliRunner().invoke(app, ["convert", "source"])
    assert done.exit_code == 0, done.stderr
    shards = sorted(Path("source").glob("*.safetensors"))
    assert count == sum(path.stat().st_size for path in shards) and len(shards) > 1
    assert threading.main_thread().name not in threads
    for i, path in enumerate(shards, start=1):
        copied = Path(f"source-dijiang/model-{i:05d}-of-{len(shards) + 1:05d}.safetensors")
        assert copied.read_bytes() == path.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "source-dijiang"]
