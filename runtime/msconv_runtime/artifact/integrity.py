"""Checking bytes against the manifest's digests: every file, named down to the tensor that is wrong."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import xxhash

from ..errors import ArtifactError, MsconvError
from ..targets import TARGETS
from .files import check_size, read_sized
from .headers import MAX_HEADER_BYTES, differences, header_size
from .manifest import Graph, Manifest, TensorEntry, WeightFile, Weights, digest_bytes, digest_of
from .opened import Artifact
from .served import wrong_files

_BLOCK = 8 << 20
SOME = 20  # places that a message names


@dataclass(frozen=True)
class Damage:
    """One place where bytes are not what the manifest says.  `tensor` is empty for headers and graphs."""

    path: str
    tensor: str
    problem: str


def check_artifact(
    artifact: Artifact, progress: Callable[[int], None] = lambda n: None, rank: int | None = None
) -> list[Damage]:
    """Read every byte of weights and graphs (of one rank, if given).  Empty: all is well."""
    damage: list[Damage] = []
    manifest = artifact.manifest
    if manifest.weights is not None:
        for file in manifest.weights.files:
            if rank in (None, file.rank):
                damage += check_file(artifact.root, manifest.weights, file, progress)
    seen = {d.path for d in damage}
    return damage + [d for d in check_graphs(artifact) if d.path not in seen]


def check_graphs(artifact: Artifact) -> list[Damage]:
    """Sizes of all files, the bytes of the graphs, whether they are graphs of ours, and the bytes of what a server
    reads besides: little to read, enough to doubt a proof by."""
    damage: list[Damage] = []
    root, manifest = artifact.root, artifact.manifest
    for file in manifest.weights.files if manifest.weights else ():
        try:
            check_size(root / file.path, file.size)
        except ArtifactError as e:
            damage.append(Damage(file.path, "", e.message))
    for graph in manifest.graphs:
        try:
            data = read_sized(root / graph.path, graph.size)
        except ArtifactError as e:
            damage.append(Damage(graph.path, "", e.message))
            continue
        same = digest_bytes(data) == graph.digest
        if problem := refusal(data, graph, manifest) if same else "digest differs":
            damage.append(Damage(graph.path, "", problem))
    return damage + [Damage(name, "", problem) for name, problem in wrong_files(artifact)]


def refusal(data: bytes, graph: Graph, manifest: Manifest) -> str:
    """Why bytes are no graph of ours, or "": asked of what reads graphs of that form."""
    check = import_module(f"..{TARGETS[graph.target].form.check}", __package__)
    found: str = check.refusal_in(data, graph, manifest)
    return found


def check_file(
    root: Path, weights: Weights, file: WeightFile, progress: Callable[[int], None] = lambda n: None
) -> list[Damage]:
    """Compare one rank file with the manifest: its bytes, and which tensors they are by its header.  Reads in
    order, in bounded memory, past the page cache."""
    try:
        check_size(root / file.path, file.size)
    except ArtifactError as e:
        return [Damage(file.path, "", e.message)]
    index = [f.path for f in weights.files if f.rank == file.rank].index(file.path)
    entries = [t for t in weights.tensors if t.file == index]
    size = header_size(entries) or file.size
    if size > MAX_HEADER_BYTES:
        return [Damage(file.path, "", f"a header of {size} bytes, {MAX_HEADER_BYTES} is the limit")]
    damage: list[Damage] = []
    buffer = bytearray(_BLOCK)
    with (root / file.path).open("rb", buffering=0) as f:
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        header = f.read(size)
        found = [digest_bytes(header)]
        for entry in entries:
            digest = tensor_digest(f.fileno(), entry, buffer)
            found.append(digest)
            if digest != entry.digests[file.rank]:
                damage.append(Damage(file.path, entry.name, "digest differs"))
            os.posix_fadvise(f.fileno(), entry.begin, entry.nbytes, os.POSIX_FADV_DONTNEED)
            progress(entry.nbytes)
    if damage:
        return damage
    if digest_of(found) != file.digest:
        return [Damage(file.path, "", "the header differs")]
    return [Damage(file.path, name, problem) for name, problem in differences(header, entries)]


def tensor_digest(fd: int, entry: TensorEntry, buffer: bytearray) -> str:
    """Digest of a tensor's bytes in an open rank file; `buffer` is reused between calls."""
    digests = []
    offset = entry.begin
    view = memoryview(buffer)
    for size in entry.parts:
        hasher = xxhash.xxh3_128()
        end = offset + size
        while offset < end:
            n = os.preadv(fd, [view[: min(len(buffer), end - offset)]], offset)
            if n == 0:
                break
            hasher.update(view[:n])
            offset += n
        digests.append("xxh3:" + hasher.hexdigest())
        offset = end
    return digest_of(digests)


def refuse_damage(artifact: Artifact, kind: type[MsconvError] = ArtifactError, rank: int | None = None) -> None:
    """Raises `kind`, with the first places, if any byte (of one rank, if given) is not what the manifest says."""
    if damage := check_artifact(artifact, rank=rank):
        places = "\n".join(f"  {d.path}: {d.tensor or 'file'}: {d.problem}" for d in damage[:SOME])
        raise kind(
            f"{artifact.root}: its bytes are not those the manifest describes:\n{places}",
            "Copy the artifact again, or convert again with --force.",
        )
