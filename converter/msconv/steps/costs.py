"""What a command will take here, said in one way for all of them: how much work of each kind there is, and how
much of it this machine did in a second when that was tried."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Tried:
    """One kind of work.  `amount` of it in `unit`s, of which `per_s` were done in a second; 0: it was not tried,
    and is taken to cost what the others of its unit do."""

    kind: object
    amount: float
    per_s: float
    unit: str = "bytes"

    @property
    def seconds(self) -> float:
        return self.amount / self.per_s if self.per_s else 0.0


@dataclass(frozen=True)
class Cost:
    """Of one command.  `startup`: seconds before the first of `tried` begins.  `read_bytes`: from a disk, or from
    elsewhere.  `memory_bytes`: at most, without pages of files.  `took`: seconds in which this was found out."""

    startup: float
    tried: tuple[Tried, ...]
    read_bytes: int
    memory_bytes: int
    took: float = 0.0

    @property
    def seconds(self) -> float:
        units = dict.fromkeys(t.unit for t in self.tried)
        return self.startup + sum(_seconds(t for t in self.tried if t.unit == unit) for unit in units)


def _seconds(tried: Iterable[Tried]) -> float:
    """Of kinds that are counted in one unit."""
    of_unit = list(tried)
    known = [t for t in of_unit if t.per_s]
    if not known:
        return 0.0
    share = sum(t.amount for t in of_unit) / max(1.0, sum(t.amount for t in known))
    return sum(t.seconds for t in known) * share
