"""Conversion: base weights arrive byte for byte, what is new is the kernel's, and a folder is a whole checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dijiang_convert.checkpoint import loading
from dijiang_convert.checkpoint.companions import LEFT_BEHIND, MODELING_FILES
from dijiang_convert.checkpoint.loading import load_any, load_converted, load_tokenizer
from dijiang_convert.convert import ConvertResult, convert
from dijiang_convert.errors import DijiangError
from dijiang_convert.generate import generate
from dijiang_convert.recipe import load_recipe
from tests.convert.converting import CPU, INDEX, digests, read_json, written
from tests.sources_on_disk import edit_config

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
        "AutoModelForDecision": "modeling_dijiang.DiJiangLlamaForCausalLM",
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
    convert(str(sources / "neox-sharded"), tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").write_text("old")
    with pytest.raises(DijiangError, match="--force"):
        convert(str(sources / "llama"), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()
    convert(str(sources / "llama"), tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    load_converted(tmp_path / "out", device=CPU)


def test_force_never_removes_the_source(sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "llama", tmp_path / "zoo" / "llama")
    (tmp_path / "zoo" / "mine.txt").write_text("mine")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for out in (tmp_path / "zoo", tmp_path / "zoo" / "llama", tmp_path):
        with pytest.raises(DijiangError, match="--force leaves it alone"):
            convert(str(tmp_path / "zoo" / "llama"), out, force=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("part", "key"), [("", "_attn_implementation"), ("", "attn_implementation")])
def test_an_attention_function_that_the_source_chose_is_left_out(
    part: str, key: str, sources: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(sources / "llama", source)
    edit_config(source, **{key: "eager"})
    convert(str(source), tmp_path / "out")
    assert key not in read_json(tmp_path / "out" / "config.json")
    assert load_any(str(tmp_path / "out")).config._attn_implementation == "dijiang"


def test_a_cache_that_the_source_chose_is_left_out(sources: Path, tmp_path: Path, capsys: Any) -> None:
    source = tmp_path / "source"
    shutil.copytree(sources / "llama", source)
    path = source / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "cache_implementation": "offloaded", "top_k": 7}))
    convert(str(source), tmp_path / "out")
    assert "generation_config.json's cache, since converted layers have their own" in capsys.readouterr().err
    written_config = read_json(tmp_path / "out" / "generation_config.json")
    assert "cache_implementation" not in written_config and written_config["top_k"] == 7
    assert generate(tmp_path / "out", "hello " * 9, chat=False, max_new_tokens=8).tokens == 8


def test_a_layer_that_runs_another_attention_function_is_refused(
    sources: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Where something undid the swap, eval, bench and finetune must not go on with softmax."""
    convert(str(sources / "llama"), tmp_path / "out")
    load = loading.converted_config
    monkeypatch.setattr(loading, "converted_config", lambda folder, **_: load(folder, attn_implementation="sdpa"))
    with pytest.raises(DijiangError, match="runs sdpa attention: take attn_implementation out"):
        load_any(str(tmp_path / "out"))


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"module._orig_mod.{name}": value for name, value in state.items()}


def without_a_layer(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if "layers.1." not in name}


def with_more_tokens(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    embedding = state["model.embed_tokens.weight"]
    return {**state, "model.embed_tokens.weight": torch.cat([embedding, embedding[:8]])}


@pytest.mark.parametrize("change", [renamed, without_a_layer, with_more_tokens])
def test_weights_are_compared_with_the_model(change: Any, sources: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(sources / "llama", source)
    state = load_file(source / "model.safetensors")
    save_file(change(state), source / "model.safetensors", metadata={"format": "pt"})
    if change is renamed:  # as torch.compile and DDP name them
        convert(str(source), tmp_path / "out")
        found = load_converted(tmp_path / "out", device=CPU).state_dict()
        assert all(torch.equal(found[name], value) for name, value in state.items())
        with pytest.raises(DijiangError, match="whose tensors are named module._orig_mod"):
            convert(str(source), tmp_path / "linked", link=True)
        return
    with pytest.raises(DijiangError, match="are not those of its config.json") as call:
        convert(str(source), tmp_path / "out")
    assert "\n" not in str(call.value) and not (tmp_path / "out").exists()


def test_a_dtype_that_can_not_hold_the_weights_is_refused(sources: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(sources / "llama", source)
    state = load_file(source / "model.safetensors")
    state["model.norm.weight"][0] = 1e5
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DijiangError, match="model.norm.weight has numbers that F16 can't hold, up to 1e\\+05"):
        convert(str(source), tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    convert(str(source), tmp_path / "out", dtype="bfloat16")


def test_a_snapshot_of_the_hubs_cache_is_its_repository(sources: Path, tmp_path: Path, monkeypatch: Any) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    snapshot = tmp_path / "models--me--tiny" / "snapshots" / commit
    shutil.copytree(sources / "llama", snapshot)
    monkeypatch.chdir(tmp_path)
    result = convert(str(snapshot))
    assert (result.out, result.source, result.source_revision) == ("tiny-dijiang", "me/tiny", commit)
    assert "base_model: me/tiny" in (tmp_path / "tiny-dijiang" / "README.md").read_text()


def test_a_home_folder_in_out(sources: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    convert(str(sources / "llama"), "~/out")
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dtype": "int8"}, "no dtype 'int8'"),
        ({"layers": "9"}, "there is no layer 9"),
        ({"recipe": "no-such"}, "no recipe 'no-such'"),
        ({"settings": ["windw=3"]}, "did you mean window?"),
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
