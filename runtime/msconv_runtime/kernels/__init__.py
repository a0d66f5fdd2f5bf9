"""Compiled kernels of the CPU's graphs: their C++ is built where it runs, once a machine and version.

Without a C++ compiler, or where the result does not compute what it should, there is no library: the graphs of
MindSpore's own operations run in its place.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..errors import MsconvError, ResourceError
from ..mindir_check import allowed
from .builds import cached_build
from .compiler import BUILD_S, Compiler, find_compiler, problem

LIBRARY = allowed.LIBRARY
UNITS = ("kernels.cc", "int8.cc")
SOURCES = (*UNITS, "codes.h", "experts.h", "norms.h", "operation.h", "pool.h", "vector.h")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-pthread", "-shared", "-fPIC", "-Wno-psabi")
SWITCHES = ("MSCONV_COMPILED", "MSCONV_NATIVE")  # 0: do without; the second is its name before
CGROUP = Path("/sys/fs/cgroup")
QUOTAS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))  # versions 2 and 1


@dataclass(frozen=True)
class Library:
    """`path` is None where there is none, and `why` says the reason."""

    path: Path | None
    why: str = ""
    handle: ctypes.CDLL | None = None  # keeps it loaded: MindSpore opens and closes it at every node


@functools.cache
def library() -> Library:
    """The kernels for this machine, built now (some seconds) if they are not in the cache directory."""
    for switch in SWITCHES:
        if os.environ.get(switch) == "0":
            return Library(None, f"{switch}=0")
    here = Path(__file__).parent
    try:
        compiler = find_compiler()
        sources = [(here / name).read_bytes() for name in SOURCES]
        build = partial(compiler.build, (*FLAGS, *(str(here / name) for name in UNITS)))
        path = cached_build(LIBRARY, [*compiler.key, *FLAGS, *sources], build, partial(_try, compiler))
        return Library(path, handle=ctypes.CDLL(str(path)))
    except MsconvError as e:
        place = "no place for them: " if isinstance(e, ResourceError) else ""
        return Library(None, f"{place}{e.message}; {e.hint}")
    except (ImportError, OSError) as e:
        return Library(None, str(e))


def _try(compiler: Compiler, made: Path) -> None:
    """Raises EnvironmentProblem if what was built computes something else than it should: tried in a process of
    its own, which may as well end by it."""
    command = [sys.executable, "-P", "-m", f"{__name__}.check", str(made)]  # -P: nothing of the current directory
    try:
        tried = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_S)
    except subprocess.TimeoutExpired:
        said = [f"no end in {BUILD_S} s"]
    else:
        if not tried.returncode:
            return
        said = (tried.stdout or tried.stderr).strip().splitlines() or [f"the trial ended with {tried.returncode}"]
    raise problem(compiler.named, f" built kernels that do not work: {said[-1]}")


def use_threads(ranks: int) -> None:
    """Let the kernels use this process's share of the machine: its processors, divided by the ranks that share
    them; at most OMP_NUM_THREADS.  (MindSpore sets that to 1 for itself, where Python does not see it.)"""
    processors = max(1, processors_allowed() // ranks)
    told = os.environ.get("OMP_NUM_THREADS", "")
    threads = min(processors, int(told)) if told.isdecimal() and int(told) else processors
    if (handle := library().handle) is not None:
        handle.Threads(ctypes.c_int64(threads))


def processors_allowed() -> int:
    """How many this process may use: by its affinity, and by its container's quota."""
    count = len(os.sched_getaffinity(0))
    for names in QUOTAS:
        try:
            quota, period = (int(word) for name in names for word in (CGROUP / name).read_text().split())
        except (OSError, ValueError):  # no such version, or no limit: "max", or -1
            continue
        if quota > 0 and period > 0:
            count = min(count, -(-quota // period))
    return count
