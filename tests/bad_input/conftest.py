"""What these tests share: a good source, a checkpoint made of it, and a place for each example."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from dijiang_convert import convert
from tests.sources_on_disk import llama_config, write_source


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source in several shards, and its conversion."""
    folder = tmp_path_factory.mktemp("good")
    write_source(folder / "source", llama_config(num_hidden_layers=2), shard_size="40KB")
    convert(str(folder / "source"), folder / "converted")
    return folder


Place = Callable[[], AbstractContextManager[Path]]


@pytest.fixture
def place(good: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], waits: list[float]) -> Place:
    """Makes a current folder with a copy of the source, which it yields, and removes both in the end.

    Nothing may reach stderr past the command line, which captures its own.
    """

    @contextmanager
    def make() -> Iterator[Path]:
        above = Path.cwd()
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            inside = Path(folder, "a", "b")  # so that a path upwards stays in the folder
            inside.mkdir(parents=True)
            shutil.copytree(good / "source", inside / "source")
            os.chdir(inside)
            try:
                yield Path("source")
            finally:
                os.chdir(above)
        assert not capfd.readouterr().err

    return make
