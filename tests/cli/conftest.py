"""What these tests share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dijiang_convert.cli import app
from tests.sources_on_disk import llama_config, neox_config, write_source


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources and a converted checkpoint, none of which a test changes."""
    folder = tmp_path_factory.mktemp("sources")
    write_source(folder / "llama", llama_config())
    write_source(folder / "neox", neox_config(), shard_size="60KB")
    done = CliRunner().invoke(app, ["convert", str(folder / "llama"), "--out", str(folder / "converted")])
    assert done.exit_code == 0, done.stderr
    return folder


@pytest.fixture
def source(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to spoil, named source, in a current folder that holds nothing else."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sources / "neox", tmp_path / "source")
    return tmp_path / "source"
