"""What the ranks of a server loaded: weights against the rank's own file, casts to NZ against the manifest, groups
against SGLang's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from msconv_runtime.artifact import OF_TARGET, Artifact, Graph, digest_bytes

from .records import Rank
from .served import Loaded

SOME = 3  # names that are told


class Stored:
    """The weights of all ranks, as files.  `target`: those of the model for which this one drafts."""

    def __init__(self, artifact: Artifact, target: Stored | None = None) -> None:
        self._target = target
        self._files: dict[tuple[int, str], Path] = {}
        for file in artifact.weights.files:
            path = artifact.root / file.path
            with safe_open(path, framework="pt") as opened:
                self._files |= {(file.rank, name): path for name in opened.keys()}  # noqa: SIM118

    def digest(self, rank: int, name: str, dtype: str) -> str:
        """The digest of one tensor's values as `dtype`; "" if there is none."""
        if self._target is not None and name.startswith(OF_TARGET):
            return self._target.digest(rank, name.removeprefix(OF_TARGET), dtype)
        path = self._files.get((rank, name))
        if path is None:
            return ""
        with safe_open(path, framework="pt") as opened:
            values = opened.get_tensor(name).to(getattr(torch, dtype)).contiguous()
        return digest_bytes(values.flatten().view(torch.uint8).numpy().data)


def loading_problems(artifact: Artifact, loaded: Loaded, ranks: list[Rank]) -> list[str]:
    """`artifact`: the target's; what a draft takes from it is compared with its files."""
    target = Stored(artifact)
    files = {artifact.root: target}
    found: list[str] = []
    for rank in ranks:
        for event in rank.of("graph"):
            if (whose := loaded.get((rank.rank, event["number"]))) is None:
                continue
            model, role = whose
            stored = files.setdefault(model.artifact.root, Stored(model.artifact, target))
            found += _weights(rank.rank, model.graphs[role], event["parameters"], stored, artifact.tp)
        found += _groups(rank, artifact.tp)
    return list(dict.fromkeys(found))


def _weights(rank: int, graph: Graph, parameters: list[dict[str, Any]], stored: Stored, tp: int) -> Iterator[str]:
    wrong: dict[int | None, list[str]] = {}  # whose values they are
    for p in parameters:
        if p["digest"] != stored.digest(rank, p["name"], p["dtype"]):
            others = (r for r in range(tp) if p["digest"] == stored.digest(r, p["name"], p["dtype"]))
            wrong.setdefault(next(others, None), []).append(p["name"])
    for other, names in wrong.items():
        whose = "those of no rank's file" if other is None else f"those of rank {other}'s file"
        yield f"weights of rank {rank}: {_some(names)}: the values are {whose}"
    cast, listed = {p["name"] for p in parameters if p["nz"]}, set(graph.nz)
    if more := sorted(cast - listed):
        yield f"weights of rank {rank}: {_some(more)}: cast to NZ, and not in the manifest's list"
    if fewer := sorted(listed - cast):
        yield f"weights of rank {rank}: {_some(fewer)}: not cast to NZ, and in the manifest's list"


def device_problems(replicas: list[list[Rank]], machines: int) -> Iterator[str]:
    """Each rank of a machine must have a device of its own."""
    seen: dict[tuple[int, int], str] = {}
    for number, ranks in enumerate(replicas):
        for rank in ranks:
            machine = rank.rank * machines // len(ranks)
            name = f"rank {rank.rank}" + f" of copy {number}" * (len(replicas) > 1)
            for event in rank.of("set_device"):
                other = seen.setdefault((machine, event["id"]), name)
                if other != name:
                    yield f"devices: {name} and {other} are both on device {event['id']}"


def _groups(rank: Rank, tp: int) -> Iterator[str]:
    made = {e["name"]: e for e in rank.of("create_group")}
    for name, event in made.items():
        if event["shared"]:
            yield f"groups of rank {rank.rank}: {name} shares its communicator with {', '.join(event['shared'])}"
    for group in (g for event in rank.of("groups") for g in event["groups"]):
        name = group["name"]
        if name not in made:
            yield f"groups of rank {rank.rank}: the graphs name {name}, which MindSpore does not know"
        elif group["handle"] != group["server"]:
            yield (
                f"groups of rank {rank.rank}: {name} has the communicator {group['handle']:#x}; SGLang's "
                f"tensor-parallel group has {group['server']:#x}"
            )
        elif len(made[name]["ranks"]) != tp:
            yield f"groups of rank {rank.rank}: {name} has the ranks {made[name]['ranks']}, the model has {tp}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SOME} more" if len(names) > SOME else ""
    return ", ".join(names[:SOME]) + more
