"""Where models come from: an alias of the paper, a Hub id, or a folder.

`resolve` turns what the user typed into a `Source` pinned to one commit, `read_config` fetches nothing but
config.json, so that a model can be refused before its weights travel, and `download` fetches the files that
a conversion needs and no others. Nothing here looks inside a weight file or knows which models convert.
"""

from __future__ import annotations

import dataclasses
import difflib
import glob
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .errors import DijiangError

PYTHIA_SIZES = ("70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")
OPT_SIZES = ("125m", "350m", "1.3b", "2.7b", "6.7b")

# The models of the paper, by the short names that it uses.
ALIASES: dict[str, str] = {
    **{f"pythia-{size}": f"EleutherAI/pythia-{size}" for size in PYTHIA_SIZES},
    **{f"pythia-{size}-deduped": f"EleutherAI/pythia-{size}-deduped" for size in PYTHIA_SIZES},
    **{f"opt-{size}": f"facebook/opt-{size}" for size in OPT_SIZES},
    "tinyllama-1.1b": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
}

# What a conversion reads beside the weights. Only the top level counts: folders such as onnx/ and original/
# hold other formats.
COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*")

# A single file, or `<name>.index.json` and the shards that it lists; transformers looks in this order, too.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")

HUB_TIMEOUT = 30  # seconds; the client's own default for look-ups is to wait for ever


@dataclass(frozen=True)
class Source:
    """One model at one commit: what to convert.

    `revision` is the commit's sha for a Hub source and None for a folder; `folder` is None until `download`.
    `license` is what the Hub's model card says, where it says it.
    """

    name: str
    repo_id: str | None
    revision: str | None
    folder: Path | None
    license: str | None = None

    def __str__(self) -> str:
        return self.repo_id or str(self.folder)


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form owner/name; legacy names without an owner do not count."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text, re.ASCII) is not None


