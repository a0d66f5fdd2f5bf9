"""What only a CPU needs: names upstream imports on an NPU, and MindSpore's own communication between ranks (mccl).

Run as a program, this file is MindSpore's scheduler: the process through which the ranks find each other.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import math
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import EnvironmentProblem
from .launch import LOCALHOST, Settings

LISTEN_S = 60  # until MindSpore's scheduler must listen
MEET_S = 300  # until the ranks must have found each other
STALL_S = 3600  # a process that stood still for less is not taken for dead: we watch the processes ourselves
PR_SET_PDEATHSIG = 1
MADV_POPULATE_WRITE = 23
RESERVE = 16 << 20  # bytes of a tensor from which on its memory is reserved
AT_ONCE = 1 << 30  # bytes that are given their pages before the server is ready
POPULATE = 2 << 20  # bytes a call
PAUSE_S = 0.001  # between calls, which keep other threads from running Python
IDLE_S = 0.1  # without a step, until the server counts as idle
_reserved: list[mmap.mmap] = []
_idle_from = 0.0  # on the monotonic clock
logger = logging.getLogger(__name__)


class NoMask:
    """In place of upstream's LowerTriangularMask, which allocates 512 MB: the graphs' masks are made elsewhere."""

    def __init__(self, dtype: Any, max_model_len: int) -> None:
        from mindspore import mint

        self.mask = mint.zeros((1, 1), dtype=dtype)

    def gen_attention_mask(self, *args: Any) -> Any:
        return self.mask


def complete(upstream: Any) -> None:
    """Give upstream's module the names it imports only on an NPU.  Idempotent."""
    if hasattr(upstream, "ms"):
        return
    import mindspore

    upstream.ms, upstream.np, upstream.Tensor = mindspore, np, mindspore.Tensor
    upstream.mint, upstream.mutable = mindspore.mint, mindspore.mutable
    upstream.torch_npu = types.SimpleNamespace(npu=types.SimpleNamespace(synchronize=lambda: None))
    upstream.LowerTriangularMask = NoMask


@contextlib.contextmanager
def reserved_zeros() -> Iterator[None]:
    """In here torch.zeros takes large CPU tensors from memory that is zero until it is touched."""
    import torch

    zeros = torch.zeros

    def reserved(*size: Any, **options: Any) -> Any:
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        dtype, device = options.get("dtype") or torch.get_default_dtype(), options.get("device")
        nbytes = math.prod(shape) * dtype.itemsize
        if not size or nbytes < RESERVE or str(device) != "cpu" or options.keys() - {"dtype", "device"}:
            return zeros(*size, **options)
        memory = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        _reserved.append(memory)
        return torch.frombuffer(memory, dtype=dtype).reshape(shape)

    torch.zeros = reserved
    try:
        yield
    finally:
        torch.zeros = zeros


@contextlib.contextmanager
def at_work() -> Iterator[None]:
    """In here and shortly after, no pages are given to reserved memory: the memory's speed bounds a step's."""
    global _idle_from
    _idle_from = math.inf
    try:
        yield
    finally:
        _idle_from = time.monotonic() + IDLE_S


def populate_reserved() -> None:
    """Give the reserved memory its pages: from then on the server's memory does not grow with its use.  Little is
    done at once, more in a thread, as soon as and as long as the server is idle.  A kernel that cannot (before
    Linux 5.14) gives them when they are touched."""
    memories = list(_reserved)
    _reserved.clear()
    if sum(map(len, memories)) <= AT_ONCE:
        _populate(memories, 0.0)
    else:
        threading.Thread(target=_populate, args=(memories, PAUSE_S), name="msconv-pool", daemon=True).start()


def _populate(memories: list[mmap.mmap], pause_s: float) -> None:
    try:
        for memory in memories:
            for begin in range(0, len(memory), POPULATE):
                while time.monotonic() < _idle_from:
                    time.sleep(IDLE_S)
                memory.madvise(MADV_POPULATE_WRITE, begin, min(POPULATE, len(memory) - begin))
                time.sleep(pause_s)
    except OSError as e:
        if e.errno == errno.ENOMEM:
            logger.warning("msconv: no memory for all of the KV pool: give SGLang a smaller --max-total-tokens")


def start_communication(tp_group: Any) -> None:
    """Start MindSpore's collectives among the ranks of SGLang's tensor-parallel group; each rank calls this.

    Takes 4 to 20 s (4 ranks on 2 busy cores: 40 s), mostly pauses inside MindSpore, in which no other thread of
    this process runs Python.
    """
    from mindspore.communication import get_group_size, get_rank, init

    started = time.monotonic()
    rank, size = tp_group.rank_in_group, tp_group.world_size
    host = Settings.read().meeting_host
    port = tp_group.broadcast_object(start_scheduler(size, host) if rank == 0 else None)
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


def start_scheduler(size: int, host: str = LOCALHOST) -> int:
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
        start_new_session=True,  # Ctrl-C is for SGLang, which ends its processes in order
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
    """Wait for the scheduler's end, which ends the server: SGLang's ranks tell their parent in the same way."""
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
