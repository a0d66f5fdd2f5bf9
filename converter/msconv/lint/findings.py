"""What was found, gathered from all threads: tensors with the same problem become one line."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ..layout.names import fold, shorten

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
SOME = 6  # folded names of a finding


@dataclass(frozen=True, slots=True)
class Finding:
    """`error`: the checkpoint is damaged, or computes something else than is meant.  `warning`: most likely so.
    `note`: worth knowing.  `check`: which kind.  `where`: tensors, folded, or a file.  `count`: of tensors."""

    severity: Severity
    check: str
    where: str
    problem: str
    count: int = 1


class Findings:
    """Threads may add at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: dict[tuple[Severity, str, str], tuple[list[str], str]] = {}

    def add(self, severity: Severity, check: str, problem: str, where: Iterable[str], first: str = "") -> None:
        """`problem`: the same words for all that have it; `first`: numbers of one of them."""
        with self._lock:
            names, _ = self._found.setdefault((severity, check, problem), ([], first))
            names.extend(where)

    def listed(self) -> list[Finding]:
        """The worst first, then in the order of their checks and names."""
        found = []
        for (severity, check, problem), (names, first) in self._found.items():
            folded = [shorten(name) for name, _ in fold(sorted(names, key=_natural))]
            more = f", ... and {len(folded) - SOME} more" if len(folded) > SOME else ""
            words = f"{problem}; the first: {first}" if first else problem
            found.append(Finding(severity, check, ", ".join(folded[:SOME]) + more, words, len(names)))
        return sorted(found, key=lambda f: (SEVERITIES.index(f.severity), f.check, f.where, f.problem))


def _natural(name: str) -> list[tuple[int, str]]:
    """layers.2 before layers.10."""
    return [
        (int(piece), "") if piece.isdecimal() and piece.isascii() else (-1, piece) for piece in name.split(".")
    ]
