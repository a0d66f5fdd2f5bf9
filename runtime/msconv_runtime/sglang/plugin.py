"""The SGLang plug-in (entry point `sglang.srt.plugins`): runs in every SGLang process, before any model.

It points SGLang's model registry at `slot`.  Directories that are not artifacts go upstream's way untouched.
"""

from __future__ import annotations

import functools
import gc
import logging
import multiprocessing
import os
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..artifact import Artifact, is_artifact
from ..roles import gives_all_logits
from ..serving.halves import MODES
from ..serving.pages import Pages
from ..serving.proof import proof_of
from ..serving.ready import address, first_request, ready_lines
from ..serving.settings import Settings
from ..serving.signed import refuse_unsigned_once
from ..targets import target_named
from ..versions import SGLANG
from . import meeting
from .asked import in_clients_words
from .configuration import refuse_other
from .draft_attention import attend_in_extend, attend_in_steps
from .endpoints import ENDPOINTS, Gate
from .flags import NO_TOKENIZER
from .halves import next_address, next_steps
from .keys import hide_fields, hide_text, hide_words
from .requests import check_answers, check_request
from .speculation import gives_hidden
from .stop_regex import searched, searched_tokens
from .transfer import ask_of_prefill, fail_refused, tell_identity

PACKAGE = "msconv_runtime.sglang"
SLOT = "MindSporeForCausalLM"  # the class that SGLang looks for under --model-impl mindspore
MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
REQUEST = "sglang.srt.managers.io_struct.GenerateReqInput"
RUNNING = "sglang.srt.managers.schedule_batch.Req"
AUTH = "sglang.srt.utils.auth"
CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
WEIGHTS_FROM = ("disk", "tensor", "distributed", "ipc")
TRANSFER = "sglang.srt.disaggregation"
DRAFT_BACKENDS = "sglang.srt.speculative.draft_utils.DraftBackendFactory"
logger = logging.getLogger(__name__)


def activate() -> None:
    """Called by SGLang's plug-in loader.  Where this SGLang lacks a place that is changed, none is: servers of
    other models are as they were, and artifacts are not served."""
    import sglang
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    changes = _changes(HookType)
    lacking = [] if sglang.__version__ in SGLANG else [place for place, _, _ in changes if not _is_there(place)]
    if lacking:
        logger.warning(
            "msconv: SGLang %s has no %s%s: artifacts cannot be served by it, other models are served as without "
            "msconv.  msconv was tried with %s.",
            sglang.__version__,
            lacking[0],
            f" (and lacks {len(lacking) - 1} more)" if lacking[1:] else "",
            " and ".join(SGLANG),
        )
        return
    found = os.environ.setdefault("SGLANG_EXTERNAL_MODEL_PACKAGE", PACKAGE)
    if found != PACKAGE:
        logger.warning("msconv: SGLANG_EXTERNAL_MODEL_PACKAGE is %s: artifacts cannot be served; unset it.", found)
    for place, change, kind in changes:
        HookRegistry.register(place, change, kind)


def _is_there(place: str) -> bool:
    """Whether a dotted name, of a function or method, can be imported."""
    path, _, name = place.rpartition(".")
    try:
        return hasattr(pkgutil.resolve_name(path), name)
    except (ImportError, AttributeError):
        return False


