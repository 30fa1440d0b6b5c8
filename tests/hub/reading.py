"""Look-ups, trees and downloads of the loopback Hub."""

from __future__ import annotations

import hashlib
import re
from typing import Any
from urllib.parse import parse_qs

import yaml

from .server import API, REPO, REVISION, Handler, Refusal, route


@route("GET", "/api/whoami-v2")
def whoami(self: Handler) -> None:
    self.need_token()
    self.answer_json({"type": "user", "name": self.hub.user, "orgs": []})


@route("GET", rf"{API}/{REPO}(/revision/{REVISION})?")
def info(self: Handler, repo: str, revision: str = "main") -> None:
    found = self.find(repo)
    commit = self.find_commit(found, revision)
    self.answer_json(
        {
            "id": repo,
            "sha": commit.sha,
            "private": found.private,
            "gated": "manual" if found.gated else False,
            "tags": [],
            "cardData": front_matter(commit.files["README.md"].data) if "README.md" in commit.files else None,
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }
    )


@route("GET", rf"{API}/{REPO}/tree/{REVISION}(/(?P<folder>.+))?")
def tree(self: Handler, repo: str, revision: str, folder: str = "") -> None:
    files = self.find_commit(self.find(repo), revision).files
    recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
    prefix = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, blob in sorted(files.items()):
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            name = prefix + "/".join(parts[:depth])
            oid = hashlib.sha1(name.encode()).hexdigest()
            entries[name] = {"type": "directory", "path": name, "size": 0, "oid": oid}
        if recursive or len(parts) == 1:
            entries[path] = blob.listing(path)
    self.answer_json(list(entries.values()))


@route("POST", rf"{API}/{REPO}/paths-info/{REVISION}")
def paths_info(self: Handler, repo: str, revision: str) -> None:
    files = self.find_commit(self.find(repo), revision).files
    wanted = parse_qs(self.body.decode()).get("paths", [])
    self.answer_json([files[path].listing(path) for path in wanted if path in files])


@route("GET", rf"{API}/{REPO}/refs")
def refs(self: Handler, repo: str) -> None:
    found = self.find(repo)
    branches, tags = (
        [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in names.items()]
        for kind, names in (("heads", found.branches), ("tags", found.tags))
    )
    self.answer_json({"branches": branches, "converts": [], "tags": tags, "pullRequests": []})


@route("GET", rf"/(?:datasets/)?{REPO}/resolve/{REVISION}/(?P<path>.+)")
def resolve(self: Handler, repo: str, revision: str, path: str) -> None:
    found = self.find(repo)
    if found.gated and not (found.granted and self.known):
        message = f"Access to model {repo} is restricted and you are not in the authorized list."
        raise Refusal(403 if self.known else 401, message, code="GatedRepo")
    commit = self.find_commit(found, revision)
    blob = commit.files.get(path)
    if blob is None:
        raise Refusal(404, "Entry not found", code="EntryNotFound", commit=commit.sha)
    headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
    if blob.lfs:
        linked = {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.data))}
        location = f"{self.hub.files_url}/files/{blob.sha256}?signature=abc"
        self.answer(b"", 302, headers | linked | {"Location": location})
    else:
        serve(self, blob.data, headers)


@route("GET", "/files/(?P<oid>[0-9a-f]{64})")
def lfs_file(self: Handler, oid: str) -> None:
    """On the host of files, where a signed address is enough."""
    if self.headers.get("Authorization"):
        self.hub.leaks.append(self.path)
    if "signature" not in self.query:
        raise Refusal(403, "the address is not signed")
    serve(self, self.hub.objects[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})


def serve(self: Handler, data: bytes, headers: dict[str, str]) -> None:
    """A file, or the part of it that was asked for."""
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
    status = 200
    if asked is not None and self.hub.ranges:
        size = len(data)
        start, end = int(asked[1]), min(int(asked[2] or size), size - 1)
        if start >= size:
            raise Refusal(416, "Range not satisfiable")
        headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        data, status = data[start : end + 1], 206
    if self.command != "HEAD":
        cut = self.fault.cut if self.fault is not None else None
        self.hub.bytes_sent += len(data[:cut])
    self.answer(data, status, headers)


def front_matter(readme: bytes) -> Any:
    parts = readme.decode().split("---\n", 2)
    return yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else None
