"""What may be put into a directory, and what is taken out of it: only what msconv wrote."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from msconv_runtime.artifact import MANIFEST, READY, SIGNATURE, STATE_DIR, is_artifact
from msconv_runtime.errors import UsageError
from msconv_runtime.targets import TARGETS

from ..checkpoint.directory import AUXILIARY
from .names import DOWNLOADS, IDENTITY, JOURNAL, REPORT


def refuse_foreign(root: Path, source: Path | None = None) -> None:
    """Raises UsageError if `root` is the source itself, lies in an artifact, or holds what msconv did not
    write."""
    try:
        is_there = root.exists()
    except (OSError, ValueError):
        raise UsageError(
            f"{str(root)[:300]}: no directory can have this name.", "Give another --output."
        ) from None
    refuse_inside(root, "--output")
    if not is_there:
        return
    if not root.is_dir():
        raise UsageError(f"{root}: is a file, not a directory.", "Give another --output.")
    if source is not None and root.resolve() == source.resolve():
        raise UsageError(f"{root}: the output is the source directory.", "Give another --output.")
    is_ours = (root / STATE_DIR).is_dir() or is_artifact(root)
    if not is_ours and any(root.iterdir()):
        raise UsageError(
            f"{root}: holds something else than an artifact; nothing was touched.",
            "Give an empty or new directory with --output.",
        )


def refuse_inside(path: Path, option: str) -> None:
    """Raises UsageError if a path lies in an artifact, which takes no other files."""
    if above := next((p for p in Path(os.path.realpath(path)).parents if is_artifact(p)), None):
        raise UsageError(
            f"{option} lies in the artifact {above}, which could not be served with other files in it.",
            "Give a directory elsewhere.",
        )


def clear(root: Path) -> None:
    """Remove what msconv wrote, and only that.  READY goes first."""
    for name in (READY, MANIFEST, SIGNATURE, REPORT, JOURNAL, IDENTITY, *AUXILIARY, *_of_graphs()):
        (root / name).unlink(missing_ok=True)
    for path in (root / "weights").glob("model-rank-*-part-*.safetensors*"):
        path.unlink()
    shutil.rmtree(root / "graphs", ignore_errors=True)
    clear_downloads(root)


def _of_graphs() -> Iterator[str]:
    """Graphs that do not lie in a directory of graphs, and what lies beside any."""
    for target in TARGETS.values():
        graphs = (f"{role}_{variant}" if variant else role for role, variant in target.graphs)
        yield from (path for name in graphs if "/" not in (path := target.form.path(target.name, name)))
        yield from target.form.beside


def clear_uploaded(root: Path) -> None:
    """Remove an artifact's directory that was made for an upload, after it."""
    shutil.rmtree(root.parent, ignore_errors=True)


def clear_downloads(root: Path) -> None:
    """Remove the shards that this artifact's conversion downloaded for itself."""
    shutil.rmtree(root / DOWNLOADS, ignore_errors=True)
