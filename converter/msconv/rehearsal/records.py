"""What the server's processes wrote down: events, and each call of a graph with its inputs and its logits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .protocol import HIDDEN, INPUTS


@dataclass(frozen=True)
class Cache:
    """A cache that a call was given: shape, address, and which buffer of SGLang's pool lies there (`k 3`)."""

    shape: tuple[int, ...]
    at: int
    buffer: str


@dataclass(frozen=True)
class Call:
    """One rank's call.  `graph`: digest of what was loaded; `loaded`: as which one of this rank's.  `probes`:
    outputs of the residual stream's norms.  `states`: hidden states of all tokens, where the graph gives them.
    `error`: why it could not be run; then there are no logits.  `is_warm_up`: on caches that are MindSpore's own,
    before SGLang has a pool."""

    number: int
    graph: str
    caches: list[Cache]
    inputs: dict[str, torch.Tensor]
    logits: torch.Tensor
    probes: dict[str, torch.Tensor]
    error: str = ""
    is_warm_up: bool = False
    loaded: int = 0
    states: torch.Tensor | None = None


@dataclass(frozen=True)
class Rank:
    """All that one process recorded."""

    rank: int
    directory: Path
    events: list[dict[str, Any]] = field(default_factory=list)

    def of(self, what: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e["what"] == what]

    @property
    def num_calls(self) -> int:
        return len(list(self.directory.glob("*.safetensors")))

    def calls(self) -> Iterator[Call]:
        for number, path in enumerate(sorted(self.directory.glob("*.safetensors"))):
            yield _read_call(number, path)


def read_replicas(directory: Path) -> list[list[Rank]]:
    """The ranks of each copy of the model (`--dp-size`), in their order."""
    found: dict[str, list[Rank]] = {}
    for path in sorted(directory.glob("*-*")):
        cluster, _, rank = path.name.rpartition("-")
        lines = (path / "events.jsonl").read_text().splitlines()
        found.setdefault(cluster, []).append(Rank(int(rank), path, [json.loads(line) for line in lines]))
    return [sorted(ranks, key=lambda r: r.rank) for _, ranks in sorted(found.items())]


def _read_call(number: int, path: Path) -> Call:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as opened:
        about = json.loads(opened.metadata()["call"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a mapping
    return Call(
        number,
        about["graph"],
        [Cache(tuple(c["shape"]), c["at"], c["is"]) for c in about["caches"]],
        {name: tensors[name] for name in (*INPUTS, HIDDEN) if name in tensors},
        tensors.get("logits", torch.zeros(0)),
        {n.removeprefix("probe "): t for n, t in tensors.items() if n.startswith("probe ")},
        about["error"],
        about["warm_up"],
        about["number"],
        tensors.get("states"),
    )
