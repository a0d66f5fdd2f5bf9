"""Loading while a server starts: a thread binds this process's rank and warms it up while the engine makes pools.

More ranks than one warm up together, when their groups exist: they load when the engine asks.  So does an NPU.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifact import Artifact
from ..graphs import Graphs, Place
from ..kernels.variants import chosen
from ..targets import target_named
from .settings import Settings
from .signed import refuse_unsigned_once

logger = logging.getLogger(__name__)


@dataclass
class Loaded:
    """Graphs ready for requests, and how long that took, in seconds."""

    graphs: Graphs
    seconds: dict[str, float]


_loading: dict[Path, Future[Loaded]] = {}
_finished: dict[tuple[Path, bool], Loaded] = {}  # by artifact, and whether it is what drafts
_alone = threading.Lock()


def begin(root: Path) -> None:
    """Start to load the only rank of `root` in a thread, for a CPU.  An artifact of more ranks is left alone."""
    artifact, settings = Artifact(root), Settings.read()
    if artifact.tp > 1 or root in _loading or not target_named(settings.target).device.is_host:
        return
    future: Future[Loaded] = Future()

    def run() -> None:
        try:
            future.set_result(load(artifact, Place(ranks_here=settings.ranks_here)))
        except BaseException as e:
            future.set_exception(e)

    _loading[root] = future
    threading.Thread(target=run, name="msconv-load", daemon=True).start()


def has_begun(root: Path) -> bool:
    return root in _loading


def load(artifact: Artifact, place: Place, model: Graphs | None = None) -> Loaded:
    """Map or read the rank's file, bind the graphs, warm them up.  One artifact after the other: MindSpore does
    not compile in two threads at once, and a server of drafts loads two.  `model`: the graphs for which these
    draft, if they read hidden states."""
    with _alone:
        return _load(artifact, place, model)


def _load(artifact: Artifact, place: Place, model: Graphs | None) -> Loaded:
    settings = Settings.read()
    refuse_unsigned_once(artifact.root)
    seconds = {}
    started = time.monotonic()
    import mindspore  # noqa: F401  takes seconds: apart from what follows

    seconds["import"] = time.monotonic() - started
    graphs = Graphs(artifact, settings.target, place, settings.load_mode, settings.check_digests, model=model)
    seconds |= graphs.seconds
    started = time.monotonic()
    graphs.warm_up(strict=settings.strict_aot)
    seconds["warm up"] = time.monotonic() - started
    return Loaded(graphs, seconds)


def finish(artifact: Artifact, place: Place, model: Graphs | None = None) -> Graphs:
    """What was begun, or loaded now.  Raises what loading raised.  `model`: as for `load`."""
    root, key = artifact.root, (artifact.root, model is not None)
    if key in _finished:
        return _finished[key].graphs
    started = time.monotonic()
    wait(_loading.values())  # the other's too: no graph may run while one is compiled
    begun = model is None and root in _loading
    loaded = _loading[root].result() if begun else load(artifact, place, model)
    loaded.seconds["waited for"] = time.monotonic() - started
    seconds = {part: round(s, 2) for part, s in loaded.seconds.items()}
    logger.info(
        "msconv: rank %d of %s: %d tensors bound, %s warmed up; compiles since ready are counted from here",
        place.rank,
        root,
        len(loaded.graphs.tensors),
        " and ".join(g.name for g in loaded.graphs.entries.values()),
    )
    if loaded.graphs.target.device.is_host and (why := loaded.graphs.library.why):
        tell = logger.warning if chosen() else logger.info
        tell("msconv: MindSpore's own operations, slower on a CPU than compiled kernels: %s", why)
    logger.info("msconv: start, seconds: %s", json.dumps(seconds))
    _finished[key] = loaded
    return loaded.graphs


def state(root: Path) -> dict[str, Any]:
    """What this process has loaded, for /server_info: of the artifact that is served, with that of its draft.
    Empty: nothing of ours."""
    if (root, False) not in _finished:
        return {}
    drafts = [_told(key[0], loaded) for key, loaded in _finished.items() if key != (root, False)]
    return _told(root, _finished[root, False]) | ({"draft": drafts[0]} if drafts else {})


def _told(root: Path, loaded: Loaded) -> dict[str, Any]:
    return {
        "artifact": str(root),
        "graphs": sorted(g.name for g in loaded.graphs.entries.values()),
        "kernels": loaded.graphs.library.variant,
        "compiles_since_ready": loaded.graphs.compiles_since_ready,
        "start_seconds": loaded.seconds,
    }
