"""The plan: every output file, header, offset and byte range, decided before a byte moves.

All ranks share one layout (same names, shapes, offsets); what differs is which box of a source a rank gets.
"""

from __future__ import annotations

import fnmatch
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from msconv_runtime.errors import PlanError

from . import dtypes
from .cuts import Box, Cut, Mesh, boxes, part_shape, problem
from .model import Sizes, Table, TensorInfo, expand
from .names import fold, listing
from .rules import Rule

Expanded = list[tuple[Rule, str, dict[str, str]]]

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
    """A source tensor goes, cut, to part `part` of output tensor `tensor`."""

    tensor: int
    part: int
    cut: Cut


@dataclass(frozen=True, slots=True)
class Constant:
    """A small tensor in which ranks differ: `vocab_start` or `rank_onehot`."""

    tensor: int
    kind: str


@dataclass(frozen=True, slots=True)
class OutFile:
    """File number `index` of every rank: its header bytes and its whole size."""

    header: bytes
    size: int


@dataclass(frozen=True)
class Plan:
    mesh: Mesh
    sizes: Sizes
    dtype: str
    source_dtype: str
    tensors: tuple[OutTensor, ...]
    files: tuple[OutFile, ...]
    moves: Mapping[str, tuple[Move, ...]]
    sources: Mapping[str, TensorInfo]
    constants: tuple[Constant, ...]
    dropped: tuple[tuple[str, str, str], ...]  # (source name, reason, name of its twin or "")
    vocab: tuple[int, int] = field(default=(0, 0))  # (real rows, padded rows over all ranks)

    @property
    def rank_bytes(self) -> int:
        return sum(f.size for f in self.files)

    @property
    def output_bytes(self) -> int:
        return self.rank_bytes * self.mesh.tp

    @property
    def read_bytes(self) -> int:
        return sum(self.sources[name].nbytes for name in self.moves)

    @property
    def parameters(self) -> int:
        """Elements of the source tensors that are used: the model's published parameter count."""
        return sum(math.prod(self.sources[name].shape) for name in self.moves)

    def boxes(self, name: str, move: Move, rank: int) -> tuple[Box, ...]:
        return boxes(move.cut, self.sources[name].shape, self.mesh, self.sizes.dims, rank)

    def part_offset(self, move: Move) -> int:
        """Where the part begins in its file, in bytes."""
        tensor = self.tensors[move.tensor]
        return len(self.files[tensor.file].header) + tensor.begin + sum(tensor.parts[: move.part])


def file_name(rank: int, index: int) -> str:
    return f"weights/model-rank-{rank}-part-{index}.safetensors"


RANK_CONSTANTS = (("vocab_start", "int32"), ("rank_onehot", "float32"))  # a target may need only some of them


def make_plan(
    table: Table,
    sizes: Sizes,
    sources: Mapping[str, TensorInfo],
    mesh: Mesh,
    dtype: str | None = None,
    part_bytes: int = PART_BYTES,
) -> Plan:
    """Plan a conversion.  Pure.  Raises PlanError that lists every missing, unused, misshapen or indivisible
    tensor.  `dtype` None keeps the sources' own."""
    expanded = expand(table, sizes)
    dropped = _drops(table, sizes, sources, {n for _, _, names in expanded for n in names.values()})
    errors = _coverage(expanded, sizes, sources, dropped)
    damaged = bool(errors)
    source_dtype = _common_dtype(expanded, sources, dtype, errors)
    errors += _divisions(table, sizes, mesh)
    if errors:
        hint = "Download the checkpoint again, or check that config.json belongs to these weights."
        raise PlanError("\n".join(errors), hint if damaged else _hint(table, sizes, mesh))
    dtype = dtype or source_dtype

    tensors: list[tuple[str, str, tuple[int, ...], tuple[int, ...]]] = []
    moves: dict[str, list[Move]] = {}
    constants: list[Constant] = []
    vocab = (0, 0)
    for rule, dst, names in expanded:
        out_dtype = rule.dtype or dtype
        shapes = []
        for i, part in enumerate(rule.parts):
            name = names[part.src]
            shape = sources[name].shape
            shapes.append(part_shape(part.cut, shape, mesh, sizes.dims))
            moves.setdefault(name, []).append(Move(len(tensors), i, part.cut))
            if part.cut.pad:
                vocab = (shape[0], shapes[-1][0] * mesh.tp)
        joined = (sum(s[0] for s in shapes), *shapes[0][1:]) if shapes[0] else ()
        item = dtypes.SIZES[out_dtype]
        tensors.append((dst, out_dtype, joined, tuple(math.prod(s) * item for s in shapes)))
    if mesh.tp > 1:
        for name, kind_dtype in RANK_CONSTANTS:
            shape = (1,) if name == "vocab_start" else (mesh.tp, 1, 1)
            constants.append(Constant(len(tensors), name))
            tensors.append((name, kind_dtype, shape, (math.prod(shape) * 4,)))

    placed, files = _place(tensors, part_bytes)
    return Plan(
        mesh=mesh,
        sizes=sizes,
        dtype=dtype,
        source_dtype=source_dtype,
        tensors=placed,
        files=files,
        moves={name: tuple(m) for name, m in moves.items()},
        sources=sources,
        constants=tuple(constants),
        dropped=dropped,
        vocab=vocab,
    )


