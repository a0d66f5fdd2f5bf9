"""Flags of a command line, as the user wrote them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

FLAG = re.compile(r"--|-[A-Za-z]")  # how one begins; -1 is a number


def given_flags(extra: list[str]) -> dict[str, str]:
    """Flags as the user wrote them, short ones too, with their values ("" if none follows)."""
    found: dict[str, str] = {}
    for i, word in enumerate(extra):
        if FLAG.match(word):
            name, equals, value = word.partition("=")
            follows = extra[i + 1] if i + 1 < len(extra) and not FLAG.match(extra[i + 1]) else ""
            found[name] = value if equals else follows
    return found


def number(given: Mapping[str, str], *names: str) -> int:
    """What the user gave as one of these flags, or 0; the engine itself refuses what is no number."""
    value = next((given[name] for name in names if name in given), "")
    return int(value) if value.isdecimal() else 0


@dataclass(frozen=True)
class Refused:
    """Flags that an artifact cannot answer; a name that ends in * stands for all that begin so.  `fine`: values
    that ask for nothing."""

    names: str
    why: str
    fine: tuple[str, ...] = ()

    def covers(self, flag: str) -> bool:
        return any(flag.startswith(n[:-1]) if n.endswith("*") else flag == n for n in self.names.split())

    def shortened(self, flag: str) -> str:
        """The flag that a parser may take this for, if it lets flags be shortened."""
        return next((n for n in self.names.split() if n.startswith(flag) and n != flag), "")
