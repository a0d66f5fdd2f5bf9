"""Attention of a draft model on a plain CPU, for which SGLang has none: the graphs attend by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..artifact import is_artifact


def attend_in_steps(original: Callable[[Any], Any], factory: Any) -> Any:
    """What SGLang prepares before each step of a draft: for an artifact's, the same as for its target.  That does
    nothing unless a torch layer asks it."""
    if not _is_ours(factory):
        return original(factory)
    if factory.speculative_num_steps <= 1:
        return None
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    backend: Any = TorchNativeAttnBackend(factory.draft_model_runner)
    backend.attn_backends = [backend] * factory.speculative_num_steps
    return backend


def attend_in_extend(original: Callable[[Any], Any], factory: Any) -> Any:
    """What SGLang prepares before a draft takes what was accepted: None, the draft's own."""
    return None if _is_ours(factory) else original(factory)


def _is_ours(factory: Any) -> bool:
    runner = factory.draft_model_runner
    return runner.device == "cpu" and is_artifact(runner.model_config.model_path)
