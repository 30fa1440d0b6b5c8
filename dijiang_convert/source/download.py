"""Files of one commit, fetched from the Hub into its cache by the Hub's own client, and checked by their hashes.

The client resumes a cut transfer, locks what two processes want and shows its progress; it compares sizes only, so
that a proxy's damage would become a model. Here every file that was fetched is compared with the hash of its listing.
"""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DijiangError
from ..files import bytes_text
from ..progress import is_drawn, say
from .hub import hub_errors, one_line, patiently

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils import tqdm

GIT_HASH, SHA256 = r"[0-9a-f]{40}", r"[0-9a-f]{64}"  # git has the first of a small file, LFS the second of a large one


def list_files(repo_id: str, revision: str) -> dict[str, RepoFile]:
    """The files of a commit by name, with sizes and hashes, without names that leave a folder. Raises DijiangError."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    with hub_errors(repo_id, revision):
        tree = patiently(lambda: list(HfApi().list_repo_tree(repo_id, revision=revision, recursive=True)))
    files = [entry for entry in tree if isinstance(entry, RepoFile)]
    for file in files:  # The cache names its files by these hashes.
        if not re.fullmatch(SHA256 if file.lfs else GIT_HASH, _hash_of(file)):
            raise DijiangError(
                f"the Hub lists {one_line(file.path, 80)} of {repo_id} without a hash: check HF_ENDPOINT"
            )
    return {file.path: file for file in files if all(map(is_plain, file.path.split("/")))}


def is_plain(name: str) -> bool:
    """Whether a name that a repository gives is that of a file in a folder and stays there, on any system.

    Names that would steer a terminal are not plain either: progress bars and errors show them.
    """
    return re.fullmatch(r"[^/\\:]+", name) is not None and name.isprintable() and name not in (".", "..")


def cache_folder(repo_id: str) -> Path:
    """The repository's folder in the Hub's cache: blobs/HASH, snapshots/COMMIT/NAME, refs/BRANCH."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model")


def bytes_left(repo_id: str, revision: str, files: Iterable[RepoFile]) -> int:
    """How many bytes of `files` are not in the cache yet."""
    cache = cache_folder(repo_id)
    left: dict[str, int] = {}  # files of the same content travel once
    for file in files:
        if not _is_here(cache, revision, file):
            left[_hash_of(file)] = file.size
    return sum(left.values())


def fetch(repo_id: str, revision: str, files: list[RepoFile], check: bool = False) -> Path:
    """Bring `files` into the cache and return the snapshot's folder.

    check: read large files that were in the cache already and compare their hashes, too.

    Raises:
        DijiangError: the Hub refuses or can't be reached, or a file is not what its hash says. It is removed then.
    """
    from huggingface_hub import snapshot_download

    cache = cache_folder(repo_id)
    folder = cache / "snapshots" / revision
    new = [file for file in files if not (folder / file.path).exists()]
    fetched = [file for file in new if not _is_here(cache, revision, file)]
    if new:
        total, left = sum(file.size for file in new), bytes_left(repo_id, revision, new)
        have = f", {bytes_text(total - left)} of it here already" if left < total else ""
        say(f"downloading {repo_id}: {len(new)} files, {bytes_text(total)}{have}")
        names = [glob.escape(file.path) for file in new]
        with hub_errors(repo_id, revision):
            patiently(lambda: snapshot_download(repo_id, revision=revision, allow_patterns=names, tqdm_class=_bar()))
    for file in files:
        if file.lfs is None or check or file in fetched:
            _check(folder / file.path, file, repo_id)
    return folder


def check_blob(path: Path) -> bool:
    """Whether a cached file is what the name of its blob says; True where that says nothing."""
    name = path.resolve().name
    if re.fullmatch(SHA256, name):
        return _sha256(path) == name
    return re.fullmatch(GIT_HASH, name) is None or _git_hash(path) == name


def _hash_of(file: RepoFile) -> str:
    return file.lfs.sha256 if file.lfs else file.blob_id


def _is_here(cache: Path, revision: str, file: RepoFile) -> bool:
    return (cache / "blobs" / _hash_of(file)).exists() or (cache / "snapshots" / revision / file.path).exists()


def _check(path: Path, file: RepoFile, repo_id: str) -> None:
    """Raises DijiangError where a file is not what the Hub lists, and takes it out of the cache."""
    if (_sha256(path) if file.lfs else _git_hash(path)) != _hash_of(file):
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise DijiangError(
            f"{file.path} of {repo_id} is damaged (its hash is not the one that the Hub lists) and was removed: "
            "run this again, and check any proxy if it stays so"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git_hash(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _bar() -> type[tqdm]:
    """The client's progress bar, which is drawn on a terminal alone."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": not is_drawn()})

    return Bar
