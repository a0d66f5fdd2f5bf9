"""How SGLang's processes start with an artifact: its configuration, the slot's class, weights and pool."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..artifact import Artifact, is_artifact
from ..serving.signed import refuse_unsigned_once
from .configuration import refuse_other
from .served import slot_is_ours

SLOT = "MindSporeForCausalLM"  # the class that SGLang looks for under --model-impl mindspore


def _keep_for_good() -> None:
    """What was imported stays as long as the process: no search for garbage looks at it again.  One among all of
    SGLang's modules takes 0.4 s, in which no other thread runs Python, and MindSpore makes one before each graph
    that it compiles.  SGLang does the same as soon as a server is ready."""
    gc.freeze()


def get_config(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """An artifact's configuration is that of its graphs, or refused.  Its weights are not quantised any more,
    whatever its source's config.json says."""
    if is_artifact(model):
        refuse_unsigned_once(Path(model))
    config = original(model, *args, **kwargs)
    if is_artifact(model):
        refuse_other(Artifact(model), config, kwargs.get("model_override_args"))
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
    return config


def get_model_architecture(original: Callable[[Any], Any], config: Any) -> Any:
    """The slot's class at once: upstream asks first whether it knows the model itself, and imports all its models
    for that, which takes longer than an artifact takes to load."""
    from sglang.srt.configs.model_config import ModelImpl
    from sglang.srt.models.registry import ModelRegistry

    if config.model_impl != ModelImpl.MINDSPORE or not (slot_is_ours() and is_artifact(config.model_path)):
        return original(config)
    found, name = ModelRegistry.resolve_model_cls([SLOT])
    config._resolved_model_arch, config._resolved_model_impl = name, ModelImpl.MINDSPORE
    return found, name


def fork_on_cpu(result: Any, server_args: Any) -> Any:
    """SGLang starts its processes anew, and each imports for seconds what this one has imported: on a CPU they may
    begin as copies of it.  Only of a process of one thread: a copy has no other, and would wait for it."""
    from sglang.srt.arg_groups.overrides import resolving_view

    view = resolving_view(server_args)
    ours = slot_is_ours() and view.model_impl == "mindspore" and is_artifact(view.model_path)
    if ours and view.device == "cpu" and view.dp_size == 1 and _threads() == 1:
        multiprocessing.set_start_method("fork", force=True)
    return result


def _threads() -> int:
    """Of this process, whoever started them."""
    return sum(1 for _ in Path("/proc/self/task").iterdir())


def make_pool(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    """On a CPU the KV pool's memory is only reserved here: filling it takes longer than loading an artifact."""
    from . import pool

    if runner.device != "cpu" or not (slot_is_ours() and is_artifact(runner.model_config.model_path)):
        return original(runner, *args, **kwargs)
    with pool.reserved_zeros():
        return original(runner, *args, **kwargs)


def begin_once(original: Callable[[Any], None], runner: Any) -> None:
    """MindSpore's device, meeting and groups are a process's: those of the target are there for its draft."""
    if not (runner.is_draft_worker and slot_is_ours() and is_artifact(runner.model_config.model_path)):
        original(runner)


def build_one_latent(original: Callable[..., Any], configurator: Any, **sizes: Any) -> Any:
    """The graphs take the latent and the rotated key as one cache: SGLang's plain pool for latent attention has it
    so.  Its pool for NPUs keeps the two apart."""
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

    if not (slot_is_ours() and is_artifact(configurator.model_config.model_path)):
        return original(configurator, **sizes)
    return configurator._build_mla_kv_pool(
        max_total_num_tokens=sizes["max_total_num_tokens"], mla_pool_class=MLATokenToKVPool
    )


def load_beside(original: Callable[..., Any], scheduler: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
    """An artifact of one rank loads while SGLang makes its pools; the server is not ready before both are done."""
    from ..graphs import Place
    from ..serving import loading
    from . import pool

    root = Path(server_args.model_path)
    if slot_is_ours() and server_args.model_impl == "mindspore" and is_artifact(root):
        _keep_for_good()
        loading.begin(root)
    original(scheduler, server_args, *args, **kwargs)
    if loading.has_begun(root):
        loading.finish(Artifact(root), Place())
    pool.populate_reserved()


def check_server_args(original: Callable[[Any], Any], server_args: Any) -> Any:
    """SGLang asserts an NPU for its MindSpore slot; our artifacts run in it on a CPU as well."""
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.runtime_context import override_platform

    view = resolving_view(server_args)
    if view.model_impl == "mindspore" and view.device == "cpu" and is_artifact(view.model_path):
        with override_platform(is_npu=True):
            return original(server_args)
    return original(server_args)


def add_state(reply: Any, *args: Any, **kwargs: Any) -> Any:
    """What /server_info says of an artifact: how it started, and what has been compiled since."""
    from sglang.srt.runtime_context import get_model

    from ..serving import loading

    if found := loading.state(Path(get_model().model_path)):
        reply.internal_state["msconv"] = found
    return reply
