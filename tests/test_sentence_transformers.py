"""A converted sentence-transformers folder in the hands of sentence-transformers, where that is installed."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from dijiang_convert import convert
from dijiang_convert.data.demo_text import documents
from tests.sources_on_disk import VOCABULARY, write_tokenizer

sentence_transformers = pytest.importorskip("sentence_transformers")
modules = pytest.importorskip("sentence_transformers.models")


def test_it_encodes_alone_and_in_a_batch_alike_and_is_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.3,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    write_tokenizer(tmp_path / "bert", around=("<s>", "</s>"))
    parts = [modules.Transformer(str(tmp_path / "bert")), modules.Pooling(32), modules.Normalize()]
    source = sentence_transformers.SentenceTransformer(modules=parts, device="cpu")
    source.tokenizer.pad_token = "<s>"
    source.save_pretrained(str(tmp_path / "source"))
    normalize = tmp_path / "source" / "2_Normalize"
    assert normalize.is_dir()
    shutil.rmtree(normalize)  # as on the Hub and in git, which keep no empty folders
    convert(str(tmp_path / "source"), tmp_path / "out", settings=["window=8", "block=8", "memory=8"])

    model = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), trust_remote_code=True, device="cpu")
    texts = ["A ship.", documents("train")[0][:400], "The sea was calm that day."]
    together = model.encode(texts)
    np.testing.assert_allclose(together, np.concatenate([model.encode([text]) for text in texts]), atol=1e-5)
    assert np.abs(together[1] - source.encode(texts)[1]).max() > 1e-3  # far beyond the window: it is the kernel's
    model.save_pretrained(str(tmp_path / "saved"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True, device="cpu")
    np.testing.assert_array_equal(again.encode(texts), together)
