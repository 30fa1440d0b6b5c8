"""Shards as a conversion and a training lay them out: copied, linked, indexed."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dijiang_convert import files
from dijiang_convert.checkpoint.shards import (
    INDEX,
    read_checkpoint,
    write_shards,
    write_trained,
)
from dijiang_convert.errors import DijiangError
from dijiang_convert.files import link_file, new_folder, weight_files
from tests.checkpoint.tensors import tree
from tests.refusals import message


def lay_out(tmp_path: Path, **options: Any) -> Path:
    save_file({"a": torch.arange(40_000.0)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(3, dtype=torch.int64)}, tmp_path / "two.safetensors")
    options = {"new": {"c.dijiang.t": torch.ones(5)}, "dtype": None, "progress": lambda n: None, **options}
    with new_folder(tmp_path / "out") as folder:
        write_shards(folder, [tmp_path / "one.safetensors", tmp_path / "two.safetensors"], **options)
    return tmp_path / "out"


def test_shards_are_copied_and_indexed(tmp_path: Path) -> None:
    written: list[int] = []
    out = lay_out(tmp_path, progress=written.append)
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert tree(out) == [*names, INDEX]
    assert (out / names[0]).read_bytes() == (tmp_path / "one.safetensors").read_bytes()
    assert (out / names[1]).read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    index = json.loads((out / INDEX).read_text())
    assert index["weight_map"] == {"a": names[0], "b": names[1], "c.dijiang.t": names[2]}
    assert index["metadata"]["total_size"] == 40_000 * 4 + 3 * 8 + 5 * 4
    assert sum(written) == sum((tmp_path / f"{n}.safetensors").stat().st_size for n in ("one", "two"))


def test_a_rewrite_is_indexed_with_its_new_size(tmp_path: Path) -> None:
    out = lay_out(tmp_path, dtype=torch.bfloat16)
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"]["total_size"] == 40_000 * 2 + 3 * 8 + 5 * 4
    assert load_file(out / index["weight_map"]["a"])["a"].dtype == torch.bfloat16
    assert load_file(out / index["weight_map"]["b"])["b"].dtype == torch.int64
    assert load_file(out / index["weight_map"]["c.dijiang.t"])["c.dijiang.t"].dtype == torch.float32


def test_a_new_tensor_must_be_new(tmp_path: Path) -> None:
    with pytest.raises(DijiangError, match="already: is it converted"):
        lay_out(tmp_path, new={"a": torch.ones(1)})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("already", [0, 1000])
def test_where_the_kernel_does_not_copy(already: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems refuse copy_file_range, at once or in the middle of a file."""
    real, calls = os.copy_file_range, []

    def refuse(source: int, target: int, count: int) -> int:
        calls.append(count)
        if already and len(calls) == 1:
            return real(source, target, already)
        raise OSError(errno.EXDEV, "cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    written: list[int] = []
    out = lay_out(tmp_path, progress=written.append)
    for i, name in enumerate(("one", "two"), start=1):
        copy = out / f"model-0000{i}-of-00003.safetensors"
        assert copy.read_bytes() == (tmp_path / f"{name}.safetensors").read_bytes()
    assert calls and sum(written) == sum((tmp_path / f"{n}.safetensors").stat().st_size for n in ("one", "two"))


@pytest.fixture
def no_reflinks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(files, "_reflink", refuse)


@pytest.mark.usefixtures("no_reflinks")
def test_shards_become_hard_links(tmp_path: Path) -> None:
    written: list[int] = []
    out = lay_out(tmp_path, progress=written.append, link=True)
    for i, name in enumerate(("one", "two"), start=1):
        assert (out / f"model-0000{i}-of-00003.safetensors").samefile(tmp_path / f"{name}.safetensors")
    assert json.loads((out / INDEX).read_text())["weight_map"]["a"] == "model-00001-of-00003.safetensors"
    assert sum(written) == sum((tmp_path / f"{n}.safetensors").stat().st_size for n in ("one", "two"))


def test_a_reflink_is_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"old" * 5000)
    if link_file(tmp_path / "source", tmp_path / "target") == "hard link":
        pytest.skip("this file system has no reflinks")
    (tmp_path / "target").write_bytes(b"new")
    assert (tmp_path / "source").read_bytes() == b"old" * 5000


def test_a_reflink_is_asked_for_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system here has none: that the call is the one that copies, from source to target."""
    if sys.platform != "linux":
        pytest.skip("reflinks are made by a call of Linux")

    def clone(target: int, request: int, source: int) -> int:
        assert request == 0x40049409  # FICLONE, as linux/fs.h has it
        return os.write(target, os.pread(source, 100, 0))

    monkeypatch.setattr("fcntl.ioctl", clone)
    (tmp_path / "source").write_bytes(b"bytes")
    assert link_file(tmp_path / "source", tmp_path / "target") == "reflink"
    assert (tmp_path / "target").read_bytes() == b"bytes" and not (tmp_path / "target").samefile(tmp_path / "source")


@pytest.mark.usefixtures("no_reflinks")
def test_a_link_to_a_file_is_followed(tmp_path: Path) -> None:
    """As in the Hub's cache, where names point to files."""
    (tmp_path / "blob").write_text("weights")
    (tmp_path / "name").symlink_to("blob")
    assert link_file(tmp_path / "name", tmp_path / "target") == "hard link"
    assert not (tmp_path / "target").is_symlink() and (tmp_path / "target").samefile(tmp_path / "blob")


