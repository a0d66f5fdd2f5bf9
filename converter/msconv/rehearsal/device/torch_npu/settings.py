"""What this rehearsal is: read from the directory that MSCONV_REHEARSAL names, written by `msconv rehearse`."""

from __future__ import annotations

import json
import os
from pathlib import Path

from msconv.rehearsal.protocol import DEVICE_FILE, Device


def rehearsal_directory() -> Path:
    """Raises RuntimeError outside a rehearsal: the stand-in serves nothing else."""
    named = os.environ.get("MSCONV_REHEARSAL")
    if not named:
        raise RuntimeError(
            "This torch_npu is msconv's rehearsal device, not an NPU's: it runs in `msconv rehearse` only.  "
            "Take its directory out of PYTHONPATH."
        )
    return Path(named)


SETTINGS = Device(**json.loads((rehearsal_directory() / DEVICE_FILE).read_text()))
