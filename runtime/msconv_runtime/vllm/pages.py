"""msconv's pages beside vLLM's API, and what a server says when it is ready.  Plain ASGI, for --middleware."""

from __future__ import annotations

import json
import os
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

from ..artifact import Artifact
from ..serving.asgi import App, Receive, Scope, Send
from ..serving.pages import Pages
from ..serving.proof import proof_of
from ..serving.ready import address, first_request, ready_lines
from ..serving.settings import Settings


class ArtifactPages:
    """Answers GET of msconv's own paths; all else goes on.  vLLM's arguments are in its application's state."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.given: Any = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.given = self.given or getattr(scope["app"].state, "args", None)
        if scope["type"] == "lifespan":
            await self.app(scope, receive, self._say_ready(send))
        elif self.given is None:
            await self.app(scope, receive, send)
        else:
            await self.pages(scope, receive, send)

    @cached_property
    def pages(self) -> Pages:
        settings, artifact = Settings.read(), Artifact(Path(self.given.model))
        return Pages(self.app, proof_of(artifact, settings.target), settings.ui, self.keys)

    @property
    def keys(self) -> tuple[str, ...]:
        """Those that clients may show, as vLLM takes them."""
        return tuple(key for key in self.given.api_key or [os.environ.get("VLLM_API_KEY", "")] if key)

    def _say_ready(self, send: Send) -> Send:
        async def told(message: Any) -> None:
            await send(message)
            if message["type"] == "lifespan.startup.complete" and self.given is not None:
                print("\n".join(self._ready()), file=sys.stderr, flush=True)

        return told

    def _ready(self) -> list[str]:
        given = self.given
        url, root = address(given.host or "", given.port), Path(given.model)
        name = (given.served_model_name or [given.model])[0]
        if given.skip_tokenizer_init:
            body = json.dumps({"model": name, "token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 8}})
            request = f"curl {url}/inference/v1/generate -H 'Content-Type: application/json' -d '{body}'"
        else:
            request = first_request(url, name, root, has_key=bool(self.keys))
        return ready_lines(url, request, Settings.read().ui)
