"""What the reference has between layers, as files that workers read: by token, all sequences one after another."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from msconv_runtime.errors import ResourceError

from ..reference import Trace

NORM, STREAM, CLOSEST, LOGITS, HIDDEN = "norm", "stream", "closest", "logits", "hidden"
PROBE = "probe:"
SHOWS_WITHIN_S = 5.0


@dataclass(frozen=True)
class Given:
    """Files of values in a directory, and the digest of each.  `lengths`: tokens of each sequence."""

    directory: Path
    layers: int
    lengths: tuple[int, ...]
    digests: dict[str, str]

    def border(self, number: int) -> dict[str, torch.Tensor]:
        """Between layer number - 1 and layer `number`: the norm's output and the residual stream, [T, hidden]."""
        return self._read(f"border-{number}")

    def traces(self, layer: int) -> list[Trace]:
        """Of each sequence, what is compared in a layer's segment; of the last, logits too."""
        found = self._read(f"layer-{layer}")
        probes = {name.removeprefix(PROBE): v for name, v in found.items() if name.startswith(PROBE)}
        if layer < self.layers - 1:
            probes[first_norm(layer + 1)] = self.border(layer + 1)[NORM]
        none = torch.zeros(sum(self.lengths), 0)
        by_name = {name: self._apart(value) for name, value in probes.items()}
        parts = [self._apart(found.get(name, none)) for name in (LOGITS, CLOSEST, HIDDEN)]
        return [
            Trace(parts[0][i], {name: value[i] for name, value in by_name.items()}, parts[1][i], parts[2][i])
            for i in range(len(self.lengths))
        ]

    def rows(self, places: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Which rows of a file (sequence, position) are."""
        begins = np.cumsum([0, *self.lengths])
        return torch.tensor([int(begins[i]) + p for i, p in places])

    def _apart(self, value: torch.Tensor) -> list[NDArray[np.float32]]:
        return [part.numpy() for part in value.split(list(self.lengths))]

    def _read(self, name: str) -> dict[str, torch.Tensor]:
        """Raises ResourceError if this machine does not see what was written."""
        from safetensors.torch import load

        path, deadline = self.directory / f"{name}.safetensors", time.monotonic() + SHOWS_WITHIN_S
        while True:
            try:
                data, reason = path.read_bytes(), "its bytes are others than were written"
            except OSError as e:
                data, reason = b"", e.strerror or str(e)
            if hashlib.sha256(data).hexdigest() == self.digests[name]:
                return dict(load(data))
            if time.monotonic() > deadline:
                raise ResourceError(f"{path}: {reason}.", "Run the same command again: what was done is kept.")
            time.sleep(0.2)


def first_norm(layer: int) -> str:
    return f"model.layers.{layer}.input_layernorm"


def write(directory: Path, traces: Sequence[Trace], layers: int) -> Given:
    """Write what the workers need.  Raises OSError."""
    digests = {}

    def save(name: str, values: dict[str, list[NDArray[np.float32]]]) -> None:
        from safetensors.torch import save as packed

        data = packed({k: torch.from_numpy(np.concatenate(v)) for k, v in values.items()})
        (directory / f"{name}.safetensors").write_bytes(data)
        digests[name] = hashlib.sha256(data).hexdigest()

    for layer in range(layers):
        name = first_norm(layer)
        if layer:
            save(f"border-{layer}", {NORM: _probes(traces, name), STREAM: [t.streams[name] for t in traces]})
        probed = [f"model.layers.{layer}.post_attention_layernorm", *([] if layer else [name])]
        values = {CLOSEST: [t.closest for t in traces]}
        if layer == layers - 1:
            probed.append("model.norm")
            values |= {LOGITS: [t.logits for t in traces], HIDDEN: [t.hidden for t in traces]}
        save(f"layer-{layer}", values | {PROBE + n: _probes(traces, n) for n in probed})
    return Given(directory, layers, tuple(len(t.closest) for t in traces), digests)


def _probes(traces: Sequence[Trace], name: str) -> list[NDArray[np.float32]]:
    return [t.probes[name] for t in traces]
