"""Sizes that would take all memory are refused at once. Each is tried in a process that has little of it."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import error_line

SPACE = 16 << 30  # bytes of addresses; the libraries alone take some gigabytes of them, hardly any of it memory
SECONDS = 60  # of processor time, most of which the libraries take to load
CONFIGS = (
    {"hidden_size": 10**9}, {"hidden_size": 10**9, "head_dim": None}, {"num_hidden_layers": 10**7},
    {"num_hidden_layers": 10**12}, {"vocab_size": 10**12}, {"num_attention_heads": 10**9}, {"head_dim": 10**9},
    {"num_key_value_heads": 10**12}, {"intermediate_size": 10**12},
)  # fmt: skip
SETTINGS = ("window=64000000000", "sinks=1000000000", "memory=1000000000000", "block=1000000", "decay_rank=1000000000")
# What else is given a size: verb, options.
OTHERS = (
    ["eval", "converted", "--data", "text.txt", "--seq-len", "1000000000000"],
    ["finetune", "converted", "--data", "text.txt", "--out", "out", "--teacher", "source", "--seq-len", "100000000000"],
    ["convert", "source", "--out", "out", "--layers", "0-1000000000000"],
)


def limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (SPACE, SPACE))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))


COMMANDS = """
import json, sys
from typer.testing import CliRunner
from dijiang_convert.cli import app
for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, arguments)
    print(json.dumps([result.exit_code, result.stderr]))
"""


@pytest.mark.slow
def test_hostile_sizes(good: Path, tmp_path: Path) -> None:
    config = json.loads((good / "source" / "config.json").read_text())
    commands = [["convert", "source", "--out", "out", "--set", "far=true", "--set", setting] for setting in SETTINGS]
    for i, change in enumerate(CONFIGS):
        folder = shutil.copytree(good / "source", tmp_path / str(i))
        kept = {key: value for key, value in {**config, **change}.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))
        commands.append(["convert", str(i), "--out", f"out{i}"])
    for name in ("source", "converted"):
        (tmp_path / name).symlink_to(good / name)
    (tmp_path / "text.txt").write_text("The sea is deep. " * 40)
    before = sorted(tmp_path.iterdir())
    command = [sys.executable, "-c", COMMANDS, json.dumps([*commands, *OTHERS])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(commands) + len(OTHERS)
    for arguments, (code, stderr) in zip([*commands, *OTHERS], results, strict=True):
        assert code == 1 and "unexpected" not in stderr, (arguments, stderr)
        assert error_line(stderr)
    assert sorted(tmp_path.iterdir()) == before
