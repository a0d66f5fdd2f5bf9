"""Targets: every fact of a device that graphs are compiled for, a record each.

Every Target that a file in this directory makes is one, under its name: a new target is a new file.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from ..errors import UsageError
from .cpu import CPU
from .record import DeviceModel, Paging, Target

TARGETS: dict[str, Target] = {
    value.name: value
    for name in sorted((module.name for module in iter_modules(__path__)), key=lambda name: (name != "cpu", name))
    for value in vars(import_module(f"{__name__}.{name}")).values()
    if isinstance(value, Target)
}


def target_named(name: str) -> Target:
    """Raises UsageError naming those there are."""
    if name not in TARGETS:
        raise UsageError(f"{name}: no such target.", f"Targets are: {', '.join(TARGETS)}.")
    return TARGETS[name]


def is_for_npu(name: str) -> bool:
    """Whether graphs of this target, which may be one that is not known here, run on an NPU."""
    return name not in TARGETS or not TARGETS[name].is_cpu


__all__ = ["CPU", "TARGETS", "DeviceModel", "Paging", "Target", "is_for_npu", "target_named"]
