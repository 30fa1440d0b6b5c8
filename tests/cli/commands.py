"""The command line as tests call it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from dijiang_convert.cli import app

INDEX = "model.safetensors.index.json"


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def refusal(*arguments: str) -> str:
    """What follows `error: ` on stderr, where nothing else is."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    return error_line(result.stderr)


def error_line(stderr: str) -> str:
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and stderr.endswith("\n"), stderr
    assert "Traceback" not in stderr and "unexpected" not in stderr
    return stderr.removeprefix("error: ").strip()


def write(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def shard(folder: Path, i: int) -> str:
    return sorted(path.name for path in folder.glob("*.safetensors"))[i]
