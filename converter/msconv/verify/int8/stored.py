"""An artifact's codes, scales and sums, bit for bit, against those of the source: cut here a second time.

Every int8 tensor of every rank is compared with what the rank must have of the source's matrices, and with it the
scales and biases of its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from msconv_runtime.artifact import Artifact

from ...families.config import DecoderConfig
from ..stored import Stored
from .weights import OF_STATIC, QuantisedWeights

Rows = Callable[[int], torch.Tensor]  # of a rank -> which rows of the source it has, in its order


@dataclass(frozen=True)
class Piece:
    """A source matrix in a tensor of the artifact.  `rows` of each rank; `columns` [begin, end) of each rank, None
    for all."""

    source: str
    rows: Rows
    columns: Callable[[int], slice] | None = None


class Cuts:
    """What each rank has of a model's matrices."""

    def __init__(self, config: DecoderConfig, tp: int, ep: int) -> None:
        self.config, self.tp, self.ep = config, tp, ep

    def matrices(self, layer: int) -> Iterator[tuple[str, list[Piece]]]:
        """(name in the artifact, its pieces from top to bottom) of a layer's linears, experts apart."""
        prefix = f"model.layers.{layer}."
        yield from (self._heads if self.config.mla is None else self._latent)(prefix + "self_attn.", layer)
        moe = self.config.moe
        if moe is None or not self.config.has_experts(layer):
            yield from self._mlp(prefix + "mlp.", self.config.ffn)
        elif moe.shared_ffn:
            yield from self._mlp(prefix + "mlp.shared_experts.", moe.shared_ffn)

    def _heads(self, prefix: str, layer: int) -> Iterator[tuple[str, list[Piece]]]:
        spec = self.config.attention(layer)
        q, kv, width = spec.heads, spec.kv_heads, spec.head_dim
        local = max(1, kv // self.tp)

        def keys(rank: int) -> torch.Tensor:
            first = rank * kv // self.tp  # ranks beyond the number of heads share them
            return torch.arange(first * width, (first + local) * width)

        yield (
            prefix + "qkv_proj.weight",
            [
                Piece(prefix + "q_proj.weight", self._share(q * width)),
                Piece(prefix + "k_proj.weight", keys),
                Piece(prefix + "v_proj.weight", keys),
            ],
        )
        yield prefix + "o_proj.weight", [self._divided(prefix + "o_proj.weight", self.config.hidden, q * width)]

    def _latent(self, prefix: str, layer: int) -> Iterator[tuple[str, list[Piece]]]:
        mla = self.config.mla
        assert mla is not None
        heads = self.config.attention(layer).heads
        query = halves_apart(mla.nope + mla.rope, mla.rope if mla.interleaved else 0)
        all_heads = torch.cat([query + len(query) * head for head in range(heads)])
        share = self._share(len(all_heads))
        if mla.q_lora:
            yield prefix + "q_a_proj.weight", [Piece(prefix + "q_a_proj.weight", whole(mla.q_lora))]
        name = prefix + ("q_b_proj.weight" if mla.q_lora else "q_proj.weight")
        yield name, [Piece(name, lambda rank: all_heads[share(rank)])]
        latent = halves_apart(mla.latent, mla.rope if mla.interleaved else 0)
        name = prefix + "kv_a_proj_with_mqa.weight"
        yield name, [Piece(name, lambda rank: latent)]
        name = prefix + "o_proj.weight"
        yield name, [self._divided(name, self.config.hidden, heads * mla.v_dim)]

    def _mlp(self, prefix: str, ffn: int) -> Iterator[tuple[str, list[Piece]]]:
        share = self._share(ffn)
        parts = [Piece(f"{prefix}{part}_proj.weight", share) for part in ("gate", "up")]
        yield prefix + "gate_up_proj.weight", parts
        yield prefix + "down_proj.weight", [self._divided(prefix + "down_proj.weight", self.config.hidden, ffn)]

    def _share(self, count: int) -> Rows:
        size = count // self.tp
        return lambda rank: torch.arange(rank * size, (rank + 1) * size)

    def _divided(self, name: str, rows: int, columns: int) -> Piece:
        size = columns // self.tp
        return Piece(name, whole(rows), lambda rank: slice(rank * size, (rank + 1) * size))


def whole(count: int) -> Rows:
    return lambda rank: torch.arange(count)


def halves_apart(width: int, pairs: int) -> torch.Tensor:
    """Rows of a head whose last `pairs` rows are stored as x0 y0 x1 y1 ..: x0 x1 .. y0 y1 .."""
    order = torch.arange(width)
    order[width - pairs :] = (width - pairs + torch.arange(pairs)).reshape(-1, 2).T.reshape(-1)
    return order


class Check:
    """One comparison of an artifact with its source."""

    def __init__(self, artifact: Artifact, weights: QuantisedWeights) -> None:
        self.tp, self.ep = artifact.tp, artifact.manifest.parallel.ep
        self.weights, self.config = weights, weights.checkpoint.config
        if artifact.manifest.draft and artifact.manifest.draft.is_layer:
            self.config = self.config.with_draft()
        self.found = Stored(artifact)
        self.known: set[str] = set()

    def run(self, layers: int = 0) -> Stored:
        """`layers`: only the first of them."""
        cuts = Cuts(self.config, self.tp, self.ep)
        for layer in range(layers or self.config.layers + self.config.drafts):
            for name, pieces in cuts.matrices(layer):
                self._matrix(name, pieces)
            if self.config.has_experts(layer):
                self._experts(f"model.layers.{layer}.mlp.experts.")
            if self.found.place:
                return self.found
        odd = sorted(n for n, dtype in self.found.types.items() if dtype == "int8" and n not in self.known)
        if odd and not layers:
            self.found.place = f"{odd[0]}: is int8, and the source's matrix is not to be"
        return self.found

    def _matrix(self, name: str, pieces: list[Piece]) -> None:
        module, parts = name.removesuffix(".weight"), [p.source.removesuffix(".weight") for p in pieces]
        kind = self.weights.kind(parts[0])
        if kind is None:
            return
        self.known.add(name)
        if kind == "dynamic":
            sources = [dict(zip(("codes", "scale"), self.weights.codes(p.source), strict=True)) for p in pieces]
            companions = {name + "_scale": "scale"}
        else:
            sources = [{"codes": self.weights.raw(p.source)} for p in pieces]
            for source, part in zip(sources, parts, strict=True):
                source |= {leaf: self.weights.raw(f"{part}.{leaf}") for leaf in OF_STATIC}
            companions = {f"{module}.{leaf}": leaf for leaf in OF_STATIC}
        for rank in range(self.tp):
            self.found.compare(rank, name, self._join(rank, "codes", pieces, sources), parts)
            for companion, leaf in companions.items():
                self.found.compare(rank, companion, self._join(rank, leaf, pieces, sources), parts)

    def _join(
        self, rank: int, leaf: str, pieces: list[Piece], sources: list[dict[str, torch.Tensor]]
    ) -> torch.Tensor:
        if leaf in ("input_scale", "input_offset"):
            return sources[0][leaf].to(torch.float32)
        found = []
        for piece, source in zip(pieces, sources, strict=True):
            values = source[leaf]
            if leaf == "quant_bias" and piece.columns is not None:
                values = self._bias_of(rank, piece.columns, source)
            elif leaf == "codes" and piece.columns is not None:
                values = values[:, piece.columns(rank)]
            found.append(values[piece.rows(rank)])
        return torch.cat(found)

    def _bias_of(
        self, rank: int, columns: Callable[[int], slice], source: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """A rank's share: its own columns without the offset; what remains, a bias, is on rank 0."""
        offset = int(source["input_offset"].round().item())

        def share(columns: slice) -> torch.Tensor:
            return -offset * source["codes"][:, columns].to(torch.int64).sum(1)

        own = share(columns(rank))
        if rank == 0:
            own = own + source["quant_bias"].to(torch.int64) - share(slice(None))
        return own.to(torch.int32)

    def _experts(self, prefix: str) -> None:
        if not self.weights.has_experts(prefix):
            return
        moe, group = self.config.moe, self.tp // self.ep
        assert moe is not None
        local, width = moe.experts // self.ep, moe.ffn // group
        names = [prefix + "gate_up_proj.weight", prefix + "down_proj.weight"]
        self.known |= set(names)
        for expert in range(moe.experts):
            parts = {p: self.weights.codes(f"{prefix}{expert}.{p}_proj.weight") for p in ("gate", "up", "down")}
            for rank in range(expert // local * group, (expert // local + 1) * group):
                mine = slice(rank % group * width, (rank % group + 1) * width)
                (gate, gate_scale), (up, up_scale), (down, down_scale) = parts.values()
                wanted = {
                    names[0]: torch.cat([gate[mine], up[mine]]),
                    names[0] + "_scale": torch.cat([gate_scale[mine], up_scale[mine]]),
                    names[1]: down[:, mine],
                    names[1] + "_scale": down_scale,
                }
                for name, values in wanted.items():
                    of = [f"{prefix}{expert}"]
                    self.found.compare(rank, name, values.T.unsqueeze(0), of, expert % local)
