"""Loading while SGLang starts: a thread binds this process's rank and warms it up while SGLang makes its pools.

More ranks than one warm up together, when their groups exist: they load when SGLang asks.  So does an NPU.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..artifact import Manifest, read_manifest
from ..graphs import FREE_PAGE, Graphs
from .launch import Settings

logger = logging.getLogger(__name__)


@dataclass
class Loaded:
    """Graphs ready for requests, and how long that took, in seconds."""

    graphs: Graphs
    seconds: dict[str, float]


@dataclass(frozen=True)
class Place:
    """Where the graphs will run: the rank, the KV pool's page, and MindSpore's names of the groups."""

    rank: int = 0
    page: int = FREE_PAGE
    groups: dict[str, str] = field(default_factory=dict)


_loading: dict[Path, Future[Loaded]] = {}
_finished: dict[Path, Loaded] = {}


def begin(root: Path) -> None:
    """Start to load the only rank of `root` in a thread, for a CPU.  An artifact of more ranks is left alone."""
    manifest = read_manifest(root)
    if manifest.parallel.tp > 1 or root in _loading or Settings.read().target != "cpu":
        return
    future: Future[Loaded] = Future()

    def run() -> None:
        try:
            future.set_result(load(root, manifest, Place()))
        except BaseException as e:
            future.set_exception(e)

    _loading[root] = future
    threading.Thread(target=run, name="msconv-load", daemon=True).start()


def has_begun(root: Path) -> bool:
    return root in _loading


def load(root: Path, manifest: Manifest, place: Place) -> Loaded:
    """Map or read the rank's file, bind the graphs, warm them up."""
    settings = Settings.read()
    seconds = {}
    started = time.monotonic()
    import mindspore  # noqa: F401  takes seconds: apart from what follows

    seconds["import"] = time.monotonic() - started
    graphs = Graphs(
        root,
        manifest,
        settings.target,
        place.rank,
        settings.load_mode,
        settings.check_digests,
        ranks_here=settings.ranks_here,
        page=place.page,
        groups=place.groups,
    )
    seconds |= graphs.seconds
    started = time.monotonic()
    graphs.warm_up(strict=settings.strict_aot)
    seconds["warm up"] = time.monotonic() - started
    return Loaded(graphs, seconds)


def finish(root: Path, manifest: Manifest, place: Place) -> Graphs:
    """What was begun, or loaded now.  Raises what loading raised."""
    if root in _finished:
        return _finished[root].graphs
    started = time.monotonic()
    loaded = _loading[root].result() if root in _loading else load(root, manifest, place)
    loaded.seconds["waited for"] = time.monotonic() - started
    seconds = {part: round(s, 2) for part, s in loaded.seconds.items()}
    logger.info(
        "msconv: rank %d of %s: %d tensors bound, %s warmed up; compiles since ready are counted from here",
        place.rank,
        root,
        len(loaded.graphs.tensors),
        " and ".join(loaded.graphs.cells),
    )
    if loaded.graphs.target == "cpu" and (why := loaded.graphs.library.why):
        logger.info("msconv: MindSpore's own operations, slower on a CPU than compiled kernels: %s", why)
    logger.info("msconv: start, seconds: %s", json.dumps(seconds))
    _finished[root] = loaded
    return loaded.graphs


def state() -> dict[str, Any]:
    """What this process has loaded, for /server_info.  Empty: nothing of ours."""
    for root, loaded in _finished.items():
        return {
            "artifact": str(root),
            "graphs": sorted(loaded.graphs.cells),
            "compiles_since_ready": loaded.graphs.compiles_since_ready,
            "start_seconds": loaded.seconds,
        }
    return {}
