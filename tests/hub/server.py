"""A hub on localhost: speaks to the real client as huggingface.co does, misbehaves as it is told, and counts.

Files kept apart from git (*.safetensors) are redirected to another host name, as to a CDN.  It does not offer Xet
unless it is told to.  It takes uploads as Git LFS does: bytes by their sha256, then commits that name them.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

PIECE_BYTES = 64 << 10
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
INFO = re.compile(rf"/api/models/{REPO}(?:/revision/(?P<revision>.+))?")
TREE = re.compile(rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)")
RESOLVE = re.compile(rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
STORED = re.compile(rf"/stored/{REPO}/(?P<revision>[^/]+)/(?P<file>.+)")
WRITE = re.compile(rf"/api/models/{REPO}/(?P<what>preupload|commit|branch)/(?P<revision>.+)")
BATCH = re.compile(rf"/{REPO}\.git/info/lfs/objects/batch")
UPLOAD = re.compile(r"/upload/(?P<oid>[0-9a-f]{64})")


@dataclass
class Fault:
    """What happens to requests whose path has `path` in it, `times` times.

    `do`: `status` (answer `status` with `headers`), `cut` (close the connection after `after` bytes of the body),
    `silence` (after `after` bytes of the body, or without an answer if that is 0), `trickle` (a byte at a time,
    slowly), `damage` (the byte at `after` is another one), `loop` (redirect to itself), `whole` (ignore ranges),
    `extra` (more bytes than there are).
    `to_the_end`: only requests for all the rest of a file, as downloads are, and not for a range, as headers are.
    """

    do: str
    path: str = ""
    times: int = 1 << 30
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    after: int = 0
    method: str = ""
    to_the_end: bool = False


@dataclass
class Repo:
    """`directory` holds its files.  Branches, and the one commit, lead there."""

    directory: Path
    commit: str
    branches: tuple[str, ...] = ("main",)
    gated: bool = False
    private: bool = False

    def files(self) -> dict[str, Path]:
        found = {p.relative_to(self.directory).as_posix(): p for p in sorted(self.directory.rglob("*"))}
        return {name: path for name, path in found.items() if path.is_file()}

    def has(self, revision: str) -> bool:
        return revision in (self.commit, *self.branches)


@dataclass
class Request:
    method: str
    path: str
    range: str
    token: str


class Hub:
    """`repos` by owner/name, `faults` in order of precedence, `bytes_per_second` over all connections."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.tokens: set[str] = {"hf_right"}
        self.bytes_per_second = 0.0
        self.xet = False
        self.requests: list[Request] = []
        self.served: Counter[str] = Counter()  # bytes of bodies, by file name
        self.home: Path | None = None  # where repositories are created; None, they can't be
        self.commits: list[list[str]] = []  # of uploads: the files that each brought
        self.objects: dict[str, bytes] = {}  # uploaded, by sha256
        self.uploaded: Counter[str] = Counter()  # bytes that came, by sha256
        self.spans: dict[str, tuple[float, float]] = {}  # first and last byte of each file
        self.lock = threading.Lock()
        self._free_at = 0.0
        self.stopping = threading.Event()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        port = self._server.server_address[1]
        self.url, self.storage = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, name: str, directory: Path, **options: Any) -> Repo:
        commit = hashlib.sha1(f"{name} {directory}".encode()).hexdigest()
        self.repos[name] = Repo(directory, commit, **options)
        return self.repos[name]

    def environment(self, home: Path) -> dict[str, str]:
        """For a command that is to use this hub and a cache of its own."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DOWNLOAD_TIMEOUT": "2", "no_proxy": "*"}

    def asked(self, part: str) -> list[Request]:
        return [r for r in self.requests if part in r.path]

    def reset(self) -> None:
        self.served.clear()
        self.uploaded.clear()
        self.requests.clear()
        self.spans.clear()

    def fault(self, method: str, path: str, range_: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.to_the_end and not range_.endswith("-"):
                    continue
                if fault.times > 0 and fault.path in path and fault.method in ("", method):
                    fault.times -= 1
                    return fault
        return None

    def account(self, name: str, size: int) -> None:
        with self.lock:
            self.served[name] += size
            now = time.monotonic()
            self.spans[name] = (self.spans.get(name, (now, now))[0], now)

    def throttle(self, size: int) -> None:
        if not self.bytes_per_second:
            return
        with self.lock:
            begin = max(self._free_at, time.monotonic())
            self._free_at = begin + size / self.bytes_per_second
            until = self._free_at
        self.stopping.wait(max(0.0, until - time.monotonic()))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def setup(self) -> None:
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)  # so that what is counted also went
        super().setup()

    def log_message(self, format: str, *args: object) -> None:
        return

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        split = urlsplit(self.path)
        path, token = unquote(split.path), self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.hub.requests.append(Request(self.command, path, self.headers.get("Range", ""), token))
        fault = self.hub.fault(self.command, path, self.headers.get("Range", ""))
        with contextlib.suppress(ConnectionError):
            if fault and fault.do == "status":
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self._send(fault.status, b"{}", fault.headers)
            elif fault and fault.do == "silence" and not fault.after:
                self.hub.stopping.wait(60)
                self.close_connection = True
            elif fault and fault.do == "loop":
                self._send(302, b"", {"Location": self.hub.url + self.path})
            elif self.command in ("POST", "PUT"):
                self._write(path, token, fault)
            elif path == "/api/models":
                self._search(parse_qs(split.query)["search"][0])
            elif match := INFO.fullmatch(path):
                self._info(match["repo"], match["revision"] or "main", token)
            elif match := TREE.fullmatch(path):
                self._tree(match["repo"], match["revision"], token)
            elif match := RESOLVE.fullmatch(path):
                self._resolve(match["repo"], match["revision"], match["file"], token, fault)
            elif match := STORED.fullmatch(path):
                self._body(self.hub.repos[match["repo"]].files()[match["file"]], {}, fault)
            else:
                self._send(404, b"{}")

    def _repo(self, name: str, revision: str, token: str) -> Repo | None:
        """The repository, if this caller may have it at this revision.  Answers if not."""
        repo = self.hub.repos.get(name)
        if token and token not in self.hub.tokens:
            message = {"X-Error-Message": "Invalid credentials in Authorization header"}
            self._send(401, b'{"error": "Invalid credentials"}', message)
        elif repo is None or (repo.private and not token):
            self._send(404 if token else 401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif not repo.has(revision):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            return repo
        return None

    def _search(self, text: str) -> None:
        found = [{"id": name} for name in self.hub.repos if text.casefold() in name.casefold()]
        self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def _info(self, name: str, revision: str, token: str) -> None:
        if repo := self._repo(name, revision, token):
            siblings: list[dict[str, Any]] = []
            for file, path in repo.files().items():
                entry: dict[str, Any] = {"rfilename": file, "size": path.stat().st_size, "blobId": git_sha1(path)}
                if is_stored_apart(path):
                    entry["lfs"] = {"sha256": sha256(path), "size": entry["size"], "pointerSize": 134}
                siblings.append(entry)
            info = {"_id": "1", "id": name, "sha": repo.commit, "private": repo.private, "gated": repo.gated}
            data = json.dumps({**info, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings}).encode()
            self._send(200, data, {"Content-Type": "application/json"})

    def _tree(self, name: str, revision: str, token: str) -> None:
        if repo := self._repo(name, revision, token):
            entries: list[dict[str, Any]] = []
            for file, path in repo.files().items():
                size = path.stat().st_size
                entries.append({"type": "file", "path": file, "size": size, "oid": git_sha1(path)})
                if is_stored_apart(path):
                    entries[-1]["lfs"] = {"oid": sha256(path), "size": size, "pointerSize": 134}
            self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})

    def _resolve(self, name: str, revision: str, file: str, token: str, fault: Fault | None) -> None:
        repo = self._repo(name, revision, token)
        if repo is None:
            return
        common = {"X-Repo-Commit": repo.commit}
        path = repo.files().get(file)
        if repo.gated and not token:
            self._send(401, b"{}", {**common, "X-Error-Code": "GatedRepo"})
        elif path is None:
            self._send(404, b"{}", {**common, "X-Error-Code": "EntryNotFound"})
        elif is_stored_apart(path):
            if self.hub.xet:
                common |= {"X-Xet-Hash": sha256(path), "X-Xet-Refresh-Route": f"{self.hub.url}/xet"}
            linked = {"X-Linked-ETag": f'"{sha256(path)}"', "X-Linked-Size": str(path.stat().st_size)}
            location = f"{self.hub.storage}/stored/{name}/{revision}/{file}"
            self._send(302, b"", {**common, **linked, "Location": location})
        else:
            self._body(path, {**common, "ETag": f'"{git_sha1(path)}"'}, fault)

    def _write(self, path: str, token: str, fault: Fault | None) -> None:
        """Uploads: what huggingface_hub asks for, in its order."""
        if match := UPLOAD.fullmatch(path):
            return self._store(match["oid"], fault)
        lines = self.rfile.read(int(self.headers.get("Content-Length", 0))).splitlines()
        asked = [json.loads(line) for line in lines]
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if token not in self.hub.tokens:
            return self._send(401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
        if path == "/api/repos/create":
            return self._create(asked[0])
        if match := BATCH.fullmatch(path):
            return self._batch(asked[0]["objects"])
        match = WRITE.fullmatch(path)
        if match is None:
            return self._send(404, b"{}")
        if match["what"] == "branch":
            repo = self.hub.repos[match["repo"]]
            repo.branches = (*repo.branches, match["revision"])
            return self._json({})
        repo = self._repo(match["repo"], match["revision"], token)
        if repo and match["what"] == "preupload":
            return self._preupload(repo, asked[0]["files"])
        return self._commit(match["repo"], repo, asked) if repo else None

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            return self._send(409, json.dumps({"url": f"{self.hub.url}/{name}"}).encode())
        if self.hub.home is None:
            return self._send(403, b"{}")
        directory = self.hub.home / name
        directory.mkdir(parents=True)
        (directory / ".gitattributes").write_text("*.safetensors filter=lfs\n")
        self.hub.add(name, directory, private=asked.get("visibility") == "private")
        return self._json({"url": f"{self.hub.url}/{name}"})

    def _preupload(self, repo: Repo, asked: list[dict[str, Any]]) -> None:
        there = repo.files()
        files: list[dict[str, Any]] = []
        for file in asked:
            path = there.get(file["path"])
            apart = is_stored_apart(Path(file["path"]))
            oid = None if path is None else sha256(path) if apart else git_sha1(path)
            mode = "lfs" if apart else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": files})

    def _batch(self, objects: list[dict[str, Any]]) -> None:
        there = {sha256(p) for repo in self.hub.repos.values() for p in repo.files().values()}
        answer: list[dict[str, Any]] = []
        for wanted in objects:
            oid = wanted["oid"]
            upload = {"href": f"{self.hub.storage}/upload/{oid}", "header": {}}
            known = oid in there or oid in self.hub.objects
            answer.append(
                {"oid": oid, "size": wanted["size"], **({} if known else {"actions": {"upload": upload}})}
            )
        self._json({"transfer": "basic", "objects": answer})

    def _store(self, oid: str, fault: Fault | None) -> None:
        size, data = int(self.headers["Content-Length"]), bytearray()
        cut = fault.after if fault and fault.do == "cut" else size
        while len(data) < cut and (piece := self.rfile.read(min(PIECE_BYTES, cut - len(data)))):
            data += piece
            self.hub.throttle(len(piece))
            with self.hub.lock:
                self.hub.uploaded[oid] += len(piece)
        if len(data) < size:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif hashlib.sha256(data).hexdigest() != oid:
            self._send(400, b"{}")
        else:
            self.hub.objects[oid] = bytes(data)
            self._send(200, b"")

    def _commit(self, name: str, repo: Repo, asked: list[dict[str, Any]]) -> None:
        names = []
        for line in asked[1:]:
            path = repo.directory / line["value"]["path"]
            if line["key"] == "deletedFile":
                path.unlink()
                continue
            names.append(line["value"]["path"])
            path.parent.mkdir(parents=True, exist_ok=True)
            if line["key"] == "file":
                path.write_bytes(base64.b64decode(line["value"]["content"]))
            else:
                path.write_bytes(self.hub.objects[line["value"]["oid"]])
        self.hub.commits.append(names)
        repo.commit = hashlib.sha1(f"{repo.commit} {names}".encode()).hexdigest()
        url = f"{self.hub.url}/{name}/commit/{repo.commit}"
        self._json({"commitUrl": url, "commitOid": repo.commit})

    def _json(self, data: Any) -> None:
        self._send(200, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _trickle(self, data: bytes) -> None:
        for i in range(len(data)):
            self.wfile.write(data[i : i + 1])
            self.wfile.flush()
            if self.hub.stopping.wait(0.1):
                break
        raise ConnectionError

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self, path: Path, headers: dict[str, str], fault: Fault | None) -> None:
        size = path.stat().st_size
        begin, end, status = 0, size, 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and not (fault and fault.do == "whole"):
            begin, end, status = int(asked[1]), min(size, int(asked[2] or size) + 1), 206
            if begin >= size:
                return self._send(416, b"", {"Content-Range": f"bytes */{size}"})
        extra = b"more" if fault and fault.do == "extra" else b""
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(end - begin + len(extra)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        self.end_headers()
        if self.command == "HEAD":
            return None
        broken = fault if fault and fault.do in ("cut", "silence") else None
        with path.open("rb") as f:
            f.seek(begin)
            until = min(end, begin + broken.after) if broken else end
            while piece := f.read(min(PIECE_BYTES, until - f.tell())):
                if (
                    fault
                    and fault.do == "damage"
                    and 0 <= (at := fault.after - f.tell() + len(piece)) < len(piece)
                ):
                    piece = piece[:at] + bytes([piece[at] ^ 1]) + piece[at + 1 :]
                if fault and fault.do == "trickle":
                    self._trickle(piece)
                self.hub.throttle(len(piece))
                self.wfile.write(piece)
                self.hub.account(path.name, len(piece))
        self.wfile.write(extra)
        if broken:
            if broken.do == "silence":
                self.hub.stopping.wait(60)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        return None


def is_stored_apart(path: Path) -> bool:
    return path.suffix in (".safetensors", ".bin", ".gguf")


_digests: dict[tuple[str, int, str], str] = {}


def sha256(path: Path) -> str:
    key = (str(path), path.stat().st_mtime_ns, "sha256")
    if key not in _digests:
        with path.open("rb") as f:
            _digests[key] = hashlib.file_digest(f, "sha256").hexdigest()
    return _digests[key]


def git_sha1(path: Path) -> str:
    key = (str(path), path.stat().st_mtime_ns, "sha1")
    if key not in _digests:
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
        with path.open("rb") as f:
            _digests[key] = hashlib.file_digest(f, lambda: digest).hexdigest()
    return _digests[key]
