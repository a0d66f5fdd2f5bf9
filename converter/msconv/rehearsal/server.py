"""SGLang's server on the rehearsal device: the command of `msconv serve --device npu`, with the stand-ins on its
path.

Loopback only.  A server of several machines is as many servers on this one.
"""

from __future__ import annotations

import http.client
import importlib.metadata
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from msconv_runtime.errors import EnvironmentProblem, VerificationFailed
from msconv_runtime.serving.launch import Launch
from msconv_runtime.sglang.environment import STANDINS, imports

from .build import DEVICE
from .protocol import DEVICE_FILE, Device

DEVICE_VERSION = "1"  # of the stand-ins: recorded with what was rehearsed
START_S = 600
END_S = 30  # from the signal to the last process's end
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy the environment names
FAILURES = (OSError, ValueError, KeyError, http.client.HTTPException)  # of a server that ends, or answers an error
TAIL = 12  # lines of a log in a message
NOISE = re.compile(r"^\s*(\^+|~+|\[20.*(WARNING|INFO)|W0|I0)")


def prepare(work: Path, device: Device) -> None:
    """Lay out a rehearsal's directory: the device's settings, and metadata by which torch finds the stand-in."""
    (work / DEVICE_FILE).write_text(json.dumps(asdict(device)))
    info = work / "site" / f"torch_npu-{DEVICE_VERSION}+rehearsal.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {DEVICE_VERSION}+rehearsal\n"
    )
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")


def environment(work: Path, given: Mapping[str, str]) -> dict[str, str]:
    """What a server's process gets, without what is set for real devices or would lead past the stand-ins."""
    left_out = ("MS_", "ASCEND_", "TORCH_DEVICE_BACKEND_AUTOLOAD", "RANK_", "DEVICE_ID", "SGLANG_USE_CPU_ENGINE")
    kept = {name: value for name, value in given.items() if not name.startswith(left_out)}
    torchvision = [] if imports("torchvision") else [str(STANDINS / "for_torchvision")]
    path = [str(DEVICE), str(work / "site"), *torchvision, *filter(None, [kept.get("PYTHONPATH")])]
    return {
        **kept,
        "MSCONV_REHEARSAL": str(work),
        "PYTHONPATH": os.pathsep.join(path),
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        "PYTHONFAULTHANDLER": "1",
        "TRITON_INTERPRET": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "OMP_NUM_THREADS": kept.get("OMP_NUM_THREADS", "1"),
        "GLOG_v": kept.get("GLOG_v", "3"),
    }


def sglang_version() -> str:
    """Raises EnvironmentProblem if SGLang is not installed."""
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        raise EnvironmentProblem(
            "SGLang is not installed: a rehearsal starts its server.", "`make setup` installs what was tested."
        ) from None


def free_port() -> int:
    """A port that is free, and so is the one where SGLang has MindSpore's scheduler if the machines meet here: 35
    above, or below from 65500 on."""
    while True:
        with socket.socket() as s, socket.socket() as scheduler:
            s.bind(("127.0.0.1", 0))
            port = int(s.getsockname()[1])
            try:
                scheduler.bind(("127.0.0.1", port + 35 if port < 65500 else port - 35))
            except OSError:
                continue
            return port


