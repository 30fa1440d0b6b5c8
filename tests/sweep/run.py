"""One model type after the other through `make` and `check`, each in a process of its own."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.sweep.forks import Answer, Server

ROOT = Path(__file__).resolve().parents[2]
DECODERS, ENCODERS = ("make", "check"), ("encoders", "check_encoder")


def sweep(
    kinds: Iterable[str],
    workers: int = 1,
    told: Callable[[str, Answer], None] | None = None,
    modules: tuple[str, str] = DECODERS,
) -> dict[str, Answer]:
    """What came of each type: ``refused`` with the reason, or how it was converted with ``failures`` (none if it works)
    and ``figures``, or the ``error`` that kept it from being tried.

    workers: how many types at once. told: is called with each type and its answer as they come. modules: that make and
    check them.
    """
    answers: dict[str, Answer] = {}
    kinds = list(kinds)

    def work(share: list[str]) -> None:
        with tempfile.TemporaryDirectory(prefix="sweep-") as name:
            folder = Path(name)
            make = Server([sys.executable, "-m", f"tests.sweep.{modules[0]}"], ROOT, folder / "make.log")
            file = ROOT / f"tests/sweep/{modules[1]}.py"
            check = Server([sys.executable, "-I", str(file)], folder, folder / "check.log")
            for kind in share:
                answers[kind] = one(kind, make, check, folder / kind)
                shutil.rmtree(folder / kind, ignore_errors=True)
                if told is not None:
                    told(kind, answers[kind])
            make.close()
            check.close()

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, (kinds[i::workers] for i in range(workers))))
    return {kind: answers[kind] for kind in kinds}


def one(kind: str, make: Server, check: Server, folder: Path) -> Answer:
    folder.mkdir()
    made = make.ask(kind=kind, folder=str(folder))
    if "refused" in made or "error" in made:
        return made
    wanted = ("layouts", "source", "window", "padding_shifts", "rounding")
    job: dict[str, Any] = {name: made[name] for name in wanted if name in made}
    return {**made, **check.ask(folder=str(folder), **job)}


def works(answer: Answer) -> bool:
    return "failures" in answer and not answer["failures"]


def fails(answer: Answer) -> str | None:
    """What is wrong, or None for a type that works or is refused."""
    if "error" in answer:
        return str(answer["error"])
    return "; ".join(f"{name}: {reason}" for name, reason in answer.get("failures", {}).items()) or None
