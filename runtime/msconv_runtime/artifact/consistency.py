"""Whether a manifest's parts agree, so that what is read later may be taken at its word.

A stranger may have written it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from ..draft_kinds import DRAFT_KINDS, OF_CHECKPOINTS
from ..dtypes import DTYPES, VALUE_DTYPES
from ..mindir_check.allowed import TP_GROUP
from ..roles import ROLES, of_draft, of_model
from ..targets import TARGETS
from .manifest import (
    Graph,
    GraphInput,
    GraphOutput,
    GraphParameter,
    Manifest,
    Rehearsed,
    Verified,
    digest_of,
)

MOST_RANKS = 4096
MOST_GRAPH_BYTES = 256 << 20
MOST_SIZE = 1 << 31  # of a dimension
MOST_LAYERS = 4096
MOST_CAPTURED = 16  # whose hidden states a draft reads
NEWER = "a newer msconv may know it"
FILE = re.compile(r"[A-Za-z0-9][\w-]{0,90}\.(?:json|jinja|model|txt|tiktoken)", re.ASCII)
NOT_FILES = {"msconv.json"}
HALF = "half_precision_"  # settings that a proof reports without a gate
INT8 = "int8_"  # settings of a proof of int8: not errors of logits, see _led
DEVIATIONS = "sum of the layers' own deviations"  # of a proof in which each layer was given the reference's input
MOST_LED = 1e-4  # share of codes that the reference took from the candidate
HALVES = {"max_abs_logit_error", "argmax_agreement", "bound"}


def contradiction(manifest: Manifest) -> str:
    """Where the parts do not agree, or ""."""
    tp = manifest.parallel.tp
    if not 1 <= tp <= MOST_RANKS or not 1 <= manifest.parallel.ep <= tp:
        return f"tp {tp}, ep {manifest.parallel.ep}"
    return _weights(manifest) or _draft(manifest) or _graphs(manifest) or _files(manifest) or _claims(manifest)


def _weights(manifest: Manifest) -> str:
    tp, w = manifest.parallel.tp, manifest.weights
    if w is None:
        return ""
    if w.dtype not in VALUE_DTYPES:
        return (
            f"the weights have unknown element type {w.dtype[:40]!r}, known are {', '.join(VALUE_DTYPES)}; {NEWER}"
        )
    sizes: list[list[int]] = [[] for _ in range(tp)]
    for f in w.files:
        if not 0 <= f.rank < tp:
            return f"{f.path} is of rank {f.rank}, of {tp}"
        sizes[f.rank].append(f.size)
    if not sizes[0] or any(len(s) != len(sizes[0]) for s in sizes):
        return "ranks have different numbers of files"
    if w.digest != digest_of(f.digest for f in w.files):
        return "the digest of the weights is not that of their files"
    if double := _twice(f.path for f in w.files) or _twice(t.name for t in w.tensors):
        return f"{double} is there twice"
    for t in w.tensors:
        item = DTYPES[t.dtype].nbytes if t.dtype in DTYPES and DTYPES[t.dtype].storable else 0
        if not item:
            return f"{t.name} has unknown element type {t.dtype[:40]}"
        if len(t.digests) != tp:
            return f"{t.name} has {len(t.digests)} digests for {tp} ranks"
        if not 0 <= t.file < len(sizes[0]):
            return f"{t.name} is in file {t.file} of {len(sizes[0])}"
        if min([*t.parts, *t.shape, t.begin], default=0) < 0 or math.prod(t.shape) * item != t.nbytes:
            return f"{t.name} has shape {t.shape} and {t.nbytes} bytes at {t.begin}"
        if t.begin + t.nbytes > min(s[t.file] for s in sizes):
            return f"{t.name} ends at byte {t.begin + t.nbytes}, past the end of its file"
    if w.tensors and all(t.dtype != w.dtype for t in w.tensors):
        return f"the weights are {w.dtype}, and none of their tensors is"
    return ""


def _draft(manifest: Manifest) -> str:
    draft = manifest.draft
    layers = draft.layers if draft else []
    if draft and draft.kind not in DRAFT_KINDS:
        return f"the draft is of the kind {draft.kind[:40]!r}, known are {', '.join(DRAFT_KINDS)}; {NEWER}"
    if len(layers) > MOST_CAPTURED or layers != sorted({n for n in layers if 0 <= n < MOST_LAYERS}):
        return f"the draft reads the layers {layers[:9]}, which are no few in ascending order"
    return ""


def _graphs(manifest: Manifest) -> str:
    graphs = manifest.graphs
    for graph in graphs:
        if problem := _graph(graph, manifest.draft is not None):
            return problem
    if of_draft(graphs) and of_model(graphs) and not (manifest.draft and manifest.draft.is_layer):
        return "some graphs are a draft's, and it has no layer that drafts"
    if graphs and not of_model(graphs) and manifest.model.family not in OF_CHECKPOINTS:
        return f"all graphs are a draft's, of {manifest.model.family[:40]!r}, which is no kind of draft; {NEWER}"
    if double := _twice(f"{g.target} {g.name}" for g in graphs) or _twice(g.path for g in graphs):
        return f"the graph {double} is there twice"
    return ""


def _graph(g: Graph, has_draft: bool) -> str:
    named = f"the graph {g.target[:40]!r} {g.name[:40]!r}"
    if g.target not in TARGETS:
        return f"{named}: no such target, known are {', '.join(TARGETS)}; {NEWER}"
    if (g.role, g.variant) not in (*TARGETS[g.target].graphs, *TARGETS[g.target].draft_graphs):
        return f"{named}: a target has no such graph"
    if not TARGETS[g.target].form.is_place(g.target, g.path):
        return f"{named} is in {g.path[:80]!r}, where no graph of its target is"
    if not 1 <= g.size <= MOST_GRAPH_BYTES or not 1 <= g.nodes <= g.size or g.min_sequences < 0:
        return f"{named} has {g.size} bytes and {g.nodes} nodes"
    values: list[GraphInput | GraphOutput | GraphParameter] = [*g.inputs, *g.outputs, *g.reads]
    if odd := next((v for v in values if v.dtype not in DTYPES or not _is_shape(v.shape)), None):
        return f"{named}: {odd.name[:80]!r} has type {odd.dtype[:40]!r} and shape {odd.shape[:9]}"
    if any(None in p.shape for p in g.reads) or _twice(p.name for p in g.reads):
        return f"{named} reads a weight twice, or one of no shape"
    if not g.caches or any(len(c.shape) != 4 for c in g.caches):
        return f"{named} has no caches of pages, slots, heads and width"
    target = TARGETS[g.target]
    wanted = ROLES[g.role].given(has_draft and bool(target.draft_graphs))
    more = len(g.caches) if target.form.returns_caches else 0
    if tuple(o.name for o in g.outputs[: len(wanted)]) != wanted or len(g.outputs) != len(wanted) + more:
        return f"{named} gives {[o.name[:40] for o in g.outputs][:5]}"
    if set(g.groups) - {TP_GROUP} or set(g.nz) - {p.name for p in g.reads}:
        return f"{named} names a group or a weight that it has not"
    if g.nz and not target.nz:
        return f"{named} wants weights in a format that its target has not"
    if odd_one := next((f for f in g.fused if f not in target.fusions or g.fused.count(f) > 1), ""):
        return f"{named} has {odd_one[:40]!r} fused, which its target has not, or twice"
    return ""


def _is_shape(shape: Iterable[int | None]) -> bool:
    dims = [1 if n is None else n for n in shape]
    return len(dims) <= 8 and all(0 <= n < MOST_SIZE for n in dims)


def _files(manifest: Manifest) -> str:
    """Of files beside: plain names of data that a model's directory has."""
    for file in manifest.files:
        if not FILE.fullmatch(file.name) or file.name in NOT_FILES or not 0 <= file.size <= MOST_GRAPH_BYTES:
            return f"the file {file.name[:80]!r} of {file.size} bytes is none that a model has"
    if double := _twice(f.name for f in manifest.files):
        return f"the file {double} is there twice"
    return ""


