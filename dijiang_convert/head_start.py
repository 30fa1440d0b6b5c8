"""A conversion's copying, begun while Python imports torch: the disk has a few seconds less to do afterwards."""

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

from .errors import DijiangError
from .files import Lay, check_out, copy_file, default_out, weight_files
from .sources import check_space

AT_ONCE = 2  # files copied at a time: one core copies less than a disk's cache takes


@contextmanager
def head_start(source: str, out: Path | None, force: bool) -> Iterator[Lay]:
    """Copies the weights of a local source into a hidden folder, and yields what takes them from there.

    Nothing is begun where a conversion would be refused, which it tells itself, or has to rewrite the weights. What was
    not taken when the block ends is removed.
    """
    begun = _begin(Path(os.path.expanduser(source)), out, force)
    if begun is None:
        yield copy_file
        return
    shards, folder = begun
    copied, stopped, pool = dict.fromkeys(shards, 0), threading.Event(), ThreadPoolExecutor(AT_ONCE)

    def copy(shard: Path) -> None:
        def count(written: int) -> None:
            if stopped.is_set():
                raise InterruptedError("the conversion has failed")
            copied[shard] += written

        copy_file(shard, folder / shard.name, count)

    def take(shard: Path, target: Path, progress: Callable[[int], None]) -> None:
        told, copying = 0, copies[shard]
        while told < copied[shard] or not copying.done():
            wait([copying], timeout=0.1)
            told, new = copied[shard], copied[shard] - told
            progress(new)
        copying.result()  # or its error
        (folder / shard.name).rename(target)

    copies = {}
    try:
        copies.update({shard: pool.submit(copy, shard) for shard in shards})
        yield take
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(folder, ignore_errors=True)


def _begin(source: Path, out: Path | None, force: bool) -> tuple[list[Path], Path] | None:
    """The files to copy, and where to; None where a conversion would not get that far, as far as that is quickly
    told."""
    target = out if out is not None else default_out(source.resolve().name)
    if not (source / "config.json").is_file():
        return None
    try:
        check_out(target, force)
        shards = weight_files(source)
        check_space({target: sum(shard.stat().st_size for shard in shards)})
        if shards[0].suffix != ".safetensors":
            return None
        return shards, Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except (DijiangError, OSError):
        return None
