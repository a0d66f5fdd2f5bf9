"""How a proof tells what it is doing."""

from __future__ import annotations

from collections.abc import Callable

Tell = Callable[[str, int, int], None]  # phase, how much of it is done, of how much


def quietly(phase: str, done: int, total: int) -> None:
    """For whoever does not listen."""
