"""The command itself: `dijiang`, which is `python -m dijiang_convert`."""

import atexit
import io
import os
import signal
import sys
import threading
from contextlib import suppress
from typing import Any, NoReturn

from .cli import app
from .show import unwritten


def main() -> NoReturn:
    """Runs the command line and ends the process."""
    _open_closed()
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # `kill` stops a command as Ctrl-C does: nothing is left
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without Unicode shows ? in place of what it lacks
    code: Any = None
    try:
        _check_arguments()
        app(prog_name="dijiang")
    except SystemExit as end:
        code = end.code
    except OSError as error:  # help could not be written; a command tells its own
        code = _not_written(error)
    if not isinstance(code, int | None):
        sys.exit(code)
    _leave(code or 0)


def _leave(code: int) -> NoReturn:
    """Ends as sys.exit does, and leaves memory to the system: Python would take a second to free torch's and
    transformers' modules one by one."""
    end_threads: Any = threading._shutdown  # type: ignore[attr-defined]
    end_threads()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            code = code or _not_written(error)
    os._exit(code)


def _open_closed() -> None:
    """Opens /dev/null in the place of standard streams that are closed, as by `>&-`: else the next file that is opened
    would get their number, and what is printed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


def _check_arguments() -> None:
    """Ends the process where a name on the command line is no text: the libraries can't open such files."""
    for argument in sys.argv[1:]:
        try:
            argument.encode()
        except UnicodeEncodeError:
            print(f"error: {argument!a} is not UTF-8: rename the file, or set LC_ALL=C.UTF-8", file=sys.stderr)
            sys.exit(1)


def _not_written(error: OSError) -> int:
    """Tells that the output could not be written, unless whoever read it is gone, and returns the exit code."""
    with suppress(OSError):
        if not isinstance(error, BrokenPipeError):
            print(f"error: {unwritten(error)}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    main()
