"""Where a conversion reads and writes: links to the source, the Hub, and how much memory that takes."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from dijiang_convert.checkpoint.loading import load_converted
from dijiang_convert.convert import convert
from dijiang_convert.data.demo_text import documents
from dijiang_convert.errors import DijiangError, Unsupported
from dijiang_convert.finetune import finetune
from dijiang_convert.push import push
from tests.convert.converting import CPU, INDEX, WEIGHTS, digests, read_json
from tests.hub import Hub
from tests.sources_on_disk import edit_config, llama_config


def test_linked_weights(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    plain = sources / "llama-sharded"
    result = convert(str(plain), tmp_path / "out", recipe="frequency", link=True)
    assert result.linked in ("reflink", "hard link") and digests(tmp_path / "out")[:-1] == digests(plain)
    if result.linked == "hard link":
        linked = sorted((tmp_path / "out").glob("*.safetensors"))[:-1]
        assert all(old.samefile(new) for old, new in zip(sorted(plain.glob("*.safetensors")), linked, strict=True))
    load_converted(tmp_path / "out", device=CPU)


def test_what_follows_leaves_a_linked_source_alone(sources: Path, tmp_path: Path) -> None:
    """Training and a conversion in its place write files of their own, never into one."""
    source = tmp_path / "source"
    shutil.copytree(sources / "llama-sharded", source)
    before, out = digests(source), tmp_path / "out"
    assert convert(str(source), out, recipe="frequency", link=True).linked
    options: dict[str, Any] = {"data": documents("train")[:4], "seq_len": 32, "tokens": 640, "report": False}
    finetune(out, tmp_path / "tuned", stages=["distill"], train="full", **options)
    assert digests(tmp_path / "tuned") != digests(out)
    assert digests(source) == before == digests(out)[:-1]
    convert(str(source), out, dtype="bfloat16", force=True)
    assert digests(source) == before


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("llama", "bfloat16", "--link keeps the source's files and --dtype rewrites them: leave one of them out"),
        ("llama-bin", None, "--link keeps the source's files, and pytorch_model.bin must be rewritten: leave it out"),
    ],
)
def test_what_is_rewritten_can_not_be_linked(
    name: str, dtype: str | None, expected: str, sources: Path, tmp_path: Path
) -> None:
    with pytest.raises(DijiangError, match=expected):
        convert(str(sources / name), tmp_path / "out", link=True, dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_links_into_the_hubs_cache(hub: Hub, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk has space for the download, and none for a copy beside it."""
    hub.add_repo("link/llama", sources / "llama")
    size = sum(path.stat().st_size for path in (sources / "llama").iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size))
    with pytest.raises(DijiangError, match="no space left for"):
        convert("link/llama", tmp_path / "out")
    result = convert("link/llama", tmp_path / "out", recipe="frequency", link=True)
    assert result.linked and not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert digests(tmp_path / "out")[:-1] == digests(sources / "llama")


def weight_requests(hub: Hub, since: int) -> list[str]:
    return [request.path for request in hub.requests[since:] if request.path.endswith(WEIGHTS)]


@pytest.mark.parametrize("name", ["llama", "llama-sharded", "llama-bin-sharded"])
def test_a_dry_run_downloads_and_writes_nothing(name: str, hub: Hub, sources: Path, tmp_path: Path) -> None:
    revision, start = hub.add_repo(f"dry/{name}", sources / name), len(hub.requests)
    result = convert(f"dry/{name}", tmp_path / "out", dry_run=True)
    assert weight_requests(hub, start) == [] and len(hub.requests) > start
    assert list(tmp_path.iterdir()) == []
    assert result.dry_run and result.source_revision == revision and result.pushed is None
    full = convert(f"dry/{name}", tmp_path / "out")
    assert weight_requests(hub, start) != []
    assert (full.new_parameters, full.total_parameters) == (result.new_parameters, result.total_parameters)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "bloom", "architectures": ["BloomForCausalLM"]}, "AttentionInterface"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
    ],
)
def test_weights_of_what_can_not_be_converted_stay(
    changes: dict[str, Any], expected: str, hub: Hub, sources: Path, tmp_path: Path
) -> None:
    config = {**read_json(sources / "llama" / "config.json"), **changes}
    weights = (sources / "llama" / "model.safetensors").read_bytes()
    repo = f"refused/{expected}"
    hub.add_repo(repo, {"config.json": json.dumps(config), "model.safetensors": weights})
    start = len(hub.requests)
    with pytest.raises(Unsupported, match=expected):
        convert(repo, tmp_path / "out")
    assert weight_requests(hub, start) == []


