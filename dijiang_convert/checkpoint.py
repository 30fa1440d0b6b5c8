"""Checkpoints on disk: safetensors shards read by their headers, copied by bytes, written in folders that appear whole.

No tensor is loaded here but one at a time, so memory does not grow with the model.
"""

import errno
import json
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .errors import DijiangError
from .sources import read_index, read_json

if sys.platform == "linux":
    import fcntl

FICLONE = 0x40049409  # ioctl_ficlone(2)
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file, not loaded. ``load`` reads it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * _product(self.shape)


@contextmanager
def new_folder(out: Path, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``out`` that becomes it at the end, or vanishes if anything goes wrong.

    Raises DijiangError where ``out`` holds something and ``force`` is not given, or the disk is full.
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


def check_out(out: Path, force: bool = False) -> None:
    """Raises DijiangError where `new_folder` would refuse: to ask before anything that takes long."""
    if out.name in ("", ".."):
        raise DijiangError(f"--out {out} is a folder without a name of its own: give the name of a new one")
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not force:
        raise DijiangError(f"{out} exists and is not empty: choose another --out, or --force to replace it")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------- reading


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint folder, in the order transformers looks for them.

    Raises DijiangError: none there, or an index that names a missing one.
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


def read_shard(path: Path) -> list[Tensor]:
    """The tensors of a safetensors or .bin file. Raises DijiangError for a truncated or corrupt one."""
    return _read_pickle(path) if path.suffix == ".bin" else _read_safetensors(path)


def _read_safetensors(path: Path) -> list[Tensor]:
    size = path.stat().st_size
    broken = f"{path} is not a whole safetensors file: download the model again"
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 0 < length <= size - 8:
            raise DijiangError(broken)
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            tensors, spans = [], []
            for name, entry in header.items():
                dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
                if isinstance(dtype, str) and dtype not in DTYPES:
                    raise DijiangError(f"{name} in {path.name} is {dtype}: quantised weights can't be converted")
                counts = all(type(n) is int and n >= 0 for n in (*shape, start, stop))
                if not counts or stop - start != DTYPES[dtype].itemsize * _product(shape):
                    raise DijiangError(broken)
                tensors.append(Tensor(name, DTYPES[dtype], shape, _loader(path, 8 + length + start, dtype, shape)))
                spans.append((start, stop))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise DijiangError(broken) from None
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise DijiangError(broken)
        end = stop
    if 8 + length + end != size:
        raise DijiangError(broken)
    return tensors


def _loader(path: Path, offset: int, dtype: str, shape: tuple[int, ...]) -> Callable[[], torch.Tensor]:
    def load() -> torch.Tensor:
        count = _product(shape)
        if count == 0:
            return torch.empty(shape, dtype=DTYPES[dtype])
        with path.open("rb") as file:
            file.seek(offset)
            data = bytearray(file.read(count * DTYPES[dtype].itemsize))
        return torch.frombuffer(data, dtype=DTYPES[dtype]).reshape(shape)

    return load


def _read_pickle(path: Path) -> list[Tensor]:
    """A .bin file, memory-mapped; only tensors are unpickled, no code."""
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files from before PyTorch 1.6 can't be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
        tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    except Exception as error:
        reason = str(error).split("\n", 1)[0][:120]
        raise DijiangError(f"{path} can't be read as weights ({reason}): download the model again") from None
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise DijiangError(f"{name} in {path.name} is {kind}: quantised weights can't be converted")
    return in_memory(tensors)


# ------------------------------------------------------------------------------------------------------- writing


def write_safetensors(path: Path, tensors: Iterable[Tensor], dtype: torch.dtype | None = None) -> None:
    """Writes a safetensors file one tensor at a time, floating-point ones as ``dtype`` if given."""
    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for t in tensors:
        kind = _target_dtype(t, dtype)
        length = kind.itemsize * _product(t.shape)
        header[t.name] = {"dtype": NAMES[kind], "shape": list(t.shape), "data_offsets": [offset, offset + length]}
        offset += length
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for t in tensors:
            data = t.load().to(_target_dtype(t, dtype)).contiguous()
            file.write(data.flatten().view(torch.uint8).numpy().data)


def _target_dtype(t: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and t.dtype.is_floating_point else t.dtype


def in_memory(state: dict[str, torch.Tensor]) -> list[Tensor]:
    """Loaded tensors in the form that `write_safetensors` takes."""
    return [Tensor(name, t.dtype, tuple(t.shape), lambda t=t: t) for name, t in state.items()]  # type: ignore[misc]


def write_shards(
    folder: Path,
    shards: list[Path],
    new: dict[str, torch.Tensor],
    dtype: torch.dtype | None,
    progress: Callable[[int], None],
    link: bool = False,
) -> str | None:
    """Lays out a checkpoint: the source's shards, byte for byte unless ``dtype`` or their format asks for a rewrite,
    one small shard of ``new`` tensors, and the index. With ``link`` the source's shards are linked, none is copied or
    rewritten, and it returns how, as `link_file` does.

    The files are always named as shards: transformers ignores an index beside a file named model.safetensors.
    ``progress`` is called with every number of bytes written.

    Raises DijiangError where a shard can't be linked.
    """
    total = len(shards) + bool(new)
    weight_map: dict[str, str] = {}
    size = 0
    linked: set[str] = set()
    for i, shard in enumerate(shards, start=1):
        name = _shard_name(i, total)
        tensors = read_shard(shard)
        if link:
            linked.add(link_file(shard, folder / name))
            progress(shard.stat().st_size)
        elif shard.suffix == ".safetensors" and dtype is None:
            _copy(shard, folder / name, progress)
        else:
            write_safetensors(folder / name, tensors, dtype)
            progress(shard.stat().st_size)
        for t in tensors:
            weight_map[t.name] = name
            size += _product(t.shape) * _target_dtype(t, dtype).itemsize
    if new:
        name = _shard_name(total, total)
        clash = sorted(weight_map.keys() & new.keys())
        if clash:
            raise DijiangError(f"the source has a tensor named {clash[0]} already: is it converted?")
        write_safetensors(folder / name, in_memory(new))
        weight_map |= dict.fromkeys(new, name)
        size += sum(t.nbytes for t in new.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)
    return next((how for how in ("hard link", "reflink") if how in linked), None)


def write_trained(folder: Path, saved: Path, source: Path, aliases: Callable[[str], Iterable[str]]) -> None:
    """Lays out a trained checkpoint so that what training left alone stays in files of its own, which need not be
    uploaded again: a file of the source of which no tensor changed is copied byte for byte, another one is split into
    the tensors that stayed and those that changed.

    Args:
        saved: the folder with the trained tensors. Nothing is loaded but one tensor at a time.
        source: the checkpoint that was trained, whose names and, where they stayed, bytes the tensors keep.
        aliases: the names that a tensor of the source may have in ``saved``.
    """
    trained = {t.name: t for path in weight_files(saved) for t in read_shard(path)}
    untold = set(trained)
    stayed: list[tuple[Path | None, list[Tensor]]] = []
    changed: list[tuple[Path | None, list[Tensor]]] = []
    for path in weight_files(source):
        old, new = [], []
        for t in read_shard(path):
            match = next((trained[name] for name in aliases(t.name) if name in trained), t)
            untold.discard(match.name)
            if match is t or torch.equal(t.load().to(match.dtype), match.load()):
                old.append(t)
            else:
                new.append(replace(match, name=t.name))
        if old:
            stayed.append((None if new else path, old))
        if new:
            changed.append((None, new))
    parts = [*stayed, *changed]
    if untold:  # names that the source does not have: all of it as it was saved
        parts = [(path, read_shard(path)) for path in weight_files(saved)]
    weight_map: dict[str, str] = {}
    size = 0
    for i, (whole, tensors) in enumerate(parts, start=1):
        name = _shard_name(i, len(parts))
        if whole is not None:
            _copy(whole, folder / name, lambda count: None)
        else:
            write_safetensors(folder / name, tensors)
        weight_map |= {t.name: name for t in tensors}
        size += sum(t.nbytes for t in tensors)
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})


