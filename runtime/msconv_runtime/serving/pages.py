"""Pages of msconv's own beside an engine's API: the artifact's proof, and a chat page.  Plain ASGI.

The chat page is three files that the browser gets from here and nowhere else; its policy lets it ask this server
only.  It holds no answers and no keys: whoever has none gets the page, and no answer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .asgi import App, Receive, Scope, Send, has_key, path_of

PROOF, CHAT = "/msconv/proof", "/chat"
FILES = Path(__file__).with_name("ui")
TYPES = {".html": b"text/html; charset=utf-8", ".css": b"text/css", ".js": b"text/javascript"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
UI = {CHAT: "chat.html", f"{CHAT}/style.css": "style.css", f"{CHAT}/script.js": "script.js"}


@dataclass
class Pages:
    """ASGI middleware that answers GET of its own paths; all else goes on.

    `proof`: the object of PROOF, which needs `keys` (one of them) where there are any.  `ui`: serve the chat page.
    """

    app: App
    proof: dict[str, Any]
    ui: bool = False
    keys: tuple[str, ...] = ()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = path_of(scope) if scope["type"] == "http" and scope.get("method") in ("GET", "HEAD") else ""
        if path == PROOF and (not self.keys or has_key(scope, self.keys)):
            await _answer(send, 200, b"application/json", json.dumps(self.proof, indent=1).encode() + b"\n")
        elif path == PROOF:
            await _answer(send, 401, b"application/json", b'{"error": "Unauthorized"}')
        elif self.ui and path in UI:
            file = FILES / UI[path]
            await _answer(send, 200, TYPES[file.suffix], file.read_bytes())
        else:
            await self.app(scope, receive, send)


async def _answer(send: Send, status: int, kind: bytes, body: bytes) -> None:
    headers = [
        (b"content-type", kind),
        (b"content-length", str(len(body)).encode()),
        (b"content-security-policy", POLICY.encode()),
        (b"cache-control", b"no-store"),
        (b"referrer-policy", b"no-referrer"),
        (b"x-content-type-options", b"nosniff"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
