"""The exact command and environment that serve an artifact.  Builds them; runs nothing, imports nothing heavy."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from ..artifact import Artifact
from ..errors import UsageError
from ..targets import Target
from .choice import target_to_serve
from .engine import Engine, chosen_engine
from .flags import given_flags
from .halves import Half
from .nodes import ONE_MACHINE, Nodes
from .preflight import refuse
from .settings import USUAL, Settings


@dataclass(frozen=True)
class Launch:
    """A process to start.  `environment` holds only what is added to the caller's.  `target`: whose graphs.
    `untried`: flags of the user's that nobody has tried.  `notes`: what the engine does unexpectedly."""

    argv: list[str]
    environment: dict[str, str]
    target: Target
    untried: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def shell(self, hide_keys: bool = False) -> str:
        """As one would type it; `hide_keys`: for a log."""
        argv = self.shown if hide_keys and self.shown else self.argv
        return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in self.environment.items()), shlex.join(argv)])


def plan_launch(
    root: Path,
    device: str,
    host: str,
    port: int,
    extra: list[str],
    settings: Settings = USUAL,
    nodes: Nodes = ONE_MACHINE,
    elsewhere: bool = False,
    target: str | None = None,
    engine: Engine | None = None,
    half: Half | None = None,
) -> Launch:
    """Check the artifact, this machine and `extra`, and build the command.  What the user passes in `extra` wins
    over our defaults.  Raises one error that lists all that does not fit, each with what mends it.

    `elsewhere`: the command is for another machine, so this one needs no NPU.  `target`: whose graphs, where the
    artifact has several for the device; `settings.target` is set here.  `engine`: None for the chosen one.
    `half`: of two servers, None for one that prefills and decodes.
    """
    if not host.strip():
        raise UsageError("--host: is empty.", "Give an address of this machine, or 0.0.0.0 for all of them.")
    engine = engine or chosen_engine()
    artifact = Artifact(root)
    parallel, chosen = artifact.manifest.parallel, target_to_serve(artifact, device, target)
    given = given_flags(extra)
    refuse(engine, artifact, chosen, given, nodes.count, elsewhere and not chosen.device.is_host, half is not None)
    nodes.check(parallel)
    if half is not None:
        half.check(port)
    argv = engine.command()
    flags = engine.flags(artifact, chosen, nodes, host, port)
    for name, value in (flags | (engine.half_flags(half, chosen) if half else {})).items():
        if not given.keys() & {name, *engine.aliases.get(name, ())}:
            argv += [name, value] if value else [name]
    settings = replace(settings, target=chosen.name)
    if nodes.count > 1 and nodes.address:
        settings = replace(settings, meeting_host=nodes.host)
    ranks = parallel.tp * engine.copies(given)
    if ranks // nodes.count != parallel.tp:
        settings = replace(settings, ranks_here=ranks // nodes.count)
    environment = settings.environment() | engine.environment(chosen, ranks, nodes.count)
    environment |= engine.half_environment(chosen, host) if half else {}
    argv += extra
    untried, notes = tuple(engine.untried(given)), tuple(engine.notes(chosen, given))
    notes += tuple(engine.half_notes(chosen)) if half else ()
    return Launch(argv, environment, chosen, untried, tuple(engine.without_keys(argv)), notes)
