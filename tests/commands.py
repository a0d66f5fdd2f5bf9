"""Running the command line as people do: as a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Result:
    """What a finished process left."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        """stdout as the one JSON object that --json promises: NaN and Infinity are none."""
        value = json.loads(self.stdout, parse_constant=_no_constant)
        assert isinstance(value, dict)
        return value


def _no_constant(text: str) -> object:
    raise ValueError(f"{text} is not JSON")


def run_msconv(
    *args: object,
    cwd: Path | None = None,
    python: tuple[str, ...] = (),
    timeout: float = 120,
    before: Callable[[], None] | None = None,
) -> Result:
    """`msconv ARGS`.  `python`: options of the interpreter; `before` runs in the child (limits)."""
    command = [sys.executable, *python, "-m", "msconv", *map(str, args)]
    return run_command(command, cwd, timeout, before)


def run_python(code: str, *args: object, timeout: float = 120) -> Result:
    """A script in a process of its own."""
    return run_command([sys.executable, "-c", code, *map(str, args)], None, timeout)


def run_command(
    command: list[str], cwd: Path | None, timeout: float, before: Callable[[], None] | None = None
) -> Result:
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1", "NO_COLOR": "1"}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=timeout,
        preexec_fn=before,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def free_port() -> int:
    """For a server, which takes it some seconds later: none of those that the system gives to connections
    meanwhile (from 32,768 on, by its default)."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 50):
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port
    raise OSError("fifty ports of this machine are taken")
