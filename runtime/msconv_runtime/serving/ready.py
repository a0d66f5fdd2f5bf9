"""What a server says when it is ready: its address, and a request that can be pasted."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from .pages import CHAT, PROOF

EVERYWHERE = ("0.0.0.0", "::", "")


def address(host: str, port: int) -> str:
    """The URL at which this machine finds a server that listens at `host`."""
    host = "127.0.0.1" if host in EVERYWHERE else host
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def has_chat_template(root: Path) -> bool:
    """Whether the artifact's tokenizer says how a conversation is written."""
    if (root / "chat_template.jinja").is_file() or (root / "chat_template.json").is_file():
        return True
    try:
        return bool(json.loads((root / "tokenizer_config.json").read_bytes()).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False


def first_request(url: str, model: str, root: Path, has_tokenizer: bool = True, has_key: bool = False) -> str:
    """A curl command that this server answers."""
    path, body = "/v1/completions", {"model": model, "prompt": "Once upon a time", "max_tokens": 32}
    if not has_tokenizer:
        path, body = "/generate", {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 8}}
    elif has_chat_template(root):
        path, body = "/v1/chat/completions", {"model": model, "messages": [{"role": "user", "content": "Hello"}]}
    key = ' -H "Authorization: Bearer $API_KEY"' if has_key else ""
    kind = "-H 'Content-Type: application/json'"
    return f"curl {url}{path} {kind}{key} -d {shlex.quote(json.dumps(body))}"


def ready_lines(url: str, request: str, ui: bool) -> list[str]:
    """Lines for people, the first with the address.  `request`: "" for a server that nobody asks directly."""
    asked = [f"  try:   {request}"] if request else []
    chat = [f"  chat:  {url}{CHAT}"] if ui else []
    return [f"msconv: ready at {url}", *asked, *chat, f"  proof: {url}{PROOF}"]
