"""What a graph is compiled for: per-rank sizes, target, role, and how weights are stored.  No framework here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from msconv_runtime.artifact import Draft, GraphInput, GraphOutput, GraphParameter, Weights
from msconv_runtime.errors import UsageError
from msconv_runtime.roles import Role
from msconv_runtime.targets import Target

from ..families.attention import Attention
from ..families.config import DecoderConfig, Mla, Moe
from ..layout.cuts import Mesh
from ..quant import kept_format
from ..quant.record import Kept

SHAPES = re.compile(r"[1-9]\d{0,9}x[1-9]\d{0,9}x[1-9]\d{0,9}", re.ASCII)
USUAL_TOKENS, USUAL_CONTEXT, MOST_BATCH = 128, 1024, 4096  # of graphs of fixed shapes


class CannotCompute(UsageError):
    """A model asks for what a target's operations do not compute."""


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


@dataclass(frozen=True)
class Fixed:
    """Fixed shapes: `batch` sequences, `tokens` new ones of each in a prefill, `context` places in the cache."""

    batch: int
    tokens: int
    context: int

    @classmethod
    def of(cls, given: str, most: int) -> Fixed:
        """Shapes as somebody typed them, `BATCHxTOKENSxCONTEXT`, or the usual ones for ""; `most`: positions of
        the model.  Raises UsageError."""
        usual = cls(1, min(USUAL_TOKENS, most), min(USUAL_CONTEXT, most))
        if not given:
            return usual
        sizes = [int(n) for n in given.split("x")] if SHAPES.fullmatch(given) else []
        if not sizes or sizes[0] > MOST_BATCH or not sizes[1] <= sizes[2] <= most:
            raise UsageError(
                f"{given[:80]!r} are no shapes: three sizes from 1 on are, such as "
                f"{usual.batch}x{usual.tokens}x{usual.context}: at most {MOST_BATCH} sequences, no more tokens "
                f"than places, no more places than this model's {most} positions."
            )
        return cls(*sizes)


@dataclass(frozen=True, slots=True)
class Local:
    """One rank of a graph to make: what is in it is the same on every rank.

    `variant`: of the target's operations, "" or "compiled".  `types`: the stored element type of each weight, {}
    where none are stored yet.  `draft`: what the graph gives hidden states for, if anything.  `weights`: where
    each is stored, for graphs that point there.  `fixed`: for graphs of fixed shapes.  `fused`: which of the
    target's fusions the graph shall have.
    """

    config: DecoderConfig
    mesh: Mesh
    target: Target
    role: Role
    variant: str = ""
    types: Mapping[str, str] = field(default_factory=dict)
    draft: Draft | None = None
    weights: Weights | None = None
    fixed: Fixed | None = None
    fused: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The graph's name in messages."""
        return " ".join(part for part in (self.target.name, self.role.name, self.variant) if part)

    def kept(self, matrix: str) -> Kept:
        """How the matrix of this name is stored."""
        return kept_format(matrix, self.types, self.config.formats)

    def attention(self, layer: int) -> Attention:
        """One rank's share of a layer's attention."""
        return self.config.attention(layer).on_rank(self.mesh.tp)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The different windows of the layers, in the order in which they come."""
        return tuple(dict.fromkeys(self.config.attention(i).window for i in range(self.config.layers)))

    @property
    def network(self) -> str:
        """The module beside this one that builds it."""
        kind = self.config.draft_kind if self.role.is_draft else None
        return kind.name if kind else self.role.network

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what the graph gives, in order."""
        return self.role.given(self.draft is not None)

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
