"""A Hub on this machine: the HTTP API that the client `huggingface_hub` 2 speaks, in memory, which can break at will.

What it answers was read off the client's source. `Hub` runs it in a thread; `Caller` is a process in which the
unmodified client and `fire` talk to it, as they would to the real one.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_thisTokenMustNeverBeSeenAnywhere"
LARGE = (".parquet", ".safetensors")  # what .gitattributes of a new repository says
PART = 1 << 14  # files above go up in parts
PAGE = 7  # files of a tree in one answer


@dataclass
class Repo:
    """Branches are lists of commits; a commit is a tree: path -> bytes."""

    private: bool
    branches: dict[str, list[str]] = field(default_factory=dict)
    trees: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, tree: dict[str, bytes]) -> str:
        commits = self.branches.setdefault(branch, [])
        oid = hashlib.sha1(repr((branch, len(commits), sorted(tree.items()))).encode()).hexdigest()
        self.trees[oid] = tree
        commits.append(oid)
        return oid

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.trees else (self.branches.get(revision) or [None])[-1]

    @property
    def tree(self) -> dict[str, bytes]:
        """What main shows now, without what every repository starts with."""
        return {k: v for k, v in self.trees[self.branches["main"][-1]].items() if k != ".gitattributes"}

    @tree.setter
    def tree(self, value: dict[str, bytes]) -> None:
        self.commit("main", {".gitattributes": b"", **value})


@dataclass
class Hub:
    """The state of the server, and how it is told to fail."""

    url: str = ""
    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    seen: list[bytes] = field(default_factory=list)  # every line, header but Authorization, and body that came in
    break_at: int | None = None  # from this call on, counted from 1, there is no answer
    takes_effect: bool = False  # the broken call is done all the same
    status: tuple[int, str] | None = None  # every call is answered with this
    at_call: tuple[int, Callable[[], None]] | None = None  # what happens before this call is answered
    lock: threading.RLock = field(default_factory=threading.RLock)

    def fresh(self) -> None:
        """An empty Hub that works."""
        self.repos, self.objects, self.parts, self.calls, self.seen = {}, {}, {}, [], []
        self.mend()

    def mend(self) -> None:
        """All calls work from now on, and are counted anew."""
        self.calls, self.break_at, self.status, self.at_call = [], None, None, None

    def break_from(self, call: int, takes_effect: bool) -> None:
        """No answer to this call, counted from now, nor to any later one."""
        self.mend()
        self.break_at, self.takes_effect = call, takes_effect


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits for an acknowledgement of its headers
    hub: Hub

    def log_message(self, *arguments: Any) -> None: ...

    def _any(self) -> None:
        body = self._body()
        hub = self.hub
        with hub.lock:
            hub.calls.append(f"{self.command} {self.path}")
            headers = "\n".join(f"{k}: {v}" for k, v in self.headers.items() if k.lower() != "authorization")
            hub.seen.append(f"{self.command} {self.path}\n{headers}\n".encode() + body)
            if hub.at_call is not None and len(hub.calls) == hub.at_call[0]:
                hub.at_call[1]()
            broken = hub.break_at is not None and len(hub.calls) >= hub.break_at
            answer: Answer = 500, {}, b""
            if not broken or (len(hub.calls) == hub.break_at and hub.takes_effect):
                answer = self._answer(body)
        if broken:
            self.close_connection = True
            return
        status, headers_, data = answer
        self.send_response(status)
        for name, value in headers_.items():
            self.send_header(name, value)
        if "Content-Length" not in headers_:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            with suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = _any

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, body: bytes) -> Answer:
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        if self.hub.status is not None:
            status, message = self.hub.status
            return status, {"X-Error-Message": message}, b""
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                given = {k: v for k, v in match.groupdict().items() if v is not None}
                return answer(self, body, query, **given)
        return 404, {"X-Error-Message": f"no route {self.command} {path}"}, b""

    def _repo(self, kind: str, id: str, write: bool = False) -> Repo | None:
        """The repository, if the caller may see it."""
        repo = self.hub.repos.get((kind, id))
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        return repo if repo is not None and (allowed or not (repo.private or write)) else None

    # The Hub's own: what a repository is.
    def create(self, body: bytes, query: Any) -> Answer:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b""
        asked = json.loads(body)
        key = f"{asked.get('type', 'model')}s", f"{asked['organization']}/{asked['name']}"
        prefix = "" if key[0] == "models" else f"{key[0]}/"
        if key in self.hub.repos:
            return 409, {}, _json({"error": "exists", "url": f"{self.hub.url}/{prefix}{key[1]}"})
        made = self.hub.repos[key] = Repo(private=asked.get("visibility") == "private" or asked.get("private") is True)
        made.commit("main", {".gitattributes": b"*.parquet filter=lfs\n"})
        return 200, {}, _json({"url": f"{self.hub.url}/{prefix}{key[1]}"})

    def branch(self, body: bytes, query: Any, kind: str, id: str, name: str) -> Answer:
        repo = self._repo(kind, id, write=True)
        if repo is None:
            return _NO_REPO
        if name in repo.branches:
            return 409, {}, b""
        repo.branches[name] = list(repo.branches["main"])
        return 200, {}, _json({})

    def info(self, body: bytes, query: Any, kind: str, id: str, rev: str = "main") -> Answer:
        repo = self._repo(kind, id)
        if repo is None:
            return _NO_REPO
        sha = repo.resolve(rev)
        if sha is None:
            return _NO_REVISION
        siblings = [{"rfilename": p} for p in repo.trees[sha]]
        told = {"id": id, "sha": sha, "private": repo.private, "siblings": siblings, "tags": [], "downloads": 0}
        return 200, {}, _json({**told, "likes": 0, "gated": False, "disabled": False, "lastModified": _THEN})

    def refs(self, body: bytes, query: Any, kind: str, id: str) -> Answer:
        repo = self._repo(kind, id)
        if repo is None:
            return _NO_REPO
        heads = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c[-1]} for n, c in repo.branches.items()]
        return 200, {}, _json({"branches": heads, "converts": [], "tags": []})

    def tree(self, body: bytes, query: Any, kind: str, id: str, rev: str, below: str = "") -> Answer:
        repo = self._repo(kind, id)
        sha = repo.resolve(rev) if repo else None
        if repo is None or sha is None:
            return _NO_REPO if repo is None else _NO_REVISION
        found = _listed(repo.trees[sha], below.strip("/"), query.get("recursive", ["false"])[0].lower() == "true")
        if not found:
            return _NO_ENTRY
        start = int(query.get("cursor", ["0"])[0])
        headers = {}
        if start + PAGE < len(found):
            base = urlsplit(self.path)
            kept = "&".join(p for p in base.query.split("&") if p and not p.startswith("cursor="))
            headers["Link"] = f'<{self.hub.url}{base.path}?{kept}&cursor={start + PAGE}>; rel="next"'
        return 200, headers, _json(found[start : start + PAGE])

    def paths(self, body: bytes, query: Any, kind: str, id: str, rev: str) -> Answer:
        repo = self._repo(kind, id)
        sha = repo.resolve(rev) if repo else None
        if repo is None or sha is None:
            return _NO_REPO if repo is None else _NO_REVISION
        asked = (
            json.loads(body)["paths"] if "json" in self.headers["Content-Type"] else parse_qs(body.decode())["paths"]
        )
        everything = _listed(repo.trees[sha], "", True)
        return 200, {}, _json([e for e in everything if e["path"] in asked])

    def resolve(self, body: bytes, query: Any, id: str, rev: str, file: str, kind: str = "models") -> Answer:
        repo = self._repo(kind, id)
        sha = repo.resolve(rev) if repo else None
        if repo is None or sha is None:
            return _NO_REPO if repo is None else _NO_REVISION
        data = repo.trees[sha].get(file)
        if data is None:
            return _NO_ENTRY
        headers = {"ETag": f'"{_blob(file, data)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked:
            first, last = int(asked[1]), int(asked[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return 206, headers, data[first : last + 1]
        return 200, {**headers, "Content-Length": str(len(data))}, data

    # Uploads: which way a file goes, large objects, then one commit.
    def preupload(self, body: bytes, query: Any, kind: str, id: str, rev: str) -> Answer:
        repo = self._repo(kind, id, write=True)
        if repo is None:
            return _NO_REPO
        there = repo.trees[repo.resolve(rev) or ""]
        files = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                **({"oid": _blob(f["path"], there[f["path"]])} if f["path"] in there else {}),
            }
            for f in json.loads(body)["files"]
        ]
        return 200, {}, _json({"files": files})

    def batch(self, body: bytes, query: Any, id: str, kind: str = "models") -> Answer:
        if self._repo(kind, id, write=True) is None:
            return _NO_REPO
        answers = []
        for asked in json.loads(body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            actions: dict[str, Any] = {"upload": {"href": f"{self.hub.url}/lfs/{oid}"}}
            actions["verify"] = {"href": f"{self.hub.url}/lfs/{oid}/verify"}
            if size > PART:
                count = -(-size // PART)
                header = {str(i + 1): f"{self.hub.url}/lfs/{oid}/part/{i + 1}" for i in range(count)}
                actions["upload"] = {
                    "href": f"{self.hub.url}/lfs/{oid}/complete",
                    "header": {"chunk_size": str(PART), **header},
                }
            answers.append({"oid": oid, "size": size} | ({} if oid in self.hub.objects else {"actions": actions}))
        return 200, {}, _json({"transfer": "basic", "objects": answers})

    def put(self, body: bytes, query: Any, oid: str, part: str | None = None) -> Answer:
        if part is not None:
            self.hub.parts.setdefault(oid, {})[int(part)] = body
            return 200, {"ETag": f'"{part}"'}, b""
        return self._stored(oid, body)

    def complete(self, body: bytes, query: Any, oid: str) -> Answer:
        return self._stored(oid, b"".join(data for _, data in sorted(self.hub.parts.pop(oid).items())))

    def _stored(self, oid: str, data: bytes) -> Answer:
        if hashlib.sha256(data).hexdigest() != oid:
            return 400, {"X-Error-Message": "the bytes are not those of the oid"}, b""
        self.hub.objects[oid] = data
        return 200, {}, _json({})

    def verify(self, body: bytes, query: Any, oid: str) -> Answer:
        return (200, {}, _json({})) if oid in self.hub.objects else (404, {}, b"")

    def validate(self, body: bytes, query: Any) -> Answer:
        return 200, {}, _json({"errors": [], "warnings": []})

    def commit(self, body: bytes, query: Any, kind: str, id: str, rev: str) -> Answer:
        repo = self._repo(kind, id, write=True)
        if repo is None:
            return _NO_REPO
        head, *operations = [json.loads(line) for line in body.splitlines()]
        parent = head["value"].get("parentCommit")
        if parent not in (None, repo.branches[rev][-1]):
            return 412, {"X-Error-Message": "A commit has happened since. Please refresh and try again."}, b""
        tree = dict(repo.trees[repo.branches[rev][-1]])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return 400, {"X-Error-Message": "an object was not uploaded"}, b""
                tree[value["path"]] = self.hub.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                del tree[value["path"]]
        oid = repo.commit(rev, tree)
        return 200, {}, _json({"commitUrl": f"{self.hub.url}/{id}/commit/{oid}", "commitOid": oid, "success": True})


Answer = tuple[int, dict[str, str], bytes]
_THEN = "2026-01-01T00:00:00.000Z"
_NO_REPO: Answer = 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b""
_NO_REVISION: Answer = 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}, b""
_NO_ENTRY: Answer = 404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}, b""
_API, _PLAIN = r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)", r"/((?P<kind>datasets)/)?(?P<id>[^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Any]] = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", f"{_API}/branch/(?P<name>.+)", _Handler.branch),
    ("GET", f"{_API}/refs", _Handler.refs),
    ("GET", f"{_API}(/revision/(?P<rev>[^/]+))?", _Handler.info),
    ("GET", f"{_API}/tree/(?P<rev>[^/]+)(?P<below>/.*)?", _Handler.tree),
    ("POST", f"{_API}/paths-info/(?P<rev>[^/]+)", _Handler.paths),
    ("POST", f"{_API}/preupload/(?P<rev>[^/]+)", _Handler.preupload),
    ("POST", f"{_API}/commit/(?P<rev>[^/]+)", _Handler.commit),
    ("POST", rf"{_PLAIN}\.git/info/lfs/objects/batch", _Handler.batch),
    ("GET HEAD", f"{_PLAIN}/resolve/(?P<rev>[^/]+)/(?P<file>.+)", _Handler.resolve),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]+)(/part/(?P<part>[0-9]+))?", _Handler.put),
    ("POST", "/lfs/(?P<oid>[0-9a-f]+)/complete", _Handler.complete),
    ("POST", "/lfs/(?P<oid>[0-9a-f]+)/verify", _Handler.verify),
]  # fmt: skip


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _blob(path: str, data: bytes) -> str:
    """The name of a file's content: sha256 of large ones, git's hash of the others."""
    return hashlib.sha256(data).hexdigest() if path.endswith(LARGE) else _git(data)


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _listed(tree: dict[str, bytes], below: str, recursive: bool) -> list[dict[str, Any]]:
    """Files and folders below a folder, as the Hub lists them."""
    found: dict[str, dict[str, Any]] = {}
    for path, data in sorted(tree.items()):
        if below and not path.startswith(f"{below}/"):
            continue
        inside = path.removeprefix(below).strip("/").split("/")
        for depth in range(1, len(inside)):
            folder = "/".join([*([below] if below else []), *inside[:depth]])
            if recursive or depth == 1:
                found.setdefault(folder, {"type": "directory", "path": folder, "oid": _git(folder.encode()), "size": 0})
        if recursive or len(inside) == 1:
            large = {"oid": _blob(path, data), "size": len(data), "pointerSize": 134}
            lfs = {"lfs": large} if path.endswith(LARGE) else {}
            found[path] = {"type": "file", "path": path, "oid": _git(data), "size": len(data), **lfs}
    return list(found.values())


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# What runs in the caller's process: a line with arguments in, a line with the answer out. The client waits between
# its attempts; here nobody has the time.
_LOOP = """
import contextlib, io, json, sys, time
time.sleep = lambda seconds: None
from typer.testing import CliRunner
from fire_data.cli.app import app
answers = sys.stdout
for line in sys.stdin:
    asked = json.loads(line)
    if "code" in asked:
        found, out = {}, io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(asked["code"], found)
        answer = {"result": found.get("result"), "out": out.getvalue()}
    elif "call" in asked:
        from pathlib import Path
        from fire_data import hub, open_run
        from fire_data.schemas.errors import FireError
        run, repo = Path(asked["run"]), asked["repo"]
        try:
            done = hub.push(open_run(run), repo, flat=True) if asked["call"] == "push" else hub.pull(repo, run)
            answer = {"code": 0, "err": "", "files": done["files"]}
        except FireError as error:
            answer = {"code": error.exit_code, "err": str(error)}
    else:
        result = CliRunner(env={"COLUMNS": "200", **asked["env"]}).invoke(app, asked["arguments"])
        trace = result.exception if not isinstance(result.exception, SystemExit) else None
        answer = {"code": result.exit_code, "out": result.stdout, "err": result.stderr, "trace": repr(trace)}
    print(json.dumps(answer), file=answers, flush=True)
