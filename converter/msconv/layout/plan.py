"""The plan: every output file, header, offset and byte range, decided before a byte moves.

All ranks share one layout (same names, shapes, offsets); what differs is which box of a source a rank gets.
"""

from __future__ import annotations

import fnmatch
import json
import math
import struct
from collections.abc import Container, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from msconv_runtime.errors import PlanError

from . import dtypes
from .cuts import Box, Cut, Mesh, boxes, part_shape, problem, row_order
from .model import SCALE, Output, Sizes, Table, TensorInfo, expand
from .names import fold, listing
from .rules import OWN, Part

PART_BYTES = 8 << 30  # one rank's weights are split into files of about this size
TP_CHOICES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class OutTensor:
    """One tensor of every rank's files.  `begin` counts from the end of the header of file `file`;
    `parts` are the bytes of what it was joined from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    begin: int
    parts: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return sum(self.parts)


@dataclass(frozen=True, slots=True)
class Move:
    """A source tensor goes, cut, to part `part` of output tensor `tensor`.

    `owner`: the group of expert-parallel ranks that has this expert; -1, every rank.  `column`: where its columns
    begin in the part, turned over, of a stacked tensor; -1, it is not turned.
    """

    tensor: int
    part: int
    cut: Cut
    owner: int = -1
    column: int = -1


@dataclass(frozen=True, slots=True)
class Constant:
    """A small tensor in which ranks differ, one of RANK_CONSTANTS."""

    tensor: int
    kind: str


@dataclass(frozen=True, slots=True)
class OutFile:
    """File number `index` of every rank: its header bytes and its whole size."""

    header: bytes
    size: int


@dataclass(frozen=True)
class Plan:
    """`units`: source tensors that are moved together, each in one.  `scales`: of quantised sources, by name.
    `dropped`: (source name, reason, name of its twin or "").  `vocab`: (real rows, padded rows of all ranks)."""

    mesh: Mesh
    sizes: Sizes
    dtype: str
    source_dtype: str
    tensors: tuple[OutTensor, ...]
    files: tuple[OutFile, ...]
    moves: Mapping[str, tuple[Move, ...]]
    units: tuple[tuple[str, ...], ...]
    scales: Mapping[str, str]
    sources: Mapping[str, TensorInfo]
    constants: tuple[Constant, ...]
    dropped: tuple[tuple[str, str, str], ...]
    vocab: tuple[int, int] = field(default=(0, 0))

    @property
    def rank_bytes(self) -> int:
        return sum(f.size for f in self.files)

    @property
    def output_bytes(self) -> int:
        return self.rank_bytes * self.mesh.tp

    @property
    def read_bytes(self) -> int:
        return sum(self.sources[name].nbytes for name in (*self.moves, *self.scales.values()))

    @property
    def parameters(self) -> int:
        """Elements of the source tensors that are used: the model's published parameter count."""
        return sum(math.prod(self.sources[name].shape) for name in self.moves)

    @property
    def expert_bytes(self) -> int:
        """Of one rank's weights, those of its experts: the same on every rank."""
        stacked = {m.tensor for moves in self.moves.values() for m in moves if m.column >= 0}
        return sum(self.tensors[i].nbytes for i in stacked)

    def ranks(self, move: Move) -> list[int]:
        """Those that get this move's bytes."""
        return [r for r in self.mesh.ranks if move.owner in (-1, self.mesh.ep_rank(r))]

    def reads(self, unit: tuple[str, ...]) -> tuple[str, ...]:
        """Its sources, and the scales of those that are quantised."""
        return (*unit, *(self.scales[n] for n in unit if n in self.scales))

    def unit_bytes(self, unit: tuple[str, ...]) -> int:
        """What is read for it."""
        return sum(self.sources[n].nbytes for n in self.reads(unit))

    def is_done(self, unit: tuple[str, ...], done: Container[str]) -> bool:
        """Whether all of a unit's sources are among those that were moved."""
        return all(n in done for n in self.reads(unit))

    def boxes(self, name: str, move: Move, rank: int) -> tuple[Box, ...]:
        return boxes(move.cut, self.sources[name].shape, self.mesh, self.sizes.dims, rank)

    def row_order(self, move: Move) -> NDArray[np.intp] | None:
        """How rows change places within a head, or None."""
        return row_order(move.cut, self.sizes.dims)

    def part_offset(self, move: Move) -> int:
        """Where the part begins in its file, in bytes."""
        tensor = self.tensors[move.tensor]
        return len(self.files[tensor.file].header) + tensor.begin + sum(tensor.parts[: move.part])


