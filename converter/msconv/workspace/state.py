"""How far an artifact's directory has come, and for what: nothing yet, half a conversion, graphs without weights,
finished.  Another model's or layout's artifact is never written over."""

from __future__ import annotations

from pathlib import Path

import msgspec

from msconv_runtime.artifact import (
    MANIFEST,
    STATE_DIR,
    Manifest,
    Parallel,
    decode_manifest,
    digest_of,
    is_artifact,
    read_manifest,
    replace_file,
)
from msconv_runtime.errors import ArtifactError

from .names import IDENTITY, JOURNAL

SOURCE = f"{STATE_DIR}/source"
REPLACE = "Give another --output, or replace it with --force."


class Identity(msgspec.Struct, frozen=True):
    """What must be the same for a half-done conversion to go on: digests by what they cover."""

    tool: str
    source: str
    config: str
    layout: str

    def digest(self) -> str:
        return digest_of([self.tool, self.source, self.config, self.layout])

    def differences(self, other: Identity) -> list[str]:
        """In words, what is not the same."""
        words = {
            "tool": "msconv itself (another version)",
            "source": "the source files (size, time or header)",
            "config": "config.json",
            "layout": "the layout (--tp, --ep or --dtype)",
        }
        return [text for field, text in words.items() if getattr(self, field) != getattr(other, field)]


def is_same_model(manifest: Manifest, config_digest: str, parallel: Parallel) -> bool:
    """Whether an artifact is of this model and layout."""
    return manifest.model.config_digest == config_digest and manifest.parallel == parallel


def refuse_another_model(
    root: Path, manifest: Manifest, config_digest: str, parallel: Parallel, hint: str
) -> None:
    """Raises ArtifactError if `root` holds an artifact of another model or layout."""
    if not is_same_model(manifest, config_digest, parallel):
        raise ArtifactError(
            f"{root}: holds an artifact of another model or layout "
            f"({manifest.model.source}, tp {manifest.parallel.tp}, ep {manifest.parallel.ep}).",
            hint,
        )


def previous_manifest(root: Path, identity: Identity, parallel: Parallel) -> Manifest | None:
    """The manifest that is already in `root`, of this conversion.  It has no weights where only graphs were made,
    or where the conversion was interrupted.  Raises ArtifactError for another model, layout or conversion."""
    if not is_artifact(root):
        return None
    try:
        manifest = read_manifest(root)
    except ArtifactError as e:
        if (root / JOURNAL).exists():
            return _graphs_of_unfinished(root, identity, parallel)  # interrupted before READY
        raise ArtifactError(e.message, "Run with --force to convert anew.") from None
    refuse_another_model(root, manifest, identity.config, parallel, REPLACE)
    if manifest.weights is None:
        return manifest  # graphs without weights: this conversion completes them
    recorded = root / IDENTITY
    if not recorded.exists() or recorded.read_text() != identity.digest():
        raise ArtifactError(
            f"{root}: holds a finished artifact of another conversion (the source, --dtype or msconv changed).",
            REPLACE,
        )
    return manifest


def _graphs_of_unfinished(root: Path, identity: Identity, parallel: Parallel) -> Manifest | None:
    """The manifest without its weights, for the graphs it names, if it is of this model and layout."""
    try:
        manifest = decode_manifest((root / MANIFEST).read_bytes(), str(root / MANIFEST))
    except (ArtifactError, OSError):
        return None
    if not is_same_model(manifest, identity.config, parallel):
        return None
    return msgspec.structs.replace(manifest, weights=None)


def record_identity(root: Path, identity: Identity) -> None:
    replace_file(root / IDENTITY, identity.digest().encode())


def record_source(root: Path, origin: str) -> None:
    """Keep where the checkpoint came from: a directory, or owner/name@commit."""
    replace_file(root / SOURCE, f"{origin}\n".encode())


def recorded_source(root: Path) -> str:
    """Where the checkpoint came from, "" if that is not known here."""
    try:
        return (root / SOURCE).read_text().strip()
    except OSError:
        return ""
