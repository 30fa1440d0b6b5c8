"""Upload a converted checkpoint to the Hub, in one commit and never twice.

Only the files that a checkpoint consists of leave the machine: an allow-list, so optimizer state, logs and
hidden files stay. What the repository already holds is compared by hash and not sent again. The whole
checkpoint is one commit, since a repository must not show the shards of one version under another's index.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from .errors import DijiangError
from .hub import TIMEOUT, hub_errors
from .sources import is_hub_id, read_index, read_json

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# Beside the weights, which are those that the index names. Other folders (checkpoint-*/, runs/) are never entered; the
# training log and the report, which quotes the text that was trained on, stay too.
ALLOWED = ("*.json", "*.py", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.png", "README.md", "LICENSE*")
PLOTS = "plots/*.png"  # which the card shows
REFUSED = (".*", "trainer_state.json")

SHARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors")


@dataclass(frozen=True)
class PushResult:
    """Where a checkpoint went.

    `bytes_uploaded` is the size of the files that differ from what the repository held. The transfer itself
    may be smaller: the Hub asks only for contents that it has nowhere yet.
    """

    repo: str
    commit: str
    bytes_uploaded: int
    url: str


def push(checkpoint: str | Path, repo: str, *, private: bool = False, revision: str | None = None) -> PushResult:
    """Upload the checkpoint in `checkpoint` to `repo` (owner/name), which is created if it does not exist.

    `revision` names a branch, created from main if it does not exist. A checkpoint without a README.md gets
    its model card first. Weight shards that the repository holds from another version are removed in the same
    commit: a stray model.safetensors would be loaded in place of the index. No change means no commit.

    Raises:
        DijiangError: not a converted checkpoint, not a repository name, a public repository where a private
            one was asked for, or a Hub that refuses or can't be reached.
    """
    check_repo(repo)
    folder = Path(checkpoint).expanduser()
    files = _checkpoint_files(folder)

    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    url = f"{api.endpoint}/{repo}" + (f"/tree/{revision}" if revision else "")
    with hub_errors(repo, revision):
        # None leaves the choice to the organization's default, which may be private.
        api.create_repo(repo, private=True if private else None, exist_ok=True)
        info = api.model_info(repo, timeout=TIMEOUT)
        if private and not info.private:
            raise DijiangError(f"{repo} is public: make it private in its settings, or push it as public")
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
            info = api.model_info(repo, revision=revision, timeout=TIMEOUT)
        head = info.sha
        assert head is not None  # the repository exists, so its branch has a commit
        tree = api.list_repo_tree(repo, revision=head, recursive=True)
        remote = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

    changed = {name: path for name, path in files.items() if not _same(path, remote.get(name))}
    stale = [name for name in remote if SHARD.fullmatch(name) and name not in files]
    if not changed and not stale:
        return PushResult(repo=repo, commit=head, bytes_uploaded=0, url=url)

    with hub_errors(repo, revision):
        commit = api.create_commit(
            repo,
            [
                *(CommitOperationAdd(name, path) for name, path in changed.items()),
                *(CommitOperationDelete(name, is_folder=False) for name in stale),
            ],
            commit_message="Upload DiJiang checkpoint",
            revision=revision,
            parent_commit=head,  # what was compared: a push of someone else meanwhile is not mixed with this
        )
    return PushResult(
        repo=repo,
        commit=commit.oid,
        bytes_uploaded=sum(path.stat().st_size for path in changed.values()),
        url=url,
    )


def check_repo(repo: str) -> None:
    """Raises DijiangError where `repo` can't be the name of a repository: to ask before anything that takes long."""
    if not is_hub_id(repo):
        raise DijiangError(f"{repo!r} is not a repository name: give it as owner/name")


def _checkpoint_files(folder: Path) -> dict[str, Path]:
    """The files that make up the checkpoint, by their name in the repository.

    Raises:
        DijiangError: `folder` is not a complete converted checkpoint.
    """
    if not folder.is_dir():
        raise DijiangError(f"no such folder: {folder}")
    config = folder / "config.json"
    record = read_json(config).get("dijiang") if config.is_file() else None
    if record is None:
        raise DijiangError(f"{folder} is not a converted checkpoint: make one with `dijiang convert`")
    path = next(_local_paths(record), None)
    if path is not None:
        raise DijiangError(f"config.json of {folder} tells of {path} on this machine: take it out, then push")

    weights = _weights(folder)
    if not (folder / "README.md").is_file():
        from .card import write_card

        write_card(folder)
    companions = {
        path.name
        for path in folder.iterdir()
        if path.is_file()
        and any(fnmatchcase(path.name, pattern) for pattern in ALLOWED)
        and not any(fnmatchcase(path.name, pattern) for pattern in REFUSED)
    }
    plots = {path.relative_to(folder).as_posix() for path in folder.glob(PLOTS) if path.is_file()}
    return {name: folder / name for name in sorted(weights | companions | plots)}


def _local_paths(record: Any) -> Iterator[str]:
    """Absolute paths and those of a home folder among the values: a recipe of one's own may name one as its data."""
    if isinstance(record, dict | list):
        for value in record.values() if isinstance(record, dict) else record:
            yield from _local_paths(value)
    elif isinstance(record, str) and (record.startswith("~") or PureWindowsPath(record).root or Path(record).root):
        yield record


def _weights(folder: Path) -> set[str]:
    """The weight files that the index names, or the only one."""
    index, single = folder / INDEX, folder / SINGLE
    if not index.is_file():
        if not single.is_file():
            raise DijiangError(f"{folder} has neither {INDEX} nor {SINGLE}: convert again")
        return {SINGLE}
    if single.is_file():
        raise DijiangError(f"{folder} has {SINGLE} beside its index and would load it: remove one")
    weights = read_index(index)
    for name in sorted(weights):
        if "/" in name or not (folder / name).is_file():
            raise DijiangError(f"{folder} lacks {name}, which {INDEX} names: convert again")
    return weights


def _same(path: Path, remote: RepoFile | None) -> bool:
    """Whether the repository already holds these bytes under this name."""
    if remote is None or remote.size != path.stat().st_size:
        return False
    with path.open("rb") as file:
        if remote.lfs is not None:
            return hashlib.file_digest(file, "sha256").hexdigest() == remote.lfs.sha256
        blob = hashlib.sha1(b"blob %d\0" % remote.size)  # how git names a file's content
        blob.update(file.read())
        return blob.hexdigest() == remote.blob_id
