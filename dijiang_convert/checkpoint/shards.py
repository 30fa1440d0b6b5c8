"""Reads and writes the weights of checkpoints: safetensors shards by their headers and bytes, and .bin files.

Tensors are loaded one at a time, so memory does not grow with the model (but for .bin files from before PyTorch 1.6).
Models are built in `loading`.
"""

import hashlib
import json
import shlex
import struct
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import DijiangError
from ..files import copy_file, link_file, read_json, weight_files

INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PART = 2**20  # numbers that are read at a time where all are looked at
SAMPLE = 1024  # numbers of each tensor that `digest` looks at


@dataclass(frozen=True)
class Tensor:
    """A tensor that is not loaded yet.

    load: reads it. part: reads some of its numbers as [n], given where they start and how many they are at most.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]
    part: Callable[[int, int], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * _product(self.shape)


# ------------------------------------------------------------------------------------------------------- reading


def read_shard(path: Path) -> list[Tensor]:
    """The tensors of a safetensors or .bin file.

    Raises DijiangError for a truncated or corrupt file, and for dtypes of quantised weights.
    """
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
            text = file.read(length)
            header: dict[str, Any] = json.loads(text)
            # The library of that name, which loads the file later, takes no other start, and no other metadata.
            if not (text.startswith(b"{") and _are_texts(header.pop("__metadata__", None))):
                raise DijiangError(broken)
            tensors, spans = [], []
            for name, entry in header.items():
                dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
                if isinstance(dtype, str) and dtype not in DTYPES:
                    raise DijiangError(f"{name} in {path.name} is {dtype}: quantised weights can't be converted")
                counts = all(type(n) is int and n >= 0 for n in (*shape, start, stop))
                if not counts or stop - start != DTYPES[dtype].itemsize * _product(shape):
                    raise DijiangError(broken)
                tensors.append(_unread(name, DTYPES[dtype], shape, path, 8 + length + start))
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


def _are_texts(metadata: Any) -> bool:
    """Whether a header's metadata is missing, or texts by name."""
    return metadata is None or (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values()))


def _unread(name: str, dtype: torch.dtype, shape: tuple[int, ...], path: Path, offset: int) -> Tensor:
    """The tensor whose bytes start at ``offset`` in a file."""

    def part(start: int, count: int) -> torch.Tensor:
        count = min(count, _product(shape) - start)
        if count == 0:
            return torch.empty(0, dtype=dtype)
        with path.open("rb") as file:
            file.seek(offset + start * dtype.itemsize)
            data = bytearray(count * dtype.itemsize)
            file.readinto(data)
        return torch.frombuffer(data, dtype=dtype)

    return Tensor(name, dtype, shape, lambda: part(0, _product(shape)).reshape(shape), part)


def _read_pickle(path: Path) -> list[Tensor]:
    """The tensors of a .bin file, memory-mapped. Only tensors are unpickled, so no code of the file runs."""
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


def check_finite(shard: Path, progress: Callable[[int], None]) -> None:
    """Reads a weight file. Raises DijiangError where it is not whole, or a tensor holds NaN or infinity.

    progress: is called with the bytes of each tensor.
    """
    for t in read_shard(shard):
        for start in range(0, _product(t.shape) * t.dtype.is_floating_point, PART):
            low, high = t.part(start, PART).aminmax()  # as fast as reading; a NaN is both
            if not (low.isfinite() and high.isfinite()):
                kind = "NaN" if low.isnan() else "infinity"
                raise DijiangError(f"{t.name} in {shard} holds {kind}: the model is broken, get it again")
        progress(t.nbytes)


def check_size(shards: Iterable[Path], parameters: int, source: object) -> None:
    """Raises DijiangError where the weight files hold less than half of the numbers that the config speaks of.

    What the kernel adds is as large as the config says, so that this must be known before it is made. `check_weights`
    compares tensor by tensor, afterwards.
    """
    held = sum(_product(t.shape) for shard in shards for t in read_shard(shard))
    if 2 * held < parameters:
        raise DijiangError(
            f"the weights of {source} are not those of its config.json (it speaks of {parameters:,} numbers, and they "
            f"are {held:,}): get it again"
        )


def digest(folder: Path) -> str:
    """A hash of a checkpoint's base weights: names, types, shapes and the first numbers of all tensors.

    Training changes it, since that changes every tensor. Kernel parameters don't count.
    """
    found = hashlib.sha256()
    tensors = [t for path in weight_files(folder) for t in read_shard(path) if ".dijiang." not in t.name]
    for t in sorted(tensors, key=lambda t: t.name):
        found.update(f"{t.name} {NAMES[t.dtype]} {t.shape}".encode())
        found.update(t.part(0, SAMPLE).view(torch.uint8).numpy().data)
    return found.hexdigest()


# ------------------------------------------------------------------------------------------------------- writing


WRAPPERS = ("_orig_mod.", "module.")  # of torch.compile and DDP


