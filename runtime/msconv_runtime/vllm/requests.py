"""Requests that an artifact's graphs cannot answer."""

from __future__ import annotations

from typing import Any


def request_problem(params: Any) -> str:
    """Why vLLM's parameters of a request cannot be followed, with what to do; "" if they can."""
    if getattr(params, "prompt_logprobs", None) is not None:
        return (
            "prompt_logprobs (or echo with logprobs): vLLM gives no log probabilities of the prompt for an "
            "artifact.  Leave it out, or serve with SGLang, which does."
        )
    return ""
