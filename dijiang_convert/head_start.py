"""A conversion's copying, begun while Python imports torch: the disk has a few seconds less to do afterwards."""

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


@contextmanager
def head_start(source: str, out: Path | None, force: bool) -> Iterator[Lay]:
    """Copies the weights of a local source into a hidden folder, and yields what takes them from there.

    Nothing is begun where a conversion would be refused, which it tells itself, or has to rewrite the weights. What was
    not taken when the block ends is removed.
    """
    target = out if out is not None else default_out(Path(source).resolve().name)
    shards = _wanted(Path(source).expanduser(), target, force)
    if not shards:
        yield copy_file
        return
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    copied, stopped, pool = dict.fromkeys(shards, 0), threading.Event(), ThreadPoolExecutor(1)

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

    copies = {shard: pool.submit(copy, shard) for shard in shards}
    try:
        yield take
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(folder, ignore_errors=True)


def _wanted(source: Path, target: Path, force: bool) -> list[Path]:
    """The files to copy; none where a conversion would not get that far, as far as that is quickly told."""
    if not (source / "config.json").is_file() or not target.parent.is_dir():
        return []
    try:
        check_out(target, force)
        shards = weight_files(source)
        check_space({target: sum(shard.stat().st_size for shard in shards)})
    except (DijiangError, OSError):
        return []
    return shards if shards[0].suffix == ".safetensors" else []