def write_safetensors(path: Path, tensors: Iterable[Tensor], dtype: torch.dtype | None = None) -> None:
    """Writes a safetensors file, one tensor at a time. Floating-point tensors are cast to ``dtype``, if it is given."""
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
            loaded = t.load()
            data = loaded.to(_target_dtype(t, dtype)).contiguous()
            if data.dtype != t.dtype and not torch.equal(data.isfinite(), loaded.isfinite()):
                raise DijiangError(
                    f"{t.name} has numbers that {NAMES[data.dtype]} can't hold, up to {loaded.abs().max().item():.3g}: "
                    "take --dtype bfloat16 or float32"
                )
            file.write(data.flatten().view(torch.uint8).numpy().data)


def _target_dtype(t: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and t.dtype.is_floating_point else t.dtype


def in_memory(state: dict[str, torch.Tensor]) -> list[Tensor]:
    """Loaded tensors as `write_safetensors` takes tensors."""

    def unread(name: str, tensor: torch.Tensor) -> Tensor:
        return Tensor(name, tensor.dtype, tuple(tensor.shape), lambda: tensor, lambda i, n: tensor.flatten()[i : i + n])

    return [unread(name, tensor) for name, tensor in state.items()]


def write_shards(
    folder: Path,
    shards: list[Path],
    new: dict[str, torch.Tensor],
    dtype: torch.dtype | None,
    progress: Callable[[int], None],
    link: bool = False,
    wrapper: str = "",
) -> str | None:
    """Writes a checkpoint: the source's shards, one shard of ``new`` tensors if there are any, and the index.

    Files are always named as shards, since transformers ignores an index beside a file named model.safetensors.

    Args:
        shards: the source's weight files. They are copied byte for byte if they are safetensors and keep their dtype.
        dtype: what floating-point tensors of the source are cast to; None keeps theirs.
        progress: is called with the number of bytes after each write.
        link: whether the source's shards are linked, and none is copied or rewritten.
        wrapper: what the names of the source's tensors lose at their start, see `wrapper_prefix`.

    Returns:
        How shards were linked: "hard link" if any was by that, else "reflink" as of `link_file`; None without links.

    Raises:
        DijiangError: a shard can't be read or linked, or the source has a tensor with one of the new names.
    """
    total = len(shards) + bool(new)
    weight_map: dict[str, str] = {}
    size = 0
    linked: set[str] = set()
    for i, shard in enumerate(shards, start=1):
        name = _shard_name(i, total)
        tensors = [replace(t, name=t.name.removeprefix(wrapper)) for t in read_shard(shard)]
        if link:
            linked.add(link_file(shard, folder / name))
            progress(shard.stat().st_size)
        elif shard.suffix == ".safetensors" and dtype is None and not wrapper:
            copy_file(shard, folder / name, progress)
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


def wrapper_prefix(shards: Iterable[Path]) -> str:
    """What torch.compile and DDP put before all names of a model that was saved inside of them; "" without that."""
    names = [t.name for shard in shards for t in read_shard(shard)]
    prefix = ""
    while wrapper := next((each for each in WRAPPERS if all(n.startswith(prefix + each) for n in names)), ""):
        prefix += wrapper
    return prefix if names else ""


def drop_tensors(folder: Path, names: Collection[str]) -> None:
    """Removes tensors from a checkpoint that `write_shards` wrote. Only files with such a tensor are rewritten."""
    index = read_json(folder / INDEX)
    for file in {index["weight_map"].pop(name) for name in names}:
        tensors = read_shard(folder / file)
        index["metadata"]["total_size"] -= sum(t.nbytes for t in tensors if t.name in names)
        write_safetensors(folder / f"{file}.new", [t for t in tensors if t.name not in names])
        (folder / f"{file}.new").replace(folder / file)
    write_json(folder / INDEX, index)


def write_trained(folder: Path, saved: Path, source: Path, aliases: Callable[[str], Iterable[str]]) -> None:
    """Writes a trained checkpoint with unchanged tensors in files of their own, which need not be uploaded again.

    A file of the source in which no tensor changed is copied byte for byte. Any other is split in two: its unchanged
    tensors and its changed ones.

    Args:
        saved: the folder with the trained tensors.
        source: the checkpoint that was trained. Tensors keep its names, and unchanged tensors its bytes.
        aliases: returns the names that a tensor of the source may have in ``saved``.
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
    if untold:  # the source lacks some names: all tensors are written as they were saved
        parts = [(path, read_shard(path)) for path in weight_files(saved)]
    weight_map: dict[str, str] = {}
    size = 0
    for i, (whole, tensors) in enumerate(parts, start=1):
        name = _shard_name(i, len(parts))
        if whole is not None:
            copy_file(whole, folder / name, lambda count: None)
        else:
            write_safetensors(folder / name, tensors)
        weight_map |= {t.name: name for t in tensors}
        size += sum(t.nbytes for t in tensors)
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})


def _shard_name(number: int, total: int) -> str:
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_checkpoint(folder: str | Path) -> dict[str, Any]:
    """The content of a converted checkpoint's config.json. Raises DijiangError if the folder is something else."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise DijiangError(f"no checkpoint folder {folder}: make one with dijiang convert")
    if not (path / "config.json").is_file():
        raise DijiangError(f"{folder} has no config.json: it is not a checkpoint")
    config = read_json(path / "config.json")
    if "dijiang" not in config:
        raise DijiangError(f"{folder} is not converted yet: run dijiang convert {shlex.quote(str(folder))}")
    return config


def _product(shape: Iterable[int]) -> int:
    result = 1
    for n in shape:
        result *= n
    return result
