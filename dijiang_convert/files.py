"""Finds, copies and links files of checkpoints, and makes folders that appear whole. Tensors are not read here."""

import errno
import glob
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from .errors import DijiangError

if sys.platform != "win32":
    import fcntl

_RECIPES = Path(__file__).parent / "recipes"  # only an installed package has its recipes inside
RECIPES = _RECIPES if _RECIPES.is_dir() else Path(__file__).parents[1] / "recipes"
ACCELERATE = RECIPES / "accelerate"  # configurations for `accelerate launch`
# An adapter's config names a model, which transformers loads in place of the one that it lies beside on the Hub.
ADAPTER = "adapter_config.json"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how a pointer file starts
DEEPEST = 100  # levels of a JSON file: deeper ones exceed the recursion limit of whoever walks through them
FICLONE = 0x40049409  # the request of ioctl_ficlone(2), which makes a reflink
FULL = (errno.ENOSPC, errno.EDQUOT)
UNTOLD = ("inline_container", "iostream error")  # what torch.save says, whyever it can't write
HARDLY_ANY = 16 << 20  # bytes: a disk with less free space is full, where torch does not say why it can't write


@contextmanager
def new_folder(out: Path, force: bool = False, remedy: str = "free some or choose another --out") -> Iterator[Path]:
    """A temporary folder beside ``out`` that becomes ``out`` at the end, or is removed if anything goes wrong.

    It is locked as long as this process lives, so that `remove_leftovers` can tell it from that of a killed one.

    remedy: what to do where the disk is full. Raises DijiangError then, if ``out`` holds something and ``force`` is not
    given, or if ``out`` can't be written.
    """
    check_out(out, force)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise DijiangError(f"can't write beside {out}: {error.strerror}: choose another --out") from None
    try:
        with _locked(folder), telling_full_disk(out, remedy):
            yield folder
            folder.chmod(0o777 & ~_umask())  # tempfile's folders are for their owner alone
            replaced = folder.with_suffix(".replaced")
            try:
                if out.exists():
                    out.rename(replaced)
                folder.rename(out)
            finally:
                if replaced.exists() and not out.exists():
                    replaced.rename(out)
                _remove(replaced)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(out: Path) -> None:
    """Removes what killed processes left beside ``out``. A folder that one of them had just moved out of the way of its
    successor gets its name ``out`` back.

    What a living process writes stays. Where the file system has no locks, what killed ones wrote stays, too.
    """
    ours = re.compile(rf"\.{re.escape(out.name)}\.([a-z0-9_]{{8}}|run)\.(partial|replaced)")
    for left in out.parent.glob(f".{glob.escape(out.name)}.*"):
        if ours.fullmatch(left.name):
            with suppress(OSError), _locked(left) as free:
                if left.suffix == ".replaced" and not out.exists():
                    left.rename(out)
                elif free:
                    _remove(left)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Locks a folder until the end of the context or of the process, and yields whether it could."""
    if sys.platform == "win32":
        yield False
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            free = False
        else:
            free = True
        yield free
    finally:
        os.close(number)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that becomes ``path`` at the end, or is removed if anything goes wrong."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def telling_full_disk(what: Path | str, remedy: str) -> Iterator[None]:
    """Inside the context, any error of a full disk becomes a DijiangError: the disk of ``what``, and what to do."""
    try:
        yield
    except Exception as error:
        if is_of_full_disk(error, what):
            raise DijiangError(f"no space left on the disk of {what}: {remedy}") from None
        raise


def is_of_full_disk(error: Exception, what: Path | str = ".") -> bool:
    """Whether an error of Python or of a library means that the disk of ``what`` is full."""
    if isinstance(error, DijiangError):
        return False
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    if any(text in str(error) for text in (*map(os.strerror, FULL), "No usable temporary directory")):
        return True
    if not any(text in str(error) for text in UNTOLD):
        return False
    there = Path(what).absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free < HARDLY_ANY


def _umask() -> int:
    """The permissions that new files lack, which can only be read by setting them."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def default_out(name: str) -> Path:
    """The folder that a source of this name is converted into by default."""
    return Path(f"{name}-dijiang")


