"""Nodes of a Ray cluster on this machine, each with processes of its own, and conversions that they do."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

BIN = Path(__file__).parents[2] / ".venv-ray" / "bin"
PROOF_BIN = BIN.parents[1] / ".venv-ray-proof" / "bin"  # has torch too
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("RAY_")},
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "NO_COLOR": "1",
    # Ray gives a node up that does not answer for a while, as on a machine that is busy with other tests.
    "RAY_agent_register_timeout_ms": "600000",
    "RAY_health_check_timeout_ms": "60000",
    "RAY_worker_register_timeout_seconds": "600",
}
# `msconv` as it is, but with batches of so many kilobytes, each journaled at once
DRIVER = """
import sys
import msconv.stream.execute as streaming
import msconv.stream.movers.cluster as cluster
import msconv.stream.movers.workers as workers
cluster.BATCH_BYTES = int(sys.argv.pop(1)) << 10
workers.LOOKS_EVERY_S = 1.0
streaming.CHECKPOINT_BYTES = 1
from msconv.cli import main
main()
"""


def parents() -> dict[int, int]:
    """By process, its parent."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            found[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
    return found


def below(process: int) -> list[int]:
    """All processes that this one has started, and those that they have."""
    by_parent: dict[int, list[int]] = {}
    for child, parent in parents().items():
        by_parent.setdefault(parent, []).append(child)
    found, todo = [], [process]
    while todo:
        children = by_parent.get(todo.pop(), [])
        found += children
        todo += children
    return found


def title(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    except OSError:
        return ""


def movers(process: int) -> list[int]:
    """The workers of msconv below this process."""
    return [p for p in below(process) if title(p).startswith("ray::NodeWorker")]


def end(process: subprocess.Popen[str]) -> None:
    """End a process and all that it started, by their numbers."""
    started = below(process.pid)
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for other in started:
        if "ray" in title(other):
            with suppress(OSError):
                os.kill(other, signal.SIGKILL)


def own_address() -> str:
    """This machine's address as Ray finds it: several nodes cannot be at 127.0.0.1.  Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            s.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(s.getsockname()[0])


class Nodes:
    """A head without processors, and nodes that work.  `place`: the programs of their environment."""

    def __init__(self, place: Path = BIN) -> None:
        self.place = place
        self.directory = tempfile.mkdtemp(prefix="mray", dir="/tmp")  # short: sockets lie in it
        host = own_address()
        with socket.socket() as s:
            s.bind((host, 0))
            port = s.getsockname()[1]
        self.address = f"{host}:{port}"
        self.all: list[subprocess.Popen[str]] = []
        self.working: list[subprocess.Popen[str]] = []
        head = ("--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={self.directory}")
        self._start(*head, "--num-cpus=0")
        self._wait_for(host, port)

    def add(self, *before: str) -> subprocess.Popen[str]:
        """One more node that works.  `before`: a command that starts it."""
        node = self._start(f"--address={self.address}", "--num-cpus=1", before=before)
        self.working.append(node)
        return node

    def have(self, count: int) -> None:
        """So many nodes work."""
        while len(self.working) > count:
            end(self.working.pop())
        deadline = time.monotonic() + 600
        while True:
            self.working = [node for node in self.working if node.poll() is None]  # Ray gives up on a busy machine
            if len(self.working) < count:
                self.add()  # one at a time: a busy machine starts few within Ray's patience
            if (found := self.count()) == count:
                return
            assert time.monotonic() < deadline, f"{found} nodes instead of {count}"
            time.sleep(0.5)

    def count(self) -> int:
        """Nodes with processors, as Ray sees them."""
        code = f"""
import ray
ray.init("{self.address}", logging_level="ERROR", log_to_driver=False)
print(sum(n["Alive"] and n["Resources"].get("CPU", 0) > 0 for n in ray.nodes()))
"""
        done = subprocess.run([self.place / "python", "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
        said = done.stdout.splitlines()  # what Ray has to say comes after
        return int(said[0]) if said and said[0].isdecimal() else -1

    def movers(self) -> list[int]:
        return [p for node in self.working for p in movers(node.pid)]

    def close(self) -> None:
        for node in reversed(self.all):
            end(node)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _start(self, *options: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        common = ("--block", "--disable-usage-stats")
        store = "--object-store-memory=83886080"
        line = [*before, str(self.place / "ray"), "start", *common, store, *options]
        with Path(self.directory, f"node-{len(self.all)}.log").open("w") as log:
            node = subprocess.Popen(line, env=ENVIRONMENT, stdout=log, stderr=log, text=True)
        self.all.append(node)
        return node

    def _wait_for(self, host: str, port: int) -> None:
        deadline = time.monotonic() + 60
        while True:
            with suppress(OSError):
                socket.create_connection((host, port), 1).close()
                return
            assert time.monotonic() < deadline, "no head"
            time.sleep(0.2)


def nodes(place: Path = BIN) -> Iterator[Nodes]:
    """For a fixture."""
    made = Nodes(place)
    try:
        yield made
    finally:
        made.close()


def line(*arguments: object, batch_kilobytes: int = 0) -> list[str]:
    """A command of the environment that has Ray."""
    start = ["-c", DRIVER, str(batch_kilobytes)] if batch_kilobytes else ["-m", "msconv"]
    return [str(BIN / "python"), *start, *map(str, arguments)]


def msconv(*arguments: object, batch_kilobytes: int = 0, timeout: float = 180) -> subprocess.CompletedProcess[str]:
    command = line(*arguments, batch_kilobytes=batch_kilobytes)
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)


def started(*arguments: object, batch_kilobytes: int) -> subprocess.Popen[str]:
    command = line(*arguments, batch_kilobytes=batch_kilobytes)
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
