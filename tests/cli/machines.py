"""Machines as `msconv doctor` sees them, complete or not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from msconv_runtime.doctor import Finding, Machine, Report
from msconv_runtime.doctor import examine as examine_for
from msconv_runtime.sglang.engine import ENGINE

REPO = Path(__file__).parents[2]
PINNED = "".join((REPO / "requirements" / name).read_text() for name in ("cpu.txt", "torch.txt"))
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)", PINNED, re.M))
TESTED = ENGINE.needs.all_packages
GOOD = {**{name: PINS.get(name) for name in TESTED}, "msconv": TESTED["msconv"].tested[0]}
SMI = """
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip  Phy-ID              | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     Ascend910           | OK            | 166.5       38                0    / 0             |
| 0     0                   | 0000:9D:00.0  | 0           0    / 0          3131 / 65536         |
| 1     Ascend910           | HEALTH        | -           37                0    / 0             |
| 0     1                   | 0000:9F:00.0  | 0           0    / 0          2886 / 65536         |
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def machine(root: Path, versions: dict[str, str | None] | None = None, **facts: Any) -> Machine:
    """A Linux machine with all that was tested on a CPU, 8 GiB free and no NPU; `facts` change it."""
    if not (root / "proc").exists():
        write(root / "proc/meminfo", f"MemTotal: 99 kB\nMemAvailable:  {8 << 20} kB\n")
    known = {**GOOD, **(versions or {})}
    usual = {"environ": {}, "python": "3.11.9", "system": "Linux x86_64", "cores": 2, "output": root}
    return Machine(root=root, version=known.get, **{**usual, **facts})


def with_npu(root: Path, devices: int = 2, **facts: Any) -> Machine:
    """The same with torch_npu, CANN, driver and devices."""
    write(root / "usr/local/Ascend/ascend-toolkit/latest/version.cfg", "runtime_running_version=[7.6.0:8.5.0]\n")
    write(root / "usr/local/Ascend/driver/version.info", "Version=7.7.0.1\npackage_version=25.0.rc1.1\n")
    for i in range(devices):
        write(root / f"dev/davinci{i}", "")
    write(root / "dev/davinci_manager", "")
    return machine(root, {"torch_npu": "2.8.0"}, **facts)


def examine(machine: Machine, root: Path | None = None, tokens: int = 0) -> Report:
    """As `msconv doctor` does, for SGLang."""
    return examine_for(machine, root, tokens, ENGINE.needs)


def finding(report: Report, name: str) -> Finding:
    (found,) = [f for f in report.findings if f.name == name]
    return found


def cannot(report: Report) -> set[str]:
    return {ability for ability, can in report.can.items() if not can}


NOT_NPU = {"serve_npu"}
SERVE = {"serve_cpu", "serve_npu"}
NUMERIC = {"verify", *SERVE}
GRAPHS = {"compile", *NUMERIC}
ALL = {"convert", *GRAPHS}
