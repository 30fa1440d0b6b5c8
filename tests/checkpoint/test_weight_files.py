"""Weights as they are read and written: safetensors by their headers, pickles without their code."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dijiang_convert.checkpoint import shards
from dijiang_convert.checkpoint.shards import (
    DTYPES,
    check_finite,
    digest,
    in_memory,
    read_shard,
    write_safetensors,
)
from dijiang_convert.errors import DijiangError
from tests.refusals import message


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


def test_parts_of_tensors(tmp_path: Path) -> None:
    state = {name: tensor.contiguous() for name, tensor in sample().items()}
    save_file(state, tmp_path / "a.safetensors", metadata={"format": "pt"})
    for read in (read_shard(tmp_path / "a.safetensors"), in_memory(state)):
        for t in read:
            flat = state[t.name].flatten()
            assert same(t.part(0, 4), flat[:4]) and same(t.part(len(flat) // 2, 99), flat[len(flat) // 2 :])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none(value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PART", 4)
    state = {"first": torch.ones(3, 5), "second": torch.arange(11).to(torch.bfloat16), "ids": torch.arange(9)}
    save_file(state, tmp_path / "a.safetensors", metadata={"format": "pt"})
    seen: list[int] = []
    check_finite(tmp_path / "a.safetensors", seen.append)
    assert sum(seen) == sum(tensor.nbytes for tensor in state.values())
    state["second"][9] = value  # in the last of its parts
    save_file(state, tmp_path / "a.safetensors", metadata={"format": "pt"})
    with pytest.raises(DijiangError) as call:
        check_finite(tmp_path / "a.safetensors", seen.append)
    kind = "NaN" if value != value else "infinity"
    assert message(call) == f"second in {tmp_path / 'a.safetensors'} holds {kind}: the model is broken, get it again"


def test_a_digest_tells_what_was_trained(tmp_path: Path) -> None:
    state = {"b.weight": torch.ones(30, 50), "a.weight": torch.zeros(4), "a.dijiang.map": torch.ones(2)}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    before = digest(tmp_path)
    state["a.dijiang.map"] += 1
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert digest(tmp_path) == before
    state["b.weight"] += 1e-3
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert digest(tmp_path) != before
