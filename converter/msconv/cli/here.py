"""What is meant where no target and no device is named: what the artifact has graphs for, or else this machine's
device.  compile, verify and serve ask here, and all say which it is."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from msconv_runtime.errors import UsageError
from msconv_runtime.targets import CPU, DEVICES, TARGETS, Target, meant_target

from .console import say

if TYPE_CHECKING:
    from msconv_runtime.artifact import Artifact


def machine_kind() -> str:
    """The kind of device that this machine computes on: `npu` where it has one."""
    from msconv_runtime.doctor import Machine

    return "npu" if Machine().devices()[0] else CPU.kind


def machine_target() -> Target:
    """The target of this machine's device.  Raises UsageError for an NPU that names itself in no known way."""
    if machine_kind() == CPU.kind:
        return CPU
    from msconv_runtime.doctor.ascend import chip_names
    from msconv_runtime.doctor.machine import Machine

    found = {target for name in chip_names(Machine()) if (target := meant_target(name))}
    if len(found) == 1:
        return TARGETS[found.pop()]
    names = [t.name for t in TARGETS.values() if t.kind == "npu"]
    raise UsageError(
        "This machine has NPUs, and `npu-smi info` does not say of which kind.",
        f"Name it: --target {', '.join(names[:-1])} or {names[-1]}.",
    )


def usual_target(artifact: Artifact) -> str:
    """The target where none is named, said aloud.  Raises UsageError where several are as likely."""
    there = [name for name in artifact.targets if name in TARGETS]
    if len(there) == 1:
        return _said(there[0], "what the artifact has graphs for")
    kind = machine_kind()
    if not there:
        return _said(machine_target().name, "this machine's device; --target names another")
    of_this = [name for name in there if TARGETS[name].kind == kind]
    if len(of_this) > 1 and kind != CPU.kind:
        of_this = [name for name in of_this if name == machine_target().name]
    if len(of_this) == 1:
        return _said(of_this[0], "this machine's device; --target names another")
    raise UsageError(
        f"{artifact.root}: has graphs for {', '.join(there)}.", f"Name one of them: --target {there[0]}."
    )


def usual_device(artifact: Artifact, target: str | None, elsewhere: bool) -> str:
    """The device to serve on where none is named, said aloud.  `elsewhere`: the command is only printed, and this
    machine needs none."""
    there = {TARGETS[name].kind for name in artifact.targets if name in TARGETS} & DEVICES.keys()
    kind: str = machine_kind()
    if target in TARGETS and TARGETS[target].kind in DEVICES:
        kind = TARGETS[target].kind
    elif len(there) == 1 and (elsewhere or kind != CPU.kind):
        kind = there.pop()
    say(f"Device: {kind} ({DEVICES[kind].words}; --device names another)")
    return kind


def _said(name: str, why: str) -> str:
    say(f"Target: {name} ({why})")
    return name


def quoted(path: Path) -> str:
    """A path as one pastes it into a shell."""
    return shlex.quote(str(path))


def serve_command(root: Path, *flags: str) -> str:
    """The command that serves an artifact here; one without a tokenizer takes and gives token ids only."""
    ids = "" if (root / "tokenizer.json").is_file() else " -- --skip-tokenizer-init"
    return " ".join(["msconv serve", quoted(root), *flags]) + ids
