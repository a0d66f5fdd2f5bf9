"""Servers on loopback: a directory by HTTP with ranges, and a proxy in front of a store that makes what goes wrong
with stores."""

from __future__ import annotations

import http.client
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

BUSY = b"""<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"""
FORBIDDEN = b"""<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"""
HOP = ("connection", "transfer-encoding", "keep-alive", "content-length")

Fault = Callable[[str, str], str]  # (method, path) -> "" or what happens to this request


class _Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None: ...

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        headers = {"Content-Length": str(len(body)), **(headers or {})}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.wfile.flush()
            self.close_connection = True


class Server:
    """Runs in threads of this process until `close`."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self.fault: Fault = lambda method, path: ""
        outer = self

        class Handler(_Quiet):
            def do(self) -> None:
                outer.requests.append((self.command, self.path))
                try:
                    outer.handle(self, outer.fault(self.command, self.path))
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def handle(self, request: _Quiet, fault: str) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Directory(Server):
    """A directory by HTTP.  `has_ranges` False: ranges are ignored, as simple servers do."""

    def __init__(self, root: Path, has_ranges: bool = True) -> None:
        self.root, self.has_ranges = root, has_ranges
        super().__init__()

    def handle(self, request: _Quiet, fault: str) -> None:
        path = self.root / urlsplit(request.path).path.lstrip("/")
        if fault in ("403", "503"):
            return request.answer(int(fault), b"no")
        if not path.is_file():
            return request.answer(404, b"")
        data, stat = path.read_bytes(), path.stat()
        headers = {"ETag": f'"{stat.st_mtime_ns}"'}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        if asked and self.has_ranges:
            begin, end = int(asked[1]), int(asked[2]) + 1
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
            return request.answer(206, data[begin:end], headers, fault == "cut")
        return request.answer(200, data, headers, fault == "cut")


class Proxy(Server):
    """Passes requests on to a store.  Faults: `busy` (503), `forbidden` (403), `cut` (the answer ends in its
    middle), `refused` (the connection is closed before the store hears of it), `lost` (closed after that)."""

    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream)
        super().__init__()

    def handle(self, request: _Quiet, fault: str) -> None:
        body = _body(request)
        if fault == "busy":
            return request.answer(503, BUSY, {"Content-Type": "application/xml"})
        if fault == "forbidden":
            return request.answer(403, FORBIDDEN, {"Content-Type": "application/xml"})
        if fault == "refused":
            request.close_connection = True
            return None
        connection = http.client.HTTPConnection(self.upstream.hostname or "", self.upstream.port, timeout=60)
        try:
            headers = {k: v for k, v in request.headers.items() if k.lower() not in HOP}
            connection.request(request.command, request.path, body, headers)
            response = connection.getresponse()
            data = response.read()
            if fault == "lost":
                request.close_connection = True
                return None
            back = {k: v for k, v in response.getheaders() if k.lower() not in HOP}
            if request.command == "HEAD":
                back["Content-Length"] = response.headers.get("Content-Length", "0")
            return request.answer(response.status, data, back, fault == "cut")
        finally:
            connection.close()


def _body(request: _Quiet) -> bytes:
    """What came, as it came: a store decodes the pieces that S3's clients sign one by one itself."""
    if "chunked" in request.headers.get("Transfer-Encoding", "").lower():
        body = b""
        while size := int(request.rfile.readline().partition(b";")[0], 16):
            body += request.rfile.read(size)
            request.rfile.readline()
        request.rfile.readline()
        return body
    return request.rfile.read(int(request.headers.get("Content-Length", 0)))
