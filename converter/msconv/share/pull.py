"""An artifact from a repository of a hub: only what its manifest names, resumed to the byte, READY last.

Bytes are checked twice: against the hub's digests as they arrive, against the manifest's when all are there.
report.html is written anew: a page that somebody else wrote is not opened here.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled

from msconv_runtime.artifact import (
    MANIFEST,
    READY,
    SIGNATURE,
    STATE_DIR,
    Artifact,
    Manifest,
    decode_manifest,
    digest_bytes,
    is_artifact,
    replace_file,
)
from msconv_runtime.artifact.consistency import contradiction
from msconv_runtime.artifact.directory import MAX_MANIFEST_BYTES
from msconv_runtime.errors import ArtifactError, MsconvError, UsageError
from msconv_runtime.signatures import refuse_other_manifest, refuse_unsigned

from ..checkpoint.concurrency import each
from ..checkpoint.http import http
from ..checkpoint.hub import Repository, resolve
from ..checkpoint.hub_errors import explain
from ..checkpoint.hubs import REPOSITORY
from ..checkpoint.remote import Cancelled, Progress, RemoteFile
from ..checkpoint.transfer import fetch
from ..workspace.clearing import refuse_foreign
from ..workspace.disk import disk_error, out_of_space
from ..workspace.lock import exclusive
from ..workspace.recording import Publish
from ..workspace.state import record_source
from .parts import NAMES, Sum, check, has_digest, is_part, parts, split_reference

AT_ONCE = 4
PULLED = f"{STATE_DIR}/pulled"  # owner/name@commit, and the digest of that manifest
CHANGED = "Pull again; if it stays so, tell the owner of the repository: its bytes are not what was converted."


@dataclass(frozen=True)
class Pull:
    """A pull that has not started.  `data`: the bytes of the manifest; `files`: what belongs beside it; `key`: a
    public key by whose owner the artifact must be signed."""

    repository: Repository
    manifest: Manifest
    data: bytes
    files: list[RemoteFile]
    output: Path
    key: Path | None = None

    @property
    def total_bytes(self) -> int:
        return sum(f.size for f in self.files)

    @property
    def is_done(self) -> bool:
        """The same artifact is here, finished: parts by their sizes, the files beside them by their bytes."""
        try:
            return (
                digest_bytes((self.output / MANIFEST).read_bytes()) == digest_bytes(self.data)
                and Artifact(self.output).manifest == self.manifest
                and all((self.output / f.name).stat().st_size == f.size for f in self.files)
                and all(has_digest(self.output / f.name, f) for f in self.files if f.name in NAMES)
            )
        except (OSError, ArtifactError):
            return False

    def missing_bytes(self) -> int:
        """What is still to be downloaded."""
        missing = 0
        for file in self.files:
            final = self.output / file.name
            if not (final.is_file() and final.stat().st_size == file.size):
                partial = _partial(final)
                missing += max(0, file.size - (partial.stat().st_size if partial.is_file() else 0))
        return missing


@dataclass(frozen=True)
class Pulled:
    """What a pull did.  `bytes_read`: of this run; `files`: of the artifact."""

    artifact: Path
    repository: str
    commit: str
    bytes_read: int
    files: int
    seconds: float


def prepare(reference: str, output: Path | None = None, key: Path | None = None) -> Pull:
    """Resolve owner/name[@revision], read its manifest, refuse what is no artifact or would overwrite another.
    `key`: see Pull.  Nothing is written.  Raises MsconvError."""
    name, revision = split_reference(reference)
    if constants.is_offline_mode():
        raise explain(OfflineModeIsEnabled(), reference, purpose="pull")
    repository = resolve(name, revision, lambda n: n in NAMES or is_part(n), "pull")
    if MANIFEST not in repository.files:
        raise ArtifactError(
            f"{reference}: is no artifact (no {MANIFEST}).",
            f"If it is a model, `msconv convert --model {reference} --tp N` makes an artifact of it.",
        )
    if READY not in repository.files:
        raise ArtifactError(f"{reference}: was not pushed to the end (no {READY}).", "Push it again.")
    data, ready = _small(repository, MANIFEST), _small(repository, READY)
    if key is not None:
        _refuse_unsigned(repository, data, key)
    manifest = decode_manifest(data, f"{reference}: {MANIFEST}")
    if digest_bytes(data) not in ready.decode("utf-8", "replace").split():
        raise ArtifactError(f"{reference}: {MANIFEST} is not the one that {READY} vouches for.", "Push it again.")
    if problem := contradiction(manifest):
        raise ArtifactError(f"{reference}: {MANIFEST} contradicts itself: {problem}.", CHANGED)
    needed = parts(manifest) | {f.name: f.size for f in manifest.files}
    found = {n: f.size for n, f in repository.files.items()}
    if wrong := [n for n, size in needed.items() if found.get(n) != size]:
        lines = "\n".join(f"  {n}: {found.get(n, 'no')} bytes instead of {needed[n]}" for n in wrong[:50])
        raise ArtifactError(
            f"{reference}: {len(wrong)} files are not as {MANIFEST} says:\n{lines}", "Push it again."
        )
    beside = {f.name for f in manifest.files} or set(NAMES)  # of before files had digests: all that are known
    beside.add(SIGNATURE)
    names = [*needed, *(n for n in found if n in beside and n not in (*needed, MANIFEST, READY))]
    output = output or Path("artifacts") / name.rpartition("/")[2]
    _refuse_other(output, name, data)
    return Pull(repository, manifest, data, [repository.files[n] for n in names], output, key)


def run(
    pull: Pull,
    progress: Progress = lambda n: None,
    checking: Progress = lambda n: None,
    publish: Publish = lambda root, manifest: None,
) -> Pulled:
    """Download what is missing.  The artifact is READY on return.  `progress` gets the bytes that come, `checking`
    those that were compared with the manifest; `publish` may add what describes the artifact.
    Raises MsconvError; what came is kept."""
    started, root, repository = time.monotonic(), pull.output, pull.repository
    came = Sum(progress)
    if pull.is_done:
        if pull.key is not None:
            refuse_unsigned(root, pull.key)
    else:
        with exclusive(root):
            for name in (READY, MANIFEST):
                (root / name).unlink(missing_ok=True)
            note = f"{repository.reference}\n{digest_bytes(pull.data)}\n"
            replace_file(root / PULLED, note.encode())
            need, free = pull.missing_bytes(), shutil.disk_usage(root).free
            if need > free:
                raise out_of_space(root, need, free)
            cancelled = threading.Event()
            each(
                pull.files,
                lambda file: _bring(repository, file, root, came.add, cancelled),
                cancelled.set,
                AT_ONCE,
            )
            check(Artifact(root, pull.manifest), CHANGED, True, checking)
            if pull.key is not None:
                _check_signature(root, pull.data, pull.key)
            model = pull.manifest.model
            if REPOSITORY.fullmatch(source := f"{model.source}@{model.commit}"):
                record_source(root, source)
            publish(root, pull.manifest)
            replace_file(root / MANIFEST, pull.data)
            replace_file(root / READY, f"{digest_bytes(pull.data)}\n".encode())
            Artifact(root)  # raises, were it not one
    seconds = time.monotonic() - started
    return Pulled(root, repository.name, repository.commit, came.total, len(pull.files) + 2, seconds)


def _refuse_unsigned(repository: Repository, manifest: bytes, key: Path) -> None:
    """Raises ArtifactError, before a download, if the repository's signature cannot be the right one."""
    if SIGNATURE not in repository.files:
        raise ArtifactError(
            f"{repository.reference}: is not signed (no {SIGNATURE}).",
            "Its owner can sign it: `msconv push ARTIFACT --to OWNER/NAME --sign KEY`.",
        )
    refuse_other_manifest(repository.reference, _small(repository, SIGNATURE), manifest, key)