def constant_bytes(plan: Plan, constant: Constant, rank: int) -> bytes:
    """`vocab_start`: first vocabulary row of the rank, int32.  `rank_onehot`: 1.0 at the rank, float32."""
    if constant.kind == "vocab_start":
        return struct.pack("<i", rank * plan.vocab[1] // plan.mesh.tp)
    return struct.pack(f"<{plan.mesh.tp}f", *(float(r == rank) for r in plan.mesh.ranks))


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
    for name in sources:
        if name in used:
            continue
        for drop in table.drops:
            if sizes.holds(drop.when) and fnmatch.fnmatchcase(name, drop.pattern):
                out.append((name, drop.reason, drop.twin))
                break
    return tuple(out)


def _coverage(
    expanded: Expanded,
    sizes: Sizes,
    sources: Mapping[str, TensorInfo],
    dropped: tuple[tuple[str, str, str], ...],
) -> list[str]:
    missing: list[str] = []
    wrong: dict[str, list[str]] = {}
    used: set[str] = {name for name, _, _ in dropped}
    for rule, _, names in expanded:
        for part in rule.parts:
            name = names[part.src]
            used.add(name)
            expected = tuple(sizes.dims[d] for d in part.shape)
            if name not in sources:
                missing.append(name)
            elif sources[name].shape != expected:
                text = f"has shape {list(sources[name].shape)}, the configuration says {list(expected)}"
                wrong.setdefault(text, []).append(name)
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
    expanded: Expanded, sources: Mapping[str, TensorInfo], dtype: str | None, errors: list[str]
) -> str:
    seen: dict[str, list[str]] = {}
    for rule, _, names in expanded:
        for part in rule.parts:
            info = sources.get(names[part.src])
            if info is None:
                continue
            if info.dtype not in dtypes.WEIGHT_DTYPES:
                errors.append(
                    f"{info.name}: element type {info.dtype} is not a weight type of this family "
                    f"({', '.join(dtypes.WEIGHT_DTYPES)})."
                )
            elif not rule.dtype:
                seen.setdefault(info.dtype, []).append(info.name)
    if len(seen) > 1 and dtype is None:
        kinds = "\n".join(f"{d}:\n{listing(names, 4)}" for d, names in seen.items())
        errors.append(
            f"The checkpoint mixes element types; say with --dtype which one the artifact should have.\n{kinds}"
        )
    return max(seen, key=lambda d: len(seen[d])) if seen else "float32"


def _divisions(table: Table, sizes: Sizes, mesh: Mesh) -> list[str]:
    found: dict[str, list[str]] = {}
    for rule, _, names in expand(table, sizes):
        for part in rule.parts:
            shape = tuple(sizes.dims[d] for d in part.shape)
            if text := problem(part.cut, shape, mesh, sizes.dims):
                found.setdefault(text, []).append(names[part.src])
    return [f"{name}: {text}." for text, bad in found.items() for name, _ in fold(bad)]


def _hint(table: Table, sizes: Sizes, mesh: Mesh) -> str:
    if not _divisions(table, sizes, mesh):
        return "Try --dtype float32: every value fits."
    fitting = [str(tp) for tp in TP_CHOICES if not _divisions(table, sizes, Mesh(tp))]
    return f"Try --tp {', '.join(fitting[:-1])} or {fitting[-1]}." if len(fitting) > 1 else "Try --tp 1."
