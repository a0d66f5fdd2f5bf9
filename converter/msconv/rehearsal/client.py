"""How a rehearsal asks: SGLang's own /generate, token ids in and out, greedy."""

from __future__ import annotations

import json
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from msconv_runtime.errors import VerificationFailed

from .server import FAILURES, Server

LONG = 512  # tokens that an aborted request asks for


class HttpClient:
    """A `scenario.Client`.  Raises VerificationFailed where the server does not answer."""

    def __init__(self, server: Server, room: int, timeout_s: float) -> None:
        """`room`: tokens that a sequence may have."""
        self._server, self._room, self._timeout_s = server, room, timeout_s

    def generate(self, ids: list[int], new: int, **sampling: Any) -> list[tuple[list[int], int]]:
        body = {"input_ids": ids, "sampling_params": {**_greedy(new), **sampling}}
        try:
            with self._server.open("/generate", body, self._timeout_s) as reply:
                found = json.loads(reply.read())
            answers = found if isinstance(found, list) else [found]
            return [(a["output_ids"], int(a["meta_info"].get("cached_tokens") or 0)) for a in answers]
        except FAILURES as e:
            raise self._failed(ids, e) from None

    def logprobs(self, ids: list[int], new: int) -> tuple[list[int], list[float]]:
        body = {"input_ids": ids, "sampling_params": _greedy(new), "return_logprob": True, "logprob_start_len": 0}
        try:
            with self._server.open("/generate", body, self._timeout_s) as reply:
                found = json.loads(reply.read())
        except FAILURES as e:
            raise self._failed(ids, e) from None
        values = [value for value, _, _ in found["meta_info"]["input_token_logprobs"]]
        return found["output_ids"], values[1:]

    def abort_after(self, ids: list[int], count: int) -> list[int]:
        name = "msconv-rehearsal-abort"
        most = min(LONG, self._room - len(ids) - 2)
        tokens: list[int] = []
        aborted = False
        try:
            with self.stream(ids, most, rid=name) as parts:
                for part in parts:
                    tokens = part
                    if len(tokens) >= count and not aborted:
                        aborted = True
                        self._server.open("/abort_request", {"rid": name}, self._timeout_s).close()
        except FAILURES as e:
            raise self._failed(ids, e) from None
        if len(tokens) >= most:
            raise VerificationFailed(f"A request was not aborted: all of its {most} tokens came.")
        return tokens

    @contextmanager
    def stream(self, ids: list[int], new: int, **more: Any) -> Iterator[Iterator[list[int]]]:
        """The tokens of an answer so far, each time that there are more."""
        body = {"input_ids": ids, "sampling_params": _greedy(new), "stream": True, **more}
        with self._server.open("/generate", body, self._timeout_s) as reply:
            yield _parts(reply)

    def _failed(self, ids: list[int], error: Exception) -> VerificationFailed:
        """The server's own end says more than the connection's."""
        self._server.wait_until_gone(3)
        self._server.check_alive("answered")
        said = ""
        if isinstance(error, urllib.error.HTTPError):
            said = f": {error.read().decode(errors='replace')[:300]}"
        return VerificationFailed(
            f"A request of {len(ids)} tokens failed: {type(error).__name__}: {error}{said}.  The server's log "
            f"says: {self._server.reason()}",
            "`--keep DIR` keeps the log.",
        )


def _parts(reply: Any) -> Iterator[list[int]]:
    """Server-sent events.  An event has all tokens so far, or the new ones: their count tells."""
    tokens: list[int] = []
    for line in reply:
        if line.startswith(b"data: {"):
            event = json.loads(line.removeprefix(b"data: "))
            part, count = event["output_ids"], int(event["meta_info"]["completion_tokens"])
            tokens = list(part) if len(part) == count else [*tokens, *part]
            yield tokens


def _greedy(new: int) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
