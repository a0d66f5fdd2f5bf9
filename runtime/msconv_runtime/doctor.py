"""What this machine is fit for, and whether an artifact fits it.  Imports no package that it looks for.

Each fact is a `Finding`; one that is missing or wrong stops the abilities it names, and raises nothing.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from . import __version__
from .artifact import ITEM_BYTES, Artifact, Manifest
from .errors import MsconvError
from .roles import COMPILED, can_serve, of_variant
from .sglang.plugin import PACKAGE
from .units import human_bytes

State = Literal["ok", "missing", "untested", "wrong"]
Ability = Literal["convert", "compile", "verify", "serve_cpu", "serve_npu"]
ALL: tuple[Ability, ...] = get_args(Ability)
NUMERIC, SERVE, NPU = ALL[2:], ALL[3:], ALL[4:]  # verify and serve; serve; serve on an NPU

LEAST = 256 << 20  # free memory, and disk, with which small models still convert
NPU_SMI_S = 10  # until `npu-smi info` must have answered
SETUP = "`make setup` installs what was tested on a CPU"


class Needed(NamedTuple):
    """A package: the versions that were tried (2.8 is any 2.8.x), what fails without it, how to get it."""

    tested: tuple[str, ...]
    stops: tuple[Ability, ...]
    hint: str = SETUP


TESTED = {
    "msconv": Needed((__version__,), SERVE, "`pip install --no-deps .`: by its package SGLang finds the plug-in"),
    "numpy": Needed(("1.26",), ALL, "`pip install 'numpy>=1.26,<2'`: MindSpore's bfloat16 fails with numpy 2"),
    "ml_dtypes": Needed(("0.5",), ALL),
    "filelock": Needed(("4",), ALL),
    "numba": Needed(("0.62",), (), "`pip install numba`: FP8 and experts convert faster"),
    "mindspore": Needed(("2.8", "2.10"), ALL[1:], "`pip install mindspore==2.10.0`: graphs of others are refused"),
    "torch": Needed(("2.13.0",), NUMERIC),
    "transformers": Needed(("5.19",), NUMERIC),
    "safetensors": Needed(("0.8",), NUMERIC),
    "sglang": Needed(("0.5.23",), SERVE),
    "torch_npu": Needed((), NPU, "for an NPU only: install the torch_npu made for this torch"),
}
REHEARSAL = "+rehearsal"  # how the version of the stand-in for torch_npu ends
PYTHON = ("3.11",)
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"  # 0: torch imports no package of a device by itself
CANN = ("8.2", "8.3", "8.5", "9.0", "9.1")  # what MindSpore 2.10 itself looks for; 2.8 stops at 8.5

KERNELS = "FlashAttentionScore,PagedAttention"  # what SGLang's own MindSpore models switch off
VARIABLES: dict[str, tuple[str, State, str, tuple[Ability, ...]]] = {  # harmless values, else, needed, stops
    "SGLANG_EXTERNAL_MODEL_PACKAGE": (f"|{re.escape(PACKAGE)}", "wrong", f"none, or {PACKAGE}", SERVE),
    "SGLANG_PLUGINS": (r"|(.*,)?\s*msconv\s*(,.*)?", "wrong", "none, or msconv among them", SERVE),
    "MS_DEV_FORCE_USE_COMPILE_CACHE": ("(?!1$).*", "wrong", "not 1: MindSpore then loads a wrong graph", ALL[1:]),
    "MS_INTERNAL_DISABLE_CUSTOM_KERNEL_LIST": (f"|{KERNELS}", "untested", f"none, or {KERNELS}", ()),
    "MS_ENABLE_LCCL": ("|off", "untested", "none, or off", ()),
    "HF_HUB_OFFLINE": ("|0", "untested", "none, or 0: with it `convert` and `pull` fetch nothing", ()),
}


@dataclass(frozen=True)
class Finding:
    """`stops`: what cannot be done while this is missing or wrong."""

    name: str
    state: State
    found: str
    needed: str = ""
    hint: str = ""
    stops: tuple[Ability, ...] = ()


@dataclass(frozen=True)
class Report:
    """`artifact` is None if none was asked about."""

    findings: list[Finding]
    artifact: dict[str, Any] | None = None

    def against(self, ability: Ability) -> list[Finding]:
        return [f for f in self.findings if f.state in ("missing", "wrong") and ability in f.stops]

    @property
    def can(self) -> dict[Ability, bool]:
        return {ability: not self.against(ability) for ability in ALL}

    @property
    def blockers(self) -> list[Finding]:
        """What is in the way of converting, and of serving the artifact if nothing here can.  Empty: all fine."""
        nowhere = self.artifact is not None and not (self.can["serve_cpu"] or self.can["serve_npu"])
        return self.against("convert") + (self.against("serve_cpu") if nowhere else [])


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
        from .native import library
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
        available = re.search(r"MemAvailable:\s+(\d+)", read(self.root / "proc/meminfo"))
        free = [int(available[1]) << 10] if available else []
        group = self.root / "sys/fs/cgroup"
        for names in (
            ("memory.max", "memory.current", "memory.stat"),
            ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
        ):
            most, now, stat = (read(group / name).strip() for name in names)
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


def read(path: Path) -> str:
    """A small text file; "" if it cannot be read."""
    with contextlib.suppress(OSError, ValueError), path.open(encoding="utf-8", errors="replace") as f:
        return f.read(1 << 20)
    return ""


def stated(path: Path, *keys: str) -> str:
    """The first `key=8.5.0` or `key=[7.6.0:8.5.0]` of a file of Ascend's that has digits; "" if there is none."""
    found = (re.search(rf"^{key}=\[?(?:[^:\]\s]*:)?(\d[^\]\s]*)", read(path), re.M) for key in keys)
    return next((m[1] for m in found if m), "")


