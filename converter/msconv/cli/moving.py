"""Who moves weights, for the commands that do: threads of this process, or the nodes of a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from msconv_runtime.units import human_bytes

from .console import say

if TYPE_CHECKING:
    from ..stream.movers import Mover

ray_option = click.option(
    "--ray",
    metavar="ADDRESS",
    help="Have the nodes of a Ray cluster move the weights: HOST:PORT, auto, or local, which starts one here.  "
    "--jobs and --max-memory are those of each node.",
)


@dataclass(frozen=True)
class Way:
    """A mover that is asked for and not started yet.  `besides`: bytes of memory that it takes in each process."""

    besides: int
    jobs: int
    ray: str | None = None

    @contextmanager
    def mover(self, planned_memory_bytes: int) -> Iterator[Mover]:
        """The mover, while it is needed.  Raises MsconvError."""
        if self.ray is None:
            from ..stream.movers.threads import LocalThreads

            yield LocalThreads(self.jobs)
            return
        from ..stream.movers.cluster import Nodes
        from ..stream.movers.ray import connected

        say(f"Memory: {human_bytes(planned_memory_bytes)} are planned for the worker of each node.")
        with connected(self.ray, self.jobs) as cluster:
            nodes = Nodes(cluster, self.jobs, say)
            try:
                yield nodes
            finally:
                nodes.end()


def way_to_move(ray: str | None, jobs: int) -> Way:
    """Raises MsconvError if that way cannot be gone here."""
    if ray is None:
        return Way(0, jobs)
    from ..stream.movers.ray import ACTOR_BYTES, refuse_address

    refuse_address(ray)
    return Way(ACTOR_BYTES, jobs, ray)
