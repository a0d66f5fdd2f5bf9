"""Manifest entries of what was moved: digests of tensors on every rank, of files, and of the source's shards."""

from __future__ import annotations

from collections.abc import Mapping

from msconv_runtime.artifact import (
    Dropped,
    Padding,
    SourceFile,
    TensorEntry,
    WeightFile,
    Weights,
    digest_bytes,
    digest_of,
)

from ..checkpoint.directory import ShardFile
from ..layout.files import file_name
from ..layout.names import fold
from ..layout.plan import Plan
from .transform import Moved


def weights_entry(
    plan: Plan, moved: Mapping[str, Moved], source_dtype: str, dropped: list[Dropped], made: str = ""
) -> Weights:
    """All rank files: every tensor's digest per rank, and from them every file's.  `made`: what `--quant`
    named."""
    per_rank = _tensor_digests(plan, moved)
    files = [
        WeightFile(
            path=file_name(rank, index),
            rank=rank,
            size=file.size,
            digest=digest_of(
                [
                    digest_bytes(file.header),
                    *(per_rank[i][rank] for i, t in enumerate(plan.tensors) if t.file == index),
                ]
            ),
        )
        for rank in plan.mesh.ranks
        for index, file in enumerate(plan.files)
    ]
    entries = [
        TensorEntry(
            name=t.name,
            dtype=t.dtype,
            shape=list(t.shape),
            file=t.file,
            begin=len(plan.files[t.file].header) + t.begin,
            parts=list(t.parts),
            digests=per_rank[i],
        )
        for i, t in enumerate(plan.tensors)
    ]
    return Weights(
        dtype=plan.dtype,
        source_dtype=source_dtype,
        quant=plan.quant,
        made=made,
        digest=digest_of(f.digest for f in files),
        files=files,
        tensors=entries,
        dropped=dropped,
        padded=[Padding("vocab", *plan.vocab)] if plan.vocab[1] > plan.vocab[0] else [],
    )


def _tensor_digests(plan: Plan, moved: Mapping[str, Moved]) -> list[list[str]]:
    """[tensor][rank]: from the digests of its parts."""
    digests: dict[tuple[int, int, int], str] = {}
    for m in moved.values():
        digests.update(m.parts)
    constants = {c.tensor: c for c in plan.constants}
    per_rank: list[list[str]] = []
    for i, tensor in enumerate(plan.tensors):
        row = []
        for rank in plan.mesh.ranks:
            if i in constants:
                row.append(digest_of([digest_bytes(plan.constant_bytes(constants[i], rank))]))
            else:
                row.append(digest_of(digests[i, part, rank] for part in range(len(tensor.parts))))
        per_rank.append(row)
    return per_rank


def source_files(shards: Mapping[str, ShardFile], plan: Plan, moved: Mapping[str, Moved]) -> list[SourceFile]:
    """The checkpoint's shards: each digest is of its header and of the tensors that were read, in file order."""
    digests: dict[str, list[str]] = {n: [f.header_digest] for n, f in shards.items()}
    for name in sorted(plan.read_names, key=lambda n: plan.sources[n].offset):
        digests[plan.sources[name].file].append(moved[name].source_digest)
    return [SourceFile(n, f.size, digest_of(digests[n])) for n, f in sorted(shards.items())]


def dropped_tensors(plan: Plan) -> list[Dropped]:
    """Names that were left out, folded, with the reason."""
    reasons: dict[str, list[str]] = {}
    for left_out in plan.dropped:
        reasons.setdefault(left_out.reason, []).append(left_out.name)
    return [Dropped(n, count, reason) for reason, names in reasons.items() for n, count in fold(names)]
