"""Shows progress on stderr, through rich: stdout is for results."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from .errors import printable

console = Console(stderr=True)


def say(*lines: str) -> None:
    """Tells lines on stderr as they are: what would steer the terminal is escaped, and nothing in them is markup."""
    for line in lines:
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True, emoji=False)


def is_drawn() -> bool:
    """Whether progress bars are: not in a file, nor in a terminal that can't move its cursor."""
    return console.is_terminal and not console.is_dumb_terminal


@contextmanager
def bytes_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows a bar over ``total`` bytes. Yields the function that advances the bar."""
    with _bar(title, total, DownloadColumn()) as advance:
        yield advance


@contextmanager
def count_bar(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Shows a bar over ``total`` things to do. Yields the function that advances the bar."""
    with _bar(title, total, MofNCompleteColumn()) as advance:
        yield advance


@contextmanager
def _bar(title: str, total: int | None, count: ProgressColumn) -> Iterator[Callable[[int], None]]:
    """Shows a bar if stderr is a terminal."""
    if not is_drawn():
        yield lambda done: None
        return
    columns = TextColumn("{task.description}", markup=False), BarColumn(), count, TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.advance(task, done)
