"""Which of SGLang's HTTP endpoints a server of an artifact answers: an allowlist before its router.

A path that is not in the table is answered 404, so an endpoint of another version of SGLang is closed until
somebody has looked at it.  Imports no web framework.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from ..serving.asgi import App, Receive, Scope, Send, has_key, path_of
from . import asked

Access = Literal["open", "own", "admin", "never"]
MAX_ABORT_BYTES = 1 << 16
ABORT = "/abort_request"
FREEZE = "/freeze_gc"  # SGLang calls it itself, once, when the server is warm


@dataclass(frozen=True)
class Rule:
    """`open`: anybody.  `own`: anybody, for requests that he can name.  `admin`: whoever has --admin-api-key.
    `never`: an artifact cannot answer it.  `why` goes to the client."""

    access: Access
    why: str = ""


OPEN, OWN = Rule("open"), Rule("own")
STOPS = Rule("admin", "it holds up or changes what everybody's requests get")
SESSION = Rule("admin", "a session keeps memory until it is closed")
WEIGHTS = Rule("never", "an artifact takes no other weights: convert again and start another server")
LORA = Rule("never", "an artifact's graphs have no place for LoRA: merge it into the checkpoint and convert again")
EXPERTS = Rule("never", "the graphs do not tell which experts they choose")
PROFILE = Rule("never", "SGLang's profiler does not see MindSpore, and writes files where the client says")
LOGGING = Rule("never", "it can end the log and write files where the client says: start with --log-requests")
NO_VECTORS = Rule("never", "the graphs give the logits of the next token, no vectors and no classes")
NO_AUDIO = Rule("never", "the model takes text")
CACHE = Rule("never", "an artifact is served without a hierarchical cache")
CORPORA = Rule("never", "drafts come from the tokens that the server has seen")
ROLES = Rule("never", "an artifact's server prefills and decodes, on the ranks that it has")
UNKNOWN = Rule("never", "it is not among the endpoints that a server of an artifact answers")

ENDPOINTS: dict[str, Rule] = {
    **dict.fromkeys(("/", "/ready", "/ping", "/health", "/health_generate", "/metrics", "/v1/loads"), OPEN),
    **dict.fromkeys(("/get_model_info", "/model_info", "/get_server_info", "/server_info"), OPEN),
    **dict.fromkeys(("/v1/models", "/v1/models/{model:path}"), OPEN),
    **dict.fromkeys(("/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"), OPEN),
    **dict.fromkeys(("/generate", "/v1/completions", "/v1/chat/completions", "/v1/responses"), OPEN),
    **dict.fromkeys(("/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel"), OPEN),
    **dict.fromkeys(("/v1/messages", "/v1/messages/count_tokens", "/v1/score", "/v1/rerank"), OPEN),
    **dict.fromkeys(("/v1/decisions", "/v1/systemone", "/invocations", "/vertex_generate"), OPEN),
    **dict.fromkeys(("/api/chat", "/api/generate", "/api/tags", "/api/show"), OPEN),
    **dict.fromkeys(("/tokenize", "/v1/tokenize", "/detokenize", "/v1/detokenize"), OPEN),
    **dict.fromkeys(("/parse_function_call", "/separate_reasoning", "/flush_cache"), OPEN),
    ABORT: OWN,
    **dict.fromkeys(("/slow_down", "/pause_generation", "/continue_generation", "/set_internal_state"), STOPS),
    **dict.fromkeys(("/set_trace_level", FREEZE), STOPS),
    **dict.fromkeys(("/open_session", "/close_session"), SESSION),
    **dict.fromkeys(
        ("/update_weights_from_disk", "/update_weights_from_tensor", "/update_weights_from_ipc"), WEIGHTS
    ),
    **dict.fromkeys(("/update_weights_from_distributed", "/begin_weight_update", "/end_weight_update"), WEIGHTS),
    **dict.fromkeys(("/init_weights_update_group", "/destroy_weights_update_group"), WEIGHTS),
    **dict.fromkeys(("/update_weight_version", "/weights_checker", "/get_weights_by_name"), WEIGHTS),
    **dict.fromkeys(("/release_memory_occupation", "/resume_memory_occupation"), WEIGHTS),
    **dict.fromkeys(("/init_weights_send_group_for_remote_instance", "/send_weights_to_remote_instance"), WEIGHTS),
    **dict.fromkeys(
        ("/remote_instance_transfer_engine_info", "/get_remote_instance_transfer_engine_info"), WEIGHTS
    ),
    **dict.fromkeys(("/load_lora_adapter", "/load_lora_adapter_from_tensors", "/unload_lora_adapter"), LORA),
    **dict.fromkeys((f"/{verb}_expert_distribution_record" for verb in ("start", "stop", "dump")), EXPERTS),
    **dict.fromkeys(("/start_profile", "/stop_profile"), PROFILE),
    "/configure_logging": LOGGING,
    **dict.fromkeys(("/encode", "/classify", "/v1/embeddings", "/v1/classify"), NO_VECTORS),
    **dict.fromkeys(("/v1/audio/transcriptions", "/v1/realtime"), NO_AUDIO),
    **dict.fromkeys(("/hicache/storage-backend", "/hicache/storage-backend/clear"), CACHE),
    "/get_hicache_l3_cache_layout": CACHE,
    **dict.fromkeys(("/add_external_corpus", "/remove_external_corpus", "/list_external_corpora"), CORPORA),
    **dict.fromkeys(("/pd_role_switch", "/scale_elastic_ep", "/is_scaling_elastic_ep"), ROLES),
}
_TEMPLATES = [
    (re.compile(re.sub(r"\{(\w+)(:path)?\}", lambda m: ".+" if m[2] else "[^/]+", path)), rule)
    for path, rule in ENDPOINTS.items()
    if "{" in path
]


def rule_for(path: str) -> Rule:
    """The rule of a request's path, without its query.  UNKNOWN for one that is not in the table."""
    if path in ENDPOINTS:
        return ENDPOINTS[path]
    return next((rule for template, rule in _TEMPLATES if template.fullmatch(path)), UNKNOWN)


