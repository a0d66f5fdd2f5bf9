"""Machines that serve one model together."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..artifact import Parallel
from ..errors import UsageError

PORT = r"[1-9]\d{0,3}|[1-5]\d{4}|6[0-4]\d{3}|65[0-4]\d{2}|655[0-2]\d|6553[0-5]"
ADDRESS = re.compile(rf"([^\s:]+|\[[^\s\]]+\]):({PORT})", re.ASCII)


@dataclass(frozen=True)
class Nodes:
    """How many machines, which of them this is, and HOST:PORT of the first one."""

    count: int = 1
    rank: int = 0
    address: str | None = None

    @property
    def host(self) -> str:
        """Of the first machine, "" if none is named."""
        return (self.address or "").rpartition(":")[0].strip("[]")

    def check(self, parallel: Parallel) -> None:
        """Raises UsageError if these machines cannot be."""
        if self.rank >= self.count:
            raise UsageError(
                f"--node-rank {self.rank}: of {self.count} machines the last is {self.count - 1}.",
                f"Give --node-rank 0 to {self.count - 1}, another on each machine."
                if self.count > 1
                else "Give --nnodes too.",
            )
        if self.count > 1 and not self.address:
            raise UsageError(
                f"--nnodes {self.count} needs --dist-init-addr.",
                "Give HOST:PORT of the first machine, the same on all of them.",
            )
        if self.address and not ADDRESS.fullmatch(self.address):
            raise UsageError(
                f"--dist-init-addr {self.address}: is not HOST:PORT.",
                "Give a port of the first machine, 1 to 65535.",
            )
        if self.count > 1 and parallel.tp % self.count:
            raise UsageError(
                f"--nnodes {self.count}: {parallel.tp} ranks are not the same number on each machine.",
                "Give a number of machines that divides the artifact's tp.",
            )


ONE_MACHINE = Nodes()
