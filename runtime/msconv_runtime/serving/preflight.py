"""Whatever keeps an artifact from being served here with these flags, in one error."""

from __future__ import annotations

from ..artifact import Artifact
from ..doctor import Finding, Machine, examine, flag_findings
from ..doctor.findings import to_serve
from ..errors import ArtifactError, EnvironmentProblem, UsageError
from ..targets import Target
from .engine import Engine

OF_ALL_RANKS = ("ranks on devices", "memory to serve")  # findings that take this machine for the only one


def refuse(
    engine: Engine,
    artifact: Artifact,
    target: Target,
    given: dict[str, str],
    machines: int = 1,
    elsewhere: bool = False,
    is_half: bool = False,
) -> None:
    """Raises an error that lists all that does not fit, each with what mends it.  This machine is not looked at if
    the command is for another one (`elsewhere`), and not for what several `machines` share.  `is_half`: the
    server only prefills or only decodes."""
    root = artifact.root
    findings = [] if elsewhere else _findings(engine, artifact, target, given)
    findings = [f for f in findings if machines == 1 or f.name not in OF_ALL_RANKS]
    if engine.needs.no_tokenizer in given:
        findings = [f for f in findings if f.name != "tokenizer"]
    if is_half and not elsewhere:
        findings += engine.half_findings(Machine(), target)
    problems = [f"{f.name}: {f.found}; needed: {f.needed}.  {f.hint}" for f in findings]
    problems += engine.problems(artifact, target, given)
    problems += engine.half_problems(target, given, elsewhere) if is_half else []
    if not problems:
        return
    damaged = any(f.name in ("artifact", "file", "weights") or f.name.startswith("graphs") for f in findings)
    kind = ArtifactError if damaged else EnvironmentProblem if findings else UsageError
    lines = "\n".join(f"  {problem}" for problem in problems)
    raise kind(f"{root}: cannot be served here:\n{lines}", f"`msconv doctor {root}` says more.")


def _findings(engine: Engine, artifact: Artifact, target: Target, given: dict[str, str]) -> list[Finding]:
    machine, tokens = Machine(), engine.pool(artifact, target, given).tokens
    found = examine(machine, artifact.root, tokens, engine.needs, engine.drafts(given)).against(
        to_serve(target.kind)
    )
    return [*found, *flag_findings(machine, given, engine.needs)]