def _claims(manifest: Manifest) -> str:
    """Of proofs and rehearsals.  Those of other bytes are no contradiction: they hold no longer."""
    for proof in manifest.verified:
        if problem := _proof(proof, manifest.parallel.tp):
            return f"the proof for {proof.target[:40]!r} {problem}"
    for rehearsed in manifest.rehearsed:
        if problem := _rehearsal(rehearsed):
            return f"the rehearsal for {rehearsed.target[:40]!r} {problem}"
    if double := _twice(v.target for v in manifest.verified):
        return f"{double} is proved twice"
    return ""


def _proof(v: Verified, tp: int) -> str:
    gated = [v.max_abs_logit_error, *v.norms.values()]
    ungated = (HALF, INT8)
    gated += [
        float(n) for name, n in v.settings.items() if not isinstance(n, str) and not name.startswith(ungated)
    ]
    if v.target not in TARGETS:
        return "is of no known target"
    if not math.isfinite(v.bound) or v.bound <= 0:
        return f"has the bound {v.bound}"
    if worst := next((e for e in gated if not 0 <= e <= v.bound), None):
        return f"has an error of {worst:.2e}, its own bound is {v.bound:.0e}"
    if v.argmax_agreement != 1.0 or v.logits_compared < 1 or v.ranks != tp:
        return (
            f"compared {v.logits_compared} rows of logits of {v.ranks} ranks, of {tp}, and their argmax agreed in "
            f"{v.argmax_agreement:.1%}"
        )
    half = {n.removeprefix(HALF) for n in v.settings if n.startswith(HALF)}
    if half and not {"max_abs_logit_error", "argmax_agreement"} <= half <= HALVES:
        return f"has half precision's {', '.join(sorted(half))[:80]}"
    if any(isinstance(n, str) or not math.isfinite(n) for n in v.settings.values()):
        return "has a setting that is no number"
    if problem := _led({n.removeprefix(INT8): float(x) for n, x in v.settings.items() if n.startswith(INT8)}):
        return problem
    if not v.graph_digests or _twice(v.graph_digests):
        return "is of no graphs, or of one twice"
    return ""


