"""A small Hub on the loopback address, which speaks the protocol that huggingface_hub speaks.

    hub = Hub()
    hub.add("org/model", {"config.json": b"{}", "model.safetensors": weights})
    with hub.serving() as url:
        ...  # with HF_ENDPOINT=url in the environment of a process
    assert hub.downloaded("org/model") == {"config.json", "model.safetensors"}

Model info, trees in pages, and files with ETag, commit, sizes and ranges. Large files are answered,
as by the Hub, with a redirect to another host (here, another name of this one), which must not see
the token. What can go wrong is made to by `fail` and `cut`.
"""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

TOKEN = "hf_ofthetests"
LARGE = re.compile(r"\.(safetensors|bin|pth|gguf|h5|onnx)$")  # in large file storage
PAGE = 4  # entries in a page of a tree
INFO = re.compile(r"^/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>.+))?$")
TREE = re.compile(r"^/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)$")
RESOLVE = re.compile(r"^/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)$")
STORAGE = re.compile(r"^/storage/(?P<digest>[0-9a-f]{64})$")


@dataclass
class Repository:
    """Files by revision; a revision is a branch or tag, and stands for a commit."""

    revisions: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, revision: str) -> str | None:
        """Return the commit of a branch, tag or commit; None if there is none."""
        if revision in self.revisions:
            parts = [f"{p}:{len(c)}".encode() + c for p, c in self.revisions[revision].items()]
            return hashlib.sha1(b"\0".join(parts)).hexdigest()
        return next((revision for r in self.revisions if self.commit(r) == revision), None)

    def files(self, revision: str) -> dict[str, bytes]:
        commit = self.commit(revision)
        return next(f for r, f in self.revisions.items() if self.commit(r) == commit)


class Request(NamedTuple):
    """A request that the server answered."""

    method: str
    path: str
    status: int
    range: str | None
    token: bool  # whether it came with one
    host: str


@dataclass
class _Fault:
    pattern: re.Pattern[str]
    times: int
    method: str | None
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    skip: int = 0  # requests that are answered first
    after: int | None = None  # bytes of the body after which the connection is cut


