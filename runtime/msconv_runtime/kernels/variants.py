"""Which kernels a processor can run: a variant is the kernels' one source with other flags of the compiler."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from ..errors import EnvironmentProblem

CPUINFO = Path("/proc/cpuinfo")
CHOICE = "MSCONV_KERNELS"  # one of the names: that variant and no other
NAMES = {"amd64": "x86_64", "arm64": "aarch64"}  # what some systems call a machine


@dataclass(frozen=True)
class Variant:
    """`needs`: features as /proc/cpuinfo has them.  `rounds`: products of many rows with bfloat16 weights round
    the rows to it, too; only who names such a variant gets it."""

    name: str
    machine: str
    needs: frozenset[str]
    flags: tuple[str, ...]
    rounds: bool = False


def _x86(name: str, needs: str, *flags: str, rounds: bool = False) -> Variant:
    return Variant(name, "x86_64", frozenset(needs.split()), ("-march=x86-64", *flags), rounds)


AVX2 = ("-mavx2", "-mfma")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
VNNI, BF16 = (*AVX512, "-mavx512vnni"), (*AVX512, "-mavx512vnni", "-mavx512bf16")
WITH_VNNI = "avx2 fma avx512f avx512bw avx512dq avx512vl avx512_vnni"
# The best first.
VARIANTS = (
    _x86("avx512bf16", f"{WITH_VNNI} avx512_bf16", *BF16, rounds=True),
    _x86("avx512vnni", WITH_VNNI, *VNNI),
    _x86("avx512", "avx2 fma avx512f avx512bw avx512dq avx512vl", *AVX512),
    _x86("avxvnni", "avx2 fma avx_vnni", *AVX2, "-mavxvnni"),
    _x86("avx2", "avx2 fma", *AVX2),
    _x86("sse2", ""),  # every x86-64
    Variant("dotprod", "aarch64", frozenset({"asimd", "asimddp"}), ("-march=armv8.2-a+dotprod",)),
    Variant("neon", "aarch64", frozenset(), ("-march=armv8-a",)),  # every aarch64
)


def chosen() -> str:
    """The name of the only variant that may be taken, or ""."""
    return os.environ.get(CHOICE, "").strip()


def rounding_choice() -> str:
    """That name if its variant rounds, or ""."""
    return next((v.name for v in VARIANTS if v.rounds and v.name == chosen()), "")


def machine() -> str:
    name = platform.machine().lower()
    return NAMES.get(name, name)


def features() -> frozenset[str]:
    """Of this machine's processors: those that all of them have.  Empty where the system does not tell."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return frozenset()
    told = [frozenset(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))]
    return frozenset.intersection(*told) if told else frozenset()


def usable(choice: str = "") -> list[Variant]:
    """Those that this processor can run, the best first, none that rounds; of all of them `choice` alone, if it is
    given.  Raises EnvironmentProblem if there is none."""
    here, has = machine(), features()
    able = [v for v in VARIANTS if v.machine == here and v.needs <= has]
    if not able:
        known = ", ".join(sorted({v.machine for v in VARIANTS}))
        raise EnvironmentProblem(
            f"no kernels for a processor of {here or 'an unknown kind'}; there are some for {known}",
            "MindSpore's own operations serve in their place",
        )
    if not choice:
        return [v for v in able if not v.rounds]
    found = [v for v in able if v.name == choice]
    if not found:
        names = ", ".join(v.name for v in able if not v.rounds)
        kind = "this processor cannot run them" if choice in {v.name for v in VARIANTS} else "no such kernels"
        raise EnvironmentProblem(f"{CHOICE}={choice}: {kind}", f"unset it, or set it to one of {names}")
    return found
