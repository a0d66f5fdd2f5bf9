"""The SGLang plug-in (entry point `sglang.srt.plugins`): runs in every SGLang process, before any model.

It points SGLang's model registry at `slot`.  Directories that are not artifacts go upstream's way untouched.
"""

from __future__ import annotations

import logging
import os
import pkgutil
from collections.abc import Callable
from typing import Any

from . import draft_attention, keys, refusals, requests, server, starting, transfer
from .environment import VERSIONS
from .served import PACKAGE

MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
REQUEST = "sglang.srt.managers.io_struct.GenerateReqInput"
RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"
RUNNING = "sglang.srt.managers.schedule_batch.Req"
AUTH = "sglang.srt.utils.auth"
CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
WEIGHTS_FROM = ("disk", "tensor", "distributed", "ipc")
WATERMARKS = "sglang.srt.sampling.watermarking.core"
TRANSFER = "sglang.srt.disaggregation"
DRAFT_BACKENDS = "sglang.srt.speculative.draft_utils.DraftBackendFactory"
logger = logging.getLogger(__name__)


def activate() -> None:
    """Called by SGLang's plug-in loader.  Where this SGLang lacks a place that is changed, none is: servers of
    other models are as they were, and artifacts are not served."""
    import sglang
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    changes = _changes(HookType)
    lacking = [] if sglang.__version__ in VERSIONS else [place for place, _, _ in changes if not _is_there(place)]
    if lacking:
        logger.warning(
            "msconv: SGLang %s has no %s%s: artifacts cannot be served by it, other models are served as without "
            "msconv.  msconv was tried with %s.",
            sglang.__version__,
            lacking[0],
            f" (and lacks {len(lacking) - 1} more)" if lacking[1:] else "",
            " and ".join(VERSIONS),
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
        ("sglang.srt.arg_groups.validation_hook.check_server_args", starting.check_server_args, kind.AROUND),
        ("sglang.srt.configs.model_config.get_config", starting.get_config, kind.AROUND),
        ("sglang.srt.model_loader.loader.get_model_architecture", starting.get_model_architecture, kind.AROUND),
        ("sglang.srt.entrypoints.engine._set_envs_and_config", starting.fork_on_cpu, kind.AFTER),
        ("sglang.srt.managers.scheduler.Scheduler.__init__", starting.load_beside, kind.AROUND),
        (f"{RUNNER}.alloc_memory_pool", starting.make_pool, kind.AROUND),
        (
            f"{RUNNER}.init_mindspore_runner",
            starting.begin_once,
            kind.AROUND,
        ),
        (f"{DRAFT_BACKENDS}.create_decode_backend", draft_attention.attend_in_steps, kind.AROUND),
        (f"{DRAFT_BACKENDS}.create_draft_extend_backend", draft_attention.attend_in_extend, kind.AROUND),
        (f"{CONFIGURATOR}._build_ascend_mla_kv_pool", starting.build_one_latent, kind.AROUND),
        (f"{TRANSFER}.common.conn.CommonKVManager.__init__", _tell_identity, kind.BEFORE),
        (f"{TRANSFER}.common.conn.CommonKVManager.try_ensure_parallel_info", transfer.ask_of_prefill, kind.AROUND),
        (f"{TRANSFER}.decode.DecodePreallocQueue._ensure_prefill_info", transfer.fail_refused, kind.AROUND),
        (f"{MANAGER}._validate_one_request", refusals.refuse_request, kind.BEFORE),
        (f"{RUNNING}._stop_match_tail_len", refusals.search_few_tokens, kind.AFTER),
        (f"{RUNNING}.tail_str", refusals.search_the_end, kind.AFTER),
        (f"{REQUEST}.normalize_batch_and_arguments", requests.check_answers, kind.BEFORE),
        *((f"{MANAGER}.update_weights_from_{s}", refusals.refusal(s), kind.AROUND) for s in WEIGHTS_FROM),
        ("sglang.srt.managers.scheduler.Scheduler.get_internal_state", starting.add_state, kind.AFTER),
        ("sglang.srt.distributed.bootstrap._resolve_dist_init_method", server.meet_at_one_address, kind.AFTER),
        (f"{AUTH}.app_has_admin_force_endpoints", server.guard_always, kind.AROUND),
        (f"{AUTH}.add_api_key_middleware", server.add_gate, kind.AFTER),
        ("sglang.srt.entrypoints.http_server._wait_and_warmup", server.say_ready, kind.AFTER),
        ("sglang.srt.server_args.ServerArgs.resolved_dict", server.hide_from_fields, kind.AFTER),
        ("sglang.srt.server_args.ServerArgs.__repr__", keys.hide_text, kind.AFTER),
        (
            f"{WATERMARKS}.redact_watermark_command_line",
            server.hide_from_words,
            kind.BEFORE,
        ),
    ]


def _tell_identity(manager: Any, args: Any, mode: Any, server_args: Any, *rest: Any, **more: Any) -> None:
    transfer.tell_identity(args, mode, server_args)
