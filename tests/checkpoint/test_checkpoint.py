"""Weight files and folders on disk: what is read, written and refused, and what a failure leaves behind."""

from __future__ import annotations

import errno
import json
import os
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dijiang_convert import files
from dijiang_convert.checkpoint.shards import (
    DTYPES,
    INDEX,
    in_memory,
    read_checkpoint,
    read_shard,
    write_safetensors,
    write_shards,
    write_trained,
)
from dijiang_convert.errors import DijiangError
from dijiang_convert.files import link_file, new_folder, weight_files


def message(call: pytest.ExceptionInfo[DijiangError]) -> str:
    """The error's text, which must be one line."""
    text = str(call.value)
    assert text and "\n" not in text and text == text.strip()
    return text


def sample() -> dict[str, torch.Tensor]:
    """A tensor of every type that is read, an empty one, a scalar, and one that is not contiguous."""
    torch.manual_seed(0)
    state = {}
    for name, dtype in DTYPES.items():
        values = torch.randn(3, 5) * 50
        state[f"of.{name}"] = values > 0 if dtype == torch.bool else values.abs().to(dtype)
    state |= {
        "empty": torch.empty(0, 7),
        "empty.bfloat16": torch.empty(2, 0, 3, dtype=torch.bfloat16),
        "scalar": torch.tensor(1.5),
        "scalar.bool": torch.tensor(True),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
    }
    return state


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


# ----------------------------------------------------------------------------------------------- safetensors files


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    state = {name: tensor.contiguous() for name, tensor in sample().items()}
    save_file(state, tmp_path / "a.safetensors", metadata={"format": "pt"})
    read = {t.name: t for t in read_shard(tmp_path / "a.safetensors")}
    assert read.keys() == state.keys()
    for name, tensor in state.items():
        assert same(read[name].load(), tensor), name
        assert read[name].nbytes == tensor.nbytes


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    state = sample()
    write_safetensors(tmp_path / "a.safetensors", in_memory(state))
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == state.keys()
    for name, tensor in state.items():
        assert same(read[name], tensor), name
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_dtype_rewrites_floating_point_alone(dtype: torch.dtype, tmp_path: Path) -> None:
    state = sample()
    write_safetensors(tmp_path / "a.safetensors", in_memory(state), dtype)
    for name, tensor in load_file(tmp_path / "a.safetensors").items():
        assert same(tensor, state[name].to(dtype) if state[name].is_floating_point() else state[name]), name


