"""How a rehearsal asks: SGLang's own /generate, token ids in and out, greedy."""

from __future__ import annotations

import json
import urllib.error
from typing import Any

from msconv_runtime.errors import VerificationFailed

from .server import Server

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
        except (OSError, ValueError) as e:
            raise self._failed(ids, e) from None
        answers = found if isinstance(found, list) else [found]
        return [(a["output_ids"], int(a["meta_info"].get("cached_tokens") or 0)) for a in answers]

    def abort_after(self, ids: list[int], count: int) -> list[int]:
        name = "msconv-rehearsal-abort"
        most = min(LONG, max(count + 1, self._room - len(ids) - 1))
        body = {"input_ids": ids, "sampling_params": _greedy(most), "stream": True, "rid": name}
        tokens: list[int] = []
        try:
            with self._server.open("/generate", body, self._timeout_s) as reply:
                aborted = False
                for line in reply:
                    if not line.startswith(b"data: {"):
                        continue
                    part = json.loads(line.removeprefix(b"data: "))["output_ids"]
                    tokens = part if part[: len(tokens)] == tokens else [*tokens, *part]
                    if len(tokens) >= count and not aborted:
                        aborted = True
                        self._server.open("/abort_request", {"rid": name}, self._timeout_s).close()
        except (OSError, ValueError) as e:
            raise self._failed(ids, e) from None
        if len(tokens) >= most:
            raise VerificationFailed(f"A request was not aborted: all of its {most} tokens came.")
        return tokens

    def _failed(self, ids: list[int], error: Exception) -> VerificationFailed:
        """The server's own end says more than the connection's."""
        self._server._wait_for_all(3)
        self._server.check_alive("answered")
        said = ""
        if isinstance(error, urllib.error.HTTPError):
            said = f": {error.read().decode(errors='replace')[:300]}"
        return VerificationFailed(
            f"A request of {len(ids)} tokens failed: {type(error).__name__}: {error}{said}.  The server's log "
            f"says: {self._server.reason()}",
            "`--keep DIR` keeps the log.",
        )


def _greedy(new: int) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
