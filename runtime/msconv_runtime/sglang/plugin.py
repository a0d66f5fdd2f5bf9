"""The SGLang plug-in (entry point `sglang.srt.plugins`): runs in every SGLang process, before any model.

It points SGLang's model registry at `slot`.  Directories that are not artifacts go upstream's way untouched.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from ..artifact import is_artifact

PACKAGE = "msconv_runtime.sglang"
logger = logging.getLogger(__name__)


def activate() -> None:
    """Called by SGLang's plug-in loader."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    found = os.environ.setdefault("SGLANG_EXTERNAL_MODEL_PACKAGE", PACKAGE)
    if found != PACKAGE:
        logger.warning("msconv: SGLANG_EXTERNAL_MODEL_PACKAGE is %s: artifacts cannot be served; unset it.", found)
    HookRegistry.register(
        "sglang.srt.arg_groups.validation_hook.check_server_args", _check_server_args, HookType.AROUND
    )
    HookRegistry.register("sglang.srt.configs.model_config.get_config", _get_config, HookType.AROUND)


def _get_config(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """An artifact's weights are not quantised any more, whatever its source's config.json says."""
    config = original(model, *args, **kwargs)
    if is_artifact(model) and getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return config


def _check_server_args(original: Callable[[Any], Any], server_args: Any) -> Any:
    """SGLang asserts an NPU for its MindSpore slot; our artifacts run in it on a CPU as well."""
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.runtime_context import override_platform

    view = resolving_view(server_args)
    if view.model_impl == "mindspore" and view.device == "cpu" and is_artifact(view.model_path):
        with override_platform(is_npu=True):
            return original(server_args)
    return original(server_args)
