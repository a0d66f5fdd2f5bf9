"""Which of SGLang's models are artifacts: everything else goes SGLang's own way."""

from __future__ import annotations

import functools
import os

from ..artifact import is_artifact

PACKAGE = "msconv_runtime.sglang"


def slot_is_ours() -> bool:
    return os.environ.get("SGLANG_EXTERNAL_MODEL_PACKAGE") == PACKAGE


def serves() -> bool:
    """Whether this process, once SGLang knows its model, serves an artifact."""
    from sglang.srt.runtime_context import get_model

    return is_served(get_model().model_path)


@functools.cache
def is_served(path: str) -> bool:
    """Asked once: the disk may be gone later."""
    return is_artifact(path)
