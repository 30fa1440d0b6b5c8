"""Files of one commit, fetched from the Hub into its cache: resumed after a cut, and checked by their hashes.

A large file grows beside the cache's blobs as HASH.part, so that what has arrived outlives a lost connection and a
killed process; it becomes a blob only once its hash is right. Repositories stored by Xet are the exception: their files
come by the client's own means, which verify each piece but begin a file anew in a new process. With
HF_HUB_DISABLE_XET=1 they come like all others.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..errors import DijiangError
from ..progress import bytes_bar, console
from .hub import hub_errors, one_line, patiently

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

HASH = r"[0-9a-f]{40}"  # of a file in git
WORKERS = 4  # files at a time


def list_files(repo_id: str, revision: str) -> dict[str, RepoFile]:
    """The files of a commit by name, with sizes and hashes, without names that leave a folder. Raises DijiangError."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    with hub_errors(repo_id, revision):
        tree = patiently(lambda: list(HfApi().list_repo_tree(repo_id, revision=revision, recursive=True)))
    files = [entry for entry in tree if isinstance(entry, RepoFile)]
    for file in files:  # hashes become names of files
        known = re.fullmatch(r"[0-9a-f]{64}", file.lfs.sha256) if file.lfs else re.fullmatch(HASH, file.blob_id)
        if not known:
            raise DijiangError(
                f"the Hub lists {one_line(file.path, 80)} of {repo_id} without a hash: check HF_ENDPOINT"
            )
    return {file.path: file for file in files if all(map(is_plain, file.path.split("/")))}


def is_plain(name: str) -> bool:
    """Whether a name that a repository gives is that of a file in a folder and stays there, on any system."""
    return re.fullmatch(r"[^/\\:\0]+", name) is not None and name not in (".", "..")


def cache_folder(repo_id: str) -> Path:
    """The repository's folder in the Hub's cache: blobs/HASH, snapshots/COMMIT/NAME, refs/BRANCH."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model")


def bytes_left(repo_id: str, revision: str, files: Iterable[RepoFile]) -> int:
    """How much of `files` has yet to travel."""
    cache = cache_folder(repo_id)
    left: dict[Path, int] = {}  # files of the same content travel once
    for file in files:
        blob, part = _blob(cache, file), _part(cache, file)
        if not blob.exists() and not (cache / "snapshots" / revision / file.path).exists():
            left[blob] = file.size - (part.stat().st_size if part.exists() else 0)
    return sum(left.values())


def fetch(repo_id: str, revision: str, files: list[RepoFile], check: bool = False) -> Path:
    """Bring `files` into the cache and return the snapshot's folder.

    check: read large files that were in the cache already and compare their hashes, too.

    Raises:
        DijiangError: the Hub refuses or can't be reached, or a file is not what its hash says. It is removed then.
    """
    cache = cache_folder(repo_id)
    folder = cache / "snapshots" / revision
    new = [file for file in files if not (folder / file.path).exists()]
    here = [file for file in files if file not in new or _blob(cache, file).exists()]
    if new:
        total, left = sum(file.size for file in new), bytes_left(repo_id, revision, new)
        have = f", {_size(total - left)} of it here already" if left < total else ""
        console.print(f"downloading {repo_id}: {len(new)} files, {_size(total)}{have}", highlight=False, soft_wrap=True)
        stopped = threading.Event()
        with bytes_bar("downloading", left) as advance, ThreadPoolExecutor(WORKERS) as pool:

            def count(received: int) -> None:
                if stopped.is_set():
                    raise InterruptedError("another file failed")
                advance(received)

            try:
                list(pool.map(lambda file: _fetch_file(repo_id, revision, file, cache, count), new))
            finally:  # after a failure or Ctrl-C the other files stop, too
                stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
    for file in files:
        if file.lfs is None or check and file in here:
            _check(folder / file.path, file, repo_id)
    return folder


def check_blob(path: Path) -> bool:
    """Whether a cached file is what the name of its blob says; True where that says nothing."""
    name = path.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", name):
        return _hash(path, "sha256") == name
    return re.fullmatch(r"[0-9a-f]{40}", name) is None or _git_hash(path) == name


def _fetch_file(repo_id: str, revision: str, file: RepoFile, cache: Path, advance: Callable[[int], None]) -> None:
    """One file; a large one that comes by HTTP is laid among the blobs first, where the client finds it."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.file_download import http_get, is_xet_available
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    bar = _bar(advance)
    url = hf_hub_url(repo_id, file.path, revision=revision)

    def piece() -> None:
        """From where the last one ended; the address of a large file is good for an hour only."""
        found = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        if found.xet_file_data is not None and is_xet_available():
            return
        headers = build_hf_headers()
        if urlsplit(found.location).netloc != urlsplit(url).netloc:  # another host must not see the token
            headers.pop("authorization", None)
        with part.open("ab") as target:
            if target.tell() > file.size:
                target.truncate(0)
            http_get(
                found.location, target, resume_size=target.tell(), headers=headers, expected_size=file.size,
                tqdm_class=bar,
            )  # fmt: skip

    blob, part = _blob(cache, file), _part(cache, file)
    with hub_errors(repo_id, revision):
        if file.lfs is not None:
            lock = cache.parent / ".locks" / cache.name / f"{part.name}.lock"
            for parent in (part.parent, lock.parent):
                parent.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(lock):  # others may want the same content
                if not blob.exists():
                    patiently(piece)
                if part.exists():
                    _check(part, file, repo_id)
                    part.replace(blob)
        pointer = Path(patiently(lambda: hf_hub_download(repo_id, file.path, revision=revision, tqdm_class=bar)))
    if file.lfs is not None and not blob.exists():  # by Xet
        _check(pointer, file, repo_id)


def _blob(cache: Path, file: RepoFile) -> Path:
    return cache / "blobs" / (file.lfs.sha256 if file.lfs else file.blob_id)


def _part(cache: Path, file: RepoFile) -> Path:
    return _blob(cache, file).with_suffix(".part")


def _check(path: Path, file: RepoFile, repo_id: str) -> None:
    """Raises DijiangError where a file is not what the Hub lists, and takes it out of the cache."""
    if (_hash(path, "sha256") != file.lfs.sha256) if file.lfs is not None else (_git_hash(path) != file.blob_id):
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise DijiangError(
            f"{file.path} of {repo_id} is damaged (its hash is not the one that the Hub lists) and was removed: "
            "run this again, and check any proxy if it stays so"
        )


def _hash(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def _git_hash(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _bar(advance: Callable[[int], None]) -> Any:
    """What the client takes for its own progress bar, so that ours counts its bytes."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

        def update(self, count: float | None = 1) -> None:
            advance(int(count or 0))

        def update_transfer(self, count: float) -> None:
            """By Xet the same bytes are told once more as they travel."""

    return Bar


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