def resolve(source: str, revision: str | None = None) -> Source:
    """Find out what `source` means: an existing folder, else an alias, else a Hub id, pinned to a commit.

    Raises:
        DijiangError: no such folder, alias or repository, a revision given with a folder, or a Hub that
            refuses or can't be reached.
    """
    path = Path(os.path.expanduser(source))  # Path.expanduser raises where there is no such user
    if path.is_dir():
        if revision is not None:
            raise DijiangError(f"{source} is a folder, and only the Hub has revisions: drop {revision}")
        return Source(name=path.resolve().name, repo_id=None, revision=None, folder=path)
    if path.is_file():
        raise DijiangError(f"{source} is a file: name the folder that holds the model's config.json")
    if source.startswith((".", "/", "~")) or source.endswith("/"):
        raise DijiangError(f"no such folder: {source}")

    alias = source.lower()
    repo_id = ALIASES.get(alias, source)
    if not is_hub_id(repo_id):
        near = difflib.get_close_matches(alias, ALIASES, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"aliases are {', '.join(ALIASES)}"
        raise DijiangError(f"{source!r} is no folder, no alias and no Hub id of the form owner/name: {hint}")

    from huggingface_hub import HfApi

    with hub_errors(repo_id, revision):
        info = HfApi().model_info(repo_id, revision=revision, timeout=HUB_TIMEOUT)
    if info.sha is None:
        raise DijiangError(f"the Hub names no commit for {repo_id}: check HF_ENDPOINT")
    licence = info.card_data.license if info.card_data else None
    return Source(
        name=alias if alias in ALIASES else repo_id.split("/")[1],
        repo_id=repo_id,
        revision=info.sha,
        folder=None,
        license=licence if isinstance(licence, str) else None,
    )


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


def download(source: Source) -> Source:
    """Fetch what a conversion needs into the Hub's cache: configs, tokenizer files and one format of weights.

    Safetensors are taken wherever there are any, otherwise PyTorch's .bin; other frameworks' weights, other
    precisions and subfolders stay where they are. A folder is returned as it is.

    Raises:
        DijiangError: the repository has no weights to convert or lacks a shard, or the Hub refuses.
    """
    if source.folder is not None:
        return source
    assert source.repo_id is not None  # without a folder it is on the Hub

    from huggingface_hub import HfApi, snapshot_download

    with hub_errors(source.repo_id, source.revision):
        names = set(HfApi().list_repo_files(source.repo_id, revision=source.revision))
    wanted = _companions(names) | _weights(source, names)
    with hub_errors(source.repo_id, source.revision):
        folder = snapshot_download(
            source.repo_id,
            revision=source.revision,
            allow_patterns=[glob.escape(name) for name in sorted(wanted)],
        )
    return dataclasses.replace(source, folder=Path(folder))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        DijiangError: the file can't be read or holds anything but a JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DijiangError(f"{path} is no readable JSON ({_one_line(error)}): get it again") from error
    if not isinstance(content, dict):
        raise DijiangError(f"{path} holds no JSON object: get it again")
    return content


def read_index(path: Path) -> set[str]:
    """The weight files that a `*.index.json` names.

    Raises:
        DijiangError: it can't be read, or names none.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DijiangError(f"{path} names no weights: get it again")
    return {str(name) for name in weight_map.values()}


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Tell any failure of the Hub client inside the block as one line about `repo_id`.

    Raises:
        DijiangError: whatever the client raised, with what to do about it and without any token.
    """
    try:
        yield
    except (_http_error(), OSError, RuntimeError, ValueError) as error:
        raise DijiangError(_explain(error, repo_id, revision)) from error


def _companions(names: set[str]) -> set[str]:
    """The files beside the weights; an index belongs to its weights, and to those of other formats."""
    return {
        name
        for name in names
        if "/" not in name
        and any(fnmatchcase(name, pattern) for pattern in COMPANIONS)
        and not name.endswith(".index.json")
    }


def _weights(source: Source, names: set[str]) -> set[str]:
    """The weight files that transformers would load, with their index if they have one."""
    for single in WEIGHTS:
        index = f"{single}.index.json"
        if single in names:
            return {single}
        if index in names:
            shards = read_index(_fetch(source, index))
            if missing := sorted(shards - names):
                raise DijiangError(f"{source} lacks {missing[0]}, which {index} names: ask its authors")
            return {index, *shards}
    raise DijiangError(f"{source} has no {' or '.join(WEIGHTS)}: choose a transformers model")


def _fetch(source: Source, name: str) -> Path:
    """Download one small file of a Hub source and return where it lies in the cache."""
    assert source.repo_id is not None

    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    with hub_errors(source.repo_id, source.revision):
        try:
            return Path(hf_hub_download(source.repo_id, name, revision=source.revision))
        except RemoteEntryNotFoundError as error:
            raise DijiangError(f"{source} has no {name}: choose a transformers model") from error


def _http_error() -> type[Exception]:
    """The base of all HTTP errors of the client, which comes from httpx or, in newer clients, httpx2."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


def _explain(error: BaseException, repo_id: str, revision: str | None) -> str:
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo_id}"
    cause: BaseException | None = error
    while cause is not None:  # the client wraps what happened, at times twice
        match cause:
            case errors.GatedRepoError():  # before RepositoryNotFoundError, its base
                return f"{repo_id} is gated: ask for access at {page}, then run `hf auth login` or set HF_TOKEN"
            case errors.RepositoryNotFoundError():
                return (
                    f"{repo_id} is not on the Hub, or is private: check the name,"
                    " or run `hf auth login` or set HF_TOKEN to see private repositories"
                )
            case errors.RevisionNotFoundError():
                return f"{repo_id} has no revision {revision}: choose a branch, tag or commit from {page}"
            case errors.OfflineModeIsEnabled():
                return f"cannot reach the Hub for {repo_id}: offline mode is on; unset HF_HUB_OFFLINE"
            case errors.BadRequestError():  # the client's own words around it are better
                break
            case errors.HfHubHTTPError():
                return _explain_status(cause.response.status_code, cause.server_message or "", repo_id)
            case _ if isinstance(cause, _http_error()):
                return (
                    f"cannot reach {constants.ENDPOINT} for {repo_id} ({type(cause).__name__}):"
                    " check the connection, any proxy and HF_ENDPOINT, then try again"
                )
        cause = cause.__cause__
    return f"the Hub client failed on {repo_id}: {_one_line(error)}"


def _explain_status(status: int, said: str, repo_id: str) -> str:
    reason = f" ({_one_line(said)})" if said else ""
    if status == 401:
        return f"the Hub wants a valid token for {repo_id}{reason}: run `hf auth login` or set HF_TOKEN"
    if status == 403:
        return f"this token may not do that to {repo_id}{reason}: run `hf auth login` with one that may"
    if status in (409, 412):
        return f"{repo_id} changed at the same time{reason}: try again"
    if status == 429:
        return f"the Hub limits how often {repo_id} may be asked for{reason}: try again in a few minutes"
    if status >= 500:
        return f"the Hub failed on {repo_id} with status {status}{reason}: try again later"
    return f"the Hub refused the request for {repo_id} with status {status}{reason}"


def _one_line(message: object, limit: int = 200) -> str:
    """`message` on one line, without tokens that a server or proxy may have echoed."""
    from huggingface_hub import get_token

    text = " ".join(str(message).split())
    if token := get_token():
        text = text.replace(token, "***")
    text = re.sub(r"\bhf_(oauth_\S+|[A-Za-z0-9]{16,})|(?<=Bearer )\S+", "***", text)
    return text if len(text) <= limit else text[: limit - 1] + "…"