def _shard_name(number: int, total: int) -> str:
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def _copy(source: Path, target: Path, progress: Callable[[int], None], chunk: int = 64 << 20) -> None:
    """Copies inside the kernel, in pieces, so that progress shows and memory stays flat."""
    with source.open("rb") as reading, target.open("wb") as writing:
        left = os.fstat(reading.fileno()).st_size
        while left > 0:
            try:
                done = os.copy_file_range(reading.fileno(), writing.fileno(), min(chunk, left))
            except (AttributeError, OSError) as error:  # another file system, or no such call here
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
    """Gives the file ``source`` a second name without copying it, and says how: "reflink" where the file system has
    them (either file can be changed and the other stays), else "hard link" (both are one file).

    Raises DijiangError where there is neither, as between file systems.
    """
    source = source.resolve()  # in the Hub's cache names are links to the files
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
    """A file of its own that shares the other's blocks until one is written to. Raises OSError where there is no such
    thing."""
    if sys.platform != "linux":
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    with source.open("rb") as reading, target.open("xb") as writing:
        fcntl.ioctl(writing.fileno(), FICLONE, reading.fileno())


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_checkpoint(folder: str | Path) -> dict[str, Any]:
    """The config of a converted checkpoint. Raises DijiangError if the folder is something else."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise DijiangError(f"no checkpoint folder {folder}: make one with dijiang convert")
    if not (path / "config.json").is_file():
        raise DijiangError(f"{folder} has no config.json: it is not a checkpoint")
    config = read_json(path / "config.json")
    if "dijiang" not in config:
        raise DijiangError(f"{folder} is not converted yet: run dijiang convert {folder}")
    return config


def _product(shape: Iterable[int]) -> int:
    result = 1
    for n in shape:
        result *= n
    return result