def of(version: str, series: tuple[str, ...]) -> bool:
    """Whether a version is of one of the series: 2.8.0 and 2.8.0+cpu are of 2.8, 2.80 is not."""
    return any(re.match(re.escape(s) + r"(?!\d)", version) for s in series)


def gib(size: int | None) -> str:
    return "cannot be read" if size is None else human_bytes(size, "GiB")


def examine(machine: Machine, root: Path | None = None, tokens: int = 0) -> Report:
    """All findings about the machine and, if given, the artifact at `root`, served on a CPU with a KV cache of so
    many tokens (0: the usual)."""
    findings = [*_system(machine), *(_package(machine, name) for name in TESTED)]
    findings += [*_variables(machine), *_ascend(machine)]
    if root is None:
        return Report(findings)
    artifact, about = _artifact(machine, root, tokens)
    return Report(findings + about, artifact)


def _system(machine: Machine) -> Iterator[Finding]:
    state: State = "ok" if of(machine.python, PYTHON) else "wrong"
    hint = "`make setup PYTHON=/path/to/python3.11`"
    yield Finding("python", state, machine.python, f"{PYTHON[0]}.x", hint, ALL)
    linux = machine.system.startswith("Linux ")
    state = "ok" if machine.system == "Linux x86_64" else "untested" if linux else "wrong"
    yield Finding("platform", state, machine.system, "Linux x86_64", "use a Linux machine", ALL)
    yield Finding("cores", "ok", str(machine.cores), "one or more")
    why, needed = machine.no_kernels(), "those of msconv, built by a C++ compiler"
    mend = "install g++" if not why or "no C++ compiler" in why else "mend that"
    hint = f"{mend}: without them a CPU serves by MindSpore's own operations, 1.5 to 3 times slower"
    yield Finding("CPU kernels", "missing" if why else "ok", why or "built", needed, hint)
    for name, free, hint in (
        ("memory free", machine.memory(), "end other programs, or raise the container's limit"),
        ("disk free", machine.disk(), "convert with --output on another disk; `msconv plan` says what it takes"),
    ):
        state = "untested" if free is None else "wrong" if free < LEAST else "ok"
        yield Finding(name, state, gib(free), f"{gib(LEAST)} at least", hint, ("convert",))


def _package(machine: Machine, name: str) -> Finding:
    tested, stops, hint = TESTED[name]
    needed = " or ".join(t if t.count(".") > 1 else f"{t}.x" for t in tested) or "any: none was tested"
    version = machine.version(name)
    if name == "torch_npu" and version and version.endswith(REHEARSAL):
        found = f"{version}: the rehearsal device, a stand-in that `msconv rehearse` starts; no NPU"
        return Finding(name, "wrong", found, "that of Ascend", "take its directory out of PYTHONPATH", NPU)
    if version is None:
        return Finding(name, "missing", "not installed", needed, hint, stops)
    state: State = "ok" if of(version, tested) else "untested"
    if name == "numpy" and re.match(r"[2-9]|1\d", version):
        state = "wrong"
    if name == "mindspore" and state == "untested":
        state, stops = "wrong", ("compile",)  # what it makes is refused when it is loaded
    return Finding(name, state, version, needed, hint, stops)


def _variables(machine: Machine) -> Iterator[Finding]:
    for name, (harmless, otherwise, needed, stops) in VARIABLES.items():
        if (value := machine.environ.get(name)) is not None:
            state = "ok" if re.fullmatch(harmless, value) else otherwise
            yield Finding(name, state, value or "empty", needed, f"`unset {name}`", stops)
    for place in filter(None, machine.environ.get("PYTHONPATH", "").split(os.pathsep)):
        for name, package in TESTED.items():
            at = next((p for p in (Path(place, name), Path(place, f"{name}.py")) if exists(p)), None)
            if at and name != "msconv" and not any(Path(place).glob(f"{name}*-info")):  # else installed there
                found, hint = f"{at} hides {name}", f"take {place} out of PYTHONPATH"
                yield Finding("PYTHONPATH", "wrong", found, "no such name", hint, package.stops)


