"""Bytes from a hub by HTTP ranges: bounded retries, resumed to the byte, the hub's digest checked at the end.

huggingface_hub's own downloads begin a file anew when the process was killed; its session, headers and errors are
used, but the bytes go to a `.incomplete` file that a later run goes on with.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, get_session
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from msconv_runtime.errors import CheckpointError

from .http import http
from .remote import Cancelled, Progress, RemoteFile, hasher

RETRIES = 5  # in a row that brought less than ENOUGH_BYTES
ENOUGH_BYTES = 64 << 10
PACE_S = 30.0  # in which a connection must bring that much, or it counts as stalled
FIRST_WAIT_S = 0.5  # then doubled
LONGEST_WAIT_S = 120.0  # that a server may ask for
TRANSIENT = (408, 429, 500, 502, 503, 504)
CHUNK_BYTES = 1 << 20
MOST_TRIED = 256 << 20  # of a file whose download is tried


class Patience:
    """How often a server is asked again: waits double, and start over when enough bytes came."""

    def __init__(self, cancelled: threading.Event) -> None:
        self._cancelled = cancelled
        self._tries = 0

    def renew(self) -> None:
        self._tries = 0

    def wait(self, error: Exception) -> None:
        """Before the next try.  Raises `error` if there is none, Cancelled."""
        wait_s = FIRST_WAIT_S * 2**self._tries
        self._tries += 1
        if isinstance(error, HfHubHTTPError):
            if error.response.status_code not in TRANSIENT:
                raise error
            wait_s = max(wait_s, _asked_wait_s(error.response))
        elif not isinstance(error, http.TransportError):
            raise error
        if self._tries > RETRIES or wait_s > LONGEST_WAIT_S:
            raise error
        if self._cancelled.wait(wait_s):
            raise Cancelled


def _asked_wait_s(response: http.Response) -> float:
    asked = response.headers.get("Retry-After", "")
    return float(asked) if asked.isdigit() else 0.0


@contextmanager
def opened(url: str, begin: int, end: int | None = None) -> Iterator[http.Response]:
    """The answer to a request for bytes [begin, end) of a file, its body unread."""
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    headers["Range"] = f"bytes={begin}-{'' if end is None else end - 1}"
    timeout_s = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout_s) as response:
        hf_raise_for_status(response)
        yield response


def paced(response: http.Response) -> Iterator[bytes]:
    """The body as it comes.  Raises ReadTimeout if it only trickles."""
    begun, came = time.monotonic(), 0
    for piece in response.iter_raw():
        came += len(piece)
        yield piece
        if (now := time.monotonic()) - begun > PACE_S:
            if came < ENOUGH_BYTES:
                raise http.ReadTimeout(f"{came} bytes in {PACE_S:.0f} s")
            begun, came = now, 0


def read_range(url: str, begin: int, end: int, cancelled: threading.Event) -> bytes:
    """Bytes [begin, end), never more: a server that sends the whole file is cut off.
    Raises Cancelled, or what the network raised."""
    patience = Patience(cancelled)
    data = bytearray()
    while begin + len(data) < end:
        before = len(data)
        try:
            with opened(url, begin + before, end) as response:
                skip = begin + before if response.status_code == 200 else 0
                for piece in paced(response):
                    data += piece[skip:]
                    skip = max(0, skip - len(piece))
                    if begin + len(data) >= end:
                        break
            if len(data) == before:
                raise http.RemoteProtocolError("the answer was empty")
        except http.HTTPError as e:
            patience.wait(e)
    return bytes(data[: end - begin])


def fetch(url: str, file: RemoteFile, partial: Path, progress: Progress, cancelled: threading.Event) -> None:
    """Complete `partial`, going on from what it has.  It is durable and has the hub's digest on return.

    `progress` gets the bytes that come (fewer than none if they have to come again).
    Raises CheckpointError for a wrong digest (the bytes are then removed), Cancelled, or what the network raised.
    """
    try:
        with _Landing(file, partial, progress) as landing:
            landing.take_up()
            old = landing.have
            _complete(url, landing, cancelled)
            if old and not landing.is_right:  # what an earlier run left may be at fault
                landing.restart()
                _complete(url, landing, cancelled)
            if not landing.is_right:
                landing.restart()
                raise CheckpointError(
                    f"{file.name}: {file.size} bytes came whose digest is not {file.etag}, as the hub says.",
                    "Run the same command again: it is downloaded anew.  If it stays so, a proxy damages it.",
                )
            try:
                os.fdatasync(landing.fd)
            except OSError:  # Linux reports lost pages once: a later run must not take up what is here
                landing.restart()
                raise
    except OSError as e:
        if not isinstance(e, http.HTTPError):
            e.filename = str(partial)
        raise


def try_range(url: str, file: RemoteFile, place: Path, seconds: float) -> float:
    """Take the beginning of a file for so long, hash and write it to the disk as `fetch` does, and throw it away:
    how many bytes came in a second, once they came.  Raises what the network or the directory `place` raised."""
    with (
        tempfile.NamedTemporaryFile(dir=place, prefix=".msconv-sample-") as scratch,
        _Landing(file, Path(scratch.name), lambda n: None) as landing,
        opened(url, 0, min(file.size, MOST_TRIED)) as response,
    ):
        begun = time.monotonic()
        for piece in paced(response):
            landing.add(piece)
            if time.monotonic() > begun + seconds:
                break
        os.fdatasync(landing.fd)
        return landing.have / max(time.monotonic() - begun, 1e-9)


class _Landing:
    """A file while it comes: what is there of it, hashed on the way."""

    def __init__(self, file: RemoteFile, path: Path, progress: Progress) -> None:
        self.file, self.have, self._came, self._progress = file, 0, 0, progress
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._digest = hasher(self.file.etag, self.file.size)

    def __enter__(self) -> _Landing:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self.fd)

    @property
    def is_right(self) -> bool:
        return self._digest.hexdigest() == self.file.etag

    def take_up(self) -> None:
        """Count what an earlier run left."""
        if os.fstat(self.fd).st_size > self.file.size:
            os.ftruncate(self.fd, 0)
        while piece := os.read(self.fd, CHUNK_BYTES):
            self._count(piece)

    def add(self, piece: bytes) -> None:
        if self.have + len(piece) > self.file.size:
            raise CheckpointError(
                f"{self.file.name}: more came than the {self.file.size} bytes that the hub says.",
                "Check HF_ENDPOINT and the proxy's settings.",
            )
        view = memoryview(piece)
        while view:
            view = view[os.write(self.fd, view) :]
        self._count(piece)
        self._came += len(piece)
        self._progress(len(piece))

    def restart(self) -> None:
        os.ftruncate(self.fd, 0)
        os.lseek(self.fd, 0, os.SEEK_SET)
        self._progress(-self._came)
        self.have = self._came = 0
        self._digest = hasher(self.file.etag, self.file.size)

    def _count(self, piece: bytes) -> None:
        self._digest.update(piece)
        self.have += len(piece)


def _complete(url: str, landing: _Landing, cancelled: threading.Event) -> None:
    patience = Patience(cancelled)
    while landing.have < landing.file.size:
        before = landing.have
        try:
            with opened(url, before) as response:
                if response.status_code == 200 and before:  # ranges are not known there
                    landing.restart()
                    before = 0
                for piece in paced(response):
                    if cancelled.is_set():
                        raise Cancelled
                    landing.add(piece)
            if landing.have == before:
                raise http.RemoteProtocolError("the answer was empty")
        except (http.HTTPError, OSError) as e:
            if landing.have - before >= ENOUGH_BYTES:
                patience.renew()
            patience.wait(e)