"""


@dataclass
class Caller:
    """A process that has a Hub, a home and perhaps a token, and in it `fire`."""

    process: subprocess.Popen[str]
    log: Path

    def _ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def fire(self, *arguments: object, **env: str) -> dict[str, Any]:
        """Call the command line; whatever happens, there must be no traceback."""
        answer = self._ask({"arguments": [str(a) for a in arguments], "env": env})
        assert answer["trace"] == "None", answer
        return answer

    def call(self, what: str, run: Path, repo: str) -> dict[str, Any]:
        """Push a run, with joined tables, or pull one, by the library: for tests that do it a hundred times."""
        return self._ask({"call": what, "run": str(run), "repo": repo})

    def run(self, code: str) -> Any:
        """What Python code leaves in `result`."""
        return self._ask({"code": code})["result"]


@contextmanager
def calling(hub: Hub, home: Path, *, token: str | None = TOKEN) -> Iterator[Caller]:
    """A process whose Hub is this one."""
    home.mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    env |= {
        "HOME": str(home), "HF_HOME": str(home / "hf"), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0",
        # The other protocol for large files has servers of its own, which are not played here.
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "POLARS_MAX_THREADS": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5", "HF_DATASETS_CACHE": str(home / "datasets"),
    }  # fmt: skip
    if token is not None:
        env["HF_TOKEN"] = token
    log = home / "stderr.log"
    with log.open("w") as stderr:
        command = [sys.executable, "-c", _LOOP]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=env, text=True
        )
        try:
            yield Caller(process, log)
        finally:
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.close()
            process.wait(timeout=20)
