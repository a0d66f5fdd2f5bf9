"""Targets: every fact of a device that graphs are compiled for, a record each.

Every Target that a file in this directory makes is one, under its name: a new target is a new file.
"""

from __future__ import annotations

import difflib
import re
from importlib import import_module
from pkgutil import iter_modules

from ..errors import UsageError
from .cpu import CPU
from .onnx import GENAI_CONFIG, ONNX, ONNX_FILE, STATIC
from .record import (
    ALL_DEVICES,
    DEVICES,
    MINDIR,
    SWIGLU,
    Device,
    DeviceModel,
    Figures,
    Form,
    Kind,
    Paging,
    Target,
)

TARGETS: dict[str, Target] = {
    value.name: value
    for name in sorted((module.name for module in iter_modules(__path__)), key=lambda name: (name != "cpu", name))
    for value in vars(import_module(f"{__name__}.{name}")).values()
    if isinstance(value, Target)
}
FUSIONS = tuple(dict.fromkeys(fusion for target in TARGETS.values() for fusion in target.fusions))


def target_named(name: str) -> Target:
    """Raises UsageError naming those there are, and the one that is probably meant."""
    if name not in TARGETS:
        meant = meant_target(name)
        near = f"Did you mean {meant}?  " if meant else ""
        if _bare(name) in ("npu", ""):  # the word for all of them
            near = "Say which NPU, as `npu-smi info` names it.  "
        raise UsageError(f"{name}: no such target.", f"{near}Targets are: {', '.join(TARGETS)}.")
    return TARGETS[name]


def meant_target(name: str) -> str:
    """The target that such a name is probably meant for, "" if none is: `910b`, `Ascend910B3`, `Atlas A3`."""
    word = _bare(name)
    if word.startswith("91093"):  # what CANN calls a 910C
        return "ascend910c"
    for target in TARGETS.values():
        if word.startswith(target.name.removeprefix("ascend")):
            return target.name
    if word in ("npu", "gpu", "cuda", ""):  # near the letters of `cpu` only
        return ""
    generations = {"a2": "ascend910b", "a3": "ascend910c", "300iduo": "ascend310p"}
    return generations.get(word) or next(iter(difflib.get_close_matches(name.casefold(), list(TARGETS), 1)), "")


def figures_named(name: str) -> tuple[Target, Figures]:
    """Published figures of a device, and the target whose graphs run on it.  Its name in any spelling: `910B2`,
    `Ascend910B2`; a target's name, where that means one device.  Raises UsageError that lists those there are."""
    known = {_bare(f.device): (t, f) for t in TARGETS.values() for f in t.figures}
    known |= {_bare(t.name): (t, t.figures[0]) for t in TARGETS.values() if len(t.figures) == 1}
    if _bare(name) not in known:
        devices = ", ".join(f.device for t in TARGETS.values() for f in t.figures)
        raise UsageError(f"{name[:80]}: no device whose figures are known here.", f"Known are {devices}.")
    return known[_bare(name)]


def _bare(name: str) -> str:
    word = re.sub(r"[^a-z0-9]", "", name.casefold()).removeprefix("huawei")
    return word.removeprefix("ascend").removeprefix("atlas")


def usual_target(kind: str) -> Target:
    """The first one for a kind of device: where one is named as an example."""
    return next(t for t in TARGETS.values() if t.kind == kind)


def device_of(name: str) -> Device:
    """What graphs of this target run on; of one that is not known here, an NPU."""
    return TARGETS[name].device if name in TARGETS else ALL_DEVICES["npu"]


__all__ = [
    "ALL_DEVICES",
    "CPU",
    "DEVICES",
    "FUSIONS",
    "GENAI_CONFIG",
    "MINDIR",
    "ONNX",
    "ONNX_FILE",
    "STATIC",
    "SWIGLU",
    "TARGETS",
    "Device",
    "DeviceModel",
    "Figures",
    "Form",
    "Kind",
    "Paging",
    "Target",
    "device_of",
    "figures_named",
    "meant_target",
    "target_named",
    "usual_target",
]