def test_no_tensors_at_all(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", [])
    assert load_file(tmp_path / "a.safetensors") == {}
    assert read_shard(tmp_path / "a.safetensors") == []


def whole(path: Path) -> bytes:
    save_file({"a": torch.arange(8.0), "b": torch.ones(2, 3)}, path)
    return path.read_bytes()


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 40, -57, -56, -55, -24, -1])
def test_a_truncated_file_is_refused(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(whole(path)[:kept])
    with pytest.raises(DijiangError) as call:
        read_shard(path)
    assert "a.safetensors is not a whole safetensors file: download the model again" in message(call)


def framed(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def entry(**changes: Any) -> bytes:
    """A file of one tensor, two float32 numbers, with some of its header changed."""
    good = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return framed(json.dumps({"a": {**good, **changes}}).encode(), bytes(8))


def test_a_header_made_by_hand_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(entry())
    assert same(read_shard(tmp_path / "a.safetensors")[0].load(), torch.zeros(2))


@pytest.mark.parametrize(
    "content",
    [
        b"not a weight file, but long enough to have eight bytes and more",
        bytes(64),
        framed(b"{"),
        framed(b"[]"),
        framed(b"7"),
        framed(b"null"),
        framed(b"\xff\xfe{}"),
        framed(b"[" * 100_000),
        framed(b'{"a": 1}'),
        framed(b'{"a": {"dtype": "F32", "shape": [2]}}', bytes(8)),
        entry(shape=[3]),
        entry(shape=[-2]),
        entry(shape=[-1, -2]),
        entry(shape=2),
        entry(shape=["2"]),
        entry(shape=[2.0]),
        entry(data_offsets=[0, 4]),
        entry(data_offsets=[8, 16]),
        entry(data_offsets=[-8, 0]),
        entry(data_offsets=[8, 0]),
        entry(data_offsets=[0]),
        entry(data_offsets="08"),
        entry(data_offsets=[0, 1 << 70], shape=[1 << 68]),
        entry(dtype=7),
        entry(dtype=["F32"]),
        entry() + b"\0",
        b"PK\x03\x04" + bytes(100),
    ],
)
def test_a_corrupt_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(DijiangError) as call:
        read_shard(tmp_path / "a.safetensors")
    assert "is not a whole safetensors file" in message(call)


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    (tmp_path / "a.safetensors").write_bytes(framed(json.dumps({"a": one, "b": one}).encode(), bytes(8)))
    with pytest.raises(DijiangError, match="is not a whole safetensors file"):
        read_shard(tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F4"])
def test_quantised_types_are_named(dtype: str, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(entry(dtype=dtype, shape=[8]))
    with pytest.raises(DijiangError) as call:
        read_shard(tmp_path / "a.safetensors")
    assert f"a in a.safetensors is {dtype}: quantised weights can't be converted" in message(call)


# ------------------------------------------------------------------------------------------------------ .bin files


@pytest.mark.parametrize("zipped", [True, False])
def test_reads_pickled_weights(zipped: bool, tmp_path: Path) -> None:
    state = sample()
    torch.save(state, tmp_path / "a.bin", _use_new_zipfile_serialization=zipped)
    read = {t.name: t for t in read_shard(tmp_path / "a.bin")}
    assert read.keys() == state.keys()
    assert all(same(read[name].load(), tensor) for name, tensor in state.items())


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "save",
    [
        lambda state, path: torch.save(state, path),
        lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
        lambda state, path: path.write_bytes(pickle.dumps(state)),
    ],
    ids=["zip", "legacy", "plain"],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_pickle_never_runs(save: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    save({"a": torch.ones(2), "b": Bomb(tmp_path / "exploded")}, tmp_path / "a.bin")
    with pytest.raises(DijiangError) as call:
        read_shard(tmp_path / "a.bin")
    assert "a.bin" in message(call)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))  # it would have
    assert (tmp_path / "exploded").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04" + bytes(100), pickle.dumps([1, 2])])
def test_corrupt_pickles_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(DijiangError) as call:
        read_shard(tmp_path / "a.bin")
    assert "can't be read as weights" in message(call)


def test_a_truncated_pickle_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1000)}, tmp_path / "a.bin")
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:-500])
    with pytest.raises(DijiangError) as call:
        read_shard(tmp_path / "a.bin")
    assert "can't be read as weights" in message(call)


def test_pickled_types_without_a_name_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2, dtype=torch.complex64)}, tmp_path / "a.bin")
    with pytest.raises(DijiangError) as call:
        read_shard(tmp_path / "a.bin")
    assert "a in a.bin is complex64" in message(call)


# ------------------------------------------------------------------------------------------- which files are weights


def touch(folder: Path, *names: str, **indices: tuple[str, ...]) -> None:
    for name in names:
        (folder / name).write_bytes(b"")
    for kind, shards in indices.items():
        index = "model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json"
        weight_map = {f"w{i}": shard for i, shard in enumerate(shards)}
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    ("names", "indices", "expected"),
    [
        (["model.safetensors"], {}, ["model.safetensors"]),
        (["model.safetensors", "pytorch_model.bin"], {}, ["model.safetensors"]),
        (["model.safetensors", "a"], {"safetensors": ("a",)}, ["model.safetensors"]),
        (["b", "a", "pytorch_model.bin"], {"safetensors": ("b", "a", "b")}, ["a", "b"]),
        (["pytorch_model.bin"], {}, ["pytorch_model.bin"]),
        (["x.bin", "y.bin", "z.bin"], {"bin": ("x.bin", "y.bin")}, ["x.bin", "y.bin"]),
    ],
)
def test_files_are_chosen_as_transformers_does(
    names: list[str], indices: dict[str, tuple[str, ...]], expected: list[str], tmp_path: Path
) -> None:
    touch(tmp_path, *names, **indices)
    assert [path.name for path in weight_files(tmp_path)] == expected


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_an_index_that_names_missing_shards(kind: str, tmp_path: Path) -> None:
    touch(tmp_path, "a", **{kind: ("a", "gone-1", "gone-2")})
    with pytest.raises(DijiangError) as call:
        weight_files(tmp_path)
    assert "names gone-1 and 1 more, not in the folder: download the model again" in message(call)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "sub/../../secret.safetensors", "{outside}"])
