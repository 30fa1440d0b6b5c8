"""Repositories of the loopback Hub, as tests make them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from dijiang_convert.source.resolve import Source

CONFIG = json.dumps({"model_type": "gpt_neox", "hidden_size": 8})


WEIGHTS = save({"embed.weight": np.ones((4, 8), dtype=np.float32)})


BASE: dict[str, str | bytes] = {"config.json": CONFIG, "tokenizer.json": "{}"}


def resolve_elsewhere(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own, since the client reads these settings at import."""
    script = f"""
from dijiang_convert.errors import DijiangError
from dijiang_convert.source.resolve import Source, download, read_config, resolve
try:
    {code}
except DijiangError as error:
    print(error)
"""
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def names(source: Source) -> set[str]:
    assert source.folder is not None
    return {path.relative_to(source.folder).as_posix() for path in source.folder.rglob("*") if path.is_file()}