def _check_signature(root: Path, manifest: bytes, key: Path) -> None:
    """Raises ArtifactError, and leaves no artifact, if its files are not those that were signed."""
    replace_file(root / MANIFEST, manifest)
    try:
        refuse_unsigned(root, key)
    except MsconvError:
        (root / MANIFEST).unlink()
        raise


def _small(repository: Repository, name: str) -> bytes:
    """The bytes of one file, in memory."""
    file = repository.files[name]
    if file.size > MAX_MANIFEST_BYTES:
        raise ArtifactError(f"{repository.reference}: {name}: {file.size} bytes is too large.")
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, name)
        try:
            fetch(repository.url(name), file, path, lambda n: None, threading.Event())
        except Exception as e:
            raise explain(e, repository.reference, name, "pull") from e
        return path.read_bytes()


def _refuse_other(root: Path, name: str, data: bytes) -> None:
    """Raises UsageError if `root` holds what did not come from this repository, or was changed since."""
    refuse_foreign(root)
    if not root.exists() or not any(root.iterdir()):
        return
    try:
        origin, digest = (root / PULLED).read_text("utf-8", "replace").split()
    except (OSError, ValueError):
        origin = digest = ""
    if origin.partition("@")[0] != name:
        what = f"was pulled from {origin}" if origin else "was not pulled"
        raise UsageError(
            f"{root}: holds an artifact that {what}; nothing was touched.",
            "Give an empty or new directory with --output.",
        )
    if is_artifact(root) and digest_bytes((root / MANIFEST).read_bytes()) not in (digest, digest_bytes(data)):
        raise UsageError(
            f"{root}: was changed since it was pulled (compiled or verified here); nothing was touched.",
            "Give another --output.",
        )


def _partial(final: Path) -> Path:
    return final.with_name(final.name + ".incomplete")


def _bring(
    repository: Repository, file: RemoteFile, root: Path, progress: Progress, cancelled: threading.Event
) -> None:
    """One file to its place.  One that is there is kept if it has the hub's digest."""
    final = root / file.name
    try:
        if cancelled.is_set() or has_digest(final, file):
            return
        final.parent.mkdir(parents=True, exist_ok=True)
        fetch(repository.url(file.name), file, _partial(final), progress, cancelled)
        _partial(final).replace(final)
    except (Cancelled, MsconvError):
        raise
    except OSError as e:
        if isinstance(e, http.HTTPError):
            raise explain(e, repository.reference, file.name, "pull") from e
        raise disk_error(e, root, file.size) from e
    except Exception as e:
        raise explain(e, repository.reference, file.name, "pull") from e
