"""Packages and environment variables: those that msconv itself needs, and those that a serving engine adds.

Imports no package that it looks for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from .. import __version__
from ..versions import MINDSPORE, in_series, named
from .findings import ALL, NPU, NUMERIC, SERVE, Ability, Finding, State
from .machine import Machine, exists

SETUP = "`make setup` installs what was tested on a CPU"
REHEARSAL = "+rehearsal"  # how the version of the stand-in for torch_npu ends


class Package(NamedTuple):
    """A package: the versions that were tried (2.8 is any 2.8.x), what fails without it, how to get it."""

    tested: tuple[str, ...]
    stops: tuple[Ability, ...]
    hint: str = SETUP


class Variable(NamedTuple):
    """An environment variable: a pattern of harmless values, what another value is, what is needed, what fails."""

    harmless: str
    otherwise: State
    needed: str
    stops: tuple[Ability, ...] = ()


class Beside(NamedTuple):
    """A package that does not go with an engine's: with `engine` of `since` and later (numbers of its version),
    this is `found`.  The latest that applies counts."""

    package: str
    engine: str
    since: tuple[int, ...]
    found: str
    hint: str


@dataclass(frozen=True)
class Needs:
    """What a serving engine needs beside msconv's own.  `tokens_flag`: its flag for the size of the KV pool.
    `no_tokenizer`: its flag for a server without a tokenizer, "" for an engine that takes token ids only.
    `for_flags`: packages that a flag of its needs, by the flag.  `beside`: packages that do not go with it."""

    packages: Mapping[str, Package] = field(default_factory=dict)
    variables: Mapping[str, Variable] = field(default_factory=dict)
    tokens_flag: str = ""
    no_tokenizer: str = ""
    for_flags: Mapping[str, str] = field(default_factory=dict)
    beside: tuple[Beside, ...] = ()

    @property
    def all_packages(self) -> dict[str, Package]:
        """msconv's own, then the engine's."""
        return {**PACKAGES, **self.packages}


PACKAGES = {
    "msconv": Package((__version__,), SERVE, "`pip install --no-deps .`"),
    "numpy": Package(("1.26",), ALL, "`pip install 'numpy>=1.26,<2'`: MindSpore's bfloat16 fails with numpy 2"),
    "ml_dtypes": Package(("0.5",), ALL),
    "filelock": Package(("4",), ALL),
    "numba": Package(("0.62",), (), "`pip install numba`: FP8 and experts convert faster"),
    "mindspore": Package(MINDSPORE, ALL[1:], "`pip install mindspore==2.10.0`: graphs of others are refused"),
    "torch": Package(("2.13.0",), NUMERIC),
    "transformers": Package(("5.19",), NUMERIC),
    "safetensors": Package(("0.8",), NUMERIC),
}
NO_ENGINE = Needs()
KERNELS = "FlashAttentionScore,PagedAttention"  # what SGLang's own MindSpore models switch off
VARIABLES = {
    "MS_DEV_FORCE_USE_COMPILE_CACHE": Variable(
        "(?!1$).*", "wrong", "not 1: MindSpore then loads a wrong graph", ALL[1:]
    ),
    "MS_INTERNAL_DISABLE_CUSTOM_KERNEL_LIST": Variable(f"|{KERNELS}", "untested", f"none, or {KERNELS}"),
    "MS_ENABLE_LCCL": Variable("|off", "untested", "none, or off"),
    "HF_HUB_OFFLINE": Variable("|0", "untested", "none, or 0: with it `convert` and `pull` fetch nothing"),
}


def package_finding(machine: Machine, name: str, needs: Needs) -> Finding:
    """Whether a package is there, in a version that was tried."""
    tested, stops, hint = needs.all_packages[name]
    needed = named(tested, " or ") or "any: none was tested"
    version = machine.version(name)
    if name == "torch_npu" and version and version.endswith(REHEARSAL):
        found = f"{version}: the rehearsal device, a stand-in that `msconv rehearse` starts; no NPU"
        return Finding(name, "wrong", found, "that of Ascend", "take its directory out of PYTHONPATH", NPU)
    if version is None:
        return Finding(name, "missing", "not installed", needed, hint, stops)
    state: State = "ok" if in_series(version, tested) else "untested"
    if name == "numpy" and re.match(r"[2-9]|1\d", version):
        state, stops = "wrong", ALL[1:]  # converting goes with any
    if name == "mindspore" and state == "untested":
        state, stops = "wrong", ("compile",)  # what it makes is refused when it is loaded
    return Finding(name, state, version, needed, hint, stops)


def flag_findings(machine: Machine, given: Iterable[str], needs: Needs) -> Iterator[Finding]:
    """Packages that flags of a server need and that are not there."""
    for flag in given:
        if (name := needs.for_flags.get(flag)) and machine.version(name) is None:
            hint = f"`pip install {name}`, or leave the flag out"
            yield Finding(name, "missing", "not installed", f"for {flag}", hint, SERVE)


def beside_findings(machine: Machine, needs: Needs) -> Iterator[Finding]:
    """Pairs of packages that do not go together.  An artifact needs none of them."""
    told: dict[str, Finding] = {}
    for other in sorted(needs.beside, key=lambda b: b.since):
        version, engine = machine.version(other.package), machine.version(other.engine)
        numbers = tuple(map(int, re.findall(r"\d+", engine or "")[:3]))
        if version and numbers >= other.since:
            found = f"{version} beside {other.engine} {engine}: {other.found}"
            told[other.package] = Finding(other.package, "untested", found, "none", other.hint)
    yield from told.values()


def variable_findings(machine: Machine, needs: Needs) -> Iterator[Finding]:
    """Variables that are set, and directories of PYTHONPATH that hide an installed package."""
    for name, (harmless, otherwise, needed, stops) in {**needs.variables, **VARIABLES}.items():
        if (value := machine.environ.get(name)) is not None:
            state = "ok" if re.fullmatch(harmless, value) else otherwise
            yield Finding(name, state, value or "empty", needed, f"`unset {name}`", stops)
    for place in filter(None, machine.environ.get("PYTHONPATH", "").split(os.pathsep)):
        for name, hidden in needs.all_packages.items():
            at = next((p for p in (Path(place, name), Path(place, f"{name}.py")) if exists(p)), None)
            if at and name != "msconv" and not any(Path(place).glob(f"{name}*-info")):  # else installed there
                found, hint = f"{at} hides {name}", f"take {place} out of PYTHONPATH"
                yield Finding("PYTHONPATH", "wrong", found, "no such name", hint, hidden.stops)
