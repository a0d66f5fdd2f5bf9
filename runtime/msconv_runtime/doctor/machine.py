"""Facts about this machine: system, memory, disk, devices, and versions of packages by their metadata."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..versions import in_series
from .findings import ALL, Finding, State, gib

PYTHON = ("3.11",)
UNTRIED_PYTHON = ("3.12",)  # MindSpore has wheels for it, and converting is tried; serving is not
LEAST = 256 << 20  # free memory, and disk, with which small models still convert


def installed(name: str) -> str | None:
    """A package's version by its metadata, None if there is none."""
    try:
        return importlib.metadata.version(name) or "of unknown version"
    except importlib.metadata.PackageNotFoundError:
        return None
    except (OSError, ValueError, KeyError):
        return "of unreadable version"


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def no_kernels() -> str:
    """Why the CPU's compiled kernels cannot be had here, or "".  Builds them if that was never done."""
    try:
        from ..kernels import library
    except ImportError as e:
        return f"{e.name} is not installed"
    return library().why


@dataclass(frozen=True)
class Machine:
    """Where facts come from.  Tests give another root, environment and versions."""

    root: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    version: Callable[[str], str | None] = installed
    python: str = field(default_factory=platform.python_version)
    system: str = field(default_factory=lambda: f"{platform.system()} {platform.machine()}")
    cores: int = field(default_factory=usable_cores)
    no_kernels: Callable[[], str] = no_kernels
    output: Path = Path()  # on the disk that is written to

    def disk(self) -> int | None:
        """Free bytes."""
        place = next((p for p in (self.output, *self.output.parents) if exists(p)), Path())
        with contextlib.suppress(OSError):
            return shutil.disk_usage(place).free
        return None

    def memory(self) -> int | None:
        """Free bytes: what Linux calls available, or less if a container's limit leaves less."""
        available = re.search(r"MemAvailable:\s+(\d+)", read_text(self.root / "proc/meminfo"))
        free = [int(available[1]) << 10] if available else []
        group = self.root / "sys/fs/cgroup"
        for names in (
            ("memory.max", "memory.current", "memory.stat"),
            ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
        ):
            most, now, stat = (read_text(group / name).strip() for name in names)
            if most.isdecimal() and now.isdecimal():
                cached = sum(map(int, re.findall(r"^(?:in)?active_file (\d+)", stat, re.M)))
                free.append(max(0, int(most) - int(now) + cached))
        return min(free, default=None)

    def devices(self) -> tuple[int, list[str] | None]:
        """How many NPUs there are, and which of them ASCEND_RT_VISIBLE_DEVICES names (None: it is not set)."""
        named = self.environ.get("ASCEND_RT_VISIBLE_DEVICES")
        there = len(list((self.root / "dev").glob("davinci[0-9]*")))
        return there, None if named is None else [n.strip() for n in named.split(",")]


def exists(path: Path) -> bool:
    """False too where one may not look."""
    with contextlib.suppress(OSError, ValueError):
        return path.exists()
    return False


def read_text(path: Path) -> str:
    """A small text file; "" if it cannot be read."""
    with contextlib.suppress(OSError, ValueError), path.open(encoding="utf-8", errors="replace") as f:
        return f.read(1 << 20)
    return ""


def version_in(path: Path, *keys: str) -> str:
    """The first `key=8.5.0` or `key=[7.6.0:8.5.0]` of a file of Ascend's that has digits; "" if there is none."""
    found = (re.search(rf"^{key}=\[?(?:[^:\]\s]*:)?(\d[^\]\s]*)", read_text(path), re.M) for key in keys)
    return next((m[1] for m in found if m), "")


def system_findings(machine: Machine) -> Iterator[Finding]:
    """Findings about Python, platform, processors, memory and disk."""
    untried = in_series(machine.python, UNTRIED_PYTHON)
    state: State = "ok" if in_series(machine.python, PYTHON) else "untested" if untried else "wrong"
    hint = "`make setup PYTHON=/path/to/python3.11`"
    yield Finding("python", state, machine.python, f"{PYTHON[0]}.x", hint, ALL)
    linux = machine.system.startswith("Linux ")
    state = "ok" if machine.system == "Linux x86_64" else "untested" if linux else "wrong"
    yield Finding("platform", state, machine.system, "Linux x86_64", "use a Linux machine", ALL)
    yield Finding("cores", "ok", str(machine.cores), "one or more")
    why, needed = machine.no_kernels(), "those of msconv, built by a C++ compiler"
    fix = "install g++" if not why or "no C++ compiler" in why else "mend that"
    hint = f"{fix}: without them a CPU serves by MindSpore's own operations, several times slower"
    yield Finding("CPU kernels", "missing" if why else "ok", why or "built", needed, hint)
    for name, free, hint in (
        ("memory free", machine.memory(), "end other programs, or raise the container's limit"),
        ("disk free", machine.disk(), "convert with --output on another disk; `msconv plan` says what it takes"),
    ):
        state = "untested" if free is None else "wrong" if free < LEAST else "ok"
        yield Finding(name, state, gib(free), f"{gib(LEAST)} at least", hint, ("convert",))
