"""Folding of tensor names for people: 36 names become one with `{0..35}` in it."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"(?<![^.])(0|[1-9]\d{0,8})(?![^.])", re.ASCII)  # a whole dotted component


def fold(names: Iterable[str]) -> list[tuple[str, int]]:
    """[(folded name, how many)], in order of first appearance.  `a.0.w a.1.w b` -> `a.{0..1}.w`, `b`."""
    groups: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for name in names:
        pieces = _NUMBER.split(name)
        texts, numbers = tuple(pieces[::2]), tuple(int(n) for n in pieces[1::2])
        groups.setdefault(texts, []).append(numbers)
    return [
        (texts[0] + "".join(r + t for r, t in zip(ranges, texts[1:], strict=True)), count)
        for texts, keys in groups.items()
        for ranges, count in _merge(keys)
    ]


def listing(names: Iterable[str], limit: int = 12) -> str:
    """Folded names, one a line, cut off after `limit` lines."""
    folded = fold(names)
    lines = [f"  {shorten(name)}" + (f"  ({n} tensors)" if n > 1 else "") for name, n in folded[:limit]]
    if len(folded) > limit:
        lines.append(f"  ... and {len(folded) - limit} more")
    return "\n".join(lines)


def shorten(name: str, limit: int = 160) -> str:
    """A name that came from outside, printable and of bounded length."""
    text = name.encode("unicode_escape").decode()
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _merge(keys: list[tuple[int, ...]]) -> list[tuple[tuple[str, ...], int]]:
    if not keys[0]:
        return [((), len(keys))]
    if len(keys[0]) > 8:  # no model nests so deep: leave such names as they are
        return [(tuple(map(str, key)), 1) for key in keys]
    rests: dict[int, list[tuple[int, ...]]] = {}
    for key in keys:
        rests.setdefault(key[0], []).append(key[1:])
    same: dict[tuple[tuple[tuple[str, ...], int], ...], list[int]] = {}
    for first, rest in rests.items():
        same.setdefault(tuple(_merge(rest)), []).append(first)
    return [
        ((_ranges(firsts), *rest), count * len(firsts))
        for merged, firsts in same.items()
        for rest, count in merged
    ]


def _ranges(numbers: list[int]) -> str:
    numbers = sorted(numbers)
    if len(numbers) == 1:
        return str(numbers[0])
    spans: list[list[int]] = []
    for n in numbers:
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return "{" + ",".join(f"{a}..{b}" if b > a else f"{a}" for a, b in spans) + "}"
