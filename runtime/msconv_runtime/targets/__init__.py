"""Targets: every fact of a device that graphs are compiled for, a record each.

Every Target that a file in this directory makes is one, under its name: a new target is a new file.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from ..errors import UsageError
from .cpu import CPU
from .record import DEVICES, Device, DeviceModel, Paging, Target

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


def device_of(name: str) -> Device:
    """What graphs of this target run on; of one that is not known here, an NPU."""
    return TARGETS[name].device if name in TARGETS else DEVICES["npu"]


__all__ = ["CPU", "DEVICES", "TARGETS", "Device", "DeviceModel", "Paging", "Target", "device_of", "target_named"]
