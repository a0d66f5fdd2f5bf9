"""Proofs that were made on this machine, kept outside the artifact: every other is a claim of its author.

A proof in a manifest is a few numbers that anybody can write.  `msconv verify` also keeps a note of it in a
private directory; one without a note was made elsewhere.  The note holds for the entry as it is, with the digests
in it, and for the manifest's table of weights: which bytes are which tensor.  What the digests do not defend
against (other bytes made to have the same digest), it does not either.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from pathlib import Path

import msgspec

from .artifact import Manifest, Verified, replace_file

logger = logging.getLogger(__name__)
CLAIMED = "claimed by its author"


class _Note(msgspec.Struct, frozen=True):
    """`table`: SHA-256 of the names, types, shapes and places of all weights."""

    proof: Verified
    table: str


def note(manifest: Manifest, proof: Verified) -> None:
    """Remember that this proof of this artifact was made here.  Where there is no place for that, it will read as
    a claim."""
    try:
        text = _text(manifest, proof)
        path = _place(text)
        path.parent.mkdir(0o700, parents=True, exist_ok=True)
        replace_file(path, text)
        path.chmod(0o600)
    except (OSError, RuntimeError) as e:
        logger.warning("%s: the proof cannot be noted here, and will read as %s.", e, CLAIMED)


def is_checked_here(manifest: Manifest, proof: Verified) -> bool:
    """Whether this very proof, of these very weights, was made by this user on this machine."""
    try:
        text = _text(manifest, proof)
        path = _place(text)
        return _is_private(path.parent) and _is_private(path) and path.read_bytes() == text
    except (OSError, RuntimeError):
        return False


def _text(manifest: Manifest, proof: Verified) -> bytes:
    """What a note holds."""
    weights = manifest.weights
    tensors = [(t.name, t.dtype, t.shape, t.file, t.begin, t.parts) for t in weights.tensors] if weights else []
    files = [(f.path, f.rank, f.size) for f in weights.files] if weights else []
    table = hashlib.sha256(msgspec.json.encode((tensors, files))).hexdigest()
    return msgspec.json.encode(_Note(proof, table))


def _place(text: bytes) -> Path:
    """https://specifications.freedesktop.org/basedir-spec/latest/: a relative path is invalid, and ignored.
    Raises RuntimeError if there is no home directory."""
    told = Path(os.environ.get("XDG_STATE_HOME", ""))
    state = told if told.is_absolute() else Path.home() / ".local" / "state"
    key = hashlib.sha256(_machine() + b"\0" + text).hexdigest()
    return state / "msconv" / "proofs" / f"{key}.json"


def _machine() -> bytes:
    """What tells machines apart that share a home directory."""
    try:
        return Path("/etc/machine-id").read_bytes().strip() or os.uname().nodename.encode()
    except OSError:
        return os.uname().nodename.encode()


def _is_private(path: Path) -> bool:
    """Of this user, and nobody else may write."""
    status = path.lstat()
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022 and not stat.S_ISLNK(status.st_mode)
