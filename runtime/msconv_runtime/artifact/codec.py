"""A manifest's bytes: encoded and decoded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import msgspec

from ..errors import ArtifactError
from . import format1
from .manifest import FORMAT, Manifest


class _Version(msgspec.Struct):
    format: int


def encode_manifest(manifest: Manifest, where: str = "msconv.json") -> bytes:
    """JSON, in today's format; `where` is for messages.  Raises ArtifactError for what could not be read back:
    JSON has no number that is not finite, and null would stand in its place."""
    data = msgspec.json.encode(manifest)
    try:
        msgspec.json.decode(data, type=Manifest)
    except msgspec.DecodeError as e:
        found = next(_not_finite(msgspec.to_builtins(manifest), ""), "")
        raise ArtifactError(
            f"{where}: is not written, it could not be read again: {found or e}.",
            "Nothing was replaced.  This is a fault in msconv: please report it with the command you ran.",
        ) from None
    return msgspec.json.format(data, indent=1) + b"\n"


def _not_finite(value: Any, place: str) -> Iterator[str]:
    """Each number that JSON does not have, with its place."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{place} is {value}"
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _not_finite(item, f"{place}.{key}".lstrip("."))


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
