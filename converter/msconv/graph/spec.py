"""What a graph is compiled for: per-rank sizes, phase, target.  No framework here."""

from __future__ import annotations

from dataclasses import dataclass

from msconv_runtime.artifact import GraphInput, GraphOutput, GraphParameter

from ..families.config import DecoderConfig, Mla, Moe
from ..layout.cuts import Mesh

TP_GROUP = "msconv_tp"  # the canonical group: whoever loads the graph creates it


@dataclass(frozen=True)
class Exported:
    """A graph's bytes and what its manifest entry says."""

    proto: bytes
    nodes: int
    kinds: dict[str, int]
    inputs: list[GraphInput]
    outputs: list[GraphOutput]
    parameters: list[GraphParameter]
    groups: list[str]
    nz: list[str]


@dataclass(frozen=True, slots=True)
class Local:
    """Sizes of one rank: the same on every rank.  `stored`: the weights' type, where it is known."""

    config: DecoderConfig
    mesh: Mesh
    phase: str
    stored: str = ""

    @property
    def heads(self) -> int:
        return self.config.heads // self.mesh.tp

    @property
    def kv_heads(self) -> int:
        return max(1, self.config.kv_heads // self.mesh.tp)

    @property
    def ffn(self) -> int:
        return self.config.ffn // self.mesh.tp

    @property
    def experts(self) -> int:
        """Experts of one rank."""
        return self.moe.experts // self.mesh.ep

    @property
    def expert_ffn(self) -> int:
        return self.moe.ffn // self.mesh.moe_tp

    @property
    def shared_ffn(self) -> int:
        return self.moe.shared_ffn // self.mesh.tp

    @property
    def vocab(self) -> int:
        """Vocabulary rows of one rank, padding included."""
        return -(-self.config.vocab // self.mesh.tp)

    @property
    def moe(self) -> Moe:
        assert self.config.moe is not None
        return self.config.moe

    @property
    def mla(self) -> Mla:
        assert self.config.mla is not None
        return self.config.mla
