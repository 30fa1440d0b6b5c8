"""The tokenizer of a converted checkpoint gives the tokens of its source's, or there is no conversion."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dijiang_convert.checkpoint.loading import load_tokenizer
from dijiang_convert.checkpoint.tokenizers import PROBES, check_tokenizer
from dijiang_convert.convert import convert
from dijiang_convert.errors import DijiangError
from tests.refusals import message
from tests.sources_on_disk import (
    VOCABULARY,
    edit_config,
    llama_config,
    neox_config,
    random_model,
    write_source,
    write_tokenizer,
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source", llama_config())


def refused(source: Path) -> str:
    """Why it does not convert, after which nothing is left."""
    out = source.with_name("out")
    with pytest.raises(DijiangError) as call:
        convert(str(source), out)
    assert [path for path in source.parent.iterdir() if "out" in path.name] == []
    return message(call)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def fast(**options: Any) -> Any:
    """A tokenizer of words."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "hello", "world", "Hello", "World", "a", "b"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if options.pop("lower", False):
        tokenizer.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **options)


def test_the_same_tokenizer_is_accepted() -> None:
    check_tokenizer(fast(), fast(), "it", 7)


def test_other_tokens_are_seen() -> None:
    with pytest.raises(DijiangError) as call:
        check_tokenizer(fast(lower=True), fast(), "it", 7)
    assert message(call).startswith("the tokenizer of it gives other tokens after conversion (at token 0 of ")


@pytest.mark.parametrize("options", [{"pad_token": "<pad>"}, {"chat_template": "{{ messages }}"}])
def test_other_special_tokens_and_templates_are_seen(options: dict[str, Any]) -> None:
    with pytest.raises(DijiangError) as call:
        check_tokenizer(fast(), fast(**options), "it", 7)
    assert "other special tokens or another chat template" in message(call)


def test_tokens_without_an_embedding(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DijiangError) as call:
        check_tokenizer(fast(), fast(), "it", 3)
    assert "and its model knows 3" in message(call)
    check_tokenizer(fast(pad_token="[PAD]"), fast(pad_token="[PAD]"), "it", 7)  # as many people add one
    told = " ".join(capsys.readouterr().err.split())
    assert told == "1 tokens of the tokenizer have no embedding in the model, the first is '[PAD]'"


def test_code_of_its_own_is_not_run_nor_replaced(source: Path) -> None:
    (source / "tokenization_own.py").write_text("raise SystemExit('it ran')\n")
    edit(source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_own.Own", None]})
    told = refused(source)
    assert "names code of the model's own for its tokenizer" in told and "tokenizer_config.json" in told
    edit(source / "tokenizer_config.json", auto_map={"AutoProcessor": "processing_own.Own"})
    convert(str(source), source.with_name("out"))


def test_a_byte_order_mark(source: Path) -> None:
    path = source / "tokenizer_config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert "starts with a byte-order mark" in refused(source)


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors"])
def test_pointers_of_git_lfs(name: str, source: Path) -> None:
    (source / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 1234\n")
    assert refused(source).endswith(f"{name} is a pointer of git-lfs, not the file: run git lfs pull in {source}")


def test_a_tokenizer_without_files(tmp_path: Path) -> None:
    """ByT5's tokens are bytes: there is nothing to keep in a file."""
    config = llama_config(vocab_size=384)
    random_model(config).save_pretrained(tmp_path / "source")
    edit_config(tmp_path / "source", tokenizer_class="ByT5Tokenizer")
    original = AutoTokenizer.from_pretrained(tmp_path / "source")
    convert(str(tmp_path / "source"), tmp_path / "out")
    for text in PROBES:
        assert load_tokenizer(tmp_path / "out")(text)["input_ids"] == original(text)["input_ids"]


@pytest.mark.parametrize(
    ("config", "expected"), [(llama_config, "can't load the tokenizer of"), (neox_config, "no tokenizer in")]
)
def test_no_tokenizer(config: Any, expected: str, tmp_path: Path) -> None:
    """transformers makes an empty one of some types."""
    source = write_source(tmp_path / "source", config())
    for path in source.glob("tokenizer*"):
        path.unlink()
    assert expected in refused(source)


def test_a_class_that_transformers_has_for_a_type_of_model_stays(tmp_path: Path) -> None:
    """Of qwen2 AutoTokenizer makes a Qwen2Tokenizer, which composes accents, whatever class the files name."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Qwen2Config(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes)
    write_source(tmp_path / "source", config)
    convert(str(tmp_path / "source"), tmp_path / "out")
    original = AutoTokenizer.from_pretrained(tmp_path / "source")
    assert type(original) is transformers.Qwen2Tokenizer
    assert original("e\u0301")["input_ids"] == original("\u00e9")["input_ids"]
    alone = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    for found in (alone, load_tokenizer(tmp_path / "out")):
        assert all(found(text)["input_ids"] == original(text)["input_ids"] for text in PROBES)


def test_a_slow_tokenizers_files(tmp_path: Path) -> None:
    """vocab.json and merges.txt, from which transformers makes a fast one."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "source")
    write_tokenizer(tmp_path / "made")
    made = json.loads((tmp_path / "made" / "tokenizer.json").read_text())
    (tmp_path / "source" / "vocab.json").write_text(json.dumps(made["model"]["vocab"]))
    (tmp_path / "source" / "merges.txt").write_text("#version: 0.2\n")
    convert(str(tmp_path / "source"), tmp_path / "out")
    original = AutoTokenizer.from_pretrained(tmp_path / "source")
    assert load_tokenizer(tmp_path / "out")(PROBES[0])["input_ids"] == original(PROBES[0])["input_ids"]
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "source" / "vocab.json").unlink()
    assert "can't load the tokenizer of" in refused(tmp_path / "source")