class Hub:
    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()

    def add(
        self,
        name: str,
        files: Mapping[str, bytes],
        revision: str = "main",
        *,
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """Add a repository, or a revision of one. Returns its commit."""
        repository = self.repositories.setdefault(name, Repository(private=private, gated=gated))
        repository.revisions[revision] = dict(files)
        commit = repository.commit(revision)
        assert commit is not None
        return commit

    def fail(
        self,
        pattern: str,
        status: int,
        times: int = 1,
        *,
        skip: int = 0,
        method: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Answer so many requests, whose path the pattern is found in, with a status."""
        fault = _Fault(re.compile(pattern), times, method, status, headers or {}, skip)
        self._faults.append(fault)

    def cut(self, pattern: str, after: int, times: int = 1) -> None:
        """Cut the connection in the body of so many answers, after a number of bytes."""
        self._faults.append(_Fault(re.compile(pattern), times, "GET", after=after))

    def mend(self) -> None:
        """Forget the faults and the requests so far."""
        self._faults.clear()
        self.requests.clear()

    def downloaded(self, name: str) -> set[str]:
        """Return the files of a repository whose content was asked for and sent."""
        found = set()
        for request in self.requests:
            match = RESOLVE.match(request.path)
            if match and match["repo"] == name and request.method == "GET":
                found.add(unquote(match["path"]))
        sent = {r.path.rpartition("/")[2] for r in self.requests if STORAGE.match(r.path)}
        for files in self.repositories[name].revisions.values():
            found |= {p for p, c in files.items() if LARGE.search(p) and _digest(c) in sent}
        return found

    @contextlib.contextmanager
    def serving(self) -> Iterator[str]:
        """Serve in threads of this process. Gives the address."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def _fault(self, method: str, path: str, cutting: bool) -> _Fault | None:
        with self._lock:
            for fault in self._faults:
                fits = fault.method in (None, method) and fault.pattern.search(path)
                if fits and fault.times > 0 and (fault.after is not None) == cutting:
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def _stored(self, digest: str) -> bytes | None:
        for repository in self.repositories.values():
            for files in repository.revisions.values():
                for content in files.values():
                    if _digest(content) == digest:
                        return content
        return None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
    if LARGE.search(path):
        entry["lfs"] = {"oid": _digest(content), "size": len(content), "pointerSize": 134}
    return entry


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def log_message(self, *arguments: object) -> None:
            pass

        def _answer(self) -> None:
            path = urlsplit(self.path).path
            if fault := hub._fault(self.command, unquote(path), cutting=False):
                self._send(fault.status, b"Something went wrong.", fault.headers)
                return
            routes: list[tuple[re.Pattern[str], Callable[..., None]]] = [
                (STORAGE, self._storage),
                (TREE, self._tree),
                (INFO, self._info),
                (RESOLVE, self._resolve),
            ]
            for pattern, route in routes:
                if match := pattern.match(path):
                    route(**{k: v and unquote(v) for k, v in match.groupdict().items()})
                    return
            self._send(404, b"Not Found")

        # ------------------------------------------------------------ answers

        def _info(self, repo: str, revision: str | None) -> None:
            found = self._repository(repo, revision or "main")
            if found is not None:
                commit, files, repository = found
                self._send_json(
                    {
                        "id": repo,
                        "modelId": repo,
                        "sha": commit,
                        "private": repository.private,
                        "gated": "manual" if repository.gated else False,
                        "disabled": False,
                        "downloads": 0,
                        "likes": 0,
                        "tags": [],
                        "siblings": [{"rfilename": path} for path in files],
                    }
                )

        def _tree(self, repo: str, revision: str) -> None:
            found = self._repository(repo, revision)
            if found is not None:
                entries = [_entry(path, content) for path, content in found[1].items()]
                query = parse_qs(urlsplit(self.path).query)
                start = int(query.get("cursor", ["0"])[0])
                headers = {}
                if start + PAGE < len(entries):
                    host = self.headers["Host"]
                    path = f"/api/models/{repo}/tree/{quote(revision, safe='')}"
                    rest = f"?recursive=True&cursor={start + PAGE}"
                    headers["Link"] = f'<http://{host}{path}{rest}>; rel="next"'
                self._send_json(entries[start : start + PAGE], headers)

        def _resolve(self, repo: str, revision: str, path: str) -> None:
            found = self._repository(repo, revision)
            if found is None:
                return
            commit, files, repository = found
            headers = {"X-Repo-Commit": commit}
            if repository.gated and not self._has_token():
                message = f"Access to model {repo} is restricted. You must have access to it."
                headers |= {"X-Error-Code": "GatedRepo", "X-Error-Message": message}
                self._send(401, message.encode(), headers)
            elif path not in files:
                headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
                self._send(404, b"Entry not found", headers)
            elif LARGE.search(path):
                digest, size = _digest(files[path]), len(files[path])
                headers |= {
                    "X-Linked-Etag": f'"{digest}"',
                    "X-Linked-Size": str(size),
                    "Location": f"http://localhost:{self.server.server_address[1]}/storage/{digest}",
                }
                self._send(302, b"", headers)
            else:
                headers["ETag"] = f'"{_oid(files[path])}"'
                self._send_content(files[path], headers)

        def _storage(self, digest: str) -> None:
            content = hub._stored(digest)
            if content is None:
                self._send(404, b"Not Found")
            else:
                self._send_content(content, {"ETag": f'"{digest}"'})

        def _repository(
            self, repo: str, revision: str
        ) -> tuple[str, dict[str, bytes], Repository] | None:
            """Find a revision; None, and an answer sent, if there is none to be seen."""
            repository = hub.repositories.get(repo)
            if repository is None or repository.private and not self._has_token():
                message = "Repository not found"
                headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": message}
                self._send(404 if self._has_token() else 401, message.encode(), headers)
                return None
            commit = repository.commit(revision)
            if commit is None:
                message = f"Invalid rev id: {revision}"
                headers = {"X-Error-Code": "RevisionNotFound", "X-Error-Message": message}
                self._send(404, message.encode(), headers)
                return None
            return commit, repository.files(revision), repository

        # ------------------------------------------------------------ sending

        def _has_token(self) -> bool:
            return self.headers.get("Authorization") == f"Bearer {TOKEN}"

        def _send_json(self, content: object, headers: Mapping[str, str] | None = None) -> None:
            kind = {"Content-Type": "application/json"}
            self._send(200, json.dumps(content).encode(), {**kind, **(headers or {})})

        def _send_content(self, content: bytes, headers: Mapping[str, str]) -> None:
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
            size = len(content)
            if asked and int(asked[1]) >= size:
                self._send(416, b"", {**headers, "Content-Range": f"bytes */{size}"})
            elif asked:
                start = int(asked[1])
                span = {"Content-Range": f"bytes {start}-{size - 1}/{size}"}
                self._send(206, content[start:], {**headers, **span})
            else:
                self._send(200, content, {**headers, "Accept-Ranges": "bytes"})

        def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
            path = urlsplit(self.path).path
            with hub._lock:
                hub.requests.append(
                    Request(
                        self.command,
                        unquote(path),
                        status,
                        self.headers.get("Range"),
                        "Authorization" in self.headers,
                        (self.headers.get("Host") or "").partition(":")[0],
                    )
                )
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if fault := hub._fault(self.command, unquote(path), cutting=True):
                self.wfile.write(body[: fault.after])
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(2)
                return
            self.wfile.write(body)

    return Handler
