"""Jobs one after the other, each in a process of its own: forked, so that torch is imported once.

What a job does to its process, crashing and hanging included, ends with that job. Imports nothing but the standard
library, for it serves a process that can't import this project, too.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Answer = dict[str, Any]


def serve(work: Callable[..., Answer], seconds: float) -> None:
    """Answers jobs on stdin, one a line, on stdout. What ``work`` raises, or the signal that ended it, is its
    answer's ``error``."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    for line in sys.stdin:
        answers.write(json.dumps(_fork(work, json.loads(line), seconds)) + "\n")
        answers.flush()


def _fork(work: Callable[..., Answer], job: dict[str, Any], seconds: float) -> Answer:
    start = time.monotonic()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            answer = work(**job)
        except BaseException as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
        with os.fdopen(writing, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(writing)
    text, timed_out = b"", False
    while True:
        ready, _, _ = select.select([reading], [], [], max(start + seconds - time.monotonic(), 0))
        if not ready:
            timed_out = True
            os.kill(pid, signal.SIGKILL)
            break
        part = os.read(reading, 1 << 16)
        if not part:
            break
        text += part
    os.close(reading)
    _, status = os.waitpid(pid, 0)
    if timed_out:
        return {"error": f"no answer within {seconds:.0f} seconds"}
    return json.loads(text) if text else {"error": f"the process ended with status {status}"}


class Server:
    """A process that runs `serve`."""

    def __init__(self, command: Sequence[str], folder: Path, log: Path) -> None:
        self.log = log.open("w")
        self.process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )

    def ask(self, **job: Any) -> Answer:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": f"{self.process.args} ended: see {self.log.name}"}

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.log.close()
