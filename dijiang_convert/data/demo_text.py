"""Reads text that every Python installation has: the source files of its own standard library.

``dijiang demo`` trains and evaluates on this text, so the demo needs no network. The embedded demo model was trained on
the ``train`` split alone. The split goes by names of modules, so the model has never seen the held-out text, whichever
Python runs the demo. A few megabytes of docstrings, comments and code show the whole job. They tell nothing about the
quality of a full-sized model.
"""

import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from ..errors import DijiangError

Split = Literal["train", "validation"]

# Names that are skipped: tests, packages that many distributions leave out, long tables, and what is not Python's own.
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "encodings", "entities", "pydoc_data"}
SKIPPED |= {"__pycache__", "sitecustomize"}


def documents(split: Split) -> list[str]:
    """The standard library's modules that belong to ``split``, one text each, ordered by path.

    Raises DijiangError if the library's source files are not there.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    modules = sorted(_modules(library), key=Path.as_posix) if library.is_dir() else []
    wanted = [path for path in modules if _split_of(path.relative_to(library)) == split]
    texts = [text for text in map(_read, wanted) if text]
    if not texts:
        raise DijiangError(
            f"no Python sources of the standard library in {library}: "
            "run the demo with a Python that is installed unzipped, with its .py files"
        )
    return texts


def _modules(folder: Path) -> Iterator[Path]:
    for entry in folder.iterdir():
        name = entry.stem
        # A name that can't be imported (site-packages, config-3.11-x86_64-linux-gnu) is not the library's, and
        # _sysconfigdata_* describes the machine that Python was built on.
        if name in SKIPPED or not name.isidentifier() or name.startswith("_sysconfigdata"):
            continue
        if entry.is_dir():
            yield from _modules(entry)
        elif entry.suffix == ".py":
            yield entry


def _split_of(module: Path) -> Split:
    """The split of a module, by its path in the library: about one character in 25 is held out.

    A package stays together, since its modules share text, and a module keeps its split when a later Python turns it
    into a package. Among the twenty residues, 17 has well-known modules that no Python drops.
    """
    package = module.parts[0].removesuffix(".py")
    return "validation" if zlib.crc32(package.encode()) % 20 == 17 else "train"


def _read(module: Path) -> str:
    """The module's text, or nothing where it is not valid UTF-8."""
    try:
        return module.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
