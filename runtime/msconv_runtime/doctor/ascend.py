"""CANN, driver and devices of Ascend: for serving on an NPU only."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from ..versions import in_series
from .findings import NPU, Finding, State
from .machine import Machine, version_in

NPU_SMI_S = 10  # until `npu-smi info` must have answered
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"  # 0: torch imports no package of a device by itself
CANN = ("8.2", "8.3", "8.5", "9.0", "9.1")  # what MindSpore 2.10 itself looks for; 2.8 stops at 8.5


def ascend_findings(machine: Machine) -> Iterator[Finding]:
    """CANN, driver and devices: for serving on an NPU only."""
    base = machine.root / "usr/local/Ascend"
    named = [Path(h) for n in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME") if (h := machine.environ.get(n))]
    homes = named or [base / "ascend-toolkit/latest", base / "cann"]
    home, cann = next(((home, v) for home in homes if (v := _cann_version(home))), (homes[0], ""))
    state: State = "missing" if not cann else "untested" if in_series(cann, CANN) else "wrong"
    hint = "for an NPU only: install CANN and `source set_env.sh`"
    needed = f"{', '.join(CANN)}: what MindSpore looks for"
    yield Finding("CANN", state, f"{cann or 'none'} in {home}", needed, hint, NPU)

    if state == "missing" and machine.version("torch_npu") and machine.environ.get(AUTOLOAD) != "0":
        found = "torch loads torch_npu, which cannot load without CANN: `import torch` fails"
        hint = (
            f"`export {AUTOLOAD}=0` for other programs; msconv's own commands do without torch_npu, but for an NPU"
        )
        yield Finding("torch", "untested", found, f"CANN, or {AUTOLOAD}=0", hint)
    driver = version_in(base / "driver/version.info", "package_version", "Version")
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
    versions = (version_in(file, "version_dir", "Version") for file in files)
    return version_in(home / "version.cfg", "runtime_running_version") or next(filter(None, versions), "")


def chip_names(machine: Machine) -> list[str]:
    """What `npu-smi info` calls the chips, [] where it cannot be asked."""
    program = shutil.which("npu-smi", path=machine.environ.get("PATH", ""))
    try:
        return [name for name, _ in _chips(program)[0]] if program else []
    except (OSError, subprocess.SubprocessError):
        return []


def _chips(program: str) -> tuple[list[tuple[str, str]], int]:
    """Each chip's name and health, and the program's exit code."""
    done = subprocess.run([program, "info"], stdin=subprocess.DEVNULL, capture_output=True, timeout=NPU_SMI_S)
    text = done.stdout.decode(errors="replace")
    rows = re.findall(r"^\|\s*\d+\s+(\S+)\s*\|\s*([A-Za-z]+)\s*\|", text, re.M)
    return rows, done.returncode


def _npu_smi(program: str) -> Finding:
    """Each chip's name and health.  Stops nothing: in a container it may fail where devices work."""
    rows: list[tuple[str, str]] = []
    try:
        rows, code = _chips(program)
        found = ", ".join(map(" ".join, rows)) or f"no chip named, exit code {code}"
    except (OSError, subprocess.SubprocessError) as e:
        found = str(e)
    state: State = "ok" if rows and all(health == "OK" for _, health in rows) else "wrong"
    return Finding("npu-smi", state, found, "every chip OK", "`npu-smi info` shows more")
