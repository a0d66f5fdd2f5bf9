"""The files of a checkpoint: what is there, what its index says, and the digests that a hub gave them.

A hub's cache names what it keeps by digest, and beside a downloaded directory lies a record of them; who copied
the files otherwise has none, and nothing is compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from msconv_runtime.errors import CheckpointError, MsconvError

from ..checkpoint.directory import (
    ShardFile,
    disagreements,
    names_in,
    read_index,
    read_shards,
    refuse_doubt,
    unindexed,
)
from ..checkpoint.remote import ETAG
from ..layout.model import TensorInfo
from .findings import Findings

RECORDS = Path(".cache", "huggingface", "download")  # of huggingface_hub's `local_dir`
MOST_RECORD_BYTES = 4096


@dataclass(frozen=True)
class Inventory:
    """Shards that can be read, and their tensors by the names in the files."""

    root: Path
    present: list[str]
    files: Mapping[str, ShardFile]
    tensors: dict[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files.values())


def inventory(root: Path, findings: Findings) -> Inventory:
    """What there is in the directory.  What is missing, damaged or doubtful becomes findings."""
    present = names_in(root)
    index: dict[str, str] = {}
    try:
        index = read_index(root)
        refuse_doubt(root, index, present)
    except MsconvError as e:
        findings.add("error", "files", e.message, [root.name])
    try:
        names = sorted(set(index.values())) or unindexed(root)
    except CheckpointError as e:
        findings.add("error", "files", e.message, [root.name])
        names = [n for n in present if n.endswith(".safetensors")]
    files, tensors, errors, unsupported = read_shards(root, names, None)
    for message in (*errors, *(e.message for e in unsupported)):
        findings.add("error", "files", message, [root.name])
    if index:
        for message in disagreements(index, tensors):
            findings.add("error", "index", message, [root.name])
    return Inventory(root, present, files, tensors)


def known_digest(path: Path) -> str:
    """sha256 or git's sha1 of a file, as the hub that it came from says; "" if that is not known."""
    real = path.resolve()
    if path.is_symlink() and real.parent.name == "blobs" and ETAG.fullmatch(real.name):
        return real.name
    try:
        with (path.parent / RECORDS / f"{path.name}.metadata").open() as f:
            lines = f.read(MOST_RECORD_BYTES).split("\n")
    except (OSError, UnicodeDecodeError):
        return ""
    etag = lines[1].strip() if len(lines) > 1 else ""
    return etag if ETAG.fullmatch(etag) else ""
