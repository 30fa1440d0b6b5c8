"""Upload a converted checkpoint to the Hub, in one commit and never twice.

Only the files that a checkpoint consists of leave the machine: an allow-list, so optimizer state, logs and
hidden files stay. What the repository already holds is compared by hash and not sent again. The whole
checkpoint is one commit, since a repository must not show the shards of one version under another's index.

A push that was interrupted is run again: large files that arrived are not sent twice, and nobody sees anything of it
until the commit, its last step.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from .errors import DijiangError
from .files import ADAPTER, check_link, read_index, read_json, telling_full_disk
from .source.hub import TIMEOUT, hub_errors, own_token, patiently, wait_if_passing
from .source.modules import module_folders
from .source.names import is_hub_id

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# Beside the weights, which are those that the index names. Other folders (checkpoint-*/, runs/) are never entered; the
# training log and the report, which quotes the text that was trained on, stay too.
ALLOWED = ("*.json", "*.py", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.png", "README.md", "LICENSE*")
PLOTS = "plots/*.png"  # the card shows them
INNER = (".png", ".json", ".safetensors", "pytorch_model.bin", ".txt")  # of plots and of sentence-transformers' modules
REFUSED = (".*", "trainer_state.json", ADAPTER)
READ = (
    "*config.json",
    "README.md",
    "*.jinja",
    "special_tokens_map.json",
)  # these are searched for what must not leave the machine

SHARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
TOKEN = re.compile(r"\bhf_(oauth_)?[A-Za-z0-9]{30,}\b")


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


def push(
    checkpoint: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
) -> PushResult:
    """Upload the checkpoint in `checkpoint` to `repo` (owner/name), which is created if it does not exist.

    `revision` names a branch, created from main if it does not exist, and `tag` a tag for the commit. A checkpoint
    without a README.md gets its model card first. Weight shards that the repository holds from another version are
    removed in the same commit: a stray model.safetensors would be loaded in place of the index. No change means no
    commit. Failures that pass are waited out.

    Raises:
        DijiangError: not a converted checkpoint, not a repository name, a public repository where a private
            one was asked for, a tag that another commit has, or a Hub that refuses or can't be reached.
    """
    check_repo(repo)
    folder = Path(checkpoint).expanduser()
    again = "free some, then push again"
    with telling_full_disk(folder, again):
        files = _checkpoint_files(folder)

    from huggingface_hub import HfApi

    api = HfApi()
    with hub_errors(repo, revision):
        # None leaves the choice to the organization's default, which may be private.
        patiently(lambda: api.create_repo(repo, private=True if private else None, exist_ok=True))
        if private and not patiently(lambda: api.model_info(repo, timeout=TIMEOUT)).private:
            raise DijiangError(f"{repo} is public: make it private in its settings, or push it as public")
        if revision is not None:
            patiently(lambda: api.create_branch(repo, branch=revision, exist_ok=True))
        refs = patiently(lambda: api.list_repo_refs(repo)) if tag is not None else None
    tagged = next((ref.target_commit for ref in refs.tags if ref.name == tag), None) if refs else None
    with telling_full_disk("temporary files (TMPDIR)", again), tempfile.TemporaryDirectory() as scratch:
        commit, sent = _upload(api, repo, revision, files, tagged, Path(scratch))
    if tag is not None and tagged is None:
        with hub_errors(repo, revision):
            patiently(lambda: api.create_tag(repo, tag=tag, revision=commit, exist_ok=True))
    url = f"{api.endpoint}/{repo}" + (f"/tree/{revision}" if revision else "")
    return PushResult(repo=repo, commit=commit, bytes_uploaded=sent, url=url)


def _upload(
    api: HfApi,
    repo: str,
    revision: str | None,
    files: dict[str, Path],
    tagged: str | None,
    scratch: Path,
    tries: int = 3,
) -> tuple[str, int]:
    """The commit that has `files`, made if there is none yet, and the size of those that changed.

    tagged: the only commit that will do, if there is one.
    scratch: an empty folder, for the card as it is to be there.
    """
    hashes: dict[Path, str] = {}
    card, sent = files["README.md"], 0
    while True:
        with hub_errors(repo, revision):
            head = str(patiently(lambda: api.model_info(repo, revision=revision, timeout=TIMEOUT)).sha)
        there = _files_at(api, repo, head)
        files = files | {"README.md": _card(api, repo, head, card, there, scratch)}
        changed = {name: path for name, path in files.items() if not _same(path, there.get(name), hashes)}
        stale = [name for name in there if SHARD.fullmatch(name) and name not in files]
        if tagged is not None and (changed or stale or head != tagged):
            raise DijiangError(f"{repo} has this tag on another commit, {tagged[:12]}: choose another --tag")
        if not changed and not stale:
            return head, sent  # the last try may have arrived, and its answer was lost
        sent = sum(path.stat().st_size for path in changed.values())
        try:
            commit = _commit(api, repo, revision, head, changed, stale)
        except DijiangError as error:
            tries -= 1
            if not (tries and wait_if_passing(error)):
                raise
            continue
        there = _files_at(api, repo, commit)
        for name, path in files.items():
            if not _same(path, there.get(name), hashes):
                raise DijiangError(f"{repo} left out {name}: see whether a .gitignore there names it")
        return commit, sent


def _commit(api: HfApi, repo: str, revision: str | None, head: str, changed: dict[str, Path], stale: list[str]) -> str:
    """Sends what the Hub lacks of `changed`, then makes one commit of it all on top of `head`."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    additions = [CommitOperationAdd(name, path) for name, path in changed.items()]
    with hub_errors(repo, revision):
        patiently(lambda: api.preupload_lfs_files(repo, additions, revision=revision, free_memory=False))
        return api.create_commit(
            repo,
            [*additions, *(CommitOperationDelete(name, is_folder=False) for name in stale)],
            commit_message="Upload DiJiang checkpoint",
            revision=revision,
            parent_commit=head,  # the Hub refuses if someone else has pushed since files were compared
        ).oid


