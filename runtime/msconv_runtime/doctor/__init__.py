"""What this machine is fit for, and whether an artifact fits it.  Imports no package that it looks for.

Each fact is a `Finding`; one that is missing or wrong stops the abilities it names, and raises nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..artifact import Artifact
from .artifact import artifact_findings
from .ascend import ascend_findings
from .findings import Ability, Finding, Report
from .machine import Machine, system_findings
from .packages import (
    NO_ENGINE,
    Beside,
    Needs,
    Package,
    Variable,
    beside_findings,
    flag_findings,
    package_finding,
    variable_findings,
)


def examine(
    machine: Machine,
    root: Path | None = None,
    tokens: int = 0,
    needs: Needs = NO_ENGINE,
    drafts: Sequence[Artifact] = (),
) -> Report:
    """All findings about the machine and, if given, the artifact at `root`, served on a CPU with a KV cache of so
    many tokens (0: the usual).  `needs`: of the engine that serves.  `drafts`: artifacts that draft for it."""
    findings = [*system_findings(machine), *(package_finding(machine, name, needs) for name in needs.all_packages)]
    findings += [*beside_findings(machine, needs), *variable_findings(machine, needs), *ascend_findings(machine)]
    if root is None:
        return Report(findings)
    artifact, about = artifact_findings(machine, root, tokens, needs, drafts)
    return Report(findings + about, artifact)


__all__ = [
    "Ability",
    "Beside",
    "Finding",
    "Machine",
    "Needs",
    "Package",
    "Report",
    "Variable",
    "examine",
    "flag_findings",
]
