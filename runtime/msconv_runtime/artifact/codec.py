"""A manifest's bytes: encoded, decoded, and held against itself before anything in it is believed."""

from __future__ import annotations

import math
from pathlib import PurePosixPath

import msgspec

from ..dtypes import DTYPES
from ..errors import ArtifactError
from . import format1
from .manifest import FORMAT, Manifest


class _Version(msgspec.Struct):
    format: int


def encode_manifest(manifest: Manifest) -> bytes:
    """JSON, in today's format."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def decode_manifest(data: bytes, where: str) -> Manifest:
    """The manifest of these bytes; `where` is for messages.  Raises ArtifactError for a newer format, for what
    is no manifest, and for names of files outside the artifact."""
    try:
        version = msgspec.json.decode(data, type=_Version).format
        if version > FORMAT:
            raise ArtifactError(
                f"{where}: this artifact has format {version}; this msconv reads formats up to {FORMAT}.",
                "Upgrade msconv, or convert the checkpoint again with this version.",
            )
        manifest = format1.decode(data) if version < FORMAT else msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ArtifactError(
            f"{where}: not a valid manifest: {e}.", "Convert again: `msconv convert --force`."
        ) from None
    for path in (
        *(f.path for f in (manifest.weights.files if manifest.weights else ())),
        *(g.path for g in manifest.graphs),
    ):
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or "\\" in path or "\0" in path:
            raise ArtifactError(f"{where}: names a file outside the artifact: {path!r}.")
    return manifest


def contradiction(manifest: Manifest) -> str:
    """Where a manifest's parts do not agree, or "": what is read later may be taken at its word."""
    tp, w = manifest.parallel.tp, manifest.weights
    if not 1 <= tp <= 4096 or not 1 <= manifest.parallel.ep <= tp:
        return f"tp {tp}, ep {manifest.parallel.ep}"
    if w is None:
        return ""
    sizes: list[list[int]] = [[] for _ in range(tp)]
    for f in w.files:
        if not 0 <= f.rank < tp:
            return f"{f.path} is of rank {f.rank}, of {tp}"
        sizes[f.rank].append(f.size)
    if not sizes[0] or any(len(s) != len(sizes[0]) for s in sizes):
        return "ranks have different numbers of files"
    for t in w.tensors:
        if t.dtype not in DTYPES or not DTYPES[t.dtype].storable:
            return f"{t.name} has unknown element type {t.dtype[:40]}"
        if len(t.digests) != tp:
            return f"{t.name} has {len(t.digests)} digests for {tp} ranks"
        if not 0 <= t.file < len(sizes[0]):
            return f"{t.name} is in file {t.file} of {len(sizes[0])}"
        if (
            min([*t.parts, *t.shape, t.begin], default=0) < 0
            or math.prod(t.shape) * DTYPES[t.dtype].nbytes != t.nbytes
        ):
            return f"{t.name} has shape {t.shape} and {t.nbytes} bytes at {t.begin}"
        if t.begin + t.nbytes > min(s[t.file] for s in sizes):
            return f"{t.name} ends at byte {t.begin + t.nbytes}, past the end of its file"
    return ""
