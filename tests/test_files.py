"""Files of checkpoints: which ones hold the weights, and folders that appear whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from dijiang_convert.checkpoint.shards import (
    INDEX,
)
from dijiang_convert.errors import DijiangError
from dijiang_convert.files import (
    check_out,
    new_file,
    new_folder,
    remove_leftovers,
    telling_full_disk,
    weight_files,
)
from tests.checkpoint.tensors import tree
from tests.refusals import message


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


def fill(out: Path, error: BaseException | None = None, force: bool = False) -> None:
    with new_folder(out, force) as folder:
        assert folder.parent == out.parent and folder.name != out.name
        (folder / "new").write_text("new")
        (folder / "sub").mkdir()
        assert not (out / "new").exists()
        if error is not None:
            raise error


def checkpoint(folder: Path) -> None:
    """What --force may replace."""
    folder.mkdir()
    (folder / "config.json").write_text('{"dijiang": {}}')


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
        checkpoint(tmp_path / "out")
    with pytest.raises(type(error)):
        fill(tmp_path / "out", error, force)
    assert tree(tmp_path) == (["out", "out/config.json"] if force else [])


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
    with pytest.raises(DijiangError, match="is no converted checkpoint, so --force leaves it alone"):
        fill(tmp_path / "out", force=True)
    assert (tmp_path / "out").read_text() == "old"


def test_force_replaces_a_checkpoint(tmp_path: Path) -> None:
    checkpoint(tmp_path / "out")
    (tmp_path / "out" / "deep").mkdir()
    (tmp_path / "out" / "deep" / "old").write_text("old")
    fill(tmp_path / "out", force=True)
    assert tree(tmp_path) == ["out", "out/new", "out/sub"]


@pytest.mark.parametrize("config", [None, "{}", "[1]", "no json", '{"model_type": "llama"}'])
def test_force_leaves_alone_what_is_not_ours(config: str | None, tmp_path: Path) -> None:
    (tmp_path / "out" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "deep" / "mine").write_text("mine")
    if config is not None:
        (tmp_path / "out" / "config.json").write_text(config)
    with pytest.raises(DijiangError, match="is no converted checkpoint, so --force leaves it alone"):
        fill(tmp_path / "out", force=True)
    assert (tmp_path / "out" / "deep" / "mine").is_file()


def test_force_leaves_alone_what_holds_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path / "out")
    (tmp_path / "out" / "text.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    check_out(tmp_path / "out", True, ["pythia-410m", "elsewhere.txt"])
    for name in (
        "out",
        "out/text.txt",
        "~/out/text.txt",
        str(tmp_path / "out"),
        "out/text.txt@3",
        "out/*.txt",
        "out/*@2",
    ):
        with pytest.raises(DijiangError, match="which is read: choose another --out"):
            check_out(tmp_path / "out", True, [name])


def test_a_failure_at_the_last_step_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path / "out")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError):
        fill(tmp_path / "out", force=True)
    assert tree(tmp_path) == ["out", "out/config.json"]


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DijiangError) as call:
        fill(tmp_path / "file" / "out")
    assert "can't write beside" in message(call)


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path: Path) -> None:
    checkpoint(tmp_path / "kept")
    (tmp_path / "kept" / "old").write_text("old")
    (tmp_path / "out").symlink_to(tmp_path / "kept")
    fill(tmp_path / "out", force=True)
    assert not (tmp_path / "out").is_symlink()
    assert (tmp_path / "kept" / "old").read_text() == "old" and (tmp_path / "out" / "new").is_file()


# --------------------------------------------------------------------------------- what killed processes leave behind


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    others = (
        ".out.abc",
        ".out.abcdefgh.part",
        ".other.abcdefgh.partial",
        ".out.b.abcdefgh.partial",
        ".outabcdefgh.partial",
    )
    for name in (".out.abcdefgh.partial", ".out.run.partial", *others):
        (tmp_path / name / "deep").mkdir(parents=True)
    with new_folder(out) as living:
        remove_leftovers(out)
        assert {path.name for path in tmp_path.iterdir()} == {living.name, *others}
    assert {path.name for path in tmp_path.iterdir()} == {"out", *others}


def test_a_folder_that_was_being_replaced_gets_its_name_back(tmp_path: Path) -> None:
    """Unless its successor is in its place."""
    out, aside = tmp_path / "out", tmp_path / ".out.abcdefgh.replaced"
    checkpoint(aside)
    remove_leftovers(out)
    assert tree(tmp_path) == ["out", "out/config.json"]
    (aside / "old").mkdir(parents=True)
    remove_leftovers(out)
    assert tree(tmp_path) == ["out", "out/config.json"]


def test_leftovers_of_names_that_are_patterns_and_of_none(tmp_path: Path) -> None:
    (tmp_path / ".o*t.abcdefgh.partial").mkdir()
    (tmp_path / ".out.abcdefgh.partial").mkdir()
    remove_leftovers(tmp_path / "o*t")
    remove_leftovers(tmp_path / "nowhere" / "out")
    assert tree(tmp_path) == [".out.abcdefgh.partial"]


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "card"
    path.write_text("old")
    with pytest.raises(OSError), new_file(path) as partial:
        partial.write_text("ne")
        raise OSError(errno.ENOSPC, "full")
    assert tree(tmp_path) == ["card"] and path.read_text() == "old"
    with new_file(path) as partial:
        partial.write_text("new")
    assert tree(tmp_path) == ["card"] and path.read_text() == "new"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "full"),
        OSError(errno.EDQUOT, "full"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 60928 vs 60816"),
        RuntimeError("basic_ios::clear: iostream error"),
        FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"),
    ],
)
def test_a_full_disk_is_told_whoever_met_it(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 30, 1 << 30, 0))  # type: ignore[attr-defined]
    with pytest.raises(DijiangError) as call, telling_full_disk(tmp_path, "free some"):
        raise error
    assert message(call) == f"no space left on the disk of {tmp_path}: free some"


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, os.strerror(errno.EIO)), RuntimeError("inline_container.cc:672"), DijiangError("full")]
)
def test_other_errors_stay_what_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as call, telling_full_disk(tmp_path, "free some"):
        raise error
    assert call.value is error
