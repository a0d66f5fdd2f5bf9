"""Numbers for people."""

from __future__ import annotations

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def human_bytes(size: float, unit: str = "", space: str = " ") -> str:
    """A number of bytes as `1.50 GiB`: in `unit`, or in the largest one that it holds once.  `space`: between."""
    chosen = UNITS.index(unit) if unit else 0
    while not unit and chosen < len(UNITS) - 1 and size / 1024**chosen >= 1024:
        chosen += 1
    return f"{size / 1024**chosen:.{2 if chosen else 0}f}{space}{UNITS[chosen]}"
