"""What `verify` of the planned artifact will take: a proof's own code is tried on one layer of each kind, and its
work is counted from the plan."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msconv_runtime.dtypes import DTYPES
from msconv_runtime.targets import Target

from ..layout.plan import Plan
from ..location import LocalDirectory
from .costs import Cost, Tried
from .estimate import Estimate
from .roofline import layer_kind

if TYPE_CHECKING:
    from ..verify.scenario import Call, Lengths
    from ..verify.trial import Pass

HEAD_ROWS = 2048  # of a rank's vocabulary, in graphs that are tried
FLOAT32 = 4
LAYER_NAME = re.compile(r"model\.layers\.(\d+)(?=$|\.)")
EMBEDDING = "embed_tokens"
LAYER, VALUE, ROW = "layers", "values", "rows"


class NotPredicted(Exception):
    """Why the time of a proof cannot be said beforehand."""


@dataclass(frozen=True)
class Shape:
    """What of a model is tried: its first `layers`, and for each of those, how many of the model's it stands for.
    `lengths`, `calls`: of the scenario that is proved, which runs `passes` times."""

    layers: int
    times: dict[int, int]
    lengths: Lengths
    calls: tuple[Call, ...]
    passes: float

    @property
    def tokens(self) -> int:
        return sum(self.lengths.totals)


def predict_proof(planned: Estimate, target: Target) -> Cost:
    """What `verify` takes for a target.  Raises NotPredicted, EnvironmentProblem without torch, transformers or
    MindSpore, and what `compile` raises."""
    begun = time.perf_counter()
    _refuse(planned, target)
    from ..graph.toolchain import require
    from ..verify.packages import require_reference

    require(target.form)
    require_reference()
    from ..verify import trial
    from ..verify.reference import model_without_weights, parts_bytes

    shape = _shape(planned, target)
    model = model_without_weights(planned.checkpoint.root, planned.checkpoint.family, shape.layers)
    startup = planned.startup + time.perf_counter() - begun  # a proof has to import and make as much
    sizes = parts_bytes(model)
    tried = [*_reading(planned)]
    tried += _counted("transformers", trial.try_reference(model, shape.lengths.totals), planned, shape, 1)
    with tempfile.TemporaryDirectory(prefix="msconv-") as place:
        root = _graphs(planned, target, shape, Path(place))
        for variant in dict.fromkeys(v for _, v in target.graphs if v not in target.asked):
            found = trial.try_rank(root, target.name, variant, shape.calls)
            name = f"{target.name} {variant}".strip()
            tried += _counted(name, found, planned, shape, planned.plan.mesh.tp)
    ceiling = _most_bytes(planned, shape, sizes)
    return Cost(startup, tuple(tried), _read_bytes(planned.plan), ceiling, time.perf_counter() - begun)


def _most_bytes(planned: Estimate, shape: Shape, sizes: dict[str, int]) -> int:
    """`sizes`: of transformers' parts, of the layers that are tried."""
    from ..verify import memory
    from ..verify.subject import is_large

    config, plan = planned.checkpoint.config, planned.plan
    parts = []
    for name, size in sizes.items():
        layer = LAYER_NAME.match(name)
        parts += [size] * (shape.times.get(int(layer[1]), 0) if layer else 1)
    ranks = Counter[str]()
    for tensor, size in _widened(plan):
        layer = LAYER_NAME.match(tensor)
        ranks[layer[0] if layer else tensor] += size * plan.mesh.tp
    norms = 0 if is_large(plan.output_bytes) else 2 * config.layers
    besides = memory.besides_bytes(shape.tokens, config.hidden, config.vocab, norms)
    cached = planned.device.kv_bytes_per_token // DTYPES[plan.dtype].nbytes
    besides += memory.ranks_bytes(shape.tokens, config.hidden, plan.mesh.tp, cached)
    return memory.most_bytes(parts, list(ranks.values()), besides)


def _refuse(planned: Estimate, target: Target) -> None:
    plan, config = planned.plan, planned.checkpoint.config
    if plan.quant:
        raise NotPredicted("the proof of int8 rounds and leads codes, which is not tried beforehand")
    if config.drafts_for is not None:
        raise NotPredicted("a draft of another model is proved by itself")
    if target.form.package != "mindspore":
        raise NotPredicted(f"graphs of {target.name} are run by {target.form.package}")
    if target.device.is_host and plan.mesh.tp == 1:
        raise NotPredicted("one CPU rank is run by MindSpore, as it is served")


