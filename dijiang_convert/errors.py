"""The one exception the package raises for anything a user can put right."""

import re

STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # all controls but \n and \t
LONGEST = 1000  # characters of a message: what it quotes of a broken file may be of any length


class DijiangError(Exception):
    """A failure told in one line: what went wrong, where, and what to do about it.

    The command line prints it as ``error: …`` and exits with code 1; ``--debug`` adds the traceback.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


class Unsupported(DijiangError):
    """The source is fine, but this package does not convert its kind of model."""


def printable(text: str) -> str:
    """A text as one line that a terminal can show: what it can't, or what would steer it, is written as Python escapes
    it, and the middle of a very long text is left out."""
    shown = "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in _without_middle(text)
    )
    return _without_middle(shown)


def _without_middle(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"


def without_steering(text: str) -> str:
    """A text of several lines that can be shown in a terminal: characters that would move its cursor, ring, colour or
    reverse what follows are written as Python escapes them. All other characters stay."""
    return STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
