"""Reading a checkpoint to say what is wrong with it: names first, then every byte."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.directory import require_model
from ..lint.files import Inventory, inventory
from ..lint.findings import Finding, Findings
from ..lint.names import Known, check_names
from ..lint.reading import Progress, Reading
from ..process import peak_rss_bytes


@dataclass(frozen=True)
class Linted:
    """`bytes_read` of the shards; `digests`: how many of them a hub's digest was known of; `family`: "" if the
    configuration does not say it."""

    root: Path
    family: str
    findings: list[Finding]
    tensors: int
    shards: int
    digests: int
    bytes_read: int
    seconds: float
    peak_rss_bytes: int

    @property
    def is_sound(self) -> bool:
        return not any(f.severity == "error" for f in self.findings)

    @property
    def seconds_per_gb(self) -> float:
        return self.seconds / max(self.bytes_read / 1e9, 1e-9)


def look(root: Path, harmless: Collection[str] = ()) -> tuple[Inventory, Known, Findings]:
    """Headers and small files of a directory: what there is, what is known of it, what is wrong with names.
    Raises MsconvError if it is no directory."""
    require_model(root)
    findings = Findings()
    found = inventory(root, findings)
    return found, check_names(found, harmless, findings), findings


def lint(
    root: Path,
    harmless: Collection[str] = (),
    jobs: int = 1,
    progress: Callable[[int], Progress] = lambda total: lambda n: None,
) -> Linted:
    """Read all of a checkpoint.  `progress` gets the bytes that there are, and gives what takes those that were
    read.  Raises MsconvError if there is nothing to read."""
    started = time.monotonic()
    found, known, findings = look(root, harmless)
    reading = Reading(found, known, findings, progress(found.nbytes))
    reading.run(jobs)
    return Linted(
        root,
        known.family,
        findings.listed(),
        len(found.tensors),
        len(found.files),
        reading.digests,
        found.nbytes,
        time.monotonic() - started,
        peak_rss_bytes(),
    )