@pytest.mark.usefixtures("no_reflinks")
def test_between_file_systems_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(DijiangError) as call:
        lay_out(tmp_path, link=True)
    text = message(call)
    assert text.startswith(f"can't link {tmp_path}/one.safetensors into {tmp_path} (Invalid cross-device link): ")
    assert text.endswith("choose an --out on the source's file system, or leave out --link")
    assert tree(tmp_path) == ["one.safetensors", "two.safetensors"]


class Full:
    """An open file on a full disk."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("where", ["copy", "write"])
def test_a_full_disk(where: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(code, "No space left on device")

    if where == "copy":
        monkeypatch.setattr(os, "copy_file_range", full)
    else:
        opening = Path.open

        def open_full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            file = opening(self, mode, *args, **kwargs)
            return Full(file) if mode == "wb" and ".partial" in str(self) else file

        monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(DijiangError) as call:
        lay_out(tmp_path, dtype=torch.float16 if where == "write" else None)
    assert "no space left on the disk of" in message(call) and "--out" in message(call)
    assert tree(tmp_path) == ["one.safetensors", "two.safetensors"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "has no config.json"),
        ('{"model_type": "llama"}', "is not converted yet: run dijiang convert"),
        ("{", "no readable JSON"),
    ],
)
def test_what_is_no_checkpoint(content: str | None, expected: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(DijiangError) as call:
        read_checkpoint(tmp_path)
    assert expected in message(call)
    with pytest.raises(DijiangError, match="no checkpoint folder"):
        read_checkpoint(tmp_path / "nowhere")


def trained(
    folder: Path, source: dict[str, dict[str, torch.Tensor]], saved: dict[str, torch.Tensor], *aliases: str
) -> dict[str, dict[str, torch.Tensor]]:
    """What lies in the files of a trained checkpoint, by their names. ``aliases``: "name=another"."""
    for name in ("source", "saved", "out"):
        (folder / name).mkdir()
    weight_map = {}
    for file, state in source.items():
        save_file(state, folder / "source" / file, {"format": "pt"})
        weight_map |= dict.fromkeys(state, file)
    (folder / "source" / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    save_file(saved, folder / "saved" / "model.safetensors", {"format": "pt"})
    other = dict(pair.split("=") for pair in aliases)
    write_trained(folder / "out", folder / "saved", folder / "source", lambda name: [name, other.get(name, name)])
    index = json.loads((folder / "out" / INDEX).read_text())
    files = {path.name: load_file(path) for path in weight_files(folder / "out")}
    assert index["weight_map"] == {name: file for file, state in files.items() for name in state}
    assert index["metadata"]["total_size"] == sum(t.nbytes for state in files.values() for t in state.values())
    return files


def number(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full((3,), value, dtype=dtype)


def test_a_file_that_training_left_alone_keeps_its_bytes(tmp_path: Path) -> None:
    source = {"model-1.safetensors": {"a": number(1), "b": number(2)}, "model-2.safetensors": {"c": number(3)}}
    files = trained(tmp_path, source, {"a": number(1), "b": number(2), "c": number(4)})
    assert [sorted(state) for state in files.values()] == [["a", "b"], ["c"]]
    first = tmp_path / "out" / "model-00001-of-00002.safetensors"
    assert first.read_bytes() == (tmp_path / "source" / "model-1.safetensors").read_bytes()
    assert files["model-00002-of-00002.safetensors"]["c"].tolist() == [4, 4, 4]


def test_a_file_is_split_into_what_stayed_and_what_changed(tmp_path: Path) -> None:
    source = {"model-1.safetensors": {"a": number(1), "b": number(2), "junk": number(9)}}
    for i, name in enumerate(("one", "two")):
        (tmp_path / name).mkdir()
        files = trained(tmp_path / name, source, {"a": number(1), "b": number(5 + i)})
        assert [sorted(state) for state in files.values()] == [["a", "junk"], ["b"]]
    one, two = ((tmp_path / name / "out" / "model-00001-of-00002.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_the_sources_dtype_stays_where_the_tensor_does(tmp_path: Path) -> None:
    source = {"model-1.safetensors": {"a": number(0.1), "b": number(0.1)}}
    half = torch.bfloat16
    files = trained(tmp_path, source, {"a": number(0.1, half), "b": number(0.2, half)})
    assert [t.dtype for state in files.values() for t in state.values()] == [torch.float32, half]


def test_tied_weights_that_the_source_holds_twice_change_together(tmp_path: Path) -> None:
    source = {"model-1.safetensors": {"embed": number(1), "head": number(1), "a": number(2)}}
    files = trained(tmp_path, source, {"embed": number(7), "a": number(2)}, "head=embed")
    assert [sorted(state) for state in files.values()] == [["a"], ["embed", "head"]]
    assert files["model-00002-of-00002.safetensors"]["head"].tolist() == [7, 7, 7]


def test_names_that_the_source_does_not_have_are_written_as_saved(tmp_path: Path) -> None:
    source = {"model-1.safetensors": {"gamma": number(1), "a": number(2)}}
    files = trained(tmp_path, source, {"weight": number(1), "a": number(2)})
    assert [sorted(state) for state in files.values()] == [["a", "weight"]]
