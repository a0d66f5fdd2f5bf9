"""What a finding is, and what it stops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..units import human_bytes

State = Literal["ok", "missing", "untested", "wrong"]
Ability = Literal["convert", "compile", "verify", "serve_cpu", "serve_npu"]
ALL: tuple[Ability, ...] = get_args(Ability)
NUMERIC, SERVE, NPU = ALL[2:], ALL[3:], ALL[4:]  # verify and serve; serve; serve on an NPU


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
        can, convert = self.can, self.against("convert")
        if self.artifact is None or any(can[ability] for ability in SERVE):
            return convert
        return convert + self.against(SERVE[0])


def served(kind: str) -> tuple[Ability, ...]:
    """Serving on devices of this kind: none where somebody else serves."""
    return tuple(ability for ability in SERVE if ability == f"serve_{kind}")


def to_serve(kind: str) -> Ability:
    """Serving on devices of this kind."""
    return next(ability for ability in SERVE if ability == f"serve_{kind}")


def gib(size: int | None) -> str:
    return "cannot be read" if size is None else human_bytes(size, "GiB")
