"""Flags of a command line, as the user wrote them."""

from __future__ import annotations

from collections.abc import Mapping


def given_flags(extra: list[str]) -> dict[str, str]:
    """Flags as the user wrote them, with their values ("" if none follows)."""
    found: dict[str, str] = {}
    for i, word in enumerate(extra):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            follows = extra[i + 1] if i + 1 < len(extra) and not extra[i + 1].startswith("--") else ""
            found[name] = value if equals else follows
    return found


def number(given: Mapping[str, str], *names: str) -> int:
    """What the user gave as one of these flags, or 0; the engine itself refuses what is no number."""
    value = next((given[name] for name in names if name in given), "")
    return int(value) if value.isdecimal() else 0
