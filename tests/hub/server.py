"""The server of the loopback Hub, what it counts, and the failures that it can be told to have."""

from __future__ import annotations

import fnmatch
import json
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from .store import Blob, Commit, Repo

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".png", ".h5", ".msgpack", ".onnx", ".model")
REPO = r"(?P<repo>[^/]+/[^/]+)"
API = "/api/(?:models|datasets)"
REVISION = r"(?P<revision>[^/]+)"


class Request(NamedTuple):
    method: str
    path: str
    status: int
    range: str | None = None


class Refusal(Exception):
    """An error answer, in the form in which the Hub gives its own."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        commit: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": " ".join(message.split()), **(headers or {})}
        if code:
            self.headers["X-Error-Code"] = code
        if commit:
            self.headers["X-Repo-Commit"] = commit


@dataclass
class Fault:
    """What goes wrong with the requests whose method and path match, the next `times` of them.

    path: their beginning, or a pattern with *.
    status, message, code, headers: the error to answer by; status 0 hangs up without an answer.
    seconds: wait so long first.
    cut: hang up after so many bytes of the body.
    flip: change the last byte of the body.
    late: do what was asked, and only then fail: the client does not hear of it.
    """

    path: str
    status: int | None = None
    message: str = "out of order"
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    method: str | None = None
    times: int | None = None
    seconds: float = 0.0
    cut: int | None = None
    flip: bool = False
    late: bool = False
    met: int = 0  # how often it happened

    def meets(self, method: str, path: str) -> bool:
        right = fnmatch.fnmatchcase(path, self.path) if "*" in self.path else path.startswith(self.path)
        return right and self.method in (None, method) and (self.times is None or self.met < self.times)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that was killed
            super().handle_error(request, client_address)


class Hub:
    """The server; `with Hub() as hub:` runs it at `hub.url`, and `hub.token` is the one token it accepts.

    requests: what was asked for.
    bytes_received, bytes_sent: contents of files that were uploaded and downloaded.
    leaks: requests that brought the token to the host of files, which must not see it.
    part_size: larger LFS files are uploaded in parts.
    moved: old names of repositories, answered by a redirect to the new ones.
    """

    def __init__(self, port: int = 0, token: str = "hf_loopbackToken", user: str = "tester") -> None:
        self.token = token
        self.user = user
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # LFS contents by sha256, shared by all repositories
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[Request] = []
        self.bytes_received = 0
        self.bytes_sent = 0
        self.leaks: list[str] = []
        self.part_size = 64 << 20
        self.moved: dict[str, str] = {}
        self.ranges = True
        self.watch: Callable[[str, str, str], None] | None = None
        self.lock = threading.RLock()
        self._faults: list[Fault] = []
        self._server = _Server(("127.0.0.1", port), type("BoundHandler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.files_url = f"http://localhost:{self._server.server_port}"  # another host, as the Hub's files have one

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

    def gate(self, repo_id: str, granted: bool = False) -> None:
        """Let nobody download the repository's files, or the token alone; as on the Hub, its look-up and listing stay
        open."""
        self.repos[repo_id].gated, self.repos[repo_id].granted = True, granted

    @contextmanager
    def failing(
        self, path: str, status: int | None = None, message: str = "out of order", **what: Any
    ) -> Iterator[Fault]:
        """Have a `Fault` while the block runs; of several that match a request the last one added happens."""
        fault = Fault(path, status, message, **what)
        self._faults.insert(0, fault)
        try:
            yield fault
        finally:
            self._faults.remove(fault)

    @contextmanager
    def watching(self, watch: Callable[[str, str, str], None]) -> Iterator[None]:
        """Call `watch(when, method, path)` at every request: "arrived", and "done" once what it asked for is."""
        self.watch = watch
        try:
            yield
        finally:
            self.watch = None

    @contextmanager
    def without_ranges(self) -> Iterator[None]:
        """Send whole files, whatever part was asked for."""
        self.ranges = False
        try:
            yield
        finally:
            self.ranges = True

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

    def find_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            fault = next((fault for fault in self._faults if fault.meets(method, path)), None)
            if fault is not None:
                fault.met += 1
        return fault


Endpoint = Callable[..., None]
ROUTES: list[tuple[str, re.Pattern[str], Endpoint]] = []


def route(method: str, pattern: str) -> Callable[[Endpoint], Endpoint]:
    """Registers a function that gets the handler, and the named parts of the path as keywords."""

    def register(endpoint: Endpoint) -> Endpoint:
        ROUTES.append((method, re.compile(pattern), endpoint))
        return endpoint

    return register


class Handler(BaseHTTPRequestHandler):
    """One request, handed to the route that takes it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def dispatch(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.query = parse_qs(url.query)
        self.body = self.read_body()  # before any answer, or the connection could not be kept
        self.fault = self.hub.find_fault(self.command, path)
        self.tell("arrived", path)
        try:
            if self.fault is not None:
                threading.Event().wait(self.fault.seconds)
                if not self.fault.late:
                    self.fail(self.fault)
            self.check_token()
            self.follow(url.path)
        except _HungUp:
            self.close_connection = True
        except Refusal as refusal:
            self.answer_json({"error": str(refusal)}, refusal.status, refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = dispatch

    def follow(self, path: str) -> None:
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, endpoint in ROUTES:
            if wanted == method and (match := pattern.fullmatch(path)):
                parts = {name: unquote(part) for name, part in match.groupdict().items() if part is not None}
                if (name := parts.get("repo")) in self.hub.moved:
                    self.answer(b"", 307, {"Location": self.path.replace(str(name), self.hub.moved[str(name)], 1)})
                    return
                with self.hub.lock:
                    endpoint(self, **parts)
                return
        raise Refusal(404, "no such endpoint here")

    def fail(self, fault: Fault) -> None:
        """The fault's error, if it has one."""
        if fault.status == 0:
            self.connection.shutdown(socket.SHUT_RDWR)
            raise _HungUp
        if fault.status is not None:
            raise Refusal(fault.status, fault.message, fault.code, headers=fault.headers)

    def tell(self, when: str, path: str) -> None:
        if self.hub.watch is not None:
            self.hub.watch(when, self.command, path)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionResetError("the client was killed in the middle of a request")
        return body

    def answer(self, data: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        path, fault = unquote(urlsplit(self.path).path), self.fault
        if fault is not None and fault.late and status < 400:
            self.fault = None
            self.fail(fault)
        self.hub.requests.append(Request(self.command, path, status, self.headers.get("Range")))
        self.tell("done", path)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is not None and fault.flip and data:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if fault is not None and fault.cut is not None:
            self.wfile.write(data[: fault.cut])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            raise _HungUp
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


class _HungUp(Exception):
    """The connection was closed on purpose."""
