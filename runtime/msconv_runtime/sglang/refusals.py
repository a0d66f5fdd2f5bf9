"""What a running server of an artifact refuses, in SGLang's own places: requests, and other weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..artifact import Artifact
from ..roles import gives_all_logits
from ..serving.settings import Settings
from ..targets import target_named
from .asked import in_clients_words
from .requests import check_request
from .served import is_served, serves
from .speculation import gives_hidden
from .stop_regex import searched, searched_tokens


def refuse_request(manager: Any, obj: Any, input_ids: Any) -> None:
    """A 400 to the client for what the graphs cannot answer: it would end the process that runs them, or be
    missing from the answer."""
    if is_served(manager.model_path):
        try:
            path, size = manager.model_path, manager.model_config.vocab_size
            check_request(obj, input_ids, size, missing_logprobs(path), _gives_hidden(path))
        except ValueError as e:
            raise ValueError(in_clients_words(str(e))) from None


@functools.cache
def missing_logprobs(path: str) -> str:
    """Why an artifact's graphs give no log probabilities of prompts, and what adds them; "" if they do."""
    target = Settings.read().target
    if gives_all_logits(Artifact(path).graphs(target)):
        return ""
    return f"this artifact has no graphs for them.  `msconv compile {path} --target {target}` adds them."


@functools.cache
def _gives_hidden(path: str) -> bool:
    return gives_hidden(Artifact(path), target_named(Settings.read().target))


def search_few_tokens(tokens: int, request: Any, *args: Any, **kwargs: Any) -> int:
    return searched_tokens(tokens, request.sampling_params) if serves() else tokens


def search_the_end(text: str, request: Any, *args: Any, **kwargs: Any) -> str:
    """What `check_stop_regex` counts with: expressions are searched for at the end of the text."""
    return searched(text, request.sampling_params) if serves() else text


def refusal(source: str) -> Callable[..., Any]:
    return functools.partial(_refuse_weights, (0,) if source == "disk" else ())


async def _refuse_weights(
    rest: tuple[Any, ...], original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any
) -> Any:
    """Other weights for a running server: it would go on with those it has.  `rest`: what follows success and
    message in SGLang's answer."""
    if not is_served(manager.model_path):
        return await original(manager, *args, **kwargs)
    return False, "An artifact takes no other weights: convert again and start another server.", *rest
