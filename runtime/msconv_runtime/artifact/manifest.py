"""The artifact's manifest: typed, and digests of digests.  Knows no model and no framework."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec
import xxhash

from ..draft_kinds import DRAFT_KINDS

FORMAT = 2

OF_TARGET = "target."  # before the name of a weight that a draft's graph takes from its target's artifact
D2T = "d2t"  # of a draft: what is added to the number of a token that it scores, to make it the target's
InputKind = Literal["batch", "mask", "hidden", "cache"]
PHASES = {"verify": "decode_all", "mixed_compiled": "native", "verify_compiled": "native_all"}  # by a graph's name


class SourceFile(msgspec.Struct, frozen=True, omit_defaults=True):
    """One file of the source checkpoint.  `digest` covers its header and the tensors that were read."""

    name: str
    size: int
    digest: str


class Model(msgspec.Struct, frozen=True, omit_defaults=True):
    family: str
    architecture: str
    source: str
    config_digest: str
    commit: str = ""
    parameters: int = 0
    files: list[SourceFile] = []
    harmless: list[str] = []  # keys of config.json that a person said change nothing


class Parallel(msgspec.Struct, frozen=True, omit_defaults=True):
    tp: int
    ep: int = 1


class Draft(msgspec.Struct, frozen=True, omit_defaults=True):
    """What guesses further tokens for this model.  `kind`: see draft_kinds.  `layers`: the model's graphs give the
    residual streams that enter these layers, ascending, side by side, [T, k * hidden]; with none of them, what the
    head reads, the last norm's output [T, hidden]."""

    kind: str
    layers: list[int] = []

    @property
    def is_layer(self) -> bool:
        """Whether it is a layer among the model's own weights."""
        return DRAFT_KINDS[self.kind].is_layer


class WeightFile(msgspec.Struct, frozen=True, omit_defaults=True):
    """One safetensors file of one rank.  `digest` = digest of (header digest, tensor digests in order)."""

    path: str
    rank: int
    size: int
    digest: str


class TensorEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One tensor, the same shape on every rank.  `file` indexes the files of a rank; `begin` is the offset
    in that file.  `digests[rank]` covers the digests of its `parts` (bytes of each, in order)."""

    name: str
    dtype: str
    shape: list[int]
    file: int
    begin: int
    parts: list[int]
    digests: list[str]

    @property
    def nbytes(self) -> int:
        return sum(self.parts)


class Dropped(msgspec.Struct, frozen=True, omit_defaults=True):
    """Source tensors that were left out on purpose (names folded over layers)."""

    name: str
    count: int
    reason: str


class Padding(msgspec.Struct, frozen=True, omit_defaults=True):
    """A dimension that tp did not divide: zero rows fill `padded - size`, over all ranks."""

    name: str
    size: int
    padded: int


class Weights(msgspec.Struct, frozen=True, omit_defaults=True):
    """`quant`: the formats that matrices are kept in.  `made`: what `--quant` named, if the conversion made their
    codes; "" if they are the source's, and in artifacts of before it was recorded."""

    dtype: str
    digest: str
    files: list[WeightFile]
    tensors: list[TensorEntry]
    source_dtype: str = ""
    quant: str = ""
    made: str = ""
    dropped: list[Dropped] = []
    padded: list[Padding] = []

    @property
    def nbytes(self) -> int:
        """Of all ranks' files."""
        return sum(f.size for f in self.files)

    @property
    def rank_bytes(self) -> int:
        """Of one rank's files."""
        return sum(f.size for f in self.files if f.rank == 0)


class GraphInput(msgspec.Struct, frozen=True, omit_defaults=True):
    """`kind`: a batch's integers, the attention mask, a draft's hidden states, or a cache that the graph reads and
    writes.  `None` in a shape is a dynamic dimension."""

    name: str
    dtype: str
    shape: list[int | None]
    kind: InputKind = "batch"


class GraphOutput(msgspec.Struct, frozen=True, omit_defaults=True):
    name: str
    dtype: str
    shape: list[int | None]


class GraphParameter(msgspec.Struct, frozen=True, omit_defaults=True):
    name: str
    dtype: str
    shape: list[int]