def _led(found: dict[str, float]) -> str:
    """What a proof of int8 says of its codes, by the names it has them under; {} for another proof."""
    if not found:
        return ""
    if worst := next((n for n in found.values() if n < 0), None):
        return f"has the number {worst}"
    compared, led, wrong = (found.get(f"codes_{n}", math.nan) for n in ("compared", "led", "unexplained"))
    if not (compared > 0 and led < MOST_LED * compared and wrong == 0):
        return f"led {led:.0f} of {compared:.0f} codes and left {wrong:.0f} unexplained"
    for name, bound in found.items():
        if name.endswith("kl_bound") and not found.get(name.removesuffix("_bound"), math.nan) <= bound:
            return f"has a divergence ({name.removesuffix('_bound')}) beyond its own bound, {bound:.1e}"
    return ""


def _rehearsal(r: Rehearsed) -> str:
    numbers = [r.max_call_error, r.max_logit_error, r.bound, r.page, r.prompts, r.tokens, r.machines, r.copies]
    numbers += [r.ties, r.undecided, *r.calls.values()]
    if worst := next((n for n in numbers if not 0 <= n < math.inf), None):
        return f"has the number {worst}"
    if r.bound and r.max_logit_error > r.bound:
        return f"has an error of {r.max_logit_error:.2e}, its own bound is {r.bound:.0e}"
    return ""


def _twice(names: Iterable[str]) -> str:
    """The first that comes a second time, or ""."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name[:80]
        seen.add(name)
    return ""
