"""Conversions that die: in this process after some units, or in one of their own by a planted fault."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import msconv.stream.execute as streaming
import msconv.stream.movers.threads as threads
from tests.commands import Result, run_command
from tests.stream.faults import Fault

FAULTS = Path(__file__).parent / "faults.py"


class Crash(Exception):
    """What the tests throw into a conversion."""


def crash(units: int, work: Callable[[], object]) -> None:
    """The work dies after some units, each durably done by then."""
    original = threads.move_unit
    left = [units]

    def move(*args: Any, **kwargs: Any) -> Any:
        if not left[0]:
            raise Crash
        left[0] -= 1
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "move_unit", move)
        patch.setattr(streaming, "CHECKPOINT_BYTES", 1)
        with pytest.raises(Crash):
            work()


def faulty(fault: Fault, *arguments: object) -> Result:
    """`msconv` with these arguments, and the fault."""
    return run_command([sys.executable, str(FAULTS), fault.text(), *map(str, arguments)], None, 120)
