"""Conversion: base weights arrive byte for byte, what is new is the kernel's, and a folder is a whole checkpoint."""

from __future__ import annotations

import hashlib
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
from safetensors.torch import load_file, save_file

from dijiang_convert.checkpoint.companions import LEFT_BEHIND, MODELING_FILES
from dijiang_convert.checkpoint.loading import load_converted, load_tokenizer
from dijiang_convert.convert import ConvertResult, convert
from dijiang_convert.data.demo_text import documents
from dijiang_convert.errors import DijiangError, Unsupported
from dijiang_convert.finetune import finetune
from dijiang_convert.inspect import inspect
from dijiang_convert.measure.timing import cache_bytes
from dijiang_convert.recipe import load_recipe
from tests.hub import Hub
from tests.sources_on_disk import edit_config, llama_config, neox_config, random_model, write_pickles, write_source

INDEX = "model.safetensors.index.json"
CPU = torch.device("cpu")
WEIGHTS = (".safetensors", ".bin")


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sources, none of which a test changes."""
    folder = tmp_path_factory.mktemp("sources")
    write_source(folder / "llama", llama_config())
    write_source(folder / "llama-sharded", llama_config(), shard_size="40KB")
    write_source(folder / "llama-tied", llama_config(tie_word_embeddings=True))
    write_source(folder / "llama-bfloat16", llama_config(), dtype=torch.bfloat16)
    write_source(folder / "neox-sharded", neox_config(), shard_size="60KB")
    write_pickles(folder / "llama", folder / "llama-bin")
    write_pickles(folder / "llama", folder / "llama-bin-sharded", shards=3)
    write_pickles(folder / "llama-tied", folder / "llama-tied-bin")
    return folder


def digests(folder: Path) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))]


def written(out: Path) -> dict[str, torch.Tensor]:
    """All tensors, by the index; every file that it names, and no weight file that it does not."""
    weight_map = json.loads((out / INDEX).read_text())["weight_map"]
    files = {name: load_file(out / name) for name in set(weight_map.values())}
    assert set(files) == {path.name for path in out.iterdir() if path.name.endswith(WEIGHTS)}
    assert {(name, key) for name, state in files.items() for key in state} == {(v, k) for k, v in weight_map.items()}
    return {key: files[name][key] for key, name in weight_map.items()}


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


ALL = (
    "llama", "llama-sharded", "llama-tied", "llama-bfloat16", "neox-sharded",
    "llama-bin", "llama-bin-sharded", "llama-tied-bin",
)  # fmt: skip


@pytest.mark.parametrize("recipe", ["default", "frequency", "paper"])
def test_converting_twice_gives_the_same_bytes(sources: Path, tmp_path: Path, recipe: str) -> None:
    for name in ("one", "two"):
        torch.rand(1)  # whatever happened before
        convert(str(sources / "llama"), tmp_path / name, recipe=recipe)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


@pytest.mark.parametrize("name", ALL)
def test_only_kernel_tensors_are_new(name: str, sources: Path, tmp_path: Path) -> None:
    source, out = sources / name, tmp_path / "out"
    result = convert(str(source), out, recipe="frequency")
    tensors = written(out)
    new = {key for key in tensors if ".dijiang." in key}
    layers = range(4 if "neox" in name else 3)
    assert {key.partition(".dijiang.")[0].split(".")[-2] for key in new} == set(map(str, layers))
    assert all(".attention.dijiang." in key or ".self_attn.dijiang." in key for key in new)
    assert sum(tensors[key].numel() for key in new) == result.new_parameters
    assert all(tensors[key].dtype == torch.float32 for key in new)

    original = transformers.AutoModelForCausalLM.from_pretrained(source)
    assert result.total_parameters == sum(p.numel() for p in original.parameters()) + result.new_parameters
    if "bin" not in name:
        kept = {key for path in source.glob("*.safetensors") for key in load_file(path)}
        assert tensors.keys() - new == kept
        assert digests(out)[:-1] == digests(source)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert read_json(out / INDEX)["metadata"]["total_size"] == total

    converted, expected = load_converted(out, device=CPU).state_dict(), original.state_dict()
    assert converted.keys() - expected.keys() == new
    for key, value in expected.items():
        assert converted[key].dtype == value.dtype and torch.equal(converted[key], value), key
    for key in new:
        assert torch.equal(converted[key], tensors[key]), key


def test_the_softmax_model_is_still_there(sources: Path, tmp_path: Path) -> None:
    convert(str(sources / "neox-sharded"), tmp_path / "out")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(sources / "neox-sharded").eval()(ids).logits
        softmax = load_converted(tmp_path / "out", attention="sdpa", device=CPU).eval()(ids).logits
        kernel = load_converted(tmp_path / "out", device=CPU).eval()(ids).logits
    torch.testing.assert_close(softmax, expected)
    torch.testing.assert_close(kernel, expected)  # 40 tokens are inside the window of 64


def test_what_comes_along(sources: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in (sources / "llama").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    left = [f"other{suffix}" for suffix in LEFT_BEHIND] + [".env", "README.md", "modeling_custom.py", "rust_model.ot"]
    for name in (*left, "NOTICE", "merges.txt", "tokenizer.model"):
        (source / name).write_text(name)
    (source / "onnx").mkdir()
    (source / "onnx" / "tokenizer.json").write_text("{}")
    convert(str(source), tmp_path / "out")

    kept = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE")
    for name in (*kept, "NOTICE", "merges.txt", "tokenizer.model"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name
    made = {"config.json", "README.md", INDEX, *MODELING_FILES}
    shards = {path.name for path in (tmp_path / "out").glob("model-*.safetensors")}
    rest = {"NOTICE", "merges.txt", "tokenizer.model"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*kept, *made, *shards, *rest}
    assert (tmp_path / "out" / "README.md").read_text() != "README.md"


def test_the_modeling_files_are_the_packages_own(sources: Path, tmp_path: Path) -> None:
    import dijiang_convert.modeling

    convert(str(sources / "llama"), tmp_path / "out")
    for name in MODELING_FILES:
        own = Path(dijiang_convert.modeling.__file__).parent / name
        assert (tmp_path / "out" / name).read_bytes() == own.read_bytes()


def test_the_config(sources: Path, tmp_path: Path) -> None:
    result = convert(
        str(sources / "llama"), tmp_path / "out", layers="0,2", settings=["window=16", "block=16", "memory=8"]
    )
    config, before = read_json(tmp_path / "out" / "config.json"), read_json(sources / "llama" / "config.json")
    assert config["architectures"] == ["DiJiangLlamaForCausalLM"]
    assert config["model_type"] == "dijiang_llama"
    assert config["auto_map"] == {
        "AutoConfig": "configuration_dijiang.DiJiangLlamaConfig",
        "AutoModel": "modeling_dijiang.DiJiangLlamaModel",
        "AutoModelForCausalLM": "modeling_dijiang.DiJiangLlamaForCausalLM",
        "AutoModelForQuestionAnswering": "modeling_dijiang.DiJiangLlamaForQuestionAnswering",
        "AutoModelForSequenceClassification": "modeling_dijiang.DiJiangLlamaForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_dijiang.DiJiangLlamaForTokenClassification",
    }
    own = {"architectures", "model_type", "auto_map", "dijiang", "tokenizer_class"}
    assert {k: v for k, v in config.items() if k not in own} == {k: v for k, v in before.items() if k not in own}
    section = config["dijiang"]
    recipe = load_recipe("default", ["window=16", "block=16", "memory=8"])
    assert section["kernel"] == recipe.kernel.to_dict() and section["kernel"]["window"] == 16
    assert section["stages"] == recipe.to_dict()["stages"] and section["data"] == recipe.data
    assert (section["recipe"], section["source"], section["source_revision"]) == ("default", "llama", None)
    assert (section["heads"], section["kv_heads"], section["head_dim"], section["value_dim"]) == (4, 2, 8, 8)
    assert section["layers"] == [0, 2] and section["attention_class"] == "LlamaAttention" and section["history"] == []
    assert result.layers_converted == 2


def test_the_tokenizer_loads(sources: Path, tmp_path: Path) -> None:
    convert(str(sources / "llama"), tmp_path / "out")
    text = "Héllo, world"
    before, after = load_tokenizer(sources / "llama"), load_tokenizer(tmp_path / "out")
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after.decode(after(text)["input_ids"]) == text


def test_the_result(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = convert(str(sources / "llama"))
    assert isinstance(result, ConvertResult)
    assert (result.out, result.source, result.recipe) == ("llama-dijiang", str(sources / "llama"), "default")
    assert result.source_revision is None and result.pushed is None and not result.dry_run and result.seconds > 0
    assert [path.name for path in tmp_path.iterdir()] == ["llama-dijiang"]


# ------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("name", ["llama-sharded", "llama-bin"])
def test_a_dtype_rewrites_the_weights(name: str, sources: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in (sources / name).iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    if name == "llama-sharded":  # integers stay what they are
        shard = min(source.glob("*.safetensors"))
        counts = {"counts": torch.arange(5), "flags": torch.tensor([True, False])}
        save_file({**load_file(shard), **counts}, shard)
        index = read_json(source / INDEX)
        index["weight_map"] |= dict.fromkeys(counts, shard.name)
        (source / INDEX).write_text(json.dumps(index))
    convert(str(source), tmp_path / "out", dtype="bfloat16")
    tensors = written(tmp_path / "out")
    for path in (sources / "llama").glob("*.safetensors"):
        for key, value in load_file(path).items():
            assert torch.equal(tensors[key], value.bfloat16()), key
    if name == "llama-sharded":
        assert torch.equal(tensors["counts"], torch.arange(5)) and tensors["flags"].tolist() == [True, False]
    assert all(value.dtype == torch.float32 for key, value in tensors.items() if ".dijiang." in key)
    assert read_json(tmp_path / "out" / INDEX)["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"
    if name == "llama-bin":
        state = load_converted(tmp_path / "out", device=CPU).state_dict()
        assert all(v.dtype == (torch.float32 if ".dijiang." in k else torch.bfloat16) for k, v in state.items())


@pytest.mark.parametrize(
    ("spec", "expected"),
    [("all", [0, 1, 2, 3]), ("1,3", [1, 3]), ("0-2", [0, 1, 2]), ("every:2", [0, 2]), ("not-last:1", [0, 1, 2])],
)
def test_layers(spec: str, expected: list[int], sources: Path, tmp_path: Path) -> None:
    result = convert(str(sources / "neox-sharded"), tmp_path / "out", recipe="frequency", layers=spec)
    assert read_json(tmp_path / "out" / "config.json")["dijiang"]["layers"] == expected
    new = {int(key.split(".")[2]) for key in written(tmp_path / "out") if ".dijiang." in key}
    assert sorted(new) == expected and result.layers_converted == len(expected)
    model = load_converted(tmp_path / "out", device=CPU)
    assert [i for i in range(4) if hasattr(model.gpt_neox.layers[i].attention, "dijiang")] == expected


def test_a_recipe_of_ones_own(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "kernel: {window: 0, sinks: 0, memory: 0, rotary: keep, decay: none, selective: false, decay_rank: 0}\n"
        "stages: [{name: only, objective: cross_entropy, train: full, tokens: 1000}]\n"
    )
    recipe = str(tmp_path / "mine.yaml")
    result = convert(str(sources / "llama"), tmp_path / "out", recipe=recipe, settings=["signed=false"])
    section = read_json(tmp_path / "out" / "config.json")["dijiang"]
    kernel = {key: section["kernel"][key] for key in ("window", "rotary", "decay", "signed")}
    assert kernel == {"window": 0, "rotary": "keep", "decay": "none", "signed": False}
    assert [stage["name"] for stage in section["stages"]] == ["only"]
    assert result.recipe == section["recipe"] == "mine"
    assert not any(key.endswith(".decay") for key in written(tmp_path / "out"))


@pytest.mark.parametrize("recipe", ["default", "frequency", "pure", "paper", "window-only"])
def test_every_recipe_converts(recipe: str, sources: Path, tmp_path: Path) -> None:
    result = convert(str(sources / "llama"), tmp_path / "out", recipe=recipe)
    model = load_converted(tmp_path / "out", device=CPU).eval()
    with torch.no_grad():
        assert model(torch.arange(100)[None]).logits.isfinite().all()
    assert (result.new_parameters == 0) == (recipe in ("default", "window-only"))


def test_force(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("old")
    with pytest.raises(DijiangError, match="--force"):
        convert(str(sources / "llama"), tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "model.safetensors"]
    convert(str(sources / "llama"), tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    load_converted(tmp_path / "out", device=CPU)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dtype": "int8"}, "no dtype 'int8'"),
        ({"layers": "9"}, "there is no layer 9"),
        ({"recipe": "no-such"}, "no recipe 'no-such'"),
        ({"settings": ["windw=3"]}, "did you mean window?"),
        ({"push": "no-owner"}, "is not a repository name"),
        ({"revision": "main"}, "only the Hub has revisions"),
        ({"out": "."}, "give the name of a new one"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_refused_before_anything_is_written(
    dry_run: bool, options: dict[str, Any], expected: str, sources: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DijiangError, match=expected.replace("?", r"\?")):
        convert(str(sources / "llama"), dry_run=dry_run, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_converted_checkpoint_does_not_convert_again(sources: Path, tmp_path: Path) -> None:
    convert(str(sources / "llama"), tmp_path / "out")
    with pytest.raises(DijiangError, match="converted already"):
        convert(str(tmp_path / "out"), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_no_space(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(DijiangError, match="no space left for"):
        convert(str(sources / "llama"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------------- links


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


# ------------------------------------------------------------------------------------------------------- the Hub


def weight_requests(hub: Hub, since: int) -> list[str]:
    return [request.path for request in hub.requests[since:] if request.path.endswith(WEIGHTS)]


@pytest.mark.parametrize("name", ["llama", "llama-sharded", "llama-bin-sharded"])
def test_a_dry_run_downloads_and_writes_nothing(name: str, hub: Hub, sources: Path, tmp_path: Path) -> None:
    revision, start = hub.add_repo(f"dry/{name}", sources / name), len(hub.requests)
    result = convert(f"dry/{name}", tmp_path / "out", dry_run=True, push="dry/pushed")
    assert weight_requests(hub, start) == [] and len(hub.requests) > start
    assert list(tmp_path.iterdir()) == [] and "dry/pushed" not in hub.repos
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
    result = convert(str(sources / "llama"), tmp_path / "out", push="convert/pushed")
    assert result.pushed == f"{hub.url}/convert/pushed"
    held = hub.files("convert/pushed")
    assert held.keys() - {".gitattributes"} == {path.name for path in (tmp_path / "out").iterdir()}
    same = {name for name in held if name[0] != "." and held[name] == (tmp_path / "out" / name).read_bytes()}
    assert held.keys() - same == {".gitattributes", "README.md"}  # the card tells its repository's name
    assert b'checkpoint = "convert/pushed"' in held["README.md"]


# ------------------------------------------------------------------------------------------------------- memory

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


# ------------------------------------------------------------------------------------------------------- inspect


def test_inspect_by_hand(sources: Path) -> None:
    result = inspect(str(sources / "llama"), recipe="frequency")
    assert result.supported and result.reason is None and result.architecture == "LlamaForCausalLM"
    assert (result.layers, result.layers_converted, result.heads, result.kv_heads, result.head_dim) == (3, 3, 4, 2, 8)
    hidden, mlp, vocabulary = 32, 64, 258
    layer = 2 * hidden * hidden + 2 * hidden * 16 + 3 * hidden * mlp + 2 * hidden
    assert result.parameters == 3 * layer + 2 * vocabulary * hidden + hidden
    # A head's features have T (8), W (8 x 8), D (16) and a; c is a query head's, b and decay are a key/value head's.
    features = 8 + 64 + 16 + 1
    selection = 2 * 2 * hidden  # of a key's log-scale and decay, for two key/value heads
    of_features = 16 * hidden + 2 * 16 * 16 + 2 * 16  # down to 16 numbers, from them to each feature's decay, its start
    assert result.new_parameters == 3 * (4 * (features + 1) + 2 * (features + 2) + selection + of_features)
    # A key/value head's state has 16 features by 8 values and a weight. Keys and values are kept of 4 sinks and of
    # 432 keys of the memory, a byte a number, an exponent each, and a score; and of three blocks of 64 in the window.
    # Of these there are besides the keys before rotation and the attention received, and of a token two gates a head
    # and 16 numbers for features.
    state, memory, window = 4 * 16 * (8 + 1), (4 + 432) * (8 + 1 + 8 + 1 + 4), 4 * 192 * (8 + 8 + 8 + 1)
    window_alone = 4 * 192 * (8 + 8 + 1)  # without a state no key is needed before its rotation
    assert result.state_bytes == 3 * (2 * (state + memory + window) + 4 * 192 * (2 * 2 + 16))
    assert result.kv_cache_bytes_at == {n: 3 * 2 * (8 + 8) * 4 * n for n in (1024, 8192, 65536)}
    first = result.smaller_from
    assert first is not None and (first - 1) * 3 * 2 * 16 * 4 <= result.state_bytes < first * 3 * 2 * 16 * 4
    default = inspect(str(sources / "llama"))
    assert default.new_parameters == 0
    assert default.state_bytes == 3 * 2 * ((4 + 896) * (8 + 1 + 8 + 1 + 4) + window_alone)
    some = inspect(str(sources / "llama"), layers="0,1", recipe="pure", settings=["shift=false"])
    assert (some.layers, some.layers_converted) == (3, 2)
    assert some.state_bytes == 2 * 2 * 16 * (8 * 4 + 8)  # its weights are float64
    shifted = inspect(str(sources / "llama"), layers="0,1", recipe="pure")
    assert shifted.state_bytes == some.state_bytes + 2 * (4 + 2) * 8 * 4  # the last token's query and key
    assert some.kv_cache_bytes_at == {n: 2 * 2 * (8 + 8) * 4 * n for n in (1024, 8192, 65536)}


def test_inspect_tells_why_not(sources: Path, tmp_path: Path) -> None:
    config = read_json(sources / "llama" / "config.json")
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "falcon", "architectures": ["F"]}))
    result = inspect(str(tmp_path))
    assert not result.supported and result.reason and "\n" not in result.reason
    assert result.architecture == "F" and result.state_bytes == 0


def test_inspect_reads_only_the_config(hub: Hub, sources: Path) -> None:
    hub.add_repo("inspect/llama", {"config.json": (sources / "llama" / "config.json").read_bytes()})
    start = len(hub.requests)
    assert inspect("inspect/llama").supported
    files = {request.path.rpartition("/")[2] for request in hub.requests[start:] if "/resolve/" in request.path}
    assert files == {"config.json"}


@pytest.mark.parametrize("kind", ["llama", "llama-bfloat16", "opt"])
@pytest.mark.parametrize("recipe", ["default", "frequency", "pure", "paper", "window-only"])
def test_state_bytes_are_what_a_cache_holds(recipe: str, kind: str, sources: Path, tmp_path: Path) -> None:
    source = sources / kind
    if kind == "opt":  # without rotary embedding, the window's keys are kept once
        source = tmp_path / "opt"
        write_source(source, transformers.OPTConfig(
            hidden_size=32, ffn_dim=64, word_embed_proj_dim=32, num_hidden_layers=2, num_attention_heads=4,
            vocab_size=258, max_position_embeddings=256,
        ))  # fmt: skip
    convert(str(source), tmp_path / "out", recipe=recipe)
    model = load_converted(tmp_path / "out", device=CPU).eval()
    ids = torch.arange(200)[None]
    with torch.no_grad():
        cache = model(ids[:, :150], use_cache=True).past_key_values
        for token in ids[:, 150:].split(1, dim=1):
            cache = model(token, past_key_values=cache, use_cache=True).past_key_values
    assert cache.get_seq_length() == 200
    assert cache_bytes(cache) == inspect(str(source), recipe=recipe).state_bytes


def test_the_softmax_cache_is_as_inspect_says(sources: Path) -> None:
    model = random_model(llama_config())
    with torch.no_grad():
        cache = model(torch.arange(1024)[None] % 250, use_cache=True).past_key_values
    assert cache_bytes(cache) == (inspect(str(sources / "llama")).kv_cache_bytes_at or {})[1024]


def test_a_checkpoint_of_another_version_is_refused(sources: Path, tmp_path: Path) -> None:
    convert(str(sources / "llama"), tmp_path / "out")
    config = read_json(tmp_path / "out" / "config.json")
    config["dijiang"]["version"] = "0.1.0"
    config["dijiang"]["kernel"]["chunk_size"] = 64
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(DijiangError, match=r"written by dijiang-convert 0\.1\.0"):
        load_converted(tmp_path / "out", device=CPU)
