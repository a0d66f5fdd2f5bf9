"""Which of an artifact's targets a device serves."""

from __future__ import annotations

import os

from ..artifact import Artifact
from ..errors import ArtifactError, UsageError
from ..targets import DEVICES, TARGETS, Target, device_of, usual_target
from .settings import TARGET


def target_to_serve(artifact: Artifact, kind: str, named: str | None = None) -> Target:
    """The one target for this kind of device that the artifact has graphs for, or the one that is `named`, here or
    by MSCONV_TARGET.  Only a kind that has several targets is asked for a name.

    Raises UsageError for a kind that there is not, or a name that is missing or wrong; ArtifactError if the
    artifact has graphs for other devices only."""
    if kind not in DEVICES:
        raise UsageError(f"--device {kind}: {' or '.join(DEVICES)}.")
    if named in TARGETS and (by := TARGETS[named].device.served_by):
        raise UsageError(f"{artifact.root}: msconv does not serve {named} graphs: {by}.")
    known = {t.name: t for t in TARGETS.values() if t.kind == kind}
    there = [known[name] for name in artifact.targets if name in known]
    if not there:
        raise _nothing_for(artifact, kind)
    named = (named or os.environ.get(TARGET)) if len(known) > 1 else None
    chosen = [t for t in there if named in (None, t.name)]
    if len(chosen) == 1:
        return chosen[0]
    names = ", ".join(t.name for t in there)
    raise UsageError(
        f"{artifact.root}: has graphs for {names}" + (f", not for {named}." if named else "."),
        f"Name one of them: --target {there[0].name}, or {TARGET}={there[0].name}.",
    )


def _nothing_for(artifact: Artifact, kind: str) -> ArtifactError:
    root, device = artifact.root, DEVICES[kind]
    if not device.is_host:
        return ArtifactError(
            f"{root}: has no graphs for {device.words}.",
            f"`msconv compile {root} --target {usual_target(kind).name}` makes them.",
        )
    compile_ = f"`msconv compile {root} --target {usual_target(kind).name}` makes them"
    if not artifact.targets:
        others = (f"--target {usual_target(k).name} for {d.words}" for k, d in DEVICES.items() if k != kind)
        return ArtifactError(f"{root}: has no graphs.", f"{compile_} for {device.words}, {', '.join(others)}.")
    there = {device_of(t) for t in artifact.targets}
    elsewhere = dict.fromkeys(d.served_by for d in there if d.served_by)
    here = f"`msconv serve {root} --device npu` serves them on an NPU, `msconv rehearse {root}` here"
    ways = [here] * any(not d.served_by for d in there) + [*elsewhere, compile_]
    return ArtifactError(
        f"{root}: has graphs for {', '.join(artifact.targets)}, none for {device.words}.",
        f"{'; '.join(ways)}.",
    )
