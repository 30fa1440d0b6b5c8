"""What the loopback Hub keeps: files by their hashes, commits, repositories."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Blob:
    """One file's content, and the names that git and LFS have for it."""

    data: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What git itself stores of a file in LFS."""
        version = "version https://git-lfs.github.com/spec/v1"
        return f"{version}\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @property
    def oid(self) -> str:
        content = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def listing(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(self.data), "oid": self.oid}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
        return entry


@dataclass(frozen=True)
class Commit:
    sha: str
    message: str
    files: dict[str, Blob]
    parent: str | None


@dataclass
class Repo:
    id: str
    private: bool = False
    gated: bool = False
    granted: bool = False  # to the one token, if it is gated
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a tag or a full sha names; KeyError if there is none."""
        return self.commits[self.branches.get(revision) or self.tags.get(revision) or revision]

    def commit(self, branch: str, message: str, files: dict[str, Blob]) -> Commit:
        parent = self.branches.get(branch)
        listing = sorted((path, blob.oid) for path, blob in files.items())
        sha = hashlib.sha1(repr((self.id, parent, message, listing)).encode()).hexdigest()
        self.commits[sha] = Commit(sha=sha, message=message, files=files, parent=parent)
        self.branches[branch] = sha
        return self.commits[sha]
