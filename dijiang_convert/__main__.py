"""The command itself: `dijiang`, which is `python -m dijiang_convert`."""

import atexit
import io
import os
import sys
import threading
from typing import Any, NoReturn

from .cli import app


def main() -> NoReturn:
    """Runs the command line and ends the process."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without Unicode shows ? in place of what it lacks
    code: Any = None
    try:
        app(prog_name="dijiang")
    except SystemExit as end:
        code = end.code
    if not isinstance(code, int | None):
        sys.exit(code)
    _leave(code or 0)


def _leave(code: int) -> NoReturn:
    """Ends as sys.exit does, and leaves memory to the system: Python would take a second to free torch's and
    transformers' modules one by one."""
    end_threads: Any = threading._shutdown  # type: ignore[attr-defined]
    end_threads()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:  # whoever read it is gone
        code = code or 1
    os._exit(code)


if __name__ == "__main__":
    main()
