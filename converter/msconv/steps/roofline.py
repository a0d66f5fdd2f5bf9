"""What a device could do at best: bounds of a layout's graphs, from a device's published figures.

Graphs are an artifact's own, or made from config.json without weights.  Those are made of the first layers only,
two or as many as have every kind of layer: the others are the same nodes again, as a test finds with whole graphs.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from msconv_runtime.artifact import Artifact
from msconv_runtime.errors import UsageError
from msconv_runtime.roles import DECODE, PREFILL, ROLES, VERIFY, Role
from msconv_runtime.targets import Figures, Target, figures_named

from ..checkpoint.reference import configuration
from ..families.config import DecoderConfig
from ..graph.spec import Local
from ..graph.toolchain import dumps_in, require
from ..layout.cuts import Mesh
from ..layout.plan import Plan
from ..mindir.bounds import Bound, bound
from ..mindir.outline import Outline, outline
from ..mindir.shapes import Batch
from ..mindir.work import Total, Work, total, works
from ..quant import formats_named
from .estimate import Estimate

TILE = (128, 128)  # of the mask in prefill
ASSUMED = (
    "Rates are the published peaks; activations, launches, the host and sampling cost nothing.",
    "Weights are read from memory once a call, and the cache of each sequence once.",
    "Tokens spread evenly over experts.",
)
DRAFTS_ASSUMED = "Making the drafts costs nothing; as many tokens are accepted a step as was given."


@dataclass(frozen=True)
class Asked:
    """`sequences` of `context` tokens each.  `draft_tokens`: new tokens of each that a step verifies, 0 without
    drafts; `accept_length`: tokens that such a step gives on average."""

    device: str
    context: int
    sequences: int
    draft_tokens: int = 0
    accept_length: float = 0

    def __post_init__(self) -> None:
        if bool(self.draft_tokens) != bool(self.accept_length):
            raise UsageError("--draft-tokens and --accept-length go together.", "Give both, or none.")
        if self.draft_tokens and not 1 <= self.accept_length <= self.draft_tokens:
            raise UsageError(
                f"--accept-length {self.accept_length}: a step that verifies {self.draft_tokens} tokens gives 1 "
                f"to {self.draft_tokens}.",
                "The server's log and its metrics say the accepted length.",
            )
        if self.draft_tokens > self.context:
            raise UsageError(
                f"--draft-tokens {self.draft_tokens}: more than the context of {self.context} tokens."
            )


@dataclass(frozen=True)
class Phase:
    """One call of a graph: for a batch, what it does and the bound.  `gives`: tokens that it gives or takes in."""

    role: str
    batch: Batch
    work: Total
    bound: Bound
    gives: float

    @property
    def seconds_per_token(self) -> float | None:
        """Of each request while others are answered too: a request gets `gives / sequences` tokens a call."""
        seconds = self.bound.seconds
        return None if seconds is None else seconds * self.batch.sequences / self.gives

    @property
    def tokens_per_second(self) -> float | None:
        return None if not self.bound.seconds else self.gives / self.bound.seconds


@dataclass(frozen=True)
class Roofline:
    """`made`: graphs of `layers_read` layers were made for this; else they are an artifact's, whole."""

    figures: Figures
    target: Target
    tp: int
    made: bool
    layers_read: int
    decode: Phase
    prefill: Phase
    assumed: tuple[str, ...]


@dataclass(frozen=True)
class Graphs:
    """Outlines by role.  `times`: how often each layer's nodes count."""

    by_role: Mapping[str, Outline]
    times: Mapping[int, int]
    experts: int
    tp: int
    made: bool


def roofline(planned: Estimate, asked: Asked) -> Roofline:
    """Bounds of the layout that was planned.  Raises UsageError for a device that is not known, EnvironmentProblem
    if MindSpore, which makes the graphs, is missing."""
    target, figures = figures_named(asked.device)
    graphs = made_graphs(planned.checkpoint.config, planned.plan, target, _roles(asked))
    return bounds_of(graphs, target, figures, asked)


def roofline_of_artifact(root: Path, mesh: Mesh, asked: Asked) -> Roofline:
    """Bounds of an artifact's own graphs.  Raises UsageError if its layout is not `mesh`, or it has none."""
    target, figures = figures_named(asked.device)
    graphs = graphs_of_artifact(Artifact(root), target, mesh, _roles(asked))
    return bounds_of(graphs, target, figures, asked)


def _roles(asked: Asked) -> tuple[Role, ...]:
    return PREFILL, VERIFY if asked.draft_tokens else DECODE


