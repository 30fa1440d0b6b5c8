"""One loopback Hub for the whole run, at work before anything imports huggingface_hub.

The client reads its endpoint and its cache folder from the environment once, at import. So the server starts
here, when pytest loads this file, and no test can reach the real Hub or the user's own cache and token.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `pytest` alone does not put the root there
from tests.hub import Hub

if "huggingface_hub" in sys.modules:
    raise RuntimeError("huggingface_hub was imported before the loopback Hub was up: tests would go to the real one")

_HUB = Hub().start()
_HOME = tempfile.TemporaryDirectory(prefix="hf-home-")

for name in (
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "HF_TOKEN_PATH",
):
    os.environ.pop(name, None)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are tiny here: threads only wait for each other
os.environ |= {
    "HF_ENDPOINT": _HUB.url,
    "HF_HOME": _HOME.name,
    "HF_TOKEN": _HUB.token,
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_XET": "1",  # the loopback Hub stores by LFS alone
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
}


@pytest.fixture(scope="session")
def hub() -> Hub:
    """The Hub that every client in this run talks to; tests share it, so each has repositories of its own."""
    return _HUB


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The demo model's."""
    from dijiang_convert.checkpoint.loading import load_tokenizer
    from dijiang_convert.demo import MODEL

    return load_tokenizer(str(MODEL))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between tries, in seconds, which are taken down instead of being made."""
    made: list[float] = []
    monkeypatch.setattr(time, "sleep", made.append)
    return made


def pytest_unconfigure() -> None:
    _HUB.stop()
    _HOME.cleanup()
