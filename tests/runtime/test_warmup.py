"""The pause before SGLang's warm-up."""

from __future__ import annotations

import socket
import threading
import time
from types import ModuleType
from typing import Any

import pytest

from msconv_runtime.sglang.warmup import Clock, begun_at_once

LONG_S = 5.0


@pytest.fixture
def free() -> tuple[socket.socket, str]:
    """A socket that does not listen yet, and its address."""
    found = socket.socket()
    found.bind(("127.0.0.1", 0))
    return found, f"http://127.0.0.1:{found.getsockname()[1]}"


def test_the_first_pause_ends_when_the_server_listens(free: tuple[socket.socket, str]) -> None:
    server, url = free
    clock, started = Clock(url), time.monotonic()
    with server:
        threading.Timer(0.3, server.listen).start()
        clock.sleep(LONG_S)
        took = time.monotonic() - started
    assert 0.25 < took < LONG_S / 2


def test_a_server_that_does_not_listen_is_waited_for_as_long_as_ever(free: tuple[socket.socket, str]) -> None:
    server, url = free
    clock, started = Clock(url), time.monotonic()
    with server:
        clock.sleep(0.3)
    assert time.monotonic() - started >= 0.3


def test_later_pauses_are_whole(free: tuple[socket.socket, str]) -> None:
    server, url = free
    with server:
        server.listen()
        clock = Clock(url)
        clock.sleep(LONG_S)
        started = time.monotonic()
        clock.sleep(0.3)
    assert time.monotonic() - started >= 0.3


def test_all_else_of_time_is_as_it_was_and_the_module_gets_it_back(free: tuple[socket.socket, str]) -> None:
    module: Any = ModuleType("with_time")
    module.time = time
    free[0].close()
    with pytest.raises(ZeroDivisionError), begun_at_once(module, free[1]):
        assert abs(module.time.time() - time.time()) < LONG_S
        raise ZeroDivisionError
    assert module.time is time