def _ascend(machine: Machine) -> Iterator[Finding]:
    """CANN, driver and devices: for serving on an NPU only."""
    base = machine.root / "usr/local/Ascend"
    named = [Path(h) for n in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME") if (h := machine.environ.get(n))]
    homes = named or [base / "ascend-toolkit/latest", base / "cann"]
    home, cann = next(((home, v) for home in homes if (v := _cann_version(home))), (homes[0], ""))
    state: State = "missing" if not cann else "untested" if of(cann, CANN) else "wrong"
    hint = "for an NPU only: install CANN and `source set_env.sh`"
    needed = f"{', '.join(CANN)}: what MindSpore looks for"
    yield Finding("CANN", state, f"{cann or 'none'} in {home}", needed, hint, NPU)

    if state == "missing" and machine.version("torch_npu") and machine.environ.get(AUTOLOAD) != "0":
        found = "torch loads torch_npu, which cannot load without CANN: `import torch` fails"
        hint = (
            f"`export {AUTOLOAD}=0` for other programs; msconv's own commands do without torch_npu, but for an NPU"
        )
        yield Finding("torch", "untested", found, f"CANN, or {AUTOLOAD}=0", hint)
    driver = stated(base / "driver/version.info", "package_version", "Version")
    hint = "for an NPU only: install Ascend's driver and firmware"
    yield Finding("driver", "untested" if driver else "missing", driver or "none", "Ascend's", hint, NPU)
    there, visible = machine.devices()
    state, found = "untested" if there else "missing", f"{there} of /dev/davinci*"
    hint = "for an NPU only: in a container, pass /dev/davinci* into it"
    yield Finding("devices", state, found, "one a rank", hint, NPU)
    if visible is not None:
        fits = all(n.isdecimal() and int(n) < there for n in visible)
        hint = "`unset ASCEND_RT_VISIBLE_DEVICES`, or name devices that are there"
        needed = f"numbers below {there}, with commas"
        found = ",".join(visible) or "empty"
        yield Finding("ASCEND_RT_VISIBLE_DEVICES", "ok" if fits else "wrong", found, needed, hint, NPU)
    if program := shutil.which("npu-smi", path=machine.environ.get("PATH", "")):
        yield _npu_smi(program)
    found = "nothing of msconv has run on an NPU yet"
    hint = "docs/proof.md says what only a device can show"
    yield Finding("on a device", "untested", found, "a first run", hint)


def _cann_version(home: Path) -> str:
    files = [home / "runtime/version.info", home / "compiler/version.info"]
    versions = (stated(file, "version_dir", "Version") for file in files)
    return stated(home / "version.cfg", "runtime_running_version") or next(filter(None, versions), "")


def _npu_smi(program: str) -> Finding:
    """Each chip's name and health.  Stops nothing: in a container it may fail where devices work."""
    rows: list[tuple[str, str]] = []
    try:
        done = subprocess.run([program, "info"], stdin=subprocess.DEVNULL, capture_output=True, timeout=NPU_SMI_S)
        text = done.stdout.decode(errors="replace")
        rows = re.findall(r"^\|\s*\d+\s+(\S+)\s*\|\s*([A-Za-z]+)\s*\|", text, re.M)
        found = ", ".join(map(" ".join, rows)) or f"no chip named, exit code {done.returncode}"
    except (OSError, subprocess.SubprocessError) as e:
        found = str(e)
    state: State = "ok" if rows and all(health == "OK" for _, health in rows) else "wrong"
    return Finding("npu-smi", state, found, "every chip OK", "`npu-smi info` shows more")


def _artifact(machine: Machine, root: Path, tokens: int) -> tuple[dict[str, Any], list[Finding]]:
    """The artifact in short, and how it fits this machine."""
    short: dict[str, Any] = {"path": str(root), "ready": False}
    try:
        artifact = Artifact(root)
        manifest = artifact.manifest
        short["ready"] = True
        damage = _damage(artifact)
        memory = list(_memory(machine, artifact, tokens))
    except (MsconvError, OSError, ImportError) as e:
        hint = getattr(e, "hint", "") or "make it readable, and numpy importable"
        return short, [Finding("artifact", "wrong", str(e), "READY, and a manifest that fits", hint, SERVE)]
    weights, tp = manifest.weights, manifest.parallel.tp
    short |= {"format": manifest.format, "tp": tp, "ep": manifest.parallel.ep}
    short["rank_bytes"] = sum(f.size for f in weights.files if f.rank == 0) if weights else None
    found = [Finding("artifact", "ok", f"format {manifest.format}, READY, tp {tp}, ep {manifest.parallel.ep}")]
    if weights is None:
        hint = f"`msconv convert --model <dir> --tp {tp} --output {root}`"
        found.append(Finding("weights", "missing", "none", "those of the model", hint, SERVE))
    ascend = {g.target for g in manifest.graphs} - {"cpu"}
    for target in ("cpu", *sorted(ascend or {"ascend910b"})):
        found += _graphs(machine, root, manifest, target, not damage)
    there, visible = machine.devices()
    usable = there if visible is None else len(visible)
    hint = f"`msconv reshard {root} --tp N --output DIR`"
    if tp > machine.cores:
        needed = "one a rank, else it is slow"
        found.append(Finding("ranks on cores", "untested", f"{tp} on {machine.cores}", needed, hint))
    if 0 < usable < tp:
        found.append(Finding("ranks on devices", "wrong", f"{tp} on {usable}", "one a rank", hint, NPU))
    proven = {f.name.removeprefix("proof "): f.state == "ok" for f in found if f.name.startswith("proof ")}
    return {**short, "proven": proven}, [*found, *damage, *memory]


def _damage(artifact: Artifact) -> list[Finding]:
    """Sizes of all files and digests of the graphs; what is wrong with one target's graphs is that target's."""
    from .artifact.integrity import check_graphs

    damage, manifest = check_graphs(artifact), artifact.manifest
    other = {a: {g.path for g in manifest.graphs if (g.target == "cpu") == (a in NPU)} for a in SERVE}
    stops = tuple(a for a in SERVE if any(d.path not in other[a] for d in damage))
    hint = "copy the artifact again, or convert and compile again"
    needed = "as the manifest says"
    return [Finding("file", "wrong", f"{d.path}: {d.problem}", needed, hint, stops) for d in damage[:20]]


def _graphs(machine: Machine, root: Path, manifest: Manifest, target: str, intact: bool) -> Iterator[Finding]:
    """Whether a target's graphs are there, of a MindSpore that was tried, and proven."""
    graphs, stops = manifest.graphs_for(target), SERVE[:1] if target == "cpu" else NPU
    made = sorted({g.mindspore for g in graphs})
    have = ", ".join(g.name for g in graphs)
    here = machine.version("mindspore")
    tested = TESTED["mindspore"].tested
    state: State = "ok" if here and of(here, tested) else "untested"
    if not can_serve(of_variant(graphs, "")):
        state = "missing"
    elif not all(of(version, tested) for version in made):
        state = "wrong"
    found = f"{have} of mindspore {', '.join(made)}; {here or 'none'} is installed" if graphs else "none"
    needed = f"prefill and decode of mindspore {' or '.join(t + '.x' for t in tested)}"
    yield Finding(f"graphs {target}", state, found, needed, f"`msconv compile {root} --target {target}`", stops)
    if graphs:
        proof = manifest.proof_for(target) if intact else None
        found = f"largest logit error {proof.max_abs_logit_error:.2e}" if proof else "UNPROVEN"
        if target != "cpu":
            found += ", interpreted" * bool(proof) + "; has run on no device"
        hint = f"`msconv verify {root} --target {target}`"
        yield Finding(f"proof {target}", "ok" if proof else "untested", found, "a proof of these bytes", hint)


def _memory(machine: Machine, artifact: Artifact, tokens: int) -> Iterator[Finding]:
    """Free memory against all ranks on a CPU: weights as the graphs take them, and the KV cache."""
    from .sglang.launch import POOL_TOKENS, pool_tokens

    root, manifest, tp = artifact.root, artifact.manifest, artifact.tp
    graphs, free = manifest.graphs_for("cpu"), machine.memory()
    if manifest.weights is None or not graphs:
        return
    compiled = {} if machine.no_kernels() else of_variant(graphs, COMPILED)
    used = list((compiled or of_variant(graphs, "")).values())
    parameters = {p.name: math.prod(p.shape) * ITEM_BYTES.get(p.dtype, 4) for g in used for p in g.reads}
    token = sum(4 * math.prod(n or 1 for n in i.shape[2:]) for i in used[0].caches)
    pools = (tokens or POOL_TOKENS[0], tokens or pool_tokens(artifact))
    least, usual = (tp * (sum(parameters.values()) + count * token) for count in pools)
    state: State = "untested" if free is None or free < usual else "ok"
    hint = f"`msconv serve {root} -- --max-total-tokens {pools[0]}` takes {gib(least)}"
    if free is not None and free < least:
        state, hint = "wrong", f"end other programs, or serve where {gib(least)} are free"
        hint += ", or give a smaller --max-total-tokens" * (tokens > POOL_TOKENS[0])
    needed = f"{gib(usual)}: weights and KV cache of {tp} ranks on a CPU"
    yield Finding("memory to serve", state, gib(free), needed, hint, SERVE[:1])
