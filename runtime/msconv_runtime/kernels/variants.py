"""Which kernels a processor can run: a variant is the kernels' one source with other flags of the compiler."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

from ..errors import EnvironmentProblem

CPUINFO = Path("/proc/cpuinfo")
CHOICE = "MSCONV_KERNELS"  # one of the names: that variant and no other
NAMES = {"amd64": "x86_64", "arm64": "aarch64"}  # what some systems call a machine


@dataclass(frozen=True)
class Variant:
    """`needs`: features as /proc/cpuinfo has them."""

    name: str
    machine: str
    needs: frozenset[str]
    flags: tuple[str, ...]


def _x86(name: str, needs: str, *flags: str) -> Variant:
    return Variant(name, "x86_64", frozenset(needs.split()), ("-march=x86-64", *flags))


AVX2 = ("-mavx2", "-mfma")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
# The best first.
VARIANTS = (
    _x86("avx512vnni", "avx2 fma avx512f avx512bw avx512dq avx512vl avx512_vnni", *AVX512, "-mavx512vnni"),
    _x86("avx512", "avx2 fma avx512f avx512bw avx512dq avx512vl", *AVX512),
    _x86("avxvnni", "avx2 fma avx_vnni", *AVX2, "-mavxvnni"),
    _x86("avx2", "avx2 fma", *AVX2),
    _x86("sse2", ""),  # every x86-64
    Variant("dotprod", "aarch64", frozenset({"asimd", "asimddp"}), ("-march=armv8.2-a+dotprod",)),
    Variant("neon", "aarch64", frozenset(), ("-march=armv8-a",)),  # every aarch64
)


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
    """Those that this processor can run, the best first; of them `choice` alone, if it is given.  Raises
    EnvironmentProblem if there is none."""
    here, has = machine(), features()
    able = [v for v in VARIANTS if v.machine == here and v.needs <= has]
    if not able:
        known = ", ".join(sorted({v.machine for v in VARIANTS}))
        raise EnvironmentProblem(
            f"no kernels for a processor of {here or 'an unknown kind'}; there are some for {known}",
            "MindSpore's own operations serve in their place",
        )
    if not choice:
        return able
    chosen = [v for v in able if v.name == choice]
    if not chosen:
        names = ", ".join(v.name for v in able)
        kind = "this processor cannot run them" if choice in {v.name for v in VARIANTS} else "no such kernels"
        raise EnvironmentProblem(f"{CHOICE}={choice}: {kind}", f"unset it, or set it to one of {names}")
    return chosen
