"""Long work that shows itself: which phase it is in, how long it has taken, and how long this phase will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from .console import REPEAT_S, say, shows_progress, visible

Tell = Callable[[str, int, int], None]  # phase, how much of it is done, of how much


@dataclass
class Phases:
    """What a piece of work has told of itself.  `clock`: seconds."""

    label: str
    clock: Callable[[], float] = time.monotonic
    phase: str = ""
    done: int = 0
    total: int = 0
    started: float = field(init=False)
    phase_started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.phase_started = self.clock()

    def tell(self, phase: str, done: int = 0, total: int = 0) -> None:
        """Take note of a phase's begin, or of how far it has come."""
        if phase != self.phase:
            self.phase, self.phase_started = phase, self.clock()
        self.done, self.total = done, total

    def line(self) -> str:
        """`compiling for cpu: decode, 1 of 3, 0:12 so far, about 0:24 left`"""
        now = self.clock()
        parts = [f"{self.label}: {self.phase}" if self.phase else self.label]
        if self.total > 1:
            parts.append(f"{self.done} of {self.total}")
        parts.append(f"{clock_time(now - self.started)} so far")
        spent = now - self.phase_started
        if 0 < self.done < self.total and spent > 1:
            parts.append(f"about {clock_time(spent / self.done * (self.total - self.done))} left")
        return ", ".join(parts)

    def __rich__(self) -> Any:
        from rich.text import Text

        return Text(visible(self.line()))


def clock_time(seconds: float) -> str:
    """`0:07`, `12:30`, `3:05:00`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def in_words(seconds: float) -> str:
    """`45 s`, `12 min`, `3.1 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@contextmanager
def phases(label: str) -> Iterator[Tell]:
    """Show work that tells its phases: a line that stays current on a terminal; elsewhere one when it begins, and
    one now and then."""
    work = Phases(label)
    if not shows_progress():
        say(f"{label} ...")
        yield _said_now_and_then(work)
        return
    from rich.console import Console

    with Console(stderr=True).status(work):  # anything that can be drawn
        yield work.tell


def _said_now_and_then(work: Phases) -> Tell:
    last = [work.clock()]

    def tell(phase: str, done: int, total: int) -> None:
        work.tell(phase, done, total)
        if work.clock() - last[0] >= REPEAT_S:
            last[0] = work.clock()
            say(f"  {work.line()}")

    return tell