def _shape(planned: Estimate, target: Target) -> Shape:
    from ..verify.scenario import Lengths, calls_of
    from ..verify.subject import FEW_STEPS, is_large, steps_of

    plan, config = planned.plan, planned.checkpoint.config
    types = {t.name: t.dtype for t in plan.tensors}
    kinds = [layer_kind(config, types, i) for i in range(config.layers)]
    first = {kind: i for i, kind in reversed(list(enumerate(kinds)))}
    lengths = Lengths.within(config.max_positions, steps_of(plan.output_bytes), True)
    sequences = [[7 * t % config.vocab % HEAD_ROWS for t in range(n)] for n in lengths.totals]
    calls = tuple(calls_of("", sequences, lengths, True))
    times = Counter(first[kind] for kind in kinds)
    passes = 1.0
    if target.dtype != "float32" and not is_large(plan.output_bytes):  # then again, in the target's own precision
        again = Lengths.within(config.max_positions, FEW_STEPS, True)
        passes += sum(again.totals) / sum(lengths.totals)
    return Shape(max(times) + 1, dict(times), lengths, calls, passes)


def _graphs(planned: Estimate, target: Target, shape: Shape, place: Path) -> Path:
    """An artifact without weights: the target's graphs of the layers that are tried, and of a short vocabulary."""
    from .compile import begin_without_weights, compile_graphs

    plan = planned.plan
    raw: dict[str, Any] = json.loads(planned.checkpoint.config_bytes)
    short: dict[str, Any] = {"num_hidden_layers": shape.layers, "num_nextn_predict_layers": 0}
    for key, value in raw.items():
        if isinstance(value, list) and len(value) == planned.checkpoint.config.layers:
            short[key] = value[: shape.layers]
    short["vocab_size"] = min(planned.checkpoint.config.vocab, HEAD_ROWS * plan.mesh.tp)
    source, root = place / "model", place / "artifact"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({**raw, **{k: v for k, v in short.items() if k in raw}}))
    begin_without_weights(LocalDirectory(source), plan.mesh.tp, plan.mesh.ep, root, drafts=False)
    compile_graphs(root, target.name, tell=lambda text: None)
    return root


def _reading(planned: Estimate) -> Iterator[Tried]:
    """Bytes that are read, and values that become float32."""
    from ..verify import trial

    plan = planned.plan
    read, widened = trial.try_reading(planned.place)
    decoded = trial.try_decoding(plan)
    yield Tried("read from the disk", _read_bytes(plan), read)
    codes = Counter[str]()
    plain = 0
    for name in plan.moves:
        info = plan.sources[name]
        if plan.is_decoded(name):
            codes[info.dtype] += prod(info.shape)
        else:
            plain += prod(info.shape)
    for dtype, amount in codes.items():
        yield Tried(f"{dtype} to float32", amount, decoded[dtype], VALUE)
    of_ranks = sum(size for _, size in _widened(plan)) // FLOAT32 * plan.mesh.tp
    # An embedding is compared with the source's, row by row; where it is the head, both are widened once more.
    embedding = sum(prod(t.shape) for t in plan.tensors if EMBEDDING in t.name) * plan.mesh.tp
    of_ranks += embedding * (3 if planned.checkpoint.config.tied else 1)
    yield Tried(f"{plan.dtype} to float32", plain + of_ranks, widened, VALUE)


def _counted(name: str, found: Pass, planned: Estimate, shape: Shape, ranks: int) -> Iterator[Tried]:
    """A pass over the whole model.  `ranks`: how many of them do what was tried."""
    of_ranks = f" on {ranks} ranks" if ranks > 1 else ""
    for layer, times in shape.times.items():
        amount = times * ranks * shape.passes
        yield Tried(f"{name}: layers like {layer}{of_ranks}", amount, 1 / found.layers[layer], LAYER)
    rows = planned.checkpoint.config.vocab * shape.passes
    yield Tried(f"{name}: head", rows, found.head_rows / found.head, ROW)


def _read_bytes(plan: Plan) -> int:
    """The source once, the artifact for its digests and for its values."""
    return plan.read_bytes + 2 * plan.output_bytes


def _widened(plan: Plan) -> list[tuple[str, int]]:
    """One rank's tensors with their bytes in float32, but for the embedding and experts, of which only what is
    looked up is widened."""
    parts = {m.tensor for moves in plan.moves.values() for m in moves if m.is_transposed}
    whole = [t for i, t in enumerate(plan.tensors) if i not in parts and EMBEDDING not in t.name]
    return [(t.name, FLOAT32 * prod(t.shape)) for t in whole]
