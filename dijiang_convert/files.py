"""Finds, copies and links files of checkpoints, and makes folders that appear whole. Tensors are not read here."""

import errno
import glob
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import DijiangError

if sys.platform == "linux":
    import fcntl

_RECIPES = Path(__file__).parent / "recipes"  # only an installed package has its recipes inside
RECIPES = _RECIPES if _RECIPES.is_dir() else Path(__file__).parents[1] / "recipes"
ACCELERATE = RECIPES / "accelerate"  # configurations for `accelerate launch`
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how a pointer file starts
FICLONE = 0x40049409  # the request of ioctl_ficlone(2), which makes a reflink


@contextmanager
def new_folder(out: Path, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``out`` that becomes ``out`` at the end, or is removed if anything goes wrong.

    Raises DijiangError if ``out`` holds something and ``force`` is not given, if ``out`` can't be written, or if the
    disk is full.
    """
    check_out(out, force)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise DijiangError(f"can't write beside {out}: {error.strerror}: choose another --out") from None
    try:
        yield folder
        folder.chmod(0o755)
        replaced = folder.with_suffix(".replaced")
        try:
            if out.exists():
                out.rename(replaced)
            folder.rename(out)
        finally:
            if replaced.exists() and not out.exists():
                replaced.rename(out)
            _remove(replaced)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DijiangError(f"no space left on the disk of {out}: free some or choose another --out") from None
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def default_out(name: str) -> Path:
    """The folder that a source of this name is converted into by default."""
    return Path(f"{name}-dijiang")


def paths_of(data: Any) -> list[str]:
    """The names among ``data``, as `token_rows` takes it, which may be paths; none of documents."""
    return [data] if isinstance(data, str) else [] if data is None or type(data) in (list, tuple) else list(data)


def check_out(out: Path, force: bool = False, inputs: Iterable[str | Path] = ()) -> None:
    """Raises DijiangError where `new_folder` would refuse, before anything that takes long.

    force: replace a folder that holds something. It must be a converted checkpoint, and may hold none of ``inputs``,
        which are paths or names of what is read.
    """
    if out.name in ("", ".."):
        raise DijiangError(f"--out {out} is a folder without a name of its own: give the name of a new one")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise DijiangError(f"{out} exists and is not empty: choose another --out, or --force to replace it")
    if not _is_ours(out):
        raise DijiangError(f"{out} is no converted checkpoint, so --force leaves it alone: choose another --out")
    for name in map(str, inputs):
        path = Path(os.path.expanduser(name))
        if not path.exists():  # it may be a glob, or have a weight behind an @
            path = Path(os.path.expanduser(name.rpartition("@")[0] or name))
            while glob.has_magic(str(path)):
                path = path.parent
        if path.exists() and path.resolve().is_relative_to(out.resolve()):
            raise DijiangError(f"{out} holds {name}, which is read: choose another --out")


def _is_ours(folder: Path) -> bool:
    """Whether a folder is a converted checkpoint."""
    try:
        return "dijiang" in json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint folder, those that transformers would load.

    Raises DijiangError if there are none, or if an index names a missing one.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).is_file():
            return [folder / single]
        index = folder / f"{single}.index.json"
        if index.is_file():
            names = sorted(read_index(index))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                raise DijiangError(f"{index} names {missing[0]}{more}, not in the folder: download the model again")
            return [folder / name for name in names]
    raise DijiangError(f"no weights in {folder}: it needs model.safetensors, pytorch_model.bin, or an index of shards")


def check_pointers(folder: Path) -> None:
    """Raises DijiangError for a file that git left for git-lfs to fetch: some lines of text in place of its content."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(LFS_POINTER):
            raise DijiangError(f"{path} is a pointer of git-lfs, not the file: run git lfs pull in {folder}")


def copy_file(source: Path, target: Path, progress: Callable[[int], None], chunk: int = 64 << 20) -> None:
    """Copies a file in chunks of ``chunk`` bytes, by the operating system's copy_file_range(2) where possible.

    progress: is called with the bytes of each chunk. Raises DijiangError if ``source`` became shorter meanwhile.
    """
    with source.open("rb") as reading, target.open("wb") as writing:
        left = os.fstat(reading.fileno()).st_size
        while left > 0:
            try:
                done = os.copy_file_range(reading.fileno(), writing.fileno(), min(chunk, left))
            except (AttributeError, OSError) as error:  # the call is missing, or can't copy here
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                    raise
                writing.seek(reading.tell())
                for data in iter(lambda: reading.read(chunk), b""):
                    writing.write(data)
                    progress(len(data))
                return
            if done == 0:
                raise DijiangError(f"{source} became shorter while it was copied: download the model again")
            left -= done
            progress(done)


def link_file(source: Path, target: Path) -> str:
    """Makes ``target`` share the bytes of the file ``source``, without copying, and returns how.

    "reflink" means two files, of which either can change and the other stays. "hard link" means two names of one file,
    where the file system has no reflinks. Raises DijiangError if it has neither, as between two file systems.
    """
    source = source.resolve()  # names in the Hub's cache are symbolic links
    try:
        _reflink(source, target)
        return "reflink"
    except OSError:
        target.unlink(missing_ok=True)
    try:
        os.link(source, target)
        return "hard link"
    except OSError as error:
        raise DijiangError(
            f"can't link {source} into {target.parent.parent} ({error.strerror}): "
            "choose an --out on the source's file system, or leave out --link"
        ) from None


def _reflink(source: Path, target: Path) -> None:
    """Makes ``target`` a file that shares the blocks of ``source`` until either is written to.

    Raises OSError where the system can't.
    """
    if sys.platform != "linux":
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    with source.open("rb") as reading, target.open("xb") as writing:
        fcntl.ioctl(writing.fileno(), FICLONE, reading.fileno())


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        DijiangError: the file can't be read or holds anything but a JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DijiangError(f"{path} is no readable JSON ({' '.join(str(error).split())}): get it again") from error
    if not isinstance(content, dict):
        raise DijiangError(f"{path} holds no JSON object: get it again")
    return content


def read_index(path: Path) -> set[str]:
    """The weight files that a `*.index.json` names.

    Raises:
        DijiangError: the index can't be read, names no files, or names files outside of its folder.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DijiangError(f"{path} names no weights: get it again")
    names = {str(name) for name in weight_map.values()}
    for name in sorted(names):
        if Path(name).is_absolute() or ".." in re.split(r"[/\\]", name):
            raise DijiangError(f"{path} names {name}, outside its folder: download the model again")
    return names