def test_an_index_that_leaves_its_folder(shard: str, tmp_path: Path) -> None:
    outside = tmp_path / "secret.safetensors"
    outside.write_bytes(b"")
    folder = tmp_path / "source"
    (folder / "sub").mkdir(parents=True)
    touch(folder, safetensors=(shard.format(outside=outside),))
    with pytest.raises(DijiangError) as call:
        weight_files(folder)
    assert "outside" in message(call)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}', "\x00"])
def test_an_index_that_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(DijiangError) as call:
        weight_files(tmp_path)
    assert INDEX in message(call)


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "tf_model.h5").write_bytes(b"")
    with pytest.raises(DijiangError) as call:
        weight_files(tmp_path)
    assert "no weights in" in message(call) and "model.safetensors" in message(call)


# ------------------------------------------------------------------------------------------------- whole folders


def fill(out: Path, error: BaseException | None = None, force: bool = False) -> None:
    with new_folder(out, force) as folder:
        assert folder.parent == out.parent and folder.name != out.name
        (folder / "new").write_text("new")
        (folder / "sub").mkdir()
        assert not (out / "new").exists()
        if error is not None:
            raise error


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("existing", [False, True])
def test_a_folder_appears_whole(existing: bool, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    if existing:
        out.mkdir(parents=True)
    fill(out)
    assert tree(tmp_path) == ["deep", "deep/out", "deep/out/new", "deep/out/sub"]
    assert out.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3), OSError(errno.EIO, "io")])
@pytest.mark.parametrize("force", [False, True])
def test_nothing_is_left_of_a_failure(error: BaseException, force: bool, tmp_path: Path) -> None:
    if force:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(type(error)):
        fill(tmp_path / "out", error, force)
    assert tree(tmp_path) == (["out", "out/old"] if force else [])


def test_a_folder_that_holds_something_stays(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(DijiangError) as call:
        fill(tmp_path / "out")
    assert "out exists and is not empty" in message(call) and "--force" in message(call)
    assert tree(tmp_path) == ["out", "out/old"]


def test_a_file_in_the_way_stays(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("old")
    with pytest.raises(DijiangError, match="--force"):
        fill(tmp_path / "out")
    assert tree(tmp_path) == ["out"]
    fill(tmp_path / "out", force=True)
    assert tree(tmp_path) == ["out", "out/new", "out/sub"]


def test_force_replaces_everything(tmp_path: Path) -> None:
    (tmp_path / "out" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "deep" / "old").write_text("old")
    fill(tmp_path / "out", force=True)
    assert tree(tmp_path) == ["out", "out/new", "out/sub"]


def test_a_failure_at_the_last_step_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError):
        fill(tmp_path / "out", force=True)
    assert tree(tmp_path) == ["out", "out/old"]


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DijiangError) as call:
        fill(tmp_path / "file" / "out")
    assert "can't write beside" in message(call)


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "old").write_text("old")
    (tmp_path / "out").symlink_to(tmp_path / "kept")
    fill(tmp_path / "out", force=True)
    assert not (tmp_path / "out").is_symlink()
    assert (tmp_path / "kept" / "old").read_text() == "old" and (tmp_path / "out" / "new").is_file()


# -------------------------------------------------------------------------------------------------- laying it out


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


# ---------------------------------------------------------------------------------------------- trained checkpoints


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