class Graph(msgspec.Struct, frozen=True, omit_defaults=True):
    """One compiled graph of a target.  `role`: what it is for (see roles.py).  `variant`: `compiled` if its
    operations are compiled kernels, "" if they are MindSpore's own.  `inputs`, `outputs` in order.  `reads`: the
    weights it takes, in the types it takes them in.  `min_sequences`: fewer run faster in the prefill graph.
    `kinds`: how many nodes of each primitive; empty in artifacts of before it was recorded.  `mindspore`, `onnx`:
    the version that wrote it, "" if the other did.  `fused`: what it has as one operation because somebody asked
    for it."""

    target: str
    role: str
    path: str
    size: int
    digest: str
    mindspore: str
    nodes: int
    inputs: list[GraphInput]
    outputs: list[GraphOutput]
    reads: list[GraphParameter]
    variant: str = ""
    min_sequences: int = 0
    groups: list[str] = []
    nz: list[str] = []
    kinds: dict[str, int] = {}
    onnx: str = ""
    fused: list[str] = []

    @property
    def name(self) -> str:
        """The role, and the variant if there are several: `prefill`, `mixed_compiled`."""
        return f"{self.role}_{self.variant}" if self.variant else self.role

    @property
    def written_by(self) -> tuple[str, str]:
        """A package and its version."""
        return ("onnx", self.onnx) if self.onnx else ("mindspore", self.mindspore)

    @property
    def phase(self) -> str:
        """What `--json` has called it since the first version: see PHASES."""
        return PHASES.get(self.name, self.name)

    @property
    def caches(self) -> list[GraphInput]:
        """Two a layer, [pages, page, heads, width], or one where both come from the same latent."""
        return [i for i in self.inputs if i.kind == "cache"]


class Verified(msgspec.Struct, frozen=True, omit_defaults=True):
    """What was compared with what, and how far apart it was.  Holds for exactly these digests.
    `norms`: largest error of each norm's output, relative to its largest value; empty where only logits show."""

    target: str
    weights_digest: str
    graph_digests: list[str]
    reference: str
    mode: str
    bound: float
    max_abs_logit_error: float
    argmax_agreement: float
    ranks: int
    logits_compared: int
    settings: dict[str, str | int | float] = {}
    norms: dict[str, float] = {}


class Rehearsed(msgspec.Struct, frozen=True, omit_defaults=True):
    """What SGLang's server did on the rehearsal device.  Holds for exactly these digests.

    `device`: version of the stand-ins.  `mode`: `float32`, or `as served` in the target's own precision.
    `machines`, `copies`: --nnodes and --dp-size.  `calls`: of each graph.  `max_call_error`: of logits, against
    the interpreter; `max_logit_error`: against transformers.  `bound`: of the latter, 0 where there is none.
    `end`: `term` if the server was ended by SIGTERM, `kill` if one of its ranks was killed.  `msconv`: the version
    whose runtime it was.
    """

    target: str
    weights_digest: str
    graph_digests: list[str]
    sglang: str
    mindspore: str
    device: str
    mode: str
    flags: list[str]
    page: int
    prompts: int
    tokens: int
    calls: dict[str, int]
    max_call_error: float
    max_logit_error: float
    bound: float
    machines: int = 1
    copies: int = 1
    ties: int = 0
    undecided: int = 0
    end: str = "term"
    msconv: str = ""


class File(msgspec.Struct, frozen=True, omit_defaults=True):
    """A file beside weights and graphs that a server reads: configuration, tokenizer, chat template."""

    name: str
    size: int
    digest: str


class Manifest(msgspec.Struct, frozen=True, omit_defaults=True):
    """`files`: empty in artifacts of before files had digests.  `draft`: its graphs give hidden states beside
    logits, of every token, for what that is."""

    format: int
    tool: str
    model: Model
    parallel: Parallel
    weights: Weights | None = None
    graphs: list[Graph] = []
    verified: list[Verified] = []
    rehearsed: list[Rehearsed] = []
    files: list[File] = []
    draft: Draft | None = None

    def graphs_for(self, target: str) -> list[Graph]:
        return [g for g in self.graphs if g.target == target]

    def proof_for(self, target: str) -> Verified | None:
        """The verification that still holds for `target`: same weights, same graphs.  None: unproven."""
        return next((v for v in self.verified if self._holds(v, target)), None)

    def rehearsals_for(self, target: str) -> list[Rehearsed]:
        """Those that still hold for `target`: same weights, same graphs."""
        return [r for r in self.rehearsed if self._holds(r, target)]

    def _holds(self, entry: Verified | Rehearsed, target: str) -> bool:
        digests = sorted(g.digest for g in self.graphs_for(target))
        same_weights = self.weights is not None and entry.weights_digest == self.weights.digest
        return entry.target == target and same_weights and sorted(entry.graph_digests) == digests


def digest_bytes(data: bytes | bytearray | memoryview) -> str:
    """`xxh3:<128 bits>` of some bytes."""
    return "xxh3:" + xxhash.xxh3_128_hexdigest(data)


def digest_of(digests: Iterable[str]) -> str:
    """Digest of a sequence of digests: how parts make a tensor, tensors a file, files the weights."""
    return digest_bytes("\n".join(digests).encode())
