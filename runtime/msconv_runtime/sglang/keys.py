"""Keys that must not be read in a log or in what /server_info answers."""

from __future__ import annotations

from typing import Any

FLAGS = ("--api-key", "--admin-api-key", "--ssl-keyfile-password")
FIELDS = tuple(flag[2:].replace("-", "_") for flag in FLAGS)
HIDDEN = "<hidden>"


def hide_words(argv: list[str]) -> list[str]:
    """A command line with HIDDEN in place of each key.  Flags may be shortened, as SGLang lets them be."""
    shown: list[str] = []
    for i, word in enumerate(argv):
        name, equals, _ = word.partition("=")
        if equals and _gives_key(name):
            shown.append(f"{name}={HIDDEN}")
        else:
            shown.append(HIDDEN if i and "=" not in argv[i - 1] and _gives_key(argv[i - 1]) else word)
    return shown


def hide_fields(values: dict[str, Any]) -> dict[str, Any]:
    """The same fields of SGLang's arguments; those that are keys say HIDDEN, unless they are not set."""
    return {name: HIDDEN if name in FIELDS and value else value for name, value in values.items()}


def hide_text(text: str, arguments: Any) -> str:
    """A text that may hold the keys of SGLang's arguments."""
    for name in FIELDS:
        if isinstance(key := getattr(arguments, name, None), str) and key:
            text = text.replace(repr(key), repr(HIDDEN))
    return text


def _gives_key(word: str) -> bool:
    """`--api` and `--admin-a` are taken for the only flags that begin so."""
    return len(word) > len("--a") and word.startswith("--") and any(flag.startswith(word) for flag in FLAGS)
