"""Files beside weights and graphs, such as tokenizer and chat template: a server reads them, so each has a digest.

Artifacts of before files had digests record none; of those only config.json is vouched for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import ArtifactError
from .directory import MANIFEST, READY, SIGNATURE, STATE_DIR
from .files import read_file, read_sized
from .manifest import File, digest_bytes
from .opened import CONFIG, Artifact

OWN = {MANIFEST, READY, SIGNATURE, "report.html", "README.md", ".gitattributes"}  # read by no server, or checked
READ = re.compile(  # what SGLang, transformers or Python would open in a model's directory
    r".*\.(json|jinja|model|tiktoken|py|pyc|so|safetensors|bin|pt|pth|ckpt|gguf|npz|msgpack|h5)|merges.txt|vocab.txt",
    re.ASCII | re.IGNORECASE | re.DOTALL,
)
MOST_FILE_BYTES = 256 << 20
MOST_NAMED = 50


def describe_file(path: Path, data: bytes = b"") -> tuple[File, bytes]:
    """The manifest's entry of a file, and its bytes: `data`, if they are known.  Raises ArtifactError, OSError."""
    data = data or read_file(path, MOST_FILE_BYTES)
    return File(path.name, len(data), digest_bytes(data)), data


def wrong_files(artifact: Artifact) -> Iterator[tuple[str, str]]:
    """Name and problem of each file that is not what the manifest says, or that it does not say and a server would
    read.  In an artifact of before files had digests, of config.json only."""
    listed = {file.name: file for file in artifact.manifest.files}
    wrong = dict(_changed(artifact.root, listed))
    if CONFIG not in wrong:  # what the graphs were made from, whatever the list says
        try:
            artifact.config_bytes()
        except ArtifactError as e:
            wrong[CONFIG] = e.message
    yield from wrong.items()
    if listed:
        for name in other_files(artifact):
            if is_read(name):
                yield name, "is not in the manifest, and a server would read it"


def _changed(root: Path, listed: Mapping[str, File]) -> Iterator[tuple[str, str]]:
    for name, file in listed.items():
        try:
            if digest_bytes(read_sized(root / name, file.size)) != file.digest:
                yield name, "digest differs"
        except ArtifactError as e:
            yield name, e.message


def is_read(name: str) -> bool:
    """Whether a file of this name would be opened by a server that is given the directory."""
    return READ.fullmatch(Path(name).name) is not None


def other_files(artifact: Artifact) -> list[str]:
    """Files that the manifest does not name, sorted, at most `MOST_NAMED`; without what msconv writes besides."""
    manifest = artifact.manifest
    known = {f.name for f in manifest.files} | {g.path for g in manifest.graphs} | OWN
    known |= {f.path for f in manifest.weights.files} if manifest.weights else set()
    found = []
    for directory, below, names in os.walk(artifact.root):
        below[:] = sorted(b for b in below if (Path(directory), b) != (artifact.root, STATE_DIR))
        places = (str(Path(directory, name).relative_to(artifact.root)) for name in sorted(names))
        found += [place for place in places if place not in known]
        if len(found) >= MOST_NAMED:
            break
    return found[:MOST_NAMED]


def refuse_wrong_files(artifact: Artifact) -> None:
    """Raises ArtifactError naming files that are not what the manifest says: before they are read."""
    if wrong := list(wrong_files(artifact)):
        places = "\n".join(f"  {name}: file: {problem}" for name, problem in wrong)
        raise ArtifactError(
            f"{artifact.root}: its files are not those the manifest describes:\n{places}",
            "Copy the artifact again, or convert again with --force.",
        )