def paths_of(data: Any) -> list[str]:
    """The names among ``data``, as `token_rows` takes it, which may be paths; none of documents."""
    return [data] if isinstance(data, str) else [] if data is None or type(data) in (list, tuple) else list(data)


def check_beside(out: Path, source: str | Path) -> None:
    """Raises DijiangError where ``out`` lies in the folder ``source``, which nothing is written into."""
    folder = Path(os.path.expanduser(source))
    if os.path.isdir(folder) and folder.resolve() in out.resolve().parents:
        beside = folder.resolve().parent / out.name
        raise DijiangError(f"{out} lies in {source}, which is read: give another --out, as {shlex.quote(str(beside))}")


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
            missing = [name for name in names if not os.path.isfile(folder / name)]
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


def check_link(path: Path, folder: Path) -> None:
    """Raises DijiangError for a file of a folder that is a link to elsewhere: whoever made the folder could have any
    file of this machine copied and pushed. The Hub's cache is made of links, to its own blobs."""
    real, whole = path.resolve(), folder.resolve()
    if real.is_relative_to(whole) or (real.parent.name == "blobs" and real.parent.parent in _caches(whole)):
        return
    raise DijiangError(f"{path} is a link to {real}, outside of {folder}: put a copy in its place")


def _caches(folder: Path) -> list[Path]:
    """Folders models--OWNER--NAME of the Hub's cache: that which holds this snapshot, and those of the user's cache."""
    from huggingface_hub import constants

    found = list(Path(constants.HF_HUB_CACHE).resolve().glob("models--*"))
    return [*found, folder.parent.parent] if folder.parent.name == "snapshots" else found


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
                if isinstance(error, OSError) and error.errno in (*FULL, errno.EIO):
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


def bytes_text(count: int) -> str:
    """A number of bytes as people read it: 271.6 kB."""
    size, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        DijiangError: the file can't be read or holds anything but a JSON object.
    """
    content = read_any_json(path)
    if not isinstance(content, dict):
        raise DijiangError(f"{path} holds no JSON object: get it again")
    return content


def read_any_json(path: Path) -> Any:
    """What the JSON file `path` holds. Raises DijiangError if it can't be read."""
    try:
        read = path.read_bytes()
        content = json.loads(read)
        if b"\\ud" in read.lower():  # an escape may be half of a surrogate pair, which can't be written again
            json.dumps(content, ensure_ascii=False).encode()
    except RecursionError:
        depth = sys.getrecursionlimit()
    except (OSError, ValueError) as error:
        raise DijiangError(f"{path} is no readable JSON ({' '.join(str(error).split())}): get it again") from error
    else:
        depth = _depth(content)
    if depth > DEEPEST:
        raise DijiangError(f"{path} is nested more than {DEEPEST} levels deep: get it again")
    return content


def _depth(value: Any) -> int:
    """How many lists and objects are within each other, up to one more than DEEPEST."""
    depth, level = 0, [value]
    while level and depth <= DEEPEST:
        level = [part for each in level if isinstance(each, dict | list) for part in _parts(each)]
        depth += 1
    return depth


def _parts(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def read_index(path: Path) -> set[str]:
    """The weight files that a `*.index.json` names.

    Raises:
        DijiangError: the index can't be read, names no files, or names files outside of its folder.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DijiangError(f"{path} names no weights: get it again")
    others = [name for name in weight_map.values() if not isinstance(name, str)]
    if others:
        raise DijiangError(f"{path} names {others[0]!r:.80}, which is no name of a file: get it again")
    names = set(weight_map.values())
    for name in sorted(names):
        if Path(name).is_absolute() or ".." in re.split(r"[/\\]", name):
            raise DijiangError(f"{path} names {name}, outside its folder: download the model again")
    return names


class _WithoutAliases(yaml.SafeLoader):
    """Reads YAML in which each value is written where it is: a few lines of aliases can stand for billions of values,
    or for a list within itself."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"*{self.peek_event().anchor} is an alias: write the value itself")
        return super().compose_node(parent, index)


def read_yaml(text: str) -> Any:
    """The content of YAML. Raises YAMLError, and ValueError for an impossible date or number."""
    try:
        return yaml.load(text, _WithoutAliases)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deep") from None
