"""What it will take to bring a checkpoint here, or to read it where it is: bytes by the plan, time by a second of
it, tried now."""

from __future__ import annotations

import time

from ..location import Location
from ..stream.execute import BASE_BYTES
from .costs import Cost, Tried
from .estimate import Estimate


def predict_coming(location: Location, planned: Estimate) -> Cost | None:
    """None if nothing has to come: the source is here, or where it is nobody knows yet.  Raises
    MsconvError."""
    begun, plan = time.perf_counter(), planned.plan
    shards = sorted({plan.sources[n].file for n in plan.read_names})
    if planned.assumed or not (rate := location.try_coming(shards)):
        return None
    size = planned.download_bytes if location.is_kept else plan.read_bytes
    kind = "downloaded" if location.is_kept else "read where it is"
    most = BASE_BYTES + location.buffered_bytes
    startup = 0.0  # it is part of a command that has begun
    return Cost(startup, (Tried(kind, size, rate),), size, most, time.perf_counter() - begun)