class Server:
    """Running processes.  `logs`: everything that each machine's processes printed."""

    def __init__(self, port: int, work: Path, processes: list[subprocess.Popen[bytes]], logs: list[Path]) -> None:
        self.port, self.work, self.processes, self.logs = port, work, processes, logs

    def wait(self, timeout_s: float = START_S) -> None:
        """Wait until it answers.  Raises VerificationFailed if it ends, or is not ready in time."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.check_alive("started")
            try:
                self.open("/health", None, timeout_s=2).close()
                return
            except FAILURES:
                time.sleep(0.2)
        raise VerificationFailed(
            f"The server was not ready after {timeout_s:.0f} s.  Its log ends: {self.reason()}",
            "`--keep DIR` keeps the log.",
        )

    def check_alive(self, what: str) -> None:
        """Raises VerificationFailed if a process of the server has ended."""
        for process in self.processes:
            if process.poll() is not None:
                self.wait_until_gone(5)
                raise VerificationFailed(
                    f"The server ended with {process.returncode} before it had {what}.  Why, by its log: "
                    f"{self.reason()}",
                    "`--keep DIR` keeps the log.",
                )

    def reason(self) -> str:
        return "; ".join(dict.fromkeys(filter(None, (last_error(log) for log in self.logs)))) or "nothing"

    def info(self) -> dict[str, Any]:
        """What the server says of itself.  Raises VerificationFailed if it does not answer."""
        self.check_alive("ended")
        try:
            with self.open("/server_info", None, timeout_s=30) as reply:
                found: dict[str, Any] = json.loads(reply.read())
        except FAILURES as e:
            raise VerificationFailed(f"/server_info failed: {type(e).__name__}: {e}.") from None
        return found

    def open(self, path: str, body: dict[str, Any] | None, timeout_s: float) -> Any:
        """The reply to a GET, or to a POST of `body`."""
        data = None if body is None else json.dumps(body).encode()
        url, headers = f"http://127.0.0.1:{self.port}{path}", {"Content-Type": "application/json"}
        return DIRECT.open(urllib.request.Request(url, data, headers), timeout=timeout_s)

    def running(self) -> list[int]:
        """Processes of the server's sessions that are no zombies."""
        sessions = {p.pid for p in self.processes}
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) in sessions and fields[0] != "Z":
                found.append(int(stat.parent.name))
        return found

    def kill_rank(self, rank: int) -> bool:
        """Kill one rank's process, as the system does that has no memory left.  False if it is not found."""
        for pid in self.running():
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            named = re.search(r"sglang::scheduler\S*?_TP(\d+)", words)
            if "sglang::scheduler" in words and int(named[1] if named else 0) == rank:
                os.kill(pid, signal.SIGKILL)
                return True
        return False

    def stop(self) -> float:
        """End it by SIGTERM; seconds until no process was left.  Raises VerificationFailed if one stays."""
        started = time.monotonic()
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        return self.wait_for_end(started, "SIGTERM")

    def wait_for_end(self, started: float, after: str) -> float:
        """Seconds from `started` until no process was left.  Raises VerificationFailed if one stays."""
        left = self.wait_until_gone(END_S)
        if left:
            raise VerificationFailed(f"{len(left)} processes of the server are left {END_S} s after {after}.")
        return time.monotonic() - started

    def wait_until_gone(self, seconds: float) -> list[int]:
        """The processes that are left when the time is over; returns at once when there is none."""
        deadline = time.monotonic() + seconds
        while True:
            for process in self.processes:
                process.poll()
            left = self.running()
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.1)

    def kill(self) -> None:
        """End all at once, those too that are started meanwhile."""
        deadline = time.monotonic() + END_S
        while (left := self.running()) and time.monotonic() < deadline:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        for process in self.processes:
            process.wait()


@contextmanager
def serving(launches: list[Launch], port: int, work: Path) -> Iterator[Server]:
    """The servers of all machines, in `work`; whatever happens, none is left."""
    processes, logs = [], []
    try:
        for machine, launch in enumerate(launches):
            logs.append(work / f"server-{machine}.log")
            with logs[-1].open("wb") as log:
                processes.append(
                    subprocess.Popen(
                        launch.argv,
                        env=environment(work, {**os.environ, **launch.environment}),
                        cwd=work,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        yield Server(port, work, processes, logs)
    finally:
        Server(port, work, processes, logs).kill()


def last_error(log: Path) -> str:
    """Why a server ended, as far as its log says: a fault of memory and where in Python, or the first error."""
    lines = log.read_text(errors="replace").splitlines()
    for i, line in enumerate(lines):
        if "the host touched device memory" in line or "Fatal Python error" in line:
            touched = "the host touched device memory" in line
            begin = next((j for j in range(i, len(lines)) if "Current thread" in lines[j]), i)
            frames = [f.strip() for f in lines[begin + 1 : begin + 40] if f.lstrip().startswith("File ")][:4]
            what = "the host touched device memory" if touched else line.strip()
            return f"{what}, at {' < '.join(frames)}" if frames else what
    if wrong := [line.strip() for line in lines if re.match(r"^\S.*: error: ", line)]:  # of the command line
        return wrong[-1]
    found = ""
    for line in lines:
        if re.match(r"^(\[20[^\]]*\] )?[A-Za-z_][\w.]*(Error|Problem|Failed|Exception)\b: ?", line):
            found = found or line.strip()
    return found or " | ".join(line.strip() for line in lines[-TAIL:] if line.strip() and not NOISE.match(line))
