"""Names: of an artifact's directory, of what msconv keeps in it for itself, and of where it came from."""

from __future__ import annotations

from pathlib import Path

from msconv_runtime.artifact import STATE_DIR, digest_bytes
from msconv_runtime.cache_directory import cache
from msconv_runtime.errors import UsageError

from .. import __version__

TOOL = f"msconv {__version__}"
REPORT = "report.html"
JOURNAL = f"{STATE_DIR}/journal.jsonl"  # of a conversion that has not finished
IDENTITY = f"{STATE_DIR}/identity"  # digest of what the finished conversion was made of
DOWNLOADS = f"{STATE_DIR}/downloads"  # shards that are deleted as they have been read


def default_name(model: str, tp: int, ep: int = 1) -> str:
    """The directory's name where --output gives none."""
    return f"{model}-tp{tp}" + (f"-ep{ep}" if ep > 1 else "")


def default_output(model: str, tp: int, ep: int = 1) -> Path:
    """The directory where --output gives none."""
    return Path("artifacts") / default_name(model, tp, ep)


def before_upload(url: str) -> Path:
    """The directory of this machine's cache where an artifact is written that then goes to this address."""
    return cache() / "uploads" / digest_bytes(url.encode()).rpartition(":")[2][:16] / url.rpartition("/")[2]


def recordable(directory: Path) -> str:
    """The whole path, as `.msconv/source` records it.  Raises UsageError if it is not text."""
    path = str(directory.resolve())
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"{path}: this path is not UTF-8, and an artifact records where it came from as text.",
            "Rename it, or copy it where the whole path is UTF-8: a link there is not enough.",
        ) from None
    return path
