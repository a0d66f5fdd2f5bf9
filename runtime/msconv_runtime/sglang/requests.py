"""Requests that an artifact's graphs cannot answer."""

from __future__ import annotations

import operator
from typing import Any

NOT_ANSWERED = {  # fields of a request: the graphs take tokens and give logits
    "input_embeds": "take no embeddings",
    "positional_embed_overrides": "take no embeddings",
    "return_hidden_states": "give no hidden states",
}


def check_request(obj: Any, input_ids: Any, size: int) -> None:
    """Raises ValueError for one of SGLang's requests that the graphs of a model of `size` tokens cannot answer.

    No tokens, or such that no row of the embedding stands for; log probabilities of the prompt, which need all
    its logits, or of more tokens than there are; NOT_ANSWERED.
    """
    for field, why in NOT_ANSWERED.items():
        if (value := getattr(obj, field, None)) is not None and value is not False:
            raise ValueError(f"{field}: the graphs of an artifact {why}.  Leave it out.")
    tokens = () if input_ids is None else input_ids
    if input_ids is not None and not len(tokens):
        raise ValueError(
            "The prompt has no tokens: its text is empty, or the artifact has no tokenizer; then serve it with "
            "`-- --skip-tokenizer-init` and send input_ids."
        )
    sampling = getattr(obj, "sampling_params", None) or {}
    for field, listed in (("input_ids", tokens), ("stop_token_ids", sampling.get("stop_token_ids") or ())):
        for token in listed:
            if not _is_one_of(token, size):
                raise ValueError(f"{field} has the token {token!r}; the model's are 0 to {size - 1}.")
    if (most := getattr(obj, "top_logprobs_num", None) or 0) > size:
        raise ValueError(f"top_logprobs_num is {most}; the model has {size} tokens.")
    start = getattr(obj, "logprob_start_len", None)
    if getattr(obj, "return_logprob", False) and start not in (None, -1) and start < len(tokens):
        raise ValueError(
            f"logprob_start_len {start} asks for log probabilities of the prompt: here are those of generated "
            "tokens only.  Leave it out."
        )


def _is_one_of(token: Any, size: int) -> bool:
    try:
        return 0 <= operator.index(token) < size
    except TypeError:
        return False