@dataclass
class Gate:
    """ASGI middleware that answers 4xx in SGLang's place to what ENDPOINTS does not open.

    `running`: the ids of the requests that the server has now.
    """

    app: App
    admin_api_key: str | None = None
    running: Callable[[], Iterable[str]] = tuple
    frozen: bool = field(default=False, init=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = path_of(scope) if scope["type"] in ("http", "websocket") else "/"
        asked.path.set(path)
        rule = rule_for(path)
        if rule.access == "never":
            await _refuse(scope, send, 404 if rule is UNKNOWN else 400, f"{path}: {rule.why}.")
        elif rule.access == "open" or self._is_admin(scope) or self._is_sglang_itself(path):
            await self.app(scope, receive, send)
        elif rule.access == "own":
            await self._abort(scope, receive, send)
        else:
            how = (
                "Send its key as the bearer token" if self.admin_api_key else "Start the server with one to use it"
            )
            await _refuse(scope, send, 403, f"{path}: {rule.why}; it needs --admin-api-key.  {how}.")

    async def _abort(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on an abort of one request, and nothing else of what the client wrote."""
        try:
            rid = _one_request(await _read(receive, MAX_ABORT_BYTES), self.running())
        except ValueError as e:
            await _refuse(scope, send, 403, f"{ABORT}: {e}.")
        else:
            await self.app(scope, _replay(json.dumps({"rid": rid}).encode(), receive), send)

    def _is_sglang_itself(self, path: str) -> bool:
        """Whether this is the first FREEZE: the end of SGLang's own start."""
        first = path == FREEZE and not self.frozen
        self.frozen = self.frozen or first
        return first

    def _is_admin(self, scope: Scope) -> bool:
        return has_key(scope, [self.admin_api_key] if self.admin_api_key else [])


def _one_request(body: bytes, running: Iterable[str]) -> str:
    """The id of the one request that this asks to abort.  Raises ValueError: it is not one.  SGLang takes an id
    for all requests whose ids begin with it."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("the body is not JSON, or too long") from None
    rid = asked.get("rid") if isinstance(asked, dict) else None
    if not isinstance(rid, str) or not rid or asked.get("abort_all"):
        raise ValueError("give the id of one request as `rid`; to abort others needs --admin-api-key")
    if any(other != rid and other.startswith(rid) for other in running):
        raise ValueError("other requests' ids begin with this `rid`: they would be aborted too")
    return rid


async def _read(receive: Receive, most: int) -> bytes:
    """A request's body; of a longer one its beginning, and nothing if the client is gone."""
    body, more = b"", True
    while more and len(body) < most:
        message = await receive()
        if message["type"] != "http.request":
            return b""
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body[:most]


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` of a request whose body was read already."""
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Any:
        return pending.pop() if pending else await receive()

    return again


async def _refuse(scope: Scope, send: Send, status: int, message: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": message[:100]})
        return
    answer = {"error": {"message": message, "type": "msconv", "code": status}}
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(answer).encode()})
