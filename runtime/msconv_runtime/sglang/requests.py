"""Requests that an artifact's graphs cannot answer."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from .stop_regex import check_stop_regex

WHOLE = 2**31 - 1  # SGLang's tensors take these as int32 or int64, its scheduler ends on what does not fit
ANSWERS = 1024  # to one prompt: SGLang makes that many requests of it at once, before it looks at any
LOGPROBS = 1 << 20  # of a prompt to a request: each is some hundred bytes by the time it is sent
FLOAT32 = 3.4e38
SEEDS = 2**63 - 1
NOT_ANSWERED = {  # fields of a request: the graphs take tokens and give logits
    "input_embeds": "take no embeddings",
    "positional_embed_overrides": "take no embeddings",
    "multi_item_delimiter_indices": "score the end of a prompt, and not places within it",
    "token_indices_to_pool": "score the end of a prompt, and not places within it",
}
NO_HIDDEN = {"return_hidden_states": "give no hidden states"}  # SGLang itself refuses it without its flag


def check_request(obj: Any, input_ids: Any, size: int, missing: str = "", gives_hidden: bool = False) -> None:
    """Raises ValueError for one of SGLang's requests that the graphs of a model of `size` tokens cannot answer.

    No tokens, or such that no row of the embedding stands for; log probabilities of more tokens than there are; of
    the prompt, if the artifact is `missing` the graphs with all its logits (that says how to add them), or so many
    that the server's memory would be full of them; expressions that take too long to search for; NOT_ANSWERED.
    """
    not_answered = NOT_ANSWERED if gives_hidden else NOT_ANSWERED | NO_HIDDEN
    for field, why in not_answered.items():
        if (value := getattr(obj, field, None)) is not None and value is not False:
            raise ValueError(f"{field}: the graphs of an artifact {why}.  Leave it out.")
    tokens = () if input_ids is None else input_ids
    if input_ids is not None and not len(tokens):
        raise ValueError(
            "The prompt has no tokens: its text is empty, or the artifact has no tokenizer; then serve it with "
            "`-- --skip-tokenizer-init` and send input_ids."
        )
    sampling = getattr(obj, "sampling_params", None) or {}
    named = {
        "input_ids": tokens,
        "stop_token_ids": sampling.get("stop_token_ids") or (),
        "token_ids_logprob": _listed(obj),
        "logit_bias": [_whole(token) for token in sampling.get("logit_bias") or ()],
    }
    for field, listed in named.items():
        for token in listed:
            if not _is_one_of(token, size):
                raise ValueError(f"{field} has the token {token!r}; the model's are 0 to {size - 1}.")
    check_stop_regex(sampling.get("stop_regex"))
    check_numbers(sampling, getattr(obj, "priority", None))
    if (most := getattr(obj, "top_logprobs_num", None) or 0) > size:
        raise ValueError(f"top_logprobs_num is {most}; the model has {size} tokens.")
    check_prompt_logprobs(obj, len(tokens), missing)


def check_prompt_logprobs(obj: Any, length: int, missing: str) -> None:
    """Raises ValueError for log probabilities of a prompt of `length` tokens that are not given: see
    `check_request`."""
    start = getattr(obj, "logprob_start_len", None)
    if not getattr(obj, "return_logprob", False) or start in (None, -1):
        return
    if not isinstance(start, int) or start < 0:
        raise ValueError(f"logprob_start_len is {start!r}; it is a position in the prompt, or -1 for none of it.")
    if start >= length:
        return
    if missing:
        raise ValueError(f"logprob_start_len {start} asks for log probabilities of the prompt: {missing}")
    values = (length - start) * ((getattr(obj, "top_logprobs_num", None) or 0) + len(_listed(obj)) + 1)
    if values > LOGPROBS:
        raise ValueError(
            f"Log probabilities of {length - start} tokens of the prompt, {values // (length - start)} of each, "
            f"are {values}: at most {LOGPROBS} are given to a request.  Ask for a smaller top_logprobs_num, fewer "
            "token_ids_logprob, or a larger logprob_start_len."
        )


def _listed(obj: Any) -> Any:
    return getattr(obj, "token_ids_logprob", None) or ()


def check_answers(obj: Any) -> None:
    """Raises ValueError for a request that asks for too many answers to a prompt."""
    given = getattr(obj, "sampling_params", None)
    for sampling in given if isinstance(given, list) else [given]:
        wanted = sampling.get("n") if isinstance(sampling, dict) else None
        if isinstance(wanted, int) and wanted > ANSWERS:
            raise ValueError(f"n is {str(wanted)[:40]}: at most {ANSWERS} answers to a prompt are given.")


def check_numbers(sampling: dict[str, Any], priority: int | None) -> None:
    """Raises ValueError for a number that is not one, or larger than SGLang's process of the model can take."""
    for field, number in _numbers("", {**sampling, "priority": priority}):
        most = SEEDS if field == "sampling_seed" else WHOLE
        if isinstance(number, int) and abs(number) > most:
            raise ValueError(f"{field} is {str(number)[:40]}; at most {most} is taken.")
        if isinstance(number, float) and not abs(number) <= FLOAT32:
            raise ValueError(f"{field} is {number}: a finite number of at most {FLOAT32:.2g} is needed.")


def _numbers(field: str, value: Any) -> Iterator[tuple[str, int | float]]:
    """Those in a parameter, with its name."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield field, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(field or str(name), inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(field, inner)


def _whole(text: Any) -> Any:
    """The number that a JSON object's name stands for, or the name."""
    return int(text) if isinstance(text, str) and text.isdecimal() and len(text) < 20 else text


def _is_one_of(token: Any, size: int) -> bool:
    try:
        return 0 <= operator.index(token) < size
    except TypeError:
        return False
