"""A checkpoint in a local directory: config, index, shards and their headers, found consistent or refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from msconv_runtime.artifact import MANIFEST, digest_bytes
from msconv_runtime.errors import CheckpointError, UsageError

from ..families import DecoderConfig, Family, configure
from ..layout.model import TensorInfo
from ..layout.names import listing, shorten
from .headers import parse_json, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@ -]{0,199}\.safetensors")
MAX_JSON_BYTES = 16 << 20
MAX_CONFIG_BYTES = 1 << 20

# What makes the artifact a model directory too.  Never code, never pickles.
AUXILIARY = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class ShardFile:
    """One safetensors file and what identifies it: the digest that a hub gives (`etag`), else its time."""

    path: Path
    size: int
    mtime_ns: int
    header_digest: str
    etag: str = ""

    @property
    def identity(self) -> str:
        return f"{self.path.name} {self.size} {self.etag or self.mtime_ns} {self.header_digest}"


Shard = tuple[ShardFile, list[TensorInfo]]  # and its tensors, in offset order


@dataclass(frozen=True)
class Checkpoint:
    """A readable source.  `tensors` by name; empty when only the configuration is there.  `repository` and
    `commit`: of a hub, "" of a directory."""

    root: Path
    name: str
    family: Family
    config: DecoderConfig
    config_digest: str
    files: dict[str, ShardFile]
    tensors: dict[str, TensorInfo]
    repository: str = ""
    commit: str = ""

    @property
    def auxiliary(self) -> list[Path]:
        return [self.root / n for n in AUXILIARY if (self.root / n).is_file()]


def open_configuration(root: Path) -> Checkpoint:
    """Only config.json: enough to plan and to compile.  Raises UsageError if `root` is no model directory."""
    try:
        found = root.exists()
    except (OSError, ValueError):  # a name that no file can have
        found = False
    if not found:
        raise UsageError(f"{str(root)[:300]}: no such directory.", "Give the directory of a downloaded model.")
    if not root.is_dir():
        raise UsageError(f"{root}: not a directory.", "Give the directory that holds config.json.")
    path = root / "config.json"
    if not path.is_file():
        raise UsageError(
            f"{root}: not a model directory: it has no config.json.",
            "Give the directory that holds config.json and *.safetensors.",
        )
    if (root / MANIFEST).exists():
        raise UsageError(
            f"{root}: this is an msconv artifact, not a checkpoint.",
            "Convert from the original model directory.",
        )
    data = read_small(path)
    raw = parse_json(data, str(path))
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: not a JSON object.")
    family, config = configure(raw, str(path))
    return Checkpoint(root, root.resolve().name, family, config, digest_bytes(data), {}, {})


def open_checkpoint(root: Path, remote: Mapping[str, Shard] | None = None) -> Checkpoint:
    """Configuration and every header.  `remote`: all shards, if they are not in `root` yet but on a hub.
    Raises CheckpointError listing missing, damaged or doubtful shards."""
    base = open_configuration(root)
    index = read_index(root)
    names = sorted(set(index.values())) or sorted(remote or ()) or _unindexed(root)
    files: dict[str, ShardFile] = {}
    tensors: dict[str, TensorInfo] = {}
    errors: list[str] = []
    for name in names:
        try:
            file, infos = remote[name] if remote else _read_shard(root / name)
        except CheckpointError as e:
            errors.append(e.message)
            continue
        files[name] = file
        for info in infos:
            if info.name in tensors:
                errors.append(f"{shorten(info.name)}: in {tensors[info.name].file} and again in {name}.")
            tensors[info.name] = info
    if index and not errors:
        errors += _disagreements(index, tensors)
    if errors:
        raise CheckpointError("\n".join(errors), "Download the files again that are named here.")
    return Checkpoint(base.root, base.name, base.family, base.config, base.config_digest, files, tensors)


def _read_shard(path: Path) -> Shard:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing, named by {INDEX}.")
    infos, header_digest = read_header(path)
    stat = path.stat()
    return ShardFile(path, stat.st_size, stat.st_mtime_ns, header_digest), infos


def has_weights(root: Path) -> bool:
    """Whether there are weights, or an index that promises them."""
    return (root / INDEX).exists() or any(root.glob("*.safetensors"))


def read_small(path: Path, limit: int = MAX_CONFIG_BYTES) -> bytes:
    """A text file of bounded size."""
    try:
        if path.stat().st_size > limit:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes is too large for this file.")
        return path.read_bytes()
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror}.") from None


def read_index(root: Path) -> dict[str, str]:
    """{tensor: file name}, {} if there is no index.  Raises CheckpointError for one that cannot be believed."""
    path = root / INDEX
    if not path.exists():
        return {}
    raw = parse_json(read_small(path, MAX_JSON_BYTES), str(path))
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map.", "Download this file again.")
    index: dict[str, str] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not SHARD_NAME.fullmatch(file):
            raise CheckpointError(
                f"{path}: {shorten(name)} is said to be in {shorten(str(file))!r}, "
                "which is not the name of a safetensors file in this directory."
            )
        index[name] = file
    return index


def _unindexed(root: Path) -> list[str]:
    if (root / SINGLE).is_file():
        return [SINGLE]
    shards = sorted(p.name for p in root.glob("*.safetensors"))
    if shards:
        raise CheckpointError(
            f"{root}: {len(shards)} safetensors files and no {INDEX} to say which belong to the model.",
            f"Download {INDEX} too.",
        )
    kinds = sorted({p.suffix for p in root.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf")})
    also = f" (it has {', '.join(kinds)} files, which are never read)" if kinds else ""
    raise CheckpointError(f"{root}: no *.safetensors files{also}.", "Download the safetensors weights.")


def _disagreements(index: dict[str, str], tensors: dict[str, TensorInfo]) -> list[str]:
    errors = []
    absent = [n for n in index if n not in tensors]
    extra = [n for n in tensors if n not in index]
    moved = [n for n, f in index.items() if n in tensors and tensors[n].file != f]
    if absent:
        errors.append(f"Named by {INDEX}, in no shard ({len(absent)}):\n{listing(absent)}")
    if extra:
        errors.append(f"In the shards, not named by {INDEX} ({len(extra)}):\n{listing(extra)}")
    if moved:
        errors.append(f"In another shard than {INDEX} says ({len(moved)}):\n{listing(moved)}")
    return errors
