"""Whether what a server loads was signed, where `--require-signature` or MSCONV_REQUIRE_SIGNATURE asks for it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ..artifact import MANIFEST, SIGNATURE
from ..artifact.directory import MAX_MANIFEST_BYTES
from ..artifact.files import read_file
from ..signatures import MOST_BYTES, refuse_unsigned
from .settings import Settings

CHECKED = "MSCONV_SIGNATURE_CHECKED"  # what was checked, for the processes that this one starts


def refuse_unsigned_once(root: Path, settings: Settings | None = None) -> None:
    """Before anything of the artifact is read: raises as `refuse_unsigned` does.  Every byte is read once for a
    server, by its first process, or by `msconv serve` before it becomes that.  `settings`: None for those of the
    environment."""
    if not (key := (settings or Settings.read()).require_signature):
        return
    if not (seen := _seen(root, Path(key))) or os.environ.get(CHECKED) != seen:
        refuse_unsigned(root, Path(key))
        os.environ[CHECKED] = seen


def _seen(root: Path, key: Path) -> str:
    """Of these very files: a mark that an environment keeps from before is none."""
    try:
        parts = [read_file(key, MOST_BYTES), read_file(root / SIGNATURE, MOST_BYTES)]
        parts.append(read_file(root / MANIFEST, MAX_MANIFEST_BYTES))
    except OSError:
        return ""
    parts.append(os.fsencode(root.resolve()))
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
