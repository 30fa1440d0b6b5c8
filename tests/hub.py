"""A Hugging Face Hub on the loopback, for tests without a network.

It speaks as much of the Hub's API as the unmodified `huggingface_hub` client needs to look up, download,
create and push model repositories, and `datasets` to stream data sets: look-ups and trees, downloads with ETag
and Range, gated and missing repositories, branches, and uploads by LFS batch and commit. Repositories live in
memory and are gone when it stops.

It tells data sets from models by nothing but their addresses. It has no spaces, no multipart uploads, no pull
requests and no Xet: the client must run with HF_HUB_DISABLE_XET=1, or it would look for a Xet server to upload
to.

    python -m tests.hub --port 8000 --repo owner/name=FOLDER
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".png", ".h5", ".msgpack", ".onnx", ".model")
REPO = r"(?P<repo>[^/]+/[^/]+)"
API = "/api/(?:models|datasets)"
REVISION = r"(?P<revision>[^/]+)"


@dataclass(frozen=True)
class Blob:
    """One file's content, and the names that git and LFS have for it."""

    data: bytes
    lfs: bool

    @property
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
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> Commit:
        """The commit that a branch or a full sha names; KeyError if there is none."""
        return self.commits[self.branches.get(revision, revision)]

    def commit(self, branch: str, message: str, files: dict[str, Blob]) -> Commit:
        parent = self.branches.get(branch)
        listing = sorted((path, blob.oid) for path, blob in files.items())
        sha = hashlib.sha1(repr((self.id, parent, message, listing)).encode()).hexdigest()
        self.commits[sha] = Commit(sha=sha, message=message, files=files, parent=parent)
        self.branches[branch] = sha
        return self.commits[sha]


class Request(NamedTuple):
    method: str
    path: str
    status: int


