"""Drives the sweep: each type is made in one process and checked in another, which can't import this project."""

from __future__ import annotations

import contextlib
import queue
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.sweep.forks import Answer, Server

ROOT = Path(__file__).resolve().parents[2]
TO_CHECK = ("layouts", "source", "window")
# A refusal that only says what broke is not the reason why a type can't be converted.
NO_REASON = ("can't be traced", "can't be built")


@dataclass(frozen=True)
class Outcome:
    """What came of a type. Exactly one is true: it ``works``, it is ``refused``, or it has ``failures``.

    refused: the reason that `dijiang convert` gives, or "". failures: check and what was wrong.
    made: what `make` said of it; figures: the largest differences that `check` saw.
    """

    kind: str
    refused: str = ""
    failures: dict[str, str] = field(default_factory=dict)
    made: Answer = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def works(self) -> bool:
        return not self.refused and not self.failures


class Workers:
    """Two processes that make and check one type at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self.maker = Server([sys.executable, "-m", "tests.sweep.make"], ROOT, folder / "make.log")
        check = [sys.executable, "-I", str(ROOT / "tests" / "sweep" / "check.py")]
        self.checker = Server(check, folder, folder / "check.log")

    def sweep(self, kind: str, unbuilt: dict[str, str]) -> Outcome:
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            if kind in unbuilt:
                return Outcome(kind, refused=unbuilt[kind])
            made = self.maker.ask(kind=kind, folder=folder)
            if "error" in made:
                return Outcome(kind, failures={"made": made["error"]})
            if "refused" in made:
                unclear = any(words in made["refused"] for words in NO_REASON)
                return Outcome(kind, failures={"refused": made["refused"]}) if unclear else Outcome(kind, **made)
            job = {name: made[name] for name in TO_CHECK if name in made}
            answer = self.checker.ask(folder=folder, **job)
            failures = {"checked": answer["error"]} if "error" in answer else answer["failures"]
            return Outcome(kind, failures=failures, made=made, figures=answer.get("figures", {}))

    def close(self) -> None:
        self.maker.close()
        self.checker.close()


def sweep(
    kinds: Sequence[str], unbuilt: dict[str, str], workers: int = 2, report: Callable[[Outcome], Any] = lambda _: None
) -> list[Outcome]:
    """The outcome of each type, in their order. ``unbuilt``: types that aren't tried, and why. ``report`` is called
    with each outcome when it is known."""
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for kind in kinds:
        waiting.put(kind)
    outcomes: dict[str, Outcome] = {}

    def work(folder: Path) -> None:
        with contextlib.closing(Workers(folder)) as pair, contextlib.suppress(queue.Empty):
            while True:
                kind = waiting.get_nowait()
                outcomes[kind] = pair.sweep(kind, unbuilt)
                report(outcomes[kind])

    with _folder() as folder:
        threads = [threading.Thread(target=work, args=(folder / str(number),)) for number in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return [outcomes[kind] for kind in kinds]


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
        yield Path(folder)
