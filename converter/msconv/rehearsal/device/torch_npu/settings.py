"""What this rehearsal is: read from the directory that MSCONV_REHEARSAL names, written by `msconv rehearse`."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """`library`: the built device.  `devices`: how many a process sees, of `memory_bytes` each.  `name`, `arch`:
    what the device calls itself to torch_npu and to CANN.  `exact`: graphs compute in float32."""

    library: str
    devices: int
    memory_bytes: int
    name: str
    arch: int
    exact: bool


def rehearsal_directory() -> Path:
    """Raises RuntimeError outside a rehearsal: the stand-in serves nothing else."""
    named = os.environ.get("MSCONV_REHEARSAL")
    if not named:
        raise RuntimeError(
            "This torch_npu is msconv's rehearsal device, not an NPU's: it runs in `msconv rehearse` only.  "
            "Take its directory out of PYTHONPATH."
        )
    return Path(named)


def read_settings() -> Settings:
    return Settings(**json.loads((rehearsal_directory() / "device.json").read_text()))


SETTINGS = read_settings()