def test_an_existing_folder_is_found_before_the_download(hub: Hub, sources: Path, tmp_path: Path) -> None:
    hub.add_repo("early/llama", sources / "llama")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    start = len(hub.requests)
    with pytest.raises(DijiangError, match="is not empty"):
        convert("early/llama", tmp_path / "out")
    assert weight_requests(hub, start) == []


def test_a_hub_source_is_pinned(hub: Hub, sources: Path, tmp_path: Path) -> None:
    files: dict[str, bytes] = {path.name: path.read_bytes() for path in (sources / "llama-sharded").iterdir()}
    files["README.md"] = b"---\nlicense: apache-2.0\n---\nA model.\n"
    old = hub.add_repo("pin/llama", files)
    new = hub.add_repo("pin/llama", sources / "neox-sharded")
    assert old != new
    for revision, sha, kind in ((old, old, "llama"), ("main", new, "gpt_neox"), (None, new, "gpt_neox")):
        out = tmp_path / str(revision)
        result = convert("pin/llama", out, recipe="frequency", revision=revision)
        config = read_json(out / "config.json")
        assert result.source_revision == sha and result.source == "pin/llama"
        assert config["dijiang"]["source_revision"] == sha and config["dijiang"]["source"] == "pin/llama"
        assert config["model_type"] == f"dijiang_{kind}"
        assert config["dijiang"]["license"] == ("apache-2.0" if sha == old else None)
    assert digests(tmp_path / old)[:-1] == digests(sources / "llama-sharded")
    assert sha in (tmp_path / "main" / "README.md").read_text()


def test_push(hub: Hub, sources: Path, tmp_path: Path) -> None:
    assert convert(str(sources / "llama"), tmp_path / "out").pushed is None
    assert push(tmp_path / "out", "convert/pushed").url == f"{hub.url}/convert/pushed"
    held = hub.files("convert/pushed")
    assert held.keys() - {".gitattributes"} == {path.name for path in (tmp_path / "out").iterdir()}
    same = {name for name in held if name[0] != "." and held[name] == (tmp_path / "out" / name).read_bytes()}
    assert held.keys() - same == {".gitattributes", "README.md"}  # the card tells its repository's name
    assert b'checkpoint = "convert/pushed"' in held["README.md"]


MEASURE = """
import sys
from dijiang_convert.convert import convert

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

convert(sys.argv[1], sys.argv[2], dry_run=True)  # with all that is imported on the way
before = peak()
result = convert(sys.argv[1], sys.argv[2])
print(peak() - before, result.total_parameters)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_model(sources: Path, tmp_path: Path) -> None:
    """A large vocabulary makes 300 MB of few tensors; they are zeros, so the files take no space."""
    source, vocabulary, width = tmp_path / "source", 120_000, 320
    source.mkdir()
    for path in (sources / "llama").iterdir():
        if path.suffix != ".safetensors":
            (source / path.name).write_bytes(path.read_bytes())
    config = llama_config(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=1)
    edit_config(source, vocab_size=vocabulary, hidden_size=width, head_dim=width // 4, num_hidden_layers=1)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in transformers.LlamaForCausalLM(config).state_dict().items()}
    weight_map = {}
    for i, (key, shape) in enumerate(shapes.items()):
        name = f"model-{i + 1:05d}-of-{len(shapes):05d}.safetensors"
        header = json.dumps({key: {"dtype": "F32", "shape": list(shape), "data_offsets": [0, 4 * shape.numel()]}})
        with (source / name).open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header.encode())
            file.truncate(8 + len(header) + 4 * shape.numel())
        weight_map[key] = name
    (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert sum(4 * shape.numel() for shape in shapes.values()) > 300e6

    command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, parameters = map(int, done.stdout.split())
    assert grown < 30e6 and parameters > 75e6
    assert sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) > 300e6
