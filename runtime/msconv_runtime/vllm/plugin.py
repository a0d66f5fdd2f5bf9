"""The vLLM plug-in (entry point `vllm.general_plugins`): runs in every vLLM process, before any model.

It adds a model class, a loader and a check of the configuration, all under msconv's own names, and looks at
requests for artifacts.  Other models are served as without it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from .arguments import ARCHITECTURE, LOAD_FORMAT
from .environment import VERSIONS

logger = logging.getLogger(__name__)


def activate() -> None:
    """Called by vLLM's plug-in loader, perhaps more than once.  Where this vLLM lacks a place that is needed,
    nothing is changed, and artifacts are not served."""
    import vllm

    try:
        _register()
    except (ImportError, AttributeError) as e:
        logger.warning(
            "msconv: vLLM %s is not as expected (%s): it cannot serve artifacts.  msconv was tried with %s.",
            vllm.__version__,
            e,
            " and ".join(VERSIONS),
        )


def _register() -> None:
    from vllm import ModelRegistry
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
    from vllm.v1.engine.input_processor import InputProcessor

    if ARCHITECTURE in MODELS_CONFIG_MAP:
        return
    _log_as_vllm()
    check = InputProcessor._validate_params

    class ArtifactLoader(BaseModelLoader):
        """Loads nothing but what the slot loads by itself."""

        def download_model(self, model_config: Any) -> None: ...

        def load_weights(self, model: Any, model_config: Any) -> None:
            model.load()

    class ArtifactConfig(VerifyAndUpdateConfig):
        """vLLM's configuration is checked before any process starts."""

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            from .checks import open_served

            open_served(vllm_config)

    register_model_loader(LOAD_FORMAT)(ArtifactLoader)
    ModelRegistry.register_model(ARCHITECTURE, f"{__package__}.slot:{ARCHITECTURE}")
    InputProcessor._validate_params = functools.wraps(check)(_checked(check))
    MODELS_CONFIG_MAP[ARCHITECTURE] = ArtifactConfig


def _log_as_vllm() -> None:
    """What msconv says stands in vLLM's log, where nobody has said otherwise."""
    ours, theirs = logging.getLogger("msconv_runtime"), logging.getLogger("vllm")
    if not ours.handlers:
        ours.handlers, ours.propagate = theirs.handlers, theirs.propagate
        ours.setLevel(theirs.level)


def _checked(check: Callable[..., Any]) -> Callable[..., Any]:
    """A request that the graphs cannot answer is the client's mistake: it would end the process that runs them."""

    def validate(processor: Any, params: Any, *rest: Any, **more: Any) -> Any:
        if processor.model_config.architecture == ARCHITECTURE:
            from vllm.exceptions import VLLMValidationError

            from .requests import request_problem

            if problem := request_problem(params):
                raise VLLMValidationError(problem, parameter="prompt_logprobs")
        return check(processor, params, *rest, **more)

    return validate
