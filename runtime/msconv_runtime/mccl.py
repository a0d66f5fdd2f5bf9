"""MindSpore's own communication between ranks on CPUs (mccl).

Run as a program, this file is MindSpore's scheduler: the process through which the ranks find each other.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from .errors import EnvironmentProblem

LISTEN_S = 60  # until MindSpore's scheduler must listen
MEET_S = 300  # until the ranks must have found each other
STALL_S = 3600  # a process that stood still for less is not taken for dead: we watch the processes ourselves
PR_SET_PDEATHSIG = 1
logger = logging.getLogger(__name__)


def start_communication(rank: int, size: int, host: str, broadcast: Callable[[int | None], int]) -> None:
    """Start MindSpore's collectives among `size` ranks; each rank calls this.  They meet at `host`; `broadcast`
    hands rank 0's value to every rank.

    Takes 4 to 20 s (4 ranks on 2 busy cores: 40 s), mostly pauses inside MindSpore, in which no other thread of
    this process runs Python.
    """
    from mindspore.communication import get_group_size, get_rank, init

    started = time.monotonic()
    port = broadcast(start_scheduler(size, host) if rank == 0 else None)
    os.environ.update(cluster_environment("MS_WORKER", str(rank), size, host, port))
    try:
        init("mccl")
    except RuntimeError as e:
        raise EnvironmentProblem(
            f"MindSpore's communication did not start on rank {rank} of {size} "
            f"in {time.monotonic() - started:.0f} s (scheduler at port {port}): {str(e).splitlines()[0]}",
            "Start the server again; the log of rank 0 says if the scheduler ended.",
        ) from None
    if (get_rank(), get_group_size()) != (rank, size):
        raise EnvironmentProblem(
            f"MindSpore took rank {rank} of {size} for rank {get_rank()} of {get_group_size()}.",
            "Unset RANK_ID and every MS_ variable, then start the server again.",
        )
    logger.info("msconv: rank %d of %d: mccl started in %.1f s", rank, size, time.monotonic() - started)


def start_scheduler(size: int, host: str) -> int:
    """Start MindSpore's scheduler for `size` ranks; its port, once it listens.  It ends when this thread does."""
    with socket.socket() as s:
        s.bind((host, 0))
        port = int(s.getsockname()[1])
    environment = {**os.environ, **cluster_environment("MS_SCHED", "scheduler", size, host, port)}
    environment.update(OMP_NUM_THREADS="1", GLOG_v="3")  # else it prints a line every 5 s
    output = tempfile.TemporaryFile()  # noqa: SIM115  as long as the process
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, str(os.getpid())],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C is for the engine, which ends its processes in order
    )
    deadline = time.monotonic() + LISTEN_S
    while not listens(port):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise EnvironmentProblem(
                f"MindSpore's scheduler does not listen at port {port} after {LISTEN_S} s or before it ended "
                f"with {process.wait()}.  The last it printed: {tail(output)}",
                "Start the server again.",
            )
        time.sleep(0.05)
    threading.Thread(target=_watch, args=(process, output, os.getppid()), daemon=True).start()
    return port


def cluster_environment(role: str, node: str, size: int, host: str, port: int) -> dict[str, str]:
    """MindSpore's variables for one process of a cluster.

    Its heartbeat stays on: switched off, MindSpore 2.10 closes that connection while the ranks still meet, and
    one start in three died of a segmentation fault.
    """
    return {
        "MS_ROLE": role,
        "MS_NODE_ID": node,
        "MS_WORKER_NUM": str(size),
        "MS_SCHED_HOST": host,
        "MS_SCHED_PORT": str(port),
        "MS_TOPO_TIMEOUT": str(MEET_S),
        "MS_DISABLE_HEARTBEAT": "0",
        "MS_NODE_TIMEOUT": str(STALL_S),
        "MS_HEARTBEAT_RETRY_TIMEOUT": str(STALL_S),
    }


def listens(port: int) -> bool:
    """Whether somebody listens at a TCP port of this machine.  Connects to nothing."""
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        rows = [line.split() for line in table.read_text().splitlines()[1:]] if table.exists() else []
        if any(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows):
            return True
    return False


def tail(output: IO[bytes], size: int = 2000) -> str:
    """The end of a file that somebody else may be writing, or "nothing"."""
    data = os.pread(output.fileno(), size, max(0, os.fstat(output.fileno()).st_size - size))
    return data.decode(errors="replace").strip() or "nothing"


def _watch(process: subprocess.Popen[bytes], output: IO[bytes], parent: int) -> None:
    """Wait for the scheduler's end, which ends the server: an engine's ranks tell their parent in the same way."""
    code = process.wait()
    logger.error(
        "msconv: MindSpore's scheduler (process %d) ended with %d: the ranks have lost each other and this server "
        "ends.  Start it again.  The last it printed: %s",
        process.pid,
        code,
        tail(output),
    )
    if os.getppid() == parent:
        os.kill(parent, signal.SIGQUIT)


def _run_scheduler(parent: int) -> None:
    """Be MindSpore's scheduler until all ranks have left, or until rank 0 is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before we asked to be told
        return
    from mindspore.communication import init

    init("mccl")


if __name__ == "__main__":
    _run_scheduler(int(sys.argv[1]))
