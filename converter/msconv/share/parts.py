"""What of an artifact is shared: its files by name and size, and whether their bytes are the manifest's."""

from __future__ import annotations

import hashlib
import io
import re
import threading
from pathlib import Path

from msconv_runtime.artifact import MANIFEST, READY, SIGNATURE, Artifact, Manifest
from msconv_runtime.artifact.integrity import check_artifact, check_graphs
from msconv_runtime.errors import ArtifactError, UsageError
from msconv_runtime.targets import TARGETS

from ..checkpoint.directory import AUXILIARY
from ..checkpoint.hubs import REPOSITORY
from ..checkpoint.remote import Progress, RemoteFile, hasher

WEIGHTS = re.compile(r"weights/model-rank-\d+-part-\d+\.safetensors", re.ASCII)
BESIDE = tuple(dict.fromkeys(name for t in TARGETS.values() for name in t.form.beside))
NAMES = (*AUXILIARY, *BESIDE, MANIFEST, READY, SIGNATURE)
CARD = "README.md"


def weight_bytes(manifest: Manifest) -> int:
    return manifest.weights.nbytes if manifest.weights else 0


def parts(manifest: Manifest) -> dict[str, int]:
    """Weights, then graphs, and their sizes in bytes.  Raises ArtifactError for a name that no artifact has."""
    sizes = {f.path: f.size for f in manifest.weights.files} if manifest.weights else {}
    sizes |= {g.path: g.size for g in manifest.graphs}
    foreign = [name for name in sizes if not is_part(name)]
    foreign += [f.name for f in manifest.files if f.name not in NAMES]
    if foreign:
        raise ArtifactError(
            f"{MANIFEST}: names {', '.join(map(repr, foreign[:5]))}, which no artifact has.",
            "Convert again with --force.",
        )
    return sizes


def is_part(name: str) -> bool:
    """Whether a file of this name could hold weights or a graph."""
    is_graph = any(target.form.is_place(target.name, name) for target in TARGETS.values())
    return is_graph or WEIGHTS.fullmatch(name) is not None


def signed_names(root: Path, manifest: Manifest) -> list[str]:
    """The files that a signature is over: all that `pull` brings, but what follows from the manifest."""
    beside = [f.name for f in manifest.files] or [name for name in AUXILIARY if (root / name).is_file()]
    return [MANIFEST, *parts(manifest), *beside]


def check(artifact: Artifact, hint: str, every_byte: bool, progress: Progress = lambda n: None) -> None:
    """Raises ArtifactError with `hint` if sizes or graphs are not the manifest's; `every_byte`: or weights."""
    damage = check_artifact(artifact, progress) if every_byte else check_graphs(artifact)
    if damage:
        lines = "\n".join(f"  {d.path}: {d.tensor or 'file'}: {d.problem}" for d in damage[:50])
        raise ArtifactError(f"{artifact.root}: {len(damage)} places differ from the manifest:\n{lines}", hint)


def split_reference(reference: str) -> tuple[str, str]:
    """owner/name[@revision] -> name, revision ("" if none was given).  Raises UsageError."""
    match = REPOSITORY.fullmatch(reference)
    if match is None:
        raise UsageError(f"{reference[:300]}: is no name of a repository.", "Give owner/name.")
    return match[1], match[2] or ""


def has_digest(content: Path | bytes, file: RemoteFile) -> bool:
    """Whether a file here, or some bytes, are the hub's: as git hashes them, or by sha256."""
    if isinstance(content, bytes):
        return len(content) == file.size and _digest(io.BytesIO(content), file) == file.etag
    if not content.is_file() or content.stat().st_size != file.size:
        return False
    with content.open("rb") as f:
        return _digest(f, file) == file.etag


def _digest(stream: io.BytesIO | io.BufferedReader, file: RemoteFile) -> str:
    return hashlib.file_digest(stream, lambda: hasher(file.etag, file.size)).hexdigest()


class Sum:
    """Counts what threads report, and passes it on."""

    def __init__(self, progress: Progress) -> None:
        self.total = 0
        self._progress = progress
        self._lock = threading.Lock()

    def add(self, n: int) -> None:
        with self._lock:
            self.total += max(0, n)
        self._progress(n)
