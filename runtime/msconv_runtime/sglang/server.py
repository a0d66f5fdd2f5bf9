"""The server of an artifact as others see it: where it listens, who may ask for what, what it says of itself."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..artifact import Artifact
from ..serving.halves import MODES
from ..serving.pages import Pages
from ..serving.proof import proof_of
from ..serving.ready import address, first_request, ready_lines
from ..serving.settings import Settings
from . import meeting
from .endpoints import ENDPOINTS, Gate
from .flags import NO_TOKENIZER
from .halves import next_address, next_steps
from .keys import hide_fields, hide_words
from .served import is_served, serves
from .warmup import begun_at_once


def meet_at_one_address(url: str, *, dist_port: int) -> str:
    """Torch's store would listen at all addresses, whatever --host says."""
    from sglang.srt.runtime_context import get_parallel

    if not serves():
        return url
    meeting.register()
    return meeting.meeting_url(url, get_parallel().nnodes)


def guard_always(original: Callable[[Any], bool], app: Any) -> bool:
    """So that SGLang comes to `add_gate` without keys as well."""
    return is_served(app.server_args.model_path) or original(app)


def add_gate(result: None, app: Any, *, api_key: str | None, admin_api_key: str | None) -> None:
    """Put our allowlist before SGLang's own check of keys, which must ask for the same key as it."""
    if not is_served(app.server_args.model_path):
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


def get_ready(original: Callable[..., None], server_args: Any, *args: Any, **kwargs: Any) -> None:
    """SGLang's warm-up, and then where the server is and what it can be asked."""
    from sglang.srt.entrypoints import http_server
    from sglang.srt.managers.tokenizer_manager import ServerStatus

    ours = is_served(server_args.model_path)
    with begun_at_once(http_server, server_args.url()) if ours else contextlib.nullcontext():
        original(server_args, *args, **kwargs)
    if ours and http_server._global_state.tokenizer_manager.server_status == ServerStatus.Up:
        _say_ready(server_args)


def _say_ready(server_args: Any) -> None:
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


def hide_from_fields(values: dict[str, Any], arguments: Any) -> dict[str, Any]:
    return hide_fields(values)


def hide_from_words(argv: list[str], *rest: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (hide_words(list(argv)), *rest), {}
