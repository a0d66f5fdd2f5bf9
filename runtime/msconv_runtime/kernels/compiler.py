"""The machine's C++ compiler: which one it is, and building a library with it."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import EnvironmentProblem
from .variants import features, machine

BUILD_S, ANSWER_S = 300, 30


@dataclass(frozen=True)
class Compiler:
    """`named`: how messages call it, with CXX where it comes from there."""

    command: tuple[str, ...]
    version: str
    named: str

    @property
    def key(self) -> tuple[str, ...]:
        """What a library depends on besides its sources and flags.  The processor is in it: a home directory on a
        network is shared by others, and each loads only what was built and tried on one like itself."""
        return (*self.command, self.version, "-".join(platform.libc_ver()), _processor())

    def build(self, arguments: Sequence[str], path: Path) -> None:
        """Write the library to `path`.  Raises EnvironmentProblem with the first error."""
        done = _run(self.named, [*self.command, *arguments, "-o", str(path)], BUILD_S)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
            raise problem(self.named, ": " + next((line for line in lines if "error: " in line), lines[0]))
        if not path.is_file():
            raise problem(self.named, ": it built nothing")


def find_compiler() -> Compiler:
    """That of CXX, which may have options, else c++ or g++.  Raises EnvironmentProblem if it compiles no C++."""
    told = os.environ.get("CXX", "").strip()
    found = shutil.which("c++") or shutil.which("g++")
    if not (told or found):
        raise EnvironmentProblem("no C++ compiler (c++, g++ or $CXX)", "install g++, or set CXX to another")
    named = f"CXX={told}" if told else str(found)
    try:
        command = tuple(shlex.split(told)) or (str(found),)
    except ValueError as e:
        raise problem(named, f": {e}") from None
    version = _run(named, [*command, "--version"], ANSWER_S)
    standard = _run(named, [*command, "-x", "c++", "-E", "-"], ANSWER_S, "__cplusplus\n")
    if version.returncode or standard.returncode or not re.search(r"^\d{6}L$", standard.stdout, re.MULTILINE):
        raise problem(named, " is not a C++ compiler")
    return Compiler(command, version.stdout, named)


def problem(named: str, what: str) -> EnvironmentProblem:
    """An error that says which compiler, and what to do."""
    told = named.startswith("CXX=")
    hint = "set CXX to a C++ compiler such as g++, or unset it" if told else "CXX may name another C++ compiler"
    return EnvironmentProblem(named + what, hint)


def _run(named: str, command: list[str], seconds: float, text: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C"}  # a key is the same in every language
    try:
        return subprocess.run(
            command,
            input=text,
            env=environment,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=seconds,
        )
    except OSError as e:
        raise problem(named, f": {e.strerror}") from None
    except subprocess.TimeoutExpired:
        raise problem(named, f": no answer in {seconds} s") from None


def _processor() -> str:
    return " ".join([machine(), *sorted(features())])
