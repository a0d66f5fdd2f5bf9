"""The artifact's directory: what makes it one, reading and replacing its manifest, files that survive a crash.

Reading refuses what is unfinished, newer than this code, or damaged.  Writing replaces manifest and READY: a crash
between the two leaves a readable artifact.
"""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

from ..errors import ArtifactError
from .codec import decode_manifest, encode_manifest
from .consistency import contradiction
from .files import read_file
from .manifest import Manifest, digest_bytes

MANIFEST = "msconv.json"
READY = "READY"
SIGNATURE = "model.sig"  # the usual name of the OpenSSF's signatures
STATE_DIR = ".msconv"  # journal, lock, local paths: never part of what the artifact promises
MAX_MANIFEST_BYTES = 256 << 20
MAX_READY_BYTES = 4096
NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # what a file system says that has no such call

logger = logging.getLogger(__name__)
_told: set[int] = set()  # devices whose lack of directory syncs was said


def is_artifact(path: str | os.PathLike[str] | None) -> bool:
    """True if the directory claims to be an artifact (finished or not)."""
    try:
        return path is not None and Path(path, MANIFEST).is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def read_manifest(root: str | os.PathLike[str]) -> Manifest:
    """The manifest of a finished artifact.  Raises ArtifactError if there is none, if READY is missing or
    belongs to another manifest, or if the format is newer."""
    root = Path(root)
    path = root / MANIFEST
    try:
        found = root.is_dir()
    except (OSError, ValueError):
        found = False
    if not found:
        raise ArtifactError(
            f"{str(root)[:300]}: no such directory.", "`msconv convert --model <dir> --tp N` makes an artifact."
        )
    try:
        data = read_file(path, MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        if (root / STATE_DIR).is_dir():
            raise ArtifactError(
                f"{root}: the conversion into this directory has not finished.",
                "Run the same `msconv convert` again: it resumes.",
            ) from None
        raise ArtifactError(
            f"{root}: not an artifact (no {MANIFEST}).",
            "`msconv convert --model <dir> --tp N` makes one.",
        ) from None
    except OSError as e:
        raise ArtifactError(f"{path}: cannot be read: {e.strerror}.") from None
    manifest = decode_manifest(data, str(path))
    try:
        ready = read_file(root / READY, MAX_READY_BYTES).decode("utf-8", "replace").split()
    except FileNotFoundError:
        raise ArtifactError(
            f"{root}: {READY} is missing: the artifact was never finished.",
            "Run the same `msconv convert` again: it resumes.",
        ) from None
    except OSError as e:
        raise ArtifactError(f"{root / READY}: cannot be read: {e.strerror}.") from None
    if digest_bytes(data) not in ready:
        raise ArtifactError(
            f"{root}: {MANIFEST} is not the one that {READY} vouches for: it was changed or half copied.",
            "Copy the artifact again, or convert again with --force.",
        )
    if problem := contradiction(manifest):
        raise ArtifactError(f"{path}: contradicts itself: {problem}.", "Convert again with --force.")
    return manifest


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Replace manifest and READY.  READY names the old and the new manifest while they change places.  Raises
    ArtifactError, and replaces nothing, for a manifest that could not be read again."""
    path = root / MANIFEST
    data = encode_manifest(manifest, str(path))
    new = digest_bytes(data)
    if (root / READY).exists() and path.exists():
        replace_file(root / READY, f"{digest_bytes(path.read_bytes())}\n{new}\n".encode())
    replace_file(path, data)
    replace_file(root / READY, f"{new}\n".encode())


def replace_file(path: Path, data: bytes) -> None:
    """Atomically and durably put `data` at `path`.  Raises OSError with the name of what could not be written."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        with tmp.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:
        e.filename = e.filename or str(tmp)
        raise
    tmp.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable.  Some network file systems have no such thing (fsync says EINVAL):
    what is done there is right until the power goes, which is logged once.  Raises OSError for all else."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in NO_SYNC:
            e.filename = str(path)
            raise
        device = os.fstat(fd).st_dev
        if device not in _told:
            _told.add(device)
            logger.warning(
                f"{path}: its file system cannot sync directories ({e.strerror}): if the machine loses power soon "
                "after, files may be missing there.  `msconv inspect ARTIFACT --check` tells."
            )
    finally:
        os.close(fd)
