"""Compiled kernels of the CPU's native graphs: their C++ is built where it runs, once a machine and version.

Without a C++ compiler, or where the result does not compute what it should, there is no library: the graphs of
MindSpore's own operations run in its place.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..artifact import digest_bytes

LIBRARY = "msconv-native-1"  # what graphs call it: another number for another set of kernels
SOURCES = ("kernels.cc", "pool.h", "vector.h")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-pthread", "-shared", "-fPIC", "-Wno-psabi")
BUILD_S = 300
OFF = "MSCONV_NATIVE"  # 0: do without
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
    if os.environ.get(OFF) == "0":
        return Library(None, f"{OFF}=0")
    found = shutil.which("c++") or shutil.which("g++")
    compiler = shlex.split(os.environ.get("CXX", "")) or ([found] if found else [])
    if not compiler:
        return Library(None, "no C++ compiler (c++, g++ or $CXX)")
    here = Path(__file__).parent
    try:
        from filelock import FileLock

        version = _run([*compiler, "--version"])
        sources = b"".join((here / name).read_bytes() for name in SOURCES)
        key = digest_bytes(sources + repr((FLAGS, version, _processor())).encode()).partition(":")[2][:16]
        path = cache() / f"{LIBRARY}-{key}.so"
        handle = _open(path)
        if handle is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                handle = _open(path)
                if handle is None:
                    _build(compiler, here / SOURCES[0], path)
                    handle = ctypes.CDLL(str(path))
    except (OSError, RuntimeError) as e:  # RuntimeError: no home
        if getattr(e, "filename", None) == compiler[0]:
            return Library(None, f"{compiler[0]}: {e}")
        return Library(None, f"no place for them: {e}; XDG_CACHE_HOME may name another directory")
    except (ArithmeticError, ImportError, subprocess.SubprocessError) as e:
        said = (getattr(e, "stderr", None) or str(e)).strip().splitlines()
        return Library(None, f"{shlex.join(compiler)}: {said[0] if said else type(e).__name__}")
    return Library(path, handle=handle)


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


def cache() -> Path:
    """Where built libraries are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "msconv"


def _open(path: Path) -> ctypes.CDLL | None:
    """None if it is not there, or damaged."""
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def _build(compiler: list[str], source: Path, path: Path) -> None:
    """Raises ArithmeticError if what was built computes something else than it should: tried in a process of its
    own, which may as well end by it."""
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        made = Path(directory) / path.name
        _run([*compiler, *FLAGS, "-o", str(made), str(source)])
        tried = subprocess.run(
            [sys.executable, "-m", f"{__name__}.check", str(made)], capture_output=True, text=True, timeout=BUILD_S
        )
        if tried.returncode:
            said = (tried.stdout or tried.stderr).strip().splitlines() or [f"it ended with {tried.returncode}"]
            raise ArithmeticError(f"built kernels that do not work: {said[-1]}")
        made.replace(path)


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=BUILD_S).stdout


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join([platform.machine(), *sorted(told)])