class Refusal(Exception):
    """An error answer, in the form in which the Hub gives its own."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": " ".join(message.split())}
        if code:
            self.headers["X-Error-Code"] = code
        if commit:
            self.headers["X-Repo-Commit"] = commit


class Hub:
    """The server; `with Hub() as hub:` runs it at `hub.url`, and `hub.token` is the one token it accepts.

    `requests` lists what was asked for and `bytes_received` counts the file contents that were uploaded.
    """

    def __init__(self, port: int = 0, token: str = "hf_loopbackToken", user: str = "tester") -> None:
        self.token = token
        self.user = user
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # LFS contents by sha256, shared by all repositories as on the Hub
        self.requests: list[Request] = []
        self.bytes_received = 0
        self.lock = threading.RLock()
        self._failures: dict[str, tuple[int, str]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def start(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Hub:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def add_repo(self, repo_id: str, files: Path | Mapping[str, bytes | str], *, private: bool = False) -> str:
        """Put a repository there with the files of a folder, or with those given; return its commit's sha."""
        if isinstance(files, Path):
            files = {
                path.relative_to(files).as_posix(): path.read_bytes()
                for path in sorted(files.rglob("*"))
                if path.is_file()
            }
        contents = {path: data.encode() if isinstance(data, str) else data for path, data in files.items()}
        with self.lock:
            repo = self.repos.setdefault(repo_id, Repo(repo_id, private=private))
            blobs = {path: self.blob(path, data) for path, data in contents.items()}
            return repo.commit("main", "Add files", blobs).sha

    def gate(self, repo_id: str) -> None:
        """Let nobody download the repository's files; as on the Hub, its look-up and listing stay open."""
        self.repos[repo_id].gated = True

    @contextmanager
    def failing(self, path: str, status: int, message: str = "out of order") -> Iterator[None]:
        """Answer every request whose path begins with `path` by an error."""
        self._failures[path] = (status, message)
        try:
            yield
        finally:
            del self._failures[path]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds at a revision."""
        return {path: blob.data for path, blob in self.repos[repo_id].at(revision).files.items()}

    def history(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """The commits behind a revision, newest first."""
        repo = self.repos[repo_id]
        commits = [repo.at(revision)]
        while (parent := commits[-1].parent) is not None:
            commits.append(repo.commits[parent])
        return commits

    def blob(self, path: str, data: bytes) -> Blob:
        blob = Blob(data, lfs=path.endswith(LFS_SUFFIXES))
        if blob.lfs:
            self.objects[blob.sha256] = data
        return blob

    def failure(self, path: str) -> tuple[int, str] | None:
        return next((failure for prefix, failure in self._failures.items() if path.startswith(prefix)), None)


Endpoint = Callable[..., None]
ROUTES: list[tuple[str, re.Pattern[str], Endpoint]] = []


def route(method: str, pattern: str) -> Callable[[Endpoint], Endpoint]:
    def register(endpoint: Endpoint) -> Endpoint:
        ROUTES.append((method, re.compile(pattern), endpoint))
        return endpoint

    return register


class Handler(BaseHTTPRequestHandler):
    """One request. The routes below are plain methods that get the parts of the path as keywords."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def dispatch(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.read_body()  # before any answer, or the connection could not be kept
        try:
            self.check_token()
            if failure := self.hub.failure(unquote(url.path)):
                raise Refusal(*failure)
            method = "GET" if self.command == "HEAD" else self.command
            for wanted, pattern, endpoint in ROUTES:
                if wanted == method and (match := pattern.fullmatch(url.path)):
                    parts = {name: unquote(part) for name, part in match.groupdict().items() if part is not None}
                    with self.hub.lock:
                        endpoint(self, **parts)
                    return
            raise Refusal(404, "no such endpoint here")
        except Refusal as refusal:
            self.answer_json({"error": str(refusal)}, refusal.status, refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = dispatch

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, data: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.hub.requests.append(Request(self.command, unquote(urlsplit(self.path).path), status))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def answer_json(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.answer(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr: tests read what the client writes there."""

    def check_token(self) -> None:
        authorization = self.headers.get("Authorization")
        self.known = authorization == f"Bearer {self.hub.token}"
        if authorization and not self.known:
            raise Refusal(401, "Invalid credentials in Authorization header")

    def need_token(self) -> None:
        if not self.known:
            raise Refusal(401, "Invalid username or password.")

    def find(self, repo_id: str) -> Repo:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self.known):
            raise Refusal(404, "Repository not found", code="RepoNotFound")
        return repo

    def find_commit(self, repo: Repo, revision: str) -> Commit:
        try:
            return repo.at(revision)
        except KeyError:
            raise Refusal(404, f"Invalid rev id: {revision}", code="RevisionNotFound") from None

    # Look-ups

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> None:
        self.need_token()
        self.answer_json({"type": "user", "name": self.hub.user, "orgs": []})

    @route("GET", rf"{API}/{REPO}(/revision/{REVISION})?")
    def info(self, repo: str, revision: str = "main") -> None:
        found = self.find(repo)
        commit = self.find_commit(found, revision)
        self.answer_json(
            {
                "id": repo,
                "sha": commit.sha,
                "private": found.private,
                "gated": "manual" if found.gated else False,
                "tags": [],
                "cardData": _front_matter(commit.files["README.md"].data) if "README.md" in commit.files else None,
                "siblings": [{"rfilename": path} for path in sorted(commit.files)],
            }
        )

    @route("GET", rf"{API}/{REPO}/tree/{REVISION}(/(?P<folder>.+))?")
    def tree(self, repo: str, revision: str, folder: str = "") -> None:
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
    def paths_info(self, repo: str, revision: str) -> None:
        files = self.find_commit(self.find(repo), revision).files
        wanted = parse_qs(self.body.decode()).get("paths", [])
        self.answer_json([files[path].listing(path) for path in wanted if path in files])

    @route("GET", rf"{API}/{REPO}/refs")
    def refs(self, repo: str) -> None:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
            for name, sha in self.find(repo).branches.items()
        ]
        self.answer_json({"branches": branches, "converts": [], "tags": [], "pullRequests": []})

    @route("GET", rf"/(?:datasets/)?{REPO}/resolve/{REVISION}/(?P<path>.+)")
    def resolve(self, repo: str, revision: str, path: str) -> None:
        found = self.find(repo)
        if found.gated:
            message = f"Access to model {repo} is restricted and you are not in the authorized list."
            raise Refusal(403 if self.known else 401, message, code="GatedRepo")
        commit = self.find_commit(found, revision)
        blob = commit.files.get(path)
        if blob is None:
            raise Refusal(404, "Entry not found", code="EntryNotFound", commit=commit.sha)
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.data))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self.answer(blob.data, headers=headers)
            return
        size = len(blob.data)
        start, end = int(asked[1]), min(int(asked[2] or size), size - 1)
        if start >= size:
            raise Refusal(416, "Range not satisfiable")
        headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        self.answer(blob.data[start : end + 1], 206, headers)

    # Writing

    @route("POST", "/api/repos/create")
    def create_repo(self) -> None:
        self.need_token()
        wish = json.loads(self.body)
        repo_id = f"{wish.get('organization') or self.hub.user}/{wish['name']}"
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repos:
            self.answer_json({"error": "You already created this model repo", "url": url}, 409)
            return
        repo = self.hub.repos[repo_id] = Repo(repo_id, private=wish.get("visibility") == "private")
        repo.commit("main", "initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", lfs=False)})
        self.answer_json({"url": url})

    @route("POST", rf"/api/models/{REPO}/branch/(?P<branch>[^/]+)")
    def create_branch(self, repo: str, branch: str) -> None:
        self.need_token()
        found = self.find(repo)
        if branch in found.branches:
            raise Refusal(409, "Reference already exists")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        found.branches[branch] = self.find_commit(found, start).sha
        self.answer_json({})

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> None:
        try:
            _front_matter(json.loads(self.body)["content"].encode())
        except yaml.YAMLError as error:
            self.answer_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        else:
            self.answer_json({"errors": [], "warnings": []})

    @route("POST", rf"/api/models/{REPO}/preupload/{REVISION}")
    def preupload(self, repo: str, revision: str) -> None:
        self.need_token()
        files = self.find_commit(self.find(repo), revision).files
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
                "oid": files[file["path"]].etag if file["path"] in files else None,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.answer_json({"files": modes})

    @route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo: str) -> None:
        self.need_token()
        self.find(repo)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:  # without actions: the Hub has it
                upload, verify = f"{self.hub.url}/lfs/{wanted['oid']}", f"{self.hub.url}/lfs-verify"
                answer["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            objects.append(answer)
        self.answer_json({"transfer": "basic", "objects": objects})

    @route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    def lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "the content does not match its sha256")
        self.hub.objects[oid] = self.body
        self.hub.bytes_received += len(self.body)
        self.answer(b"")

    @route("POST", "/lfs-verify")
    def lfs_verify(self) -> None:
        wanted = json.loads(self.body)
        if len(self.hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refusal(404, "not uploaded")
        self.answer_json({})

    @route("POST", rf"/api/models/{REPO}/commit/{REVISION}")
    def commit(self, repo: str, revision: str) -> None:
        self.need_token()
        found = self.find(repo)
        head = self.find_commit(found, revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        message = ""
        files = dict(head.files)
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit", head.sha) != head.sha:
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                content = base64.b64decode(value["content"])
                self.hub.bytes_received += len(content)
                files[value["path"]] = Blob(content, lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refusal(400, f"LFS object {value['oid']} was never uploaded")
                files[value["path"]] = Blob(self.hub.objects[value["oid"]], lfs=True)
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refusal(404, "A file with this name doesn't exist", code="EntryNotFound")
            else:
                raise Refusal(400, f"no such operation here: {key}")
        made = found.commit(revision, message, files)
        self.answer_json({"commitUrl": f"{self.hub.url}/{repo}/commit/{made.sha}", "commitOid": made.sha})


def _handler(hub: Hub) -> type[Handler]:
    return type("BoundHandler", (Handler,), {"hub": hub})


def _front_matter(readme: bytes) -> Any:
    parts = readme.decode().split("---\n", 2)
    return yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else None


def main() -> None:
    parser = argparse.ArgumentParser(description="a Hugging Face Hub on the loopback, kept in memory")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--repo", action="append", default=[], metavar="OWNER/NAME=FOLDER")
    options = parser.parse_args()
    with Hub(port=options.port) as hub:
        for repo in options.repo:
            repo_id, folder = repo.split("=", 1)
            hub.add_repo(repo_id, Path(folder))
        print(f"export HF_ENDPOINT={hub.url} HF_TOKEN={hub.token} HF_HUB_DISABLE_XET=1", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
