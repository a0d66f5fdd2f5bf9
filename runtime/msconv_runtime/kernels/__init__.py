"""Compiled kernels of the CPU's graphs: their C++ is built where it runs, once a kind of processor and version.

The best variant that the processor can run is built; where that fails, or does not compute what it should, the
next one.  Without a C++ compiler, or where none works, there is no library: the graphs of MindSpore's own
operations run in its place.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..errors import EnvironmentProblem, MsconvError, ResourceError
from ..mindir_check import allowed
from .builds import cached_build
from .compiler import BUILD_S, Compiler, find_compiler, problem
from .variants import CHOICE, Variant, chosen, usable

logger = logging.getLogger(__name__)
LIBRARY = allowed.LIBRARY
UNITS = ("kernels.cc", "layers.cc", "products.cc", "attention.cc", "int8.cc")
HEADERS = (
    "activation.h attention.h bytes.h codes.h dots.h experts.h halves.h norms.h operation.h pool.h "
    "products.h vector.h workspace.h"
)
SOURCES = (*UNITS, *HEADERS.split())
FLAGS = ("-O3", "-ffp-contract=fast", "-std=c++17", "-pthread", "-shared", "-fPIC", "-Wno-psabi")
SWITCHES = ("MSCONV_COMPILED", "MSCONV_NATIVE")  # 0: do without; the second is its name before
CGROUP = Path("/sys/fs/cgroup")
QUOTAS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))  # versions 2 and 1


@dataclass(frozen=True)
class Library:
    """`path` is None where there is none, and `why` says the reason.  `variant`: its name."""

    path: Path | None
    why: str = ""
    handle: ctypes.CDLL | None = None  # keeps it loaded: MindSpore opens and closes it at every node
    variant: str = ""


@functools.cache
def library() -> Library:
    """The kernels for this machine, built now (some seconds) if they are not in the cache directory."""
    for switch in SWITCHES:
        if os.environ.get(switch) == "0":
            return Library(None, f"{switch}=0")
    try:
        return _first_that_works(find_compiler(), usable(chosen()))
    except MsconvError as e:
        place = "no place for them: " if isinstance(e, ResourceError) else ""
        return Library(None, f"{place}{e.message}; {e.hint}")
    except (ImportError, OSError) as e:
        return Library(None, str(e))


def _first_that_works(compiler: Compiler, variants: list[Variant]) -> Library:
    """Raises EnvironmentProblem, as the first variant did, if none does."""
    here = Path(__file__).parent
    sources = [(here / name).read_bytes() for name in SOURCES]
    failed: EnvironmentProblem | None = None
    for variant in variants:
        flags = (*FLAGS, *variant.flags)
        build = partial(compiler.build, (*flags, *(str(here / name) for name in UNITS)))
        try:
            path = cached_build(LIBRARY, [*compiler.key, *flags, *sources], build, partial(_try, compiler))
        except EnvironmentProblem as e:
            failed = failed or e
            continue
        if failed:
            logger.warning(
                "msconv: kernels for %s serve, not those for %s: %s",
                variant.name,
                variants[0].name,
                failed.message,
            )
        if variant.rounds:
            logger.warning(
                "msconv: %s=%s: products of more than 32 tokens with bfloat16 weights round activations to "
                "bfloat16, which no proof covers",
                CHOICE,
                variant.name,
            )
        return Library(path, handle=ctypes.CDLL(str(path)), variant=variant.name)
    assert failed is not None
    raise failed


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
