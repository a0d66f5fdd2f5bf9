"""A manifest's bytes: encoded and decoded."""

from __future__ import annotations

from pathlib import PurePosixPath

import msgspec

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
