"""What these tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.sources_on_disk import llama_config, neox_config, write_pickles, write_source


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
