"""The artifact's format: typed manifest, version check, digests, READY.  Knows no model and no framework.

Reading: `read_manifest` refuses what is unfinished, newer than this code, or damaged.
Writing: `write_manifest` replaces manifest and READY; a crash between the two leaves a readable artifact.
"""

from __future__ import annotations

import errno
import logging
import math
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Literal

import msgspec
import xxhash

from .errors import ArtifactError

FORMAT = 1
MANIFEST = "msconv.json"
READY = "READY"
STATE_DIR = ".msconv"  # journal, lock, local paths: never part of what the artifact promises
MAX_MANIFEST_BYTES = 256 << 20
NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # what a file system says that has no such call

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "int8": 1}  # what weights may be stored as

Phase = Literal["prefill", "decode", "decode_all", "native"]

logger = logging.getLogger(__name__)
_told: set[int] = set()  # devices whose lack of directory syncs was said


class SourceFile(msgspec.Struct, frozen=True, omit_defaults=True):
    """One file of the source checkpoint.  `digest` covers its header and the tensors that were read."""

    name: str
    size: int
    digest: str


class Model(msgspec.Struct, frozen=True, omit_defaults=True):
    family: str
    architecture: str
    source: str
    config_digest: str
    commit: str = ""
    parameters: int = 0
    files: list[SourceFile] = []


class Parallel(msgspec.Struct, frozen=True, omit_defaults=True):
    tp: int
    ep: int = 1


class WeightFile(msgspec.Struct, frozen=True, omit_defaults=True):
    """One safetensors file of one rank.  `digest` = digest of (header digest, tensor digests in order)."""

    path: str
    rank: int
    size: int
    digest: str


class TensorEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One tensor, the same shape on every rank.  `file` indexes the files of a rank; `begin` is the offset
    in that file.  `digests[rank]` covers the digests of its `parts` (bytes of each, in order)."""

    name: str
    dtype: str
    shape: list[int]
    file: int
    begin: int
    parts: list[int]
    digests: list[str]

    @property
    def nbytes(self) -> int:
        return sum(self.parts)


class Dropped(msgspec.Struct, frozen=True, omit_defaults=True):
    """Source tensors that were left out on purpose (names folded over layers)."""

    name: str
    count: int
    reason: str


class Padding(msgspec.Struct, frozen=True, omit_defaults=True):
    """A dimension that tp did not divide: zero rows fill `padded - size`, over all ranks."""

    name: str
    size: int
    padded: int


class Weights(msgspec.Struct, frozen=True, omit_defaults=True):
    dtype: str
    digest: str
    files: list[WeightFile]
    tensors: list[TensorEntry]
    source_dtype: str = ""
    quant: str = ""
    dropped: list[Dropped] = []
    padded: list[Padding] = []


class GraphInput(msgspec.Struct, frozen=True, omit_defaults=True):
    name: str
    dtype: str
    shape: list[int | None]


class GraphParameter(msgspec.Struct, frozen=True, omit_defaults=True):
    name: str
    dtype: str
    shape: list[int]


class Graph(msgspec.Struct, frozen=True, omit_defaults=True):
    """One compiled phase for one target.  `inputs` in call order; `None` is a dynamic dimension.
    `kinds`: how many nodes of each primitive; empty in artifacts of before it was recorded."""

    target: str
    phase: str
    path: str
    size: int
    digest: str
    mindspore: str
    nodes: int
    inputs: list[GraphInput]
    parameters: list[GraphParameter]
    groups: list[str] = []
    nz: list[str] = []
    kinds: dict[str, int] = {}


class Verified(msgspec.Struct, frozen=True, omit_defaults=True):
    """What was compared with what, and how far apart it was.  Holds for exactly these digests.
    `norms`: largest error of each norm's output, relative to its largest value; empty where only logits show."""

    target: str
    weights_digest: str
    graph_digests: list[str]
    reference: str
    mode: str
    bound: float
    max_abs_logit_error: float
    argmax_agreement: float
    ranks: int
    logits_compared: int
    settings: dict[str, str | int | float] = {}
    norms: dict[str, float] = {}


class Rehearsed(msgspec.Struct, frozen=True, omit_defaults=True):
    """What SGLang's server did on the rehearsal device.  Holds for exactly these digests.

    `device`: version of the stand-ins.  `mode`: `float32`, or `as served` in the target's own precision.
    `machines`, `copies`: --nnodes and --dp-size.  `calls`: of each graph.  `max_call_error`: of logits, against
    the interpreter; `max_logit_error`: against transformers.  `bound`: of the latter, 0 where there is none.
    `end`: `term` if the server was ended by SIGTERM, `kill` if one of its ranks was killed.  `msconv`: the version
    whose runtime it was.
    """

    target: str
    weights_digest: str
    graph_digests: list[str]
    sglang: str
    mindspore: str
    device: str
    mode: str
    flags: list[str]
    page: int
    prompts: int
    tokens: int
    calls: dict[str, int]
    max_call_error: float
    max_logit_error: float
    bound: float
    machines: int = 1
    copies: int = 1
    ties: int = 0
    undecided: int = 0
    end: str = "term"
    msconv: str = ""


