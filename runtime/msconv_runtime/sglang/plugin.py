"""The SGLang plug-in (entry point `sglang.srt.plugins`): runs in every SGLang process, before any model.

It points SGLang's model registry at `slot`.  Directories that are not artifacts go upstream's way untouched.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from . import draft_attention, keys, refusals, requests, server, starting, transfer
from .changes import after, before, instead, make
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

    if lacking := make(CHANGES):
        place, reason = next(iter(lacking.items()))
        logger.warning(
            "msconv: SGLang %s has no %s%s: artifacts cannot be served by it, other models are served as without "
            "msconv.  msconv was tried with %s.  The reason: %s.",
            sglang.__version__,
            place,
            f" (and lacks {len(lacking) - 1} more)" if len(lacking) > 1 else "",
            " and ".join(VERSIONS),
            reason,
        )
        return
    found = os.environ.setdefault("SGLANG_EXTERNAL_MODEL_PACKAGE", PACKAGE)
    if found != PACKAGE:
        logger.warning("msconv: SGLANG_EXTERNAL_MODEL_PACKAGE is %s: artifacts cannot be served; unset it.", found)


def _tell_identity(manager: Any, args: Any, mode: Any, server_args: Any, *rest: Any, **more: Any) -> None:
    transfer.tell_identity(args, mode, server_args)


CHANGES = [
    instead("sglang.srt.arg_groups.validation_hook.check_server_args", starting.check_server_args),
    instead("sglang.srt.configs.model_config.get_config", starting.get_config),
    instead("sglang.srt.model_loader.loader.get_model_architecture", starting.get_model_architecture),
    after("sglang.srt.entrypoints.engine._set_envs_and_config", starting.fork_on_cpu),
    instead("sglang.srt.managers.scheduler.Scheduler.__init__", starting.load_beside),
    instead(f"{RUNNER}.alloc_memory_pool", starting.make_pool),
    instead(f"{RUNNER}.init_mindspore_runner", starting.begin_once),
    instead(f"{DRAFT_BACKENDS}.create_decode_backend", draft_attention.attend_in_steps),
    instead(f"{DRAFT_BACKENDS}.create_draft_extend_backend", draft_attention.attend_in_extend),
    instead(f"{CONFIGURATOR}._build_ascend_mla_kv_pool", starting.build_one_latent),
    before(f"{TRANSFER}.common.conn.CommonKVManager.__init__", _tell_identity),
    instead(f"{TRANSFER}.common.conn.CommonKVManager.try_ensure_parallel_info", transfer.ask_of_prefill),
    instead(f"{TRANSFER}.decode.DecodePreallocQueue._ensure_prefill_info", transfer.fail_refused),
    before(f"{MANAGER}._validate_one_request", refusals.refuse_request),
    after(f"{RUNNING}._stop_match_tail_len", refusals.search_few_tokens),
    after(f"{RUNNING}.tail_str", refusals.search_the_end),
    before(f"{REQUEST}.normalize_batch_and_arguments", requests.check_answers),
    *(instead(f"{MANAGER}.update_weights_from_{s}", refusals.refusal(s)) for s in WEIGHTS_FROM),
    after("sglang.srt.managers.scheduler.Scheduler.get_internal_state", starting.add_state),
    after("sglang.srt.distributed.bootstrap._resolve_dist_init_method", server.meet_at_one_address),
    instead(f"{AUTH}.app_has_admin_force_endpoints", server.guard_always),
    after(f"{AUTH}.add_api_key_middleware", server.add_gate),
    instead("sglang.srt.entrypoints.http_server._wait_and_warmup", server.get_ready),
    after("sglang.srt.server_args.ServerArgs.resolved_dict", server.hide_from_fields),
    after("sglang.srt.server_args.ServerArgs.__repr__", keys.hide_text),
    before(f"{WATERMARKS}.redact_watermark_command_line", server.hide_from_words),
]