def file_name(rank: int, index: int) -> str:
    return f"weights/model-rank-{rank}-part-{index}.safetensors"


# in which ranks differ; a target may need only some of them
RANK_CONSTANTS = {"vocab_start": "int32", "rank_onehot": "float32", "expert_start": "int32"}


def make_plan(
    table: Table,
    sizes: Sizes,
    sources: Mapping[str, TensorInfo],
    mesh: Mesh,
    dtype: str | None = None,
    part_bytes: int = PART_BYTES,
) -> Plan:
    """Plan a conversion.  Pure.  Raises PlanError that lists every missing, unused, misshapen or indivisible
    tensor.  `dtype` None keeps the sources' own; quantised ones take that of the others."""
    outputs = expand(table, sizes)
    scales = _scales(outputs, sources)
    used = {name for o in outputs for _, name in o.sources} | set(scales.values())
    dropped = _drops(table, sizes, sources, used)
    errors = _coverage(outputs, sizes, sources, scales, dropped)
    damaged = bool(errors)
    source_dtype = _common_dtype(outputs, sources, dtype, errors)
    errors += _divisions(outputs, sizes, mesh)
    if errors:
        hint = (
            "The files are whole: downloading them again gives the same.  Check that config.json belongs to these "
            "weights, and that this model is one that msconv converts."
        )
        raise PlanError("\n".join(errors), hint if damaged else _hint(outputs, sizes, mesh))
    dtype = dtype or source_dtype

    tensors: list[tuple[str, str, tuple[int, ...], tuple[int, ...]]] = []
    moves: dict[str, list[Move]] = {}
    units: dict[tuple[str, ...], None] = {}
    constants: list[Constant] = []
    vocab = (0, 0)
    for output in outputs:
        out_dtype = _dtype_of(output, sources, dtype)
        item = dtypes.SIZES[out_dtype]
        shapes = [part_shape(p.cut, sources[n].shape, mesh, sizes.dims) for p, n in output.sources]
        if output.rule.stacked:
            local, width = sizes.experts // mesh.ep, len(output.rule.parts)
            wide = sum(s[0] for s in shapes[:width])
            for i, (part, name) in enumerate(output.sources):
                owner, slot = divmod(i // width, local)
                column = sum(s[0] for s in shapes[i // width * width : i])
                moves.setdefault(name, []).append(Move(len(tensors), slot, part.cut, owner, column))
            names = [name for _, name in output.sources]
            units |= dict.fromkeys(tuple(names[i : i + width]) for i in range(0, len(names), width))
            inner = shapes[0][1]
            tensors.append((output.name, out_dtype, (local, inner, wide), (inner * wide * item,) * local))
            continue
        for i, (part, name) in enumerate(output.sources):
            moves.setdefault(name, []).append(Move(len(tensors), i, part.cut))
            units[(name,)] = None
            if part.cut.pad:
                vocab = (sources[name].shape[0], shapes[i][0] * mesh.tp)
        joined = (sum(s[0] for s in shapes), *shapes[0][1:]) if shapes[0] else ()
        tensors.append((output.name, out_dtype, joined, tuple(math.prod(s) * item for s in shapes)))
    for kind, shape in _constants(mesh).items():
        constants.append(Constant(len(tensors), kind))
        tensors.append((kind, RANK_CONSTANTS[kind], shape, (math.prod(shape) * 4,)))

    placed, files = _place(tensors, part_bytes)
    return Plan(
        mesh=mesh,
        sizes=sizes,
        dtype=dtype,
        source_dtype=dtypes.FP8 if scales else source_dtype,
        tensors=placed,
        files=files,
        moves={name: tuple(m) for name, m in moves.items()},
        units=tuple(units),
        scales=scales,
        sources=sources,
        constants=tuple(constants),
        dropped=dropped,
        vocab=vocab,
    )


def _constants(mesh: Mesh) -> dict[str, tuple[int, ...]]:
    out: dict[str, tuple[int, ...]] = {}
    if mesh.tp > 1:
        out = {"vocab_start": (1,), "rank_onehot": (mesh.tp, 1, 1)}
    if mesh.ep > 1:
        out["expert_start"] = (1,)
    return out


def constant_bytes(plan: Plan, constant: Constant, rank: int) -> bytes:
    """`vocab_start`, `expert_start`: first vocabulary row and first expert of the rank, int32.
    `rank_onehot`: 1.0 at the rank, float32."""
    if constant.kind == "vocab_start":
        return struct.pack("<i", rank * plan.vocab[1] // plan.mesh.tp)
    if constant.kind == "expert_start":
        return struct.pack("<i", plan.mesh.ep_rank(rank) * plan.sizes.experts // plan.mesh.ep)
    return struct.pack(f"<{plan.mesh.tp}f", *(float(r == rank) for r in plan.mesh.ranks))


def _scales(outputs: list[Output], sources: Mapping[str, TensorInfo]) -> dict[str, str]:
    """{quantised source: its scales}, whether those are there or not."""
    names = [name for o in outputs for _, name in o.sources]
    return {n: n + SCALE for n in names if n in sources and sources[n].dtype == dtypes.FP8}


def _dtype_of(output: Output, sources: Mapping[str, TensorInfo], dtype: str) -> str:
    return sources[output.sources[0][1]].dtype if output.rule.dtype == OWN else output.rule.dtype or dtype


def _place(
    tensors: list[tuple[str, str, tuple[int, ...], tuple[int, ...]]], part_bytes: int
) -> tuple[tuple[OutTensor, ...], tuple[OutFile, ...]]:
    placed: list[OutTensor] = []
    ends: list[int] = [0]
    for name, dtype, shape, parts in tensors:
        if ends[-1] and ends[-1] + sum(parts) > part_bytes:
            ends.append(0)
        placed.append(OutTensor(name, dtype, shape, len(ends) - 1, ends[-1], parts))
        ends[-1] += sum(parts)
    files = []
    for index, end in enumerate(ends):
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for t in placed:
            if t.file == index:
                entries[t.name] = {
                    "dtype": dtypes.CODES[t.dtype],
                    "shape": list(t.shape),
                    "data_offsets": [t.begin, t.begin + t.nbytes],
                }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % 64)  # data starts 64-byte aligned
        header = struct.pack("<Q", len(text)) + text
        files.append(OutFile(header, len(header) + end))
    return tuple(placed), tuple(files)


def _drops(
    table: Table, sizes: Sizes, sources: Mapping[str, TensorInfo], used: set[str]
) -> tuple[tuple[str, str, str], ...]:
    out = []
    after = range(sizes.layers, sizes.layers + sizes.dims.get("mtp_layers", 0))
    patterns = [
        (drop.pattern.replace("{mtp}", str(layer)), drop)
        for drop in table.drops
        if sizes.holds(drop.when)
        for layer in (after if "{mtp}" in drop.pattern else range(1))
    ]
    for name in sources:
        if name in used:
            continue
        for pattern, drop in patterns:
            if fnmatch.fnmatchcase(name, pattern):
                out.append((name, drop.reason, drop.twin))
                break
    return tuple(out)


def _coverage(
    outputs: list[Output],
    sizes: Sizes,
    sources: Mapping[str, TensorInfo],
    scales: Mapping[str, str],
    dropped: tuple[tuple[str, str, str], ...],
) -> list[str]:
    missing: list[str] = []
    wrong: dict[str, list[str]] = {}
    used: set[str] = {name for name, _, _ in dropped}

    def expect(name: str, shape: tuple[int, ...], why: str) -> None:
        used.add(name)
        if name not in sources:
            missing.append(name)
        elif sources[name].shape != shape:
            text = f"has shape {list(sources[name].shape)}, {why} {list(shape)}"
            wrong.setdefault(text, []).append(name)

    for output in outputs:
        for part, name in output.sources:
            expect(name, tuple(sizes.dims[d] for d in part.shape), "the configuration says")
    for name, scale in scales.items():
        info = sources[name]
        if not sizes.block[0]:
            text = "is FP8, and config.json has no quantization_config that says how its scales are kept"
            wrong.setdefault(text, []).append(name)
            used.add(scale)
        elif len(info.shape) == 2:  # others are no weights at all: said with their element types
            expect(scale, sizes.scale_shape(info.shape), f"blocks of {sizes.block[0]}x{sizes.block[1]} need")
    unused = [name for name in sources if name not in used]
    errors = []
    if missing:
        errors.append(f"Missing from the checkpoint ({len(missing)}):\n{listing(missing)}")
    if unused:
        errors.append(f"In the checkpoint but unknown to this model ({len(unused)}):\n{listing(unused)}")
    for text, bad in wrong.items():
        errors += [f"{name}: {text}." for name, _ in fold(bad)]
    return errors


def _common_dtype(
    outputs: list[Output], sources: Mapping[str, TensorInfo], dtype: str | None, errors: list[str]
) -> str:
    seen: dict[str, list[str]] = {}
    odd: dict[str, list[str]] = {}
    for output in outputs:
        for part, name in output.sources:
            info = sources.get(name)
            if info is None:
                continue
            if info.dtype == dtypes.FP8 and len(part.shape) == 2 and not output.rule.dtype:
                scale = sources.get(name + SCALE)
                if scale is not None and scale.dtype not in dtypes.WEIGHT_DTYPES:
                    odd.setdefault(scale.dtype, []).append(scale.name)
            elif info.dtype not in dtypes.WEIGHT_DTYPES:
                odd.setdefault(info.dtype, []).append(name)
            elif not output.rule.dtype:
                seen.setdefault(info.dtype, []).append(name)
    for kind, names in odd.items():
        errors += [
            f"{name}: element type {kind} is not a weight type of this family ({', '.join(dtypes.WEIGHT_DTYPES)})."
            for name, _ in fold(names)
        ]
    if len(seen) > 1 and dtype is None:
        kinds = "\n".join(f"{d}:\n{listing(names, 4)}" for d, names in seen.items())
        errors.append(
            f"The checkpoint mixes element types; say with --dtype which one the artifact should have.\n{kinds}"
        )
    return max(seen, key=lambda d: len(seen[d])) if seen else "float32"


def _divisions(outputs: list[Output], sizes: Sizes, mesh: Mesh) -> list[str]:
    found: dict[str, list[str]] = {}
    known: dict[Part, str] = {}
    for output in outputs:
        for part, name in output.sources:
            if part.cut.over == "moe_tp" and mesh.tp % mesh.ep:
                continue  # said below
            if part not in known:
                shape = tuple(sizes.dims[d] for d in part.shape)
                known[part] = problem(part.cut, shape, mesh, sizes.dims)
            if known[part]:
                found.setdefault(known[part], []).append(name)
    errors = [f"{name}: {text}." for text, bad in found.items() for name, _ in fold(bad)]
    if mesh.tp % mesh.ep:
        errors.append(f"ep={mesh.ep} does not divide tp={mesh.tp}.")
    if mesh.ep > 1 and not sizes.experts:
        errors.append(f"ep={mesh.ep}: this model has no experts.")
    elif sizes.experts % mesh.ep:
        errors.append(f"{sizes.experts} experts do not split over ep={mesh.ep}.")
    return errors


def _hint(outputs: list[Output], sizes: Sizes, mesh: Mesh) -> str:
    """Which other tp, or else which other ep, would do."""
    if not _divisions(outputs, sizes, mesh):
        return "Try --dtype float32: every value fits."
    for flag, choices in (
        ("--tp", [(str(tp), Mesh(tp, mesh.ep)) for tp in TP_CHOICES]),
        ("--ep", [(str(ep), Mesh(mesh.tp, ep)) for ep in TP_CHOICES]),
        ("--tp", [(f"{tp} --ep {tp}", Mesh(tp, tp)) for tp in TP_CHOICES]),
    ):
        fitting = [text for text, m in choices if m.tp % m.ep == 0 and not _divisions(outputs, sizes, m)]
        if fitting:
            several = f"{', '.join(fitting[:-1])} or " if len(fitting) > 1 else ""
            return f"Try {flag} {several}{fitting[-1]}."
    return "Try --tp 1 --ep 1."