def bounds_of(graphs: Graphs, target: Target, figures: Figures, asked: Asked) -> Roofline:
    new = asked.draft_tokens or 1
    step = Batch(asked.sequences, new, asked.context)
    mask = (step.tokens, asked.context) if asked.draft_tokens else (1, 1)
    prompt = Batch(1, asked.context, asked.context)
    role = VERIFY if asked.draft_tokens else DECODE
    return Roofline(
        figures,
        target,
        graphs.tp,
        graphs.made,
        len(graphs.times),
        decode=_phase(graphs, role, step, mask, figures, (asked.accept_length or 1) * asked.sequences),
        prefill=_phase(graphs, PREFILL, prompt, TILE, figures, asked.context),
        assumed=(*ASSUMED, DRAFTS_ASSUMED) if asked.draft_tokens else ASSUMED,
    )


def _phase(
    graphs: Graphs, role: Role, batch: Batch, mask: tuple[int, int], figures: Figures, gives: float
) -> Phase:
    done = counted(graphs, role, batch, mask)
    whole = total(done)
    return Phase(role.name, batch, whole, bound(whole, done, figures, graphs.tp), gives)


def counted(graphs: Graphs, role: Role, batch: Batch, mask: tuple[int, int] = (1, 1)) -> list[tuple[Work, int]]:
    """Each node's work, and how often it is there."""
    found = works(graphs.by_role[role.name], batch, graphs.experts, mask)
    return [(work, graphs.times.get(work.layer, 1)) for work in found]


def graphs_of_artifact(artifact: Artifact, target: Target, mesh: Mesh, roles: tuple[Role, ...]) -> Graphs:
    """An artifact's compiled graphs.  Raises UsageError for another layout, or if it has none for the target."""
    if (artifact.tp, artifact.ep) != (mesh.tp, mesh.ep):
        raise UsageError(
            f"{artifact.root}: is an artifact of tp {artifact.tp}, ep {artifact.ep}.",
            f"Give --tp {artifact.tp} --ep {artifact.ep}, or its source checkpoint for another layout.",
        )
    there = {g.role: g for g in artifact.manifest.graphs_for(target.name) if not g.variant}
    if lacking := [r.name for r in roles if r.name not in there]:
        raise UsageError(
            f"{artifact.root}: has no {' and no '.join(lacking)} graph for {target.name}.",
            f"`msconv compile {artifact.root} --target {target.name}` makes them.",
        )
    paths = {r.name: artifact.root / there[r.name].path for r in roles}
    config = configuration(artifact)
    outlines = {name: outline(path.read_bytes(), str(path)) for name, path in paths.items()}
    experts = config.moe.experts if config.moe else 0
    return Graphs(outlines, dict.fromkeys(range(config.layers), 1), experts, artifact.tp, made=False)


def made_graphs(config: DecoderConfig, plan: Plan, target: Target, roles: tuple[Role, ...]) -> Graphs:
    """Graphs of a checkpoint, or of a configuration, in the planned layout: as `compile` makes them, but for
    layers that are the same as one before.  Raises UsageError for a draft."""
    if config.drafts_for is not None:
        raise UsageError("A draft of another model has no graphs of its own to bound.", "Give that model.")
    types = {t.name: t.dtype for t in plan.tensors}
    config = replace(config, formats=tuple(dict.fromkeys((*config.formats, *formats_named(plan.quant)))))
    times = repeated(config, types)
    short = replace(config, layers=len(times))
    locals_ = {r.name: Local(short, plan.mesh, target, ROLES[r.name], "", types) for r in roles}
    experts = config.moe.experts if config.moe else 0
    return Graphs({name: _made(local) for name, local in locals_.items()}, times, experts, plan.mesh.tp, made=True)


def _made(local: Local) -> Outline:
    require(local.target.form)
    from ..graph.export import export

    with tempfile.TemporaryDirectory(prefix="msconv-") as place, dumps_in(Path(place) / "dumps"):
        return outline(export(local).proto, local.title)


def repeated(config: DecoderConfig, types: Mapping[str, str]) -> dict[int, int]:
    """The layers to make, from the first on, and how many of the model's each stands for.  The first one never
    stands for another: its first norm is alone, others' are fused with a sum."""
    kinds = [layer_kind(config, types, i) for i in range(config.layers)]
    last = {kind: i for i, kind in reversed(list(enumerate(kinds[1:], 1)))}  # the first place of each, but 0
    short = max(last.values(), default=0) + 1
    times = Counter(range(short))
    for kind in kinds[short:]:
        times[last[kind]] += 1
    return dict(times)


def layer_kind(config: DecoderConfig, types: Mapping[str, str], layer: int) -> tuple[object, ...]:
    """What makes one layer's nodes differ from another's."""
    prefix = f"model.layers.{layer}."
    stored = tuple((n.removeprefix(prefix), t) for n, t in types.items() if n.startswith(prefix))
    return config.attention(layer), config.has_experts(layer), tuple(sorted(stored))
