"""How long compiling took, kept beside an artifact.  No part of what the artifact promises."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from msconv_runtime.artifact import STATE_DIR, Graph, replace_file

TIMINGS = "timings.json"


class Timing(msgspec.Struct, frozen=True):
    """What compiling a graph took on this machine.  `digest`: of the graph that it was."""

    digest: str
    seconds: float


def read_timings(root: Path) -> dict[str, Timing]:
    """By the graph's path, where that is known."""
    try:
        return msgspec.json.decode((root / STATE_DIR / TIMINGS).read_bytes(), type=dict[str, Timing])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return {}


def add_timings(root: Path, made: Iterable[tuple[Graph, float]]) -> None:
    """Keep what compiling these graphs took, in seconds."""
    took = {graph.path: Timing(graph.digest, round(seconds, 3)) for graph, seconds in made}
    replace_file(root / STATE_DIR / TIMINGS, msgspec.json.encode({**read_timings(root), **took}))