def _changes(kind: Any) -> list[tuple[str, Callable[..., Any], Any]]:
    """(place in SGLang, what is put there, how), in the order of registering.  `kind`: SGLang's HookType."""
    return [
        ("sglang.srt.arg_groups.validation_hook.check_server_args", _check_server_args, kind.AROUND),
        ("sglang.srt.configs.model_config.get_config", _get_config, kind.AROUND),
        ("sglang.srt.model_loader.loader.get_model_architecture", _get_model_architecture, kind.AROUND),
        ("sglang.srt.entrypoints.engine._set_envs_and_config", _fork_on_cpu, kind.AFTER),
        ("sglang.srt.managers.scheduler.Scheduler.__init__", _load_beside, kind.AROUND),
        ("sglang.srt.model_executor.model_runner.ModelRunner.alloc_memory_pool", _make_pool, kind.AROUND),
        ("sglang.srt.model_executor.model_runner.ModelRunner.init_mindspore_runner", _begin_once, kind.AROUND),
        (f"{DRAFT_BACKENDS}.create_decode_backend", attend_in_steps, kind.AROUND),
        (f"{DRAFT_BACKENDS}.create_draft_extend_backend", attend_in_extend, kind.AROUND),
        (f"{CONFIGURATOR}._build_ascend_mla_kv_pool", _build_one_latent, kind.AROUND),
        (f"{TRANSFER}.common.conn.CommonKVManager.__init__", _tell_identity, kind.BEFORE),
        (f"{TRANSFER}.common.conn.CommonKVManager.try_ensure_parallel_info", ask_of_prefill, kind.AROUND),
        (f"{TRANSFER}.decode.DecodePreallocQueue._ensure_prefill_info", fail_refused, kind.AROUND),
        (f"{MANAGER}._validate_one_request", _refuse_request, kind.BEFORE),
        (f"{RUNNING}._stop_match_tail_len", _search_few_tokens, kind.AFTER),
        (f"{RUNNING}.tail_str", _search_the_end, kind.AFTER),
        (f"{REQUEST}.normalize_batch_and_arguments", check_answers, kind.BEFORE),
        *((f"{MANAGER}.update_weights_from_{s}", _refusal(s), kind.AROUND) for s in WEIGHTS_FROM),
        ("sglang.srt.managers.scheduler.Scheduler.get_internal_state", _add_state, kind.AFTER),
        ("sglang.srt.distributed.bootstrap._resolve_dist_init_method", _meet_at_one_address, kind.AFTER),
        (f"{AUTH}.app_has_admin_force_endpoints", _guard_always, kind.AROUND),
        (f"{AUTH}.add_api_key_middleware", _add_gate, kind.AFTER),
        ("sglang.srt.entrypoints.http_server._wait_and_warmup", _say_ready, kind.AFTER),
        ("sglang.srt.server_args.ServerArgs.resolved_dict", _hide_fields, kind.AFTER),
        ("sglang.srt.server_args.ServerArgs.__repr__", hide_text, kind.AFTER),
        ("sglang.srt.sampling.watermarking.core.redact_watermark_command_line", _hide_words, kind.BEFORE),
    ]


def _refusal(source: str) -> Callable[..., Any]:
    return functools.partial(_refuse_weights, (0,) if source == "disk" else ())


def _keep_for_good() -> None:
    """What was imported stays as long as the process: no search for garbage looks at it again.  One among all of
    SGLang's modules takes 0.4 s, in which no other thread runs Python, and MindSpore makes one before each graph
    that it compiles.  SGLang does the same as soon as a server is ready."""
    gc.freeze()


def _slot_is_ours() -> bool:
    return os.environ.get("SGLANG_EXTERNAL_MODEL_PACKAGE") == PACKAGE