def _files_at(api: HfApi, repo: str, commit: str) -> dict[str, RepoFile]:
    from huggingface_hub.hf_api import RepoFile

    with hub_errors(repo, commit):
        tree = patiently(lambda: list(api.list_repo_tree(repo, revision=commit, recursive=True)))
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def _card(api: HfApi, repo: str, commit: str, path: Path, there: dict[str, RepoFile], scratch: Path) -> Path:
    """The card at `path` with what a person edited in the repository's own."""
    from .checkpoint.card import card_for

    text = None
    if "README.md" in there:
        with hub_errors(repo, commit):
            old = patiently(lambda: api.hf_hub_download(repo, "README.md", revision=commit, local_dir=scratch / commit))
        text = Path(old).read_text(encoding="utf-8")
    merged = scratch / "README.md"
    merged.write_text(card_for(repo, path, text), encoding="utf-8")
    return merged


def check_repo(repo: str) -> None:
    """Raises DijiangError where `repo` can't be the name of a repository: to ask before anything that takes long."""
    if not is_hub_id(repo):
        raise DijiangError(f"{repo!r} is not a repository name: give it as owner/name")


def check_push(repo: str) -> None:
    """Whether there is anybody to push as, asked before anything that takes long. Raises DijiangError."""
    check_repo(repo)

    from huggingface_hub import HfApi

    if own_token() is None:
        raise DijiangError(f"pushing to {repo} needs a token: run `hf auth login` or set HF_TOKEN")
    with hub_errors(repo):
        patiently(lambda: HfApi().whoami())


def push_result(checkpoint: str | Path, repo: str, private: bool) -> str:
    """Pushes a checkpoint that was just written and returns the repository's address.

    Raises:
        DijiangError: as `push`, and it says that the checkpoint is there, and how to push it later.
    """
    try:
        return push(checkpoint, repo, private=private).url
    except DijiangError as error:
        option = " --private" if private else ""
        command = f"dijiang push {shlex.quote(str(checkpoint))} {repo}{option}"
        raise DijiangError(f"{error}; {checkpoint} is written: {command}") from error


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
    from .checkpoint.card import read_card, write_card

    if not (folder / "README.md").is_file():
        write_card(folder)
    read_card(folder / "README.md")  # a card that can't be read is refused before anything is created
    companions = {
        path.name
        for path in folder.iterdir()
        if path.is_file()
        and any(fnmatchcase(path.name, pattern) for pattern in ALLOWED)
        and not any(fnmatchcase(path.name, pattern) for pattern in REFUSED)
    }
    for name in sorted(weights | companions):
        check_link(folder / name, folder)
    for name in sorted(companions):
        if any(fnmatchcase(name, pattern) for pattern in READ):
            _check_text(folder / name)
    further = [*folder.glob(PLOTS), *(path for name in module_folders(folder) for path in (folder / name).iterdir())]
    for each in further:
        check_link(each, folder)
    inner = {
        path.relative_to(folder).as_posix()
        for path in further
        if path.is_file() and path.name.endswith(INNER) and not path.name.startswith(".")
    }
    return {name: folder / name for name in sorted(weights | companions | inner)}


def _local_paths(record: Any) -> Iterator[str]:
    """Absolute paths and those of a home folder among the values: a recipe of one's own may name one as its data."""
    if isinstance(record, dict | list):
        for value in record.values() if isinstance(record, dict) else record:
            yield from _local_paths(value)
    elif isinstance(record, str) and (record.startswith("~") or PureWindowsPath(record).root or Path(record).root):
        yield record


def _check_text(path: Path) -> None:
    """Raises DijiangError where a text holds a Hub token, or names a model by a path on this machine."""
    text = path.read_text(encoding="utf-8", errors="replace")
    own = own_token()
    if TOKEN.search(text) or own and own in text:
        raise DijiangError(f"{path.name} of {path.parent} holds a Hub token: take it out, then push")
    if path.suffix == ".json":
        content = json.loads(text)
        named = [content.get(key) for key in ("_name_or_path", "name_or_path")] if isinstance(content, dict) else []
        for name in named:
            if isinstance(name, str) and name in _local_paths(name) and Path(name).expanduser().exists():
                raise DijiangError(
                    f"{path.name} of {path.parent} tells of {name} on this machine: take it out, then push"
                )


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


def _same(path: Path, remote: RepoFile | None, hashes: dict[Path, str]) -> bool:
    """Whether the repository already holds these bytes under this name. `hashes` remembers those of large files."""
    if remote is None or remote.size != path.stat().st_size:
        return False
    with path.open("rb") as file:
        if remote.lfs is not None:
            if path not in hashes:
                hashes[path] = hashlib.file_digest(file, "sha256").hexdigest()
            return hashes[path] == remote.lfs.sha256
        blob = hashlib.sha1(b"blob %d\0" % remote.size)  # how git names a file's content
        blob.update(file.read())
        return blob.hexdigest() == remote.blob_id
