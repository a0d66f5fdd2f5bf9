"""What this process was asked: written down for `msconv rehearse`, which compares it afterwards.

One directory a rank: events.jsonl, and one safetensors file a call of a graph.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from msconv.rehearsal.protocol import CALLS

from .settings import rehearsal_directory


class Record:
    """Events wait in memory until the rank is known."""

    def __init__(self) -> None:
        self._waiting: list[dict[str, Any]] = []
        self._directory: Path | None = None
        self._num_calls = 0

    def begin(self, cluster: str, rank: int) -> None:
        """`cluster`: what tells the ranks of one copy of the model from those of another."""
        self._directory = rehearsal_directory() / CALLS / f"{cluster}-{rank}"
        self._directory.mkdir(parents=True)
        waiting, self._waiting = self._waiting, []
        for event in waiting:
            self._write(event)

    def event(self, what: str, **values: Any) -> None:
        event = {"what": what, **values}
        if self._directory is None:
            self._waiting.append(event)
        else:
            self._write(event)

    def file(self, name: str, data: bytes) -> None:
        assert self._directory is not None, "a graph was loaded before init('hccl')"
        (self._directory / name).write_bytes(data)

    def call(self, about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """One call of a graph.  Complete, or not there: the process may be ended at any time."""
        from safetensors.torch import save_file

        assert self._directory is not None, "a graph ran before init('hccl')"
        path = self._directory / f"{self._num_calls:06}.safetensors"
        part = path.with_suffix(".part")
        save_file({n: t.contiguous() for n, t in tensors.items()}, part, {"call": json.dumps(about)})
        part.rename(path)
        self._num_calls += 1

    def _write(self, event: dict[str, Any]) -> None:
        assert self._directory is not None
        with (self._directory / "events.jsonl").open("a") as file:
            file.write(json.dumps(event) + "\n")


RECORD = Record()
