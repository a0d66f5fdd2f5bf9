"""An artifact's tensors against the source's, bit for bit; above all those of which a proof's tokens use a part.

A token reads one row of the embedding and a few experts.  So every row of the embedding is compared, and with it
the routers and all experts that no token chose: everything else has a share in what the graphs compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from msconv_runtime.artifact import Artifact

from ..families.config import DecoderConfig, Moe
from .source_weights import SourceWeights

EMBEDDING = "model.embed_tokens.weight"
ROUTER = ("gate.weight", "gate.e_score_correction_bias")
BLOCK_BYTES = 64 << 20  # of the embedding, in float32


class Stored:
    """The stored tensors of all ranks.  `tensors`: how many were compared.  `place`: the first difference, "" if
    there is none."""

    def __init__(self, artifact: Artifact) -> None:
        self.types = {t.name: t.dtype for t in artifact.weights.tensors}
        self.tensors, self.place = 0, ""
        self._where: dict[tuple[int, str], Path] = {}
        for file in artifact.weights.files:
            path = artifact.root / file.path
            with safe_open(path, framework="pt") as opened:
                names: list[str] = list(opened.keys())
            self._where |= {(file.rank, name): path for name in names}

    def rows(self, rank: int, name: str) -> int:
        """How many a rank has of a tensor; 0 if it has none of this name."""
        return self._opened(rank, name, lambda file: int(file.get_slice(name).get_shape()[0])) or 0

    def get(self, rank: int, name: str) -> torch.Tensor | None:
        """A tensor; None if the rank has none of this name."""
        found: torch.Tensor | None = self._opened(rank, name, lambda file: file.get_tensor(name))
        return found

    def compare(
        self,
        rank: int,
        name: str,
        wanted: torch.Tensor,
        parts: list[str],
        item: int | None = None,
        begin: int | None = None,
    ) -> None:
        """`wanted`: the tensor, or its items from `item` or rows from `begin` on."""
        self.tensors += begin in (None, 0)
        if self.place:
            return
        first = item if begin is None else begin

        def take(file: Any) -> Any:
            return file.get_tensor(name) if first is None else file.get_slice(name)[first : first + len(wanted)]

        found = self._opened(rank, name, take)
        where = f"{name} of rank {rank}" + (f", item {item}" if item is not None else "")
        of = f"the source's ({', '.join(parts)})"
        if found is None:
            self.place = f"{where}: is missing"
        elif found.dtype != wanted.dtype or found.shape != wanted.shape:
            self.place = f"{where}: is {_kind(found)}, and {of} make {_kind(wanted)}"
        elif (differs := _bits(found) != _bits(wanted)).any():
            at = [int(i) for i in torch.nonzero(differs)[0]]
            values = f"{found[tuple(at)].item()!r}, not {wanted[tuple(at)].item()!r}"
            at[0] += begin or 0
            of = f"{of}; the first at {at}: {values}"
            self.place = f"{where}: {int(differs.sum())} of {found.numel()} values differ from {of}"

    def _opened(self, rank: int, name: str, take: Callable[[Any], Any]) -> Any:
        path = self._where.get((rank, name))
        if path is None:
            return None
        with safe_open(path, framework="pt") as opened:
            found = take(opened)
            return found.clone() if torch.is_tensor(found) else found


class Untouched:
    """Compares what a proof's tokens need not have touched, cut here a second time."""

    def __init__(self, artifact: Artifact, weights: SourceWeights, config: DecoderConfig) -> None:
        self.tp, self.ep = artifact.tp, artifact.manifest.parallel.ep
        draft = artifact.manifest.draft
        self.weights, self.config = weights, config.with_draft() if draft and draft.is_layer else config
        self.found = Stored(artifact)

    def run(self, chosen: Mapping[int, frozenset[int]], layers: int = 0) -> Stored:
        """`chosen`: by layer, the experts that took part.  `layers`: only the first of them."""
        self._embedding()
        for layer in range(layers or self.config.layers + self.config.drafts):
            moe = self.config.moe
            if moe is not None and self.config.has_experts(layer) and not self.found.place:
                prefix = f"model.layers.{layer}.mlp."
                order = self._routers(prefix, moe.experts)
                self._experts(f"{prefix}experts.", moe, order, chosen.get(layer, frozenset()))
        return self.found

    def _embedding(self) -> None:
        if EMBEDDING not in self.found.types:  # a draft's: it takes its target's
            return
        step = max(1, BLOCK_BYTES // (4 * self.config.hidden))
        for rank in range(self.tp):
            own = self.found.rows(rank, EMBEDDING)
            first = rank * own
            for begin in range(first, min(first + own, self.config.vocab), step):
                end = min(begin + step, first + own, self.config.vocab)
                wanted = self._stored_as(EMBEDDING, self.weights.rows(EMBEDDING, begin, end))
                self.found.compare(rank, EMBEDDING, wanted, [EMBEDDING], begin=begin - first)

    def _routers(self, prefix: str, experts: int) -> list[int]:
        """Which of the source's experts each of the artifact's is: one numbered anew is the same model."""
        names = [name for name in (prefix + leaf for leaf in ROUTER) if name in self.found.types]
        wanted = {name: self._stored_as(name, self.weights.get(name)) for name in names}
        own = [_rows(tensor) for name in names if (tensor := self.found.get(0, name)) is not None]
        numbers: dict[tuple[bytes, ...], list[int]] = {}
        for number, rows in enumerate(zip(*map(_rows, wanted.values()), strict=True)):
            numbers.setdefault(rows, []).append(number)
        order = [found.pop(0) if (found := numbers.get(rows)) else -1 for rows in zip(*own, strict=True)]
        if sorted(order) != list(range(experts)):
            order = list(range(experts))  # some row is no row of the source's: it is found below
        for name, values in wanted.items():
            for rank in range(self.tp):
                self.found.compare(rank, name, values[order], [name])
        return order

    def _experts(self, prefix: str, moe: Moe, order: list[int], chosen: frozenset[int]) -> None:
        gate_up, down = prefix + "gate_up_proj.weight", prefix + "down_proj.weight"
        if self.found.types.get(down) == "int8":
            return
        group = self.tp // self.ep
        local, width = moe.experts // self.ep, moe.ffn // group
        for expert, number in enumerate(order):
            if number in chosen:
                continue
            source = f"{prefix}{number}"
            parts = [self.weights.get(f"{source}.{p}_proj.weight") for p in ("gate", "up", "down")]
            for rank in range(expert // local * group, (expert // local + 1) * group):
                mine = slice(rank % group * width, (rank % group + 1) * width)
                both = torch.cat([parts[0][mine], parts[1][mine]])
                for name, values in ((gate_up, both), (down, parts[2][:, mine])):
                    wanted = self._stored_as(name, values.T.unsqueeze(0))
                    self.found.compare(rank, name, wanted, [source], expert % local)

    def _stored_as(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """In the type in which the artifact has them."""
        return values.to(getattr(torch, self.found.types[name]))


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _rows(tensor: torch.Tensor) -> list[bytes]:
    """The bytes of each."""
    return [row.tobytes() for row in _bits(tensor).numpy()]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Values by their bits: -0.0 is not 0.0, and what is no number is itself."""
    tensor = tensor.contiguous()
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
