"""Names, shapes and element types against configuration, description and index: all problems at once."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from msconv_runtime.dtypes import VALUE_DTYPES
from msconv_runtime.errors import MsconvError

from ..checkpoint.directory import Checkpoint, companion_endings, open_configuration, read_small
from ..checkpoint.headers import parse_json
from ..checkpoint.naming import named
from ..checkpoint.unsupported import refuse_embedding, refuse_names
from ..layout.model import TensorInfo, is_matrix
from ..layout.planning import Examined, examine
from ..quant import PLAIN, WeightFormat
from ..quant.modelslim import DESCRIPTION, INT8
from ..quant.record import LeftOut
from .files import Inventory
from .findings import Findings

LAYER = re.compile(r"model\.layers\.(\d+)\.")
EXPERT = re.compile(r"\.mlp\.experts\.")
MAX_DESCRIPTION_BYTES = 16 << 20
WIDEST = "float32"  # as which any mixture of values could be converted


@dataclass(frozen=True)
class Known:
    """What configuration and headers say, for those who look at numbers.  `family`: "" if that is not known.
    `dtype`: as which codes are decoded.  `twins`: of each tensor that is left out because another holds the same
    bytes: why, it, and the other."""

    family: str = ""
    formats: tuple[WeightFormat, ...] = ()
    dtype: str = WIDEST
    twins: tuple[tuple[LeftOut, TensorInfo, TensorInfo], ...] = ()


def check_names(found: Inventory, harmless: Collection[str], findings: Findings) -> Known:
    """Compare what is there with what should be."""
    where = found.root.name
    try:
        refuse_embedding(where, found.present)
        base = open_configuration(found.root, harmless)
    except MsconvError as e:
        _unplanned(found, e, findings)
        return Known()
    tensors = found.tensors
    if not tensors:
        return Known(base.family.name)
    try:
        endings = companion_endings(base.config.formats)
        refuse_names(where, [n for n in tensors if not n.endswith(endings)])
    except MsconvError as e:
        findings.add("error", "names", e.message, [where])
    try:
        tensors = named(tensors, base.family, base.config, where).tensors
    except MsconvError as e:
        findings.add("error", "names", e.message, [where])
    sizes = base.config.sizes()
    if any(name.startswith(f"model.layers.{sizes.layers}.") for name in tensors):
        sizes = base.config.with_draft().sizes()
    plan = examine(base.family.table, sizes, tensors, WIDEST)
    for problem in plan.problems:
        findings.add("error", "names", problem, [where])
    _check_types(base, tensors, plan, findings)
    _check_experts(found, findings)
    _check_mtp(tensors, sizes.layers, sizes.dims.get("mtp_layers", 0), findings)
    both = [entry for entry in plan.dropped if {entry.name, entry.twin} <= tensors.keys()]
    twins = tuple((entry, tensors[entry.name], tensors[entry.twin]) for entry in both)
    return Known(base.family.name, base.config.formats, plan.source_dtype, twins)


def _unplanned(found: Inventory, error: MsconvError, findings: Findings) -> None:
    """Without a configuration that is obeyed: what names alone say."""
    findings.add("error", "configuration", error.message, [found.root.name])
    try:
        refuse_names(found.root.name, [n for n in found.tensors if not n.endswith(("_scale", "_offset"))])
    except MsconvError as e:
        findings.add("error", "names", e.message, [found.root.name])
    _check_experts(found, findings)


def _check_types(base: Checkpoint, tensors: dict[str, TensorInfo], plan: Examined, findings: Findings) -> None:
    """Several types of values, and matrices that are stored as one and decoded from several formats."""
    seen: dict[str, list[str]] = {}
    for output in plan.outputs:
        for _, name in output.sources:
            if name in tensors and tensors[name].dtype in VALUE_DTYPES and not output.rule.dtype:
                seen.setdefault(tensors[name].dtype, []).append(name)
    if len(seen) > 1:
        few = min(seen, key=lambda kind: len(seen[kind]))
        others = ", ".join(kind for kind in seen if kind != few)
        findings.add("warning", "types", f"are {few}, all else is {others}: --dtype is needed", seen[few])
    for output in plan.outputs:
        kinds = {n: plan.formats.get(n, PLAIN) for part, n in output.sources if is_matrix(output.rule, part)}
        titles = dict.fromkeys(chosen.title for chosen in kinds.values())
        if len(set(kinds.values())) > 1 and not any(chosen.is_kept for chosen in kinds.values()):
            text = f"are made of matrices of several formats ({', '.join(titles)})"
            findings.add("warning", "types", text, [output.name])


def _claims_int8(found: Inventory) -> str:
    """Where the checkpoint says that its matrices are int8; "" if nowhere."""
    path = found.root / DESCRIPTION
    if path.is_file():
        try:
            raw = parse_json(read_small(path, MAX_DESCRIPTION_BYTES), path.name)
        except MsconvError:
            return ""
        claims = isinstance(raw, dict) and any(v in INT8 for v in raw.values() if isinstance(v, str))
        return DESCRIPTION if claims else ""
    return "the other matrices" if any(info.dtype == "int8" for info in found.tensors.values()) else ""


def _check_experts(found: Inventory, findings: Findings) -> None:
    """Experts that a tool skipped without a word: newer transformers keep them in one tensor, which it did not
    look into."""
    claim = _claims_int8(found)
    experts = [n for n in found.tensors if EXPERT.search(n) and not n.endswith(("_scale", "_offset"))]
    values = [n for n in experts if found.tensors[n].dtype in VALUE_DTYPES and len(found.tensors[n].shape) > 1]
    if claim and values:
        text = f"experts are left as values, where {claim} says int8: the tool did not look into them"
        findings.add("error", "experts", text, values)


def _check_mtp(tensors: dict[str, TensorInfo], layers: int, promised: int, findings: Findings) -> None:
    """Layers that guess further tokens: a server that wants them finds none, or others than it expects."""
    by_layer: dict[int, set[str]] = {}
    for name in tensors:
        if match := LAYER.match(name):
            by_layer.setdefault(int(match[1]), set()).add(name)
    wanted = range(layers, layers + promised)
    missing = [f"model.layers.{i}.*" for i in wanted if i not in by_layer]
    if missing:
        text = "layers of multi-token prediction that config.json promises are not there"
        findings.add("warning", "mtp", text, missing)
    usual = _kinds(tensors, by_layer.get(layers - 1, ()))
    for i in (i for i in wanted if i in by_layer):
        kinds = _kinds(tensors, by_layer[i])
        odd = {k: v for k, v in kinds.items() if k in usual and v != usual[k]}
        for what, kind in odd.items():
            text = f"{what} of multi-token prediction are {kind}, those of the layer before {usual[what]}"
            findings.add("warning", "mtp", text, [f"model.layers.{i}"])


def _kinds(tensors: dict[str, TensorInfo], names: Iterable[str]) -> dict[str, str]:
    """Element types of a layer's matrices: of attention, experts and the rest of the MLP."""
    found: dict[str, set[str]] = {}
    for name in names:
        info = tensors[name]
        if name.endswith("_proj.weight") and ".eh_proj" not in name and len(info.shape) == 2:
            what = "attention" if ".self_attn." in name else "experts" if EXPERT.search(name) else "other matrices"
            found.setdefault(what, set()).add(info.dtype)
    return {what: " and ".join(sorted(kinds)) for what, kinds in found.items()}
