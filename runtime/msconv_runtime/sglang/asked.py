"""What a client calls the fields of its request: SGLang renames them before msconv looks at them."""

from __future__ import annotations

import re
from contextvars import ContextVar

path: ContextVar[str] = ContextVar("path", default="")  # of the request that is being answered

OPENAI = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "sampling_seed": "seed"}
OLLAMA = {"max_new_tokens": "num_predict", "sampling_seed": "seed"}
NAMES: dict[str, dict[str, str]] = {
    "/v1/chat/completions": {**OPENAI, "top_logprobs_num": "top_logprobs"},
    "/v1/completions": {**OPENAI, "top_logprobs_num": "logprobs", "input_ids": "prompt"},
    "/v1/responses": {**OPENAI, "max_new_tokens": "max_output_tokens", "top_logprobs_num": "top_logprobs"},
    "/v1/messages": {"max_new_tokens": "max_tokens"},
    "/api/chat": OLLAMA,
    "/api/generate": OLLAMA,
}


def in_clients_words(message: str) -> str:
    """A message that begins with a field's name, with the name that the endpoint's clients send."""
    names = NAMES.get(path.get(), {})
    return re.sub(r"^\w+", lambda m: names.get(m[0], m[0]), message)