def _get_config(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
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


def _get_model_architecture(original: Callable[[Any], Any], config: Any) -> Any:
    """The slot's class at once: upstream asks first whether it knows the model itself, and imports all its models
    for that, which takes longer than an artifact takes to load."""
    from sglang.srt.configs.model_config import ModelImpl
    from sglang.srt.models.registry import ModelRegistry

    if config.model_impl != ModelImpl.MINDSPORE or not (_slot_is_ours() and is_artifact(config.model_path)):
        return original(config)
    found, name = ModelRegistry.resolve_model_cls([SLOT])
    config._resolved_model_arch, config._resolved_model_impl = name, ModelImpl.MINDSPORE
    return found, name


def _fork_on_cpu(result: Any, server_args: Any) -> Any:
    """SGLang starts its processes anew, and each imports for seconds what this one has imported: on a CPU they may
    begin as copies of it.  Only of a process of one thread: a copy has no other, and would wait for it."""
    from sglang.srt.arg_groups.overrides import resolving_view

    view = resolving_view(server_args)
    ours = _slot_is_ours() and view.model_impl == "mindspore" and is_artifact(view.model_path)
    if ours and view.device == "cpu" and view.dp_size == 1 and _threads() == 1:
        multiprocessing.set_start_method("fork", force=True)
    return result


def _threads() -> int:
    """Of this process, whoever started them."""
    return sum(1 for _ in Path("/proc/self/task").iterdir())


def _make_pool(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    """On a CPU the KV pool's memory is only reserved here: filling it takes longer than loading an artifact."""
    from . import pool

    if runner.device != "cpu" or not (_slot_is_ours() and is_artifact(runner.model_config.model_path)):
        return original(runner, *args, **kwargs)
    with pool.reserved_zeros():
        return original(runner, *args, **kwargs)


def _begin_once(original: Callable[[Any], None], runner: Any) -> None:
    """MindSpore's device, meeting and groups are a process's: those of the target are there for its draft."""
    if not (runner.is_draft_worker and _slot_is_ours() and is_artifact(runner.model_config.model_path)):
        original(runner)


def _build_one_latent(original: Callable[..., Any], configurator: Any, **sizes: Any) -> Any:
    """The graphs take the latent and the rotated key as one cache: SGLang's plain pool for latent attention has it
    so.  Its pool for NPUs keeps the two apart."""
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

    if not (_slot_is_ours() and is_artifact(configurator.model_config.model_path)):
        return original(configurator, **sizes)
    return configurator._build_mla_kv_pool(
        max_total_num_tokens=sizes["max_total_num_tokens"], mla_pool_class=MLATokenToKVPool
    )


def _load_beside(
    original: Callable[..., Any], scheduler: Any, server_args: Any, *args: Any, **kwargs: Any
) -> None:
    """An artifact of one rank loads while SGLang makes its pools; the server is not ready before both are done."""
    from ..graphs import Place
    from ..serving import loading
    from . import pool

    root = Path(server_args.model_path)
    if _slot_is_ours() and server_args.model_impl == "mindspore" and is_artifact(root):
        _keep_for_good()
        loading.begin(root)
    original(scheduler, server_args, *args, **kwargs)
    if loading.has_begun(root):
        loading.finish(Artifact(root), Place())
    pool.populate_reserved()


def _tell_identity(manager: Any, args: Any, mode: Any, server_args: Any, *rest: Any, **more: Any) -> None:
    tell_identity(args, mode, server_args)


def _refuse_request(manager: Any, obj: Any, input_ids: Any) -> None:
    """A 400 to the client for what the graphs cannot answer: it would end the process that runs them, or be
    missing from the answer."""
    if _is_served(manager.model_path):
        try:
            path, size = manager.model_path, manager.model_config.vocab_size
            check_request(obj, input_ids, size, _missing(path), _gives_hidden(path))
        except ValueError as e:
            raise ValueError(in_clients_words(str(e))) from None


def _search_few_tokens(tokens: int, request: Any, *args: Any, **kwargs: Any) -> int:
    return searched_tokens(tokens, request.sampling_params) if _serves() else tokens


def _search_the_end(text: str, request: Any, *args: Any, **kwargs: Any) -> str:
    """What `check_stop_regex` counts with: expressions are searched for at the end of the text."""
    return searched(text, request.sampling_params) if _serves() else text


async def _refuse_weights(
    rest: tuple[Any, ...], original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any
) -> Any:
    """Other weights for a running server: it would go on with those it has.  `rest`: what follows success and
    message in SGLang's answer."""
    if not _is_served(manager.model_path):
        return await original(manager, *args, **kwargs)
    return False, "An artifact takes no other weights: convert again and start another server.", *rest


def _meet_at_one_address(url: str, *, dist_port: int) -> str:
    """Torch's store would listen at all addresses, whatever --host says."""
    from sglang.srt.runtime_context import get_parallel

    if not _serves():
        return url
    meeting.register()
    return meeting.meeting_url(url, get_parallel().nnodes)


def _guard_always(original: Callable[[Any], bool], app: Any) -> bool:
    """So that SGLang comes to `_add_gate` without keys as well."""
    return _is_served(app.server_args.model_path) or original(app)


def _add_gate(result: None, app: Any, *, api_key: str | None, admin_api_key: str | None) -> None:
    """Put our allowlist before SGLang's own check of keys, which must ask for the same key as it."""
    if not _is_served(app.server_args.model_path):
        return
    from sglang.srt.utils.auth import AuthLevel

    for route in app.routes:
        rule, endpoint = ENDPOINTS.get(getattr(route, "path", "")), getattr(route, "endpoint", None)
        if rule is not None and rule.access == "admin" and endpoint is not None:
            endpoint._auth_level = AuthLevel.ADMIN_OPTIONAL
    app.add_middleware(Gate, admin_api_key=admin_api_key, running=_running)
    settings, artifact = Settings.read(), Artifact(Path(app.server_args.model_path))
    keys = tuple(key for key in (api_key, admin_api_key) if key)
    app.add_middleware(Pages, proof=proof_of(artifact, settings.target), ui=settings.ui, keys=keys)


def _say_ready(result: None, server_args: Any, *args: Any, **kwargs: Any) -> None:
    """Where the server is and what it can be asked, once it is ready."""
    from sglang.srt.entrypoints import http_server
    from sglang.srt.managers.tokenizer_manager import ServerStatus

    up = http_server._global_state.tokenizer_manager.server_status == ServerStatus.Up
    if not up or not _is_served(server_args.model_path):
        return
    url, name = address(server_args.host, server_args.port), server_args.served_model_name
    mode = server_args.disaggregation_mode
    is_half = mode in MODES
    request = first_request(
        next_address(mode, url, server_args.port) if is_half else url,
        name,
        Path(server_args.model_path),
        not server_args.skip_tokenizer_init,
        bool(server_args.api_key or server_args.admin_api_key),
    )
    lines = ready_lines(url, "" if is_half else request, Settings.read().ui)
    if is_half:
        more = NO_TOKENIZER if server_args.skip_tokenizer_init else ""
        bootstrap = server_args.disaggregation_bootstrap_port
        lines[1:1] = next_steps(mode, server_args.model_path, url, server_args.port, bootstrap, request, more)
    print("\n".join(lines), file=sys.stderr, flush=True)


def _running() -> list[str]:
    from sglang.srt.entrypoints import http_server

    return list(http_server._global_state.tokenizer_manager.rid_to_state)


def _hide_fields(values: dict[str, Any], arguments: Any) -> dict[str, Any]:
    return hide_fields(values)


def _hide_words(argv: list[str], *rest: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (hide_words(list(argv)), *rest), {}


def _serves() -> bool:
    """Whether this process, once SGLang knows its model, serves an artifact."""
    from sglang.srt.runtime_context import get_model

    return _is_served(get_model().model_path)


@functools.cache
def _is_served(path: str) -> bool:
    """Asked once: the disk may be gone later."""
    return is_artifact(path)


@functools.cache
def _missing(path: str) -> str:
    """Why an artifact's graphs give no log probabilities of prompts, and what adds them; "" if they do."""
    target = Settings.read().target
    if gives_all_logits(Artifact(path).graphs(target)):
        return ""
    return f"this artifact has no graphs for them.  `msconv compile {path} --target {target}` adds them."


@functools.cache
def _gives_hidden(path: str) -> bool:
    return gives_hidden(Artifact(path), target_named(Settings.read().target))


def _add_state(reply: Any, *args: Any, **kwargs: Any) -> Any:
    """What /server_info says of an artifact: how it started, and what has been compiled since."""
    from sglang.srt.runtime_context import get_model

    from ..serving import loading

    if found := loading.state(Path(get_model().model_path)):
        reply.internal_state["msconv"] = found
    return reply


def _check_server_args(original: Callable[[Any], Any], server_args: Any) -> Any:
    """SGLang asserts an NPU for its MindSpore slot; our artifacts run in it on a CPU as well."""
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.runtime_context import override_platform

    view = resolving_view(server_args)
    if view.model_impl == "mindspore" and view.device == "cpu" and is_artifact(view.model_path):
        with override_platform(is_npu=True):
            return original(server_args)
    return original(server_args)
