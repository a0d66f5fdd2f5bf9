"""SGLang's warm-up begins when the server listens, not a second after it was started."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

BETWEEN_S = 0.02  # two looks whether the server listens


class Clock:
    """The module `time`, whose first pause ends as soon as somebody listens at `url`."""

    def __init__(self, url: str) -> None:
        self._url: str | None = url

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        url, self._url = self._url, None
        if url is None:
            time.sleep(seconds)
            return
        end = time.monotonic() + seconds
        while not _listens(url) and (left := end - time.monotonic()) > 0:
            time.sleep(min(BETWEEN_S, left))


@contextlib.contextmanager
def begun_at_once(module: ModuleType, url: str) -> Iterator[None]:
    """In here the first pause of a module's functions is no longer than needed."""
    clock: Any = Clock(url)
    module.time = clock  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.time = time  # type: ignore[attr-defined]


def _listens(url: str) -> bool:
    address = urlsplit(url)
    try:
        socket.create_connection((address.hostname or "", address.port or 80), timeout=1).close()
    except OSError:
        return False
    return True