class Manifest(msgspec.Struct, frozen=True, omit_defaults=True):
    format: int
    tool: str
    model: Model
    parallel: Parallel
    weights: Weights | None = None
    graphs: list[Graph] = []
    verified: list[Verified] = []
    rehearsed: list[Rehearsed] = []

    def graphs_for(self, target: str) -> list[Graph]:
        return [g for g in self.graphs if g.target == target]

    def proof_for(self, target: str) -> Verified | None:
        """The verification that still holds for `target`: same weights, same graphs.  None: unproven."""
        return next((v for v in self.verified if self._holds(v, target)), None)

    def rehearsals_for(self, target: str) -> list[Rehearsed]:
        """Those that still hold for `target`: same weights, same graphs."""
        return [r for r in self.rehearsed if self._holds(r, target)]

    def _holds(self, entry: Verified | Rehearsed, target: str) -> bool:
        digests = sorted(g.digest for g in self.graphs_for(target))
        same_weights = self.weights is not None and entry.weights_digest == self.weights.digest
        return entry.target == target and same_weights and sorted(entry.graph_digests) == digests


class _Version(msgspec.Struct):
    format: int


def digest_bytes(data: bytes | bytearray | memoryview) -> str:
    """`xxh3:<128 bits>` of some bytes."""
    return "xxh3:" + xxhash.xxh3_128_hexdigest(data)


def digest_of(digests: Iterable[str]) -> str:
    """Digest of a sequence of digests: how parts make a tensor, tensors a file, files the weights."""
    return digest_bytes("\n".join(digests).encode())


def encode_manifest(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def decode_manifest(data: bytes, where: str) -> Manifest:
    try:
        version = msgspec.json.decode(data, type=_Version).format
        if version > FORMAT:
            raise ArtifactError(
                f"{where}: this artifact has format {version}; this msconv reads formats up to {FORMAT}.",
                "Upgrade msconv, or convert the checkpoint again with this version.",
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ArtifactError(
            f"{where}: not a valid manifest: {e}.", "Convert again: `msconv convert --force`."
        ) from None
    for path in (
        *(f.path for f in (manifest.weights.files if manifest.weights else ())),
        *(g.path for g in manifest.graphs),
    ):
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or "\\" in path or "\0" in path:
            raise ArtifactError(f"{where}: names a file outside the artifact: {path!r}.")
    return manifest


def _contradiction(manifest: Manifest) -> str:
    """Where a manifest's parts do not agree, or "": what is read later may be taken at its word."""
    tp, w = manifest.parallel.tp, manifest.weights
    if not 1 <= tp <= 4096 or not 1 <= manifest.parallel.ep <= tp:
        return f"tp {tp}, ep {manifest.parallel.ep}"
    if w is None:
        return ""
    sizes: list[list[int]] = [[] for _ in range(tp)]
    for f in w.files:
        if not 0 <= f.rank < tp:
            return f"{f.path} is of rank {f.rank}, of {tp}"
        sizes[f.rank].append(f.size)
    if not sizes[0] or any(len(s) != len(sizes[0]) for s in sizes):
        return "ranks have different numbers of files"
    for t in w.tensors:
        item = ITEM_BYTES.get(t.dtype, 0)
        if not item:
            return f"{t.name} has unknown element type {t.dtype[:40]}"
        if len(t.digests) != tp:
            return f"{t.name} has {len(t.digests)} digests for {tp} ranks"
        if not 0 <= t.file < len(sizes[0]):
            return f"{t.name} is in file {t.file} of {len(sizes[0])}"
        if min([*t.parts, *t.shape, t.begin], default=0) < 0 or math.prod(t.shape) * item != t.nbytes:
            return f"{t.name} has shape {t.shape} and {t.nbytes} bytes at {t.begin}"
        if t.begin + t.nbytes > min(s[t.file] for s in sizes):
            return f"{t.name} ends at byte {t.begin + t.nbytes}, past the end of its file"
    return ""


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
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ArtifactError(f"{path}: {path.stat().st_size} bytes is too large for a manifest.")
        data = path.read_bytes()
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
        ready = (root / READY).read_text("utf-8", "replace").split()
    except FileNotFoundError:
        raise ArtifactError(
            f"{root}: {READY} is missing: the artifact was never finished.",
            "Run the same `msconv convert` again: it resumes.",
        ) from None
    if digest_bytes(data) not in ready:
        raise ArtifactError(
            f"{root}: {MANIFEST} is not the one that {READY} vouches for: it was changed or half copied.",
            "Copy the artifact again, or convert again with --force.",
        )
    if problem := _contradiction(manifest):
        raise ArtifactError(f"{path}: contradicts itself: {problem}.", "Convert again with --force.")
    return manifest


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Replace manifest and READY.  READY names the old and the new manifest while they change places."""
    data = encode_manifest(manifest)
    new = digest_bytes(data)
    path = root / MANIFEST
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
