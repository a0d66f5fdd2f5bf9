"""report.html of an artifact: read, described, rendered, put beside it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from msconv_runtime.artifact import Artifact, Manifest, replace_file
from msconv_runtime.errors import UsageError

from ..checkpoint.reference import configuration
from ..workspace.names import REPORT
from ..workspace.timings import read_timings
from .data import describe


def facts(root: Path, manifest: Manifest | None = None) -> dict[str, Any]:
    """What the report says, as data.  `manifest`: one that is about to be written."""
    artifact = Artifact(root, manifest)
    return describe(artifact.manifest, configuration(artifact), read_timings(root))


def write_report(root: Path, manifest: Manifest | None = None, output: Path | None = None) -> Path:
    """Write the page, by default into the artifact.  What is there already is left alone if it says the same.
    Raises MsconvError for what is no artifact and for a place where no page belongs, OSError if the file cannot be
    written."""
    from .render import render

    path = output or root / REPORT
    _refuse_place(root, path)
    page = render(facts(root, manifest)).encode()
    with contextlib.suppress(OSError):
        if path.stat().st_size == len(page) and path.read_bytes() == page:
            return path
    try:
        replace_file(path, page)
    except OSError:
        with contextlib.suppress(OSError):
            path.with_name(path.name + ".tmp").unlink()  # what it took is needed for more important files
        raise
    return path


def _refuse_place(root: Path, path: Path) -> None:
    """Raises UsageError for what is no regular file, and for the artifact's other files."""
    if (path.exists() or path.is_symlink()) and not (path.is_file() or path.is_dir()):
        raise UsageError(
            f"{path}: is no regular file; nothing was written.", "Give another --output, or remove it."
        )
    inside = Path(os.path.realpath(root))
    place = Path(os.path.realpath(path.parent)) / path.name
    if place != inside / REPORT and place.is_relative_to(inside):
        raise UsageError(
            f"{path}: lies in the artifact, where only {REPORT} belongs; nothing was written.",
            "Give --output a file elsewhere, or leave it out.",
        )
