"""Where models come from: an alias of the paper, a Hub id, or a folder.

`resolve` turns what the user typed into a `Source` pinned to one commit, `read_config` fetches nothing but
config.json, so that a model can be refused before its weights travel, and `download` fetches the files that
a conversion needs and no others. Nothing here looks inside a weight file or knows which models convert.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from ..errors import DijiangError
from ..files import ADAPTER, bytes_text, new_file, read_index, read_json, read_yaml
from .download import GIT_HASH, bytes_left, cache_folder, check_blob, fetch, is_plain, list_files
from .hub import TIMEOUT, hub_errors, one_line, patiently
from .names import ALIASES, is_hub_id, parse_name

# What a conversion reads beside the weights. Only the top level counts: folders such as onnx/ and original/
# hold other formats.
COMPANIONS = (
    "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "bpe.codes", "*.tokenizer", "LICENSE*", "README.md",
)  # fmt: skip

# A single file, or `<name>.index.json` and the shards that it lists; transformers looks in this order, too.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")

MODULE_FILES = (".json", ".safetensors", ".bin", ".txt")  # of sentence-transformers

FRONT = re.compile(r"\A\s*---\n(.*?)\n---", re.DOTALL)  # the metadata of a model card
# What of a source's model card is true of the converted model, too.
INHERITED = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True)
class Source:
    """One model at one commit: what to convert.

    `revision` is the commit's sha for a Hub source and None for a folder; `folder` is None until `download`.
    `card` is what of its model card holds for the converted model: license and languages. `asked` is the branch or tag
    that it was found by.
    """

    name: str
    repo_id: str | None
    revision: str | None
    folder: Path | None
    card: Mapping[str, Any] = field(default_factory=dict, compare=False)
    asked: str = field(default="main", compare=False)

    def __str__(self) -> str:
        return self.repo_id or str(self.folder)


def resolve(source: str, revision: str | None = None) -> Source:
    """Find out what `source` means: an existing folder, else a name of `parse_name`, pinned to a commit.

    Raises:
        DijiangError: no such folder, alias or repository, a revision given with a folder or twice, or a Hub that
            refuses or can't be reached.
    """
    path = Path(os.path.expanduser(source))  # Path.expanduser raises where there is no such user
    if path.is_dir():
        if revision is not None:
            raise DijiangError(f"{source} is a folder, and only the Hub has revisions: drop {revision}")
        repo_id, commit = _of_snapshot(path.resolve())
        name = path.resolve().name if repo_id is None else repo_id.split("/")[1]
        return Source(name, repo_id, commit, path, card=_read_card(path / "README.md"))
    if path.is_file():
        raise DijiangError(f"{source} is a file: name the folder that holds the model's config.json")
    if source.startswith((".", "/", "~")) or source.endswith("/"):
        raise DijiangError(f"no such folder: {source}")

    alias = source.lower()
    repo_id, revision = parse_name(source, revision)
    if not is_hub_id(repo_id):
        folders = [found.parent.name for found in Path().glob("*/config.json")]
        near = [*difflib.get_close_matches(source, folders, n=2), *difflib.get_close_matches(alias, ALIASES, n=2)]
        hint = (
            f"did you mean {' or '.join(near)}?"
            if near
            else "give one of these, as pythia-410m or EleutherAI/pythia-410m"
        )
        raise DijiangError(f"{source!r} is no folder, no alias and no Hub id of the form owner/name: {hint}")

    from huggingface_hub import HfApi

    name, asked = alias if alias in ALIASES else repo_id.split("/")[1], revision or "main"
    if _is_offline():
        commit = _cached_commit(repo_id, asked)
        readme = cache_folder(repo_id) / "snapshots" / commit / "README.md"
        return Source(name, repo_id, commit, None, card=_read_card(readme), asked=asked)
    with hub_errors(repo_id, revision):
        info = patiently(lambda: HfApi().model_info(repo_id, revision=revision, timeout=TIMEOUT))
    if info.sha is None:
        raise DijiangError(f"the Hub names no commit for {repo_id}: check HF_ENDPOINT")
    card = info.card_data.to_dict() if info.card_data else {}
    return Source(name, repo_id, info.sha, None, card=_inherited(card), asked=asked)


def read_config(source: Source) -> dict[str, Any]:
    """The model's config.json, and no other file.

    Raises:
        DijiangError: there is none, it is not a JSON object, or the Hub does not hand it out.
    """
    if source.folder is not None:
        path = source.folder / "config.json"
        if not path.is_file():
            raise DijiangError(f"{source.folder} has no config.json: name the folder of a transformers model")
    else:
        path = _fetch(source, "config.json")
    return read_json(path)


def download(source: Source, out: Path | None = None, linked: bool = False) -> Source:
    """Fetch what a conversion needs into the Hub's cache: configs, tokenizer files and one format of weights.

    Safetensors are taken wherever there are any, otherwise PyTorch's .bin; other frameworks' weights, other
    precisions and subfolders stay where they are. A folder is returned as it is.

    out: where the weights will be written once more. Then files that were in the cache before are checked, too, and
    there must be space for both before anything travels; where they will be ``linked``, for one.

    Raises:
        DijiangError: the repository has no weights to convert or lacks a shard, a file is damaged, the disk is too
            small, or the Hub refuses.
    """
    if source.folder is not None:
        return source
    assert source.repo_id is not None and source.revision is not None  # without a folder it is on the Hub

    if _is_offline():
        folder = _snapshot(source)
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        for name in sorted(_companions(names) | _weights(source, names) | _modules(source, names)):
            if out is not None and not check_blob(folder / name):
                raise DijiangError(f"{name} of {source} in the cache is damaged: unset HF_HUB_OFFLINE to get it again")
        return dataclasses.replace(source, folder=folder)
    files = list_files(source.repo_id, source.revision)
    weights = _weights(source, files)
    wanted = [files[name] for name in sorted(_companions(files) | weights | _modules(source, files))]
    cache, left = cache_folder(source.repo_id), bytes_left(source.repo_id, source.revision, wanted)
    again = {out: sum(files[name].size for name in weights)} if out is not None and not linked else {}
    check_space({cache: left} | again)
    folder = fetch(source.repo_id, source.revision, wanted, check=out is not None)
    if source.asked != source.revision:  # so that it is found offline
        ref = cache / "refs" / source.asked
        with suppress(OSError):  # a cache that others share may be read-only
            ref.parent.mkdir(parents=True, exist_ok=True)
            with new_file(ref) as partial:
                partial.write_text(source.revision)
    return dataclasses.replace(source, folder=folder)


def check_space(needed: Mapping[Path, int]) -> None:
    """Raises DijiangError where a disk has less free space than all that `needed` says of paths on it."""
    disks: dict[int, tuple[Path, int]] = {}
    for path, size in needed.items():
        there = path.absolute()
        while not there.exists():
            there = there.parent
        disk = there.stat().st_dev
        disks[disk] = path, size + (disks[disk][1] if disk in disks else 0)
        if (free := shutil.disk_usage(there).free) < disks[disk][1]:
            total = f"{bytes_text(disks[disk][1])} on the disk of {path}, which has {bytes_text(free)}"
            raise DijiangError(f"no space left for {total}: free some, choose another --out, or set HF_HOME elsewhere")


def _companions(names: Collection[str]) -> set[str]:
    """The files beside the weights; an index belongs to its weights, and to those of other formats, and an adapter's
    config to an adapter, which is not converted."""
    return {
        name
        for name in names
        if is_plain(name)
        and any(fnmatchcase(name, pattern) for pattern in COMPANIONS)
        and not name.endswith(".index.json")
        and name != ADAPTER
    }


def _weights(source: Source, names: Collection[str]) -> set[str]:
    """The weight files that transformers would load, with their index if they have one."""
    for single in WEIGHTS:
        index = f"{single}.index.json"
        if single in names:
            return {single}
        if index in names:
            shards = read_index(_fetch(source, index))
            if missing := sorted(shards.difference(names)):
                raise DijiangError(f"{source} lacks {missing[0]}, which {index} names: ask its authors")
            return {index, *shards}
    where = (
        " in the cache, and offline mode is on: unset HF_HUB_OFFLINE"
        if _is_offline()
        else ": choose a transformers model"
    )
    raise DijiangError(f"{source} has no {' or '.join(WEIGHTS)}{where}")


def _modules(source: Source, names: Collection[str]) -> set[str]:
    """Files of the further modules of a sentence-transformers model, in folders that its modules.json names."""
    if "modules.json" not in names:
        return set()
    try:
        modules = json.loads(_fetch(source, "modules.json").read_bytes())
        folders = {each["path"] for each in modules if each["path"]}
    except (ValueError, KeyError, TypeError) as error:
        raise DijiangError(f"modules.json of {source} can't be read ({one_line(error)}): get it again") from error
    return {name for name in names if name.rpartition("/")[0] in folders and name.endswith(MODULE_FILES)}


def _fetch(source: Source, name: str) -> Path:
    """Download one small file of a Hub source and return where it lies in the cache."""
    assert source.repo_id is not None

    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    repo_id = source.repo_id
    with hub_errors(repo_id, source.revision):
        try:
            return Path(patiently(lambda: hf_hub_download(repo_id, name, revision=source.revision)))
        except RemoteEntryNotFoundError as error:
            raise DijiangError(f"{source} has no {name}: choose a transformers model") from error


def _is_offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _snapshot(source: Source) -> Path:
    assert source.repo_id is not None and source.revision is not None
    return cache_folder(source.repo_id) / "snapshots" / source.revision


def _of_snapshot(folder: Path) -> tuple[str | None, str | None]:
    """The repository and the commit of a folder in the Hub's cache, models--OWNER--NAME/snapshots/COMMIT; or None."""
    found = re.fullmatch(r"models--([\w.-]+?)--([\w.-]+)", folder.parent.parent.name, re.ASCII)
    if found is None or folder.parent.name != "snapshots" or not re.fullmatch(GIT_HASH, folder.name):
        return None, None
    return f"{found[1]}/{found[2]}", folder.name


def _cached_commit(repo_id: str, asked: str) -> str:
    """The commit that a branch, tag or commit had when it was last downloaded. Raises DijiangError."""
    cache = cache_folder(repo_id)
    if (cache / "snapshots" / asked).is_dir():
        return asked
    if is_plain(asked.replace("/", "-")) and ".." not in asked and (cache / "refs" / asked).is_file():
        return (cache / "refs" / asked).read_text().strip()
    raise DijiangError(f"{repo_id} at {asked} was not downloaded before, and offline mode is on: unset HF_HUB_OFFLINE")


def _read_card(readme: Path) -> dict[str, Any]:
    """What a model card on disk says that is inherited; nothing where there is none to read."""
    try:
        front = FRONT.match(readme.read_text(encoding="utf-8").replace("\r\n", "\n"))
        card = read_yaml(front[1]) if front else {}
        return _inherited(card) if isinstance(card, Mapping) else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _inherited(card: Mapping[str, Any]) -> dict[str, Any]:
    """License and languages, where they have the form that the Hub asks for."""
    kept = {name: card[name] for name in INHERITED if isinstance(card.get(name), str)}
    if isinstance(card.get("language"), list):
        kept["language"] = [name for name in card["language"] if isinstance(name, str)]
    return kept
