"""A checkpoint in a local directory: config, index, shards and their headers, found consistent or refused."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

from msconv_runtime.artifact import MANIFEST, digest_bytes
from msconv_runtime.errors import CheckpointError, UsageError

from ..families import DecoderConfig, Family, configure
from ..layout.model import TensorInfo
from ..layout.names import listing, shorten
from ..quant import WeightFormat
from ..quant.modelslim import DESCRIPTION
from ..quant.modelslim import METHOD as MODELSLIM
from .headers import parse_json, read_header
from .naming import named
from .surroundings import model_name, tokenizer_note, unnamed_note
from .unsupported import UnsupportedCheckpoint, refuse_embedding, refuse_names, weightless

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_OF = re.compile(r"model-\d+-of-\d+\.safetensors")
SOME = 12  # files or tensors in a message
INDEX_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@ -]{0,199}\.safetensors\.index\.json")
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
    """A readable source.  `tensors` by the table's names; empty when only the configuration is there.  `stored`:
    the names in the files, where they are others; `stacked`: tensors of several experts, of which `tensors` has
    the parts.  `repository` and `commit`: of a hub, "" of a directory.  `harmless`: keys of config.json that a
    person said change nothing.  `notes`: what to tell people before anything is converted.  `config_bytes`: the
    config.json of an artifact, without the description of weights that it keeps as codes.  `description`: the
    digest of ModelSlim's, "" if there is none."""

    root: Path
    name: str
    family: Family
    config: DecoderConfig
    config_digest: str
    files: dict[str, ShardFile]
    tensors: dict[str, TensorInfo]
    repository: str = ""
    commit: str = ""
    stored: Mapping[str, str] = field(default_factory=dict)
    stacked: Mapping[str, TensorInfo] = field(default_factory=dict)
    harmless: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    config_bytes: bytes = b""
    description: str = ""

    def find(self, name: str) -> TensorInfo | None:
        """A tensor, or several experts in one; None if there is none of this name."""
        return self.tensors.get(name) or self.stacked.get(name)

    def bare(self) -> Checkpoint:
        """The same, for an artifact of other weights: its config.json does not say how those here are stored."""
        data = _bare(self.config_bytes)
        return replace(self, config_bytes=data, config_digest=digest_bytes(data))

    @property
    def auxiliary(self) -> list[Path]:
        """Files that are copied.  Raises CheckpointError for a name whose file cannot be."""
        found = [path for n in AUXILIARY if os.path.lexists(path := self.root / n)]
        for path in found:
            if not path.is_file():
                what = "a link to nothing" if path.is_symlink() and not path.exists() else "no regular file"
                raise CheckpointError(f"{path}: is {what}.", "Bring the file, or remove what is in its place.")
        return found


def open_configuration(root: Path, harmless: Iterable[str] = ()) -> Checkpoint:
    """Only config.json: enough to plan and to compile.  `harmless`: keys of it that a person says change nothing.
    Raises UsageError if `root` is no model directory."""
    require_model(root)
    path = root / "config.json"
    data = read_small(path)
    raw = parse_json(data, str(path))
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: not a JSON object.")
    harmless = tuple(harmless)
    described = _description(root)
    if described is not None:
        if raw.get("quantization_config"):
            raise CheckpointError(
                f"{root}: config.json has a quantization_config, and {DESCRIPTION} is there too: which of them "
                "describes the weights is not clear.",
                "Take away the one that is not of these weights.",
            )
        raw = {**raw, "quantization_config": {"quant_method": MODELSLIM, "description": described[0]}}
    family, config = configure(raw, str(path), harmless)
    if described is None and any(f.is_kept for f in config.formats):  # a server would load the weights by it
        data = _bare(data)
    return Checkpoint(
        root,
        model_name(root),
        family,
        config,
        digest_bytes(data),
        {},
        {},
        harmless=harmless,
        config_bytes=data,
        description=described[1] if described else "",
    )


def require_model(root: Path) -> None:
    """Raises MsconvError if `root` is no directory with a config.json, or an artifact."""
    try:
        found = root.exists()
    except (OSError, ValueError):  # a name that no file can have
        found = False
    if not found:
        raise UsageError(f"{str(root)[:300]}: no such directory.", "Give the directory of a downloaded model.")
    if not root.is_dir():
        if found_instead := weightless([root.name]):
            raise UnsupportedCheckpoint(f"{root}: is one of {found_instead[0]}.", found_instead[1])
        raise UsageError(f"{root}: not a directory.", "Give the directory that holds config.json.")
    if not (root / "config.json").is_file():
        _refuse_without_config(root)
    if (root / MANIFEST).exists():
        raise UsageError(
            f"{root}: this is an msconv artifact, not a checkpoint.",
            "Convert from the original model directory.",
        )


def _bare(config: bytes) -> bytes:
    """A config.json without the description of weights, by which a server would choose a loader of its own."""
    raw = json.loads(config)
    if not raw.pop("quantization_config", None):
        return config
    return json.dumps(raw, indent=2).encode() + b"\n"


def _description(root: Path) -> tuple[object, str] | None:
    """What ModelSlim says of the tensors, and its digest."""
    path = root / DESCRIPTION
    if not path.is_file():
        return None
    data = read_small(path, MAX_JSON_BYTES)
    return parse_json(data, str(path)), digest_bytes(data)


def _refuse_without_config(root: Path) -> NoReturn:
    if found := weightless(names_in(root)):
        raise UnsupportedCheckpoint(f"{root}: has no config.json; it has {found[0]}.", found[1])
    snapshots = sorted(p for p in root.glob("snapshots/*") if (p / "config.json").is_file())
    raise UsageError(
        f"{root}: not a model directory: it has no config.json.",
        f"Give the snapshot in this cache: {snapshots[-1]}."
        if snapshots
        else "Give the directory that holds config.json and *.safetensors.",
    )


def names_in(root: Path) -> list[str]:
    """Names in a directory, folders with what is in them left out."""
    try:
        return sorted(p.name for p in root.iterdir())
    except OSError as e:
        raise CheckpointError(f"{root}: cannot be read: {e.strerror}.") from None


def open_checkpoint(
    root: Path,
    remote: Mapping[str, Shard] | None = None,
    harmless: Iterable[str] = (),
    listed: Collection[str] | None = None,
) -> Checkpoint:
    """Configuration and every header.  `remote`: all shards, if they are not in `root` yet but on a hub; `listed`:
    then all names there.  Raises CheckpointError listing missing, damaged or doubtful shards, and
    UnsupportedCheckpoint for what is whole and cannot be converted."""
    base = open_configuration(root, harmless)
    present = names_in(root) if listed is None else listed
    refuse_embedding(str(root), present)
    index = read_index(root)
    refuse_doubt(root, index, present)
    names = sorted(set(index.values())) or sorted(remote or ()) or unindexed(root)
    files, tensors, errors, unsupported = read_shards(root, names, remote)
    if index and not errors and not unsupported:
        errors += disagreements(index, tensors)
    if errors:
        raise CheckpointError("\n".join(errors), "Download the files again that are named here.")
    if unsupported:
        raise UnsupportedCheckpoint("\n".join(e.message for e in unsupported[:SOME]), unsupported[0].hint)
    refuse_names(str(root), [n for n in tensors if not n.endswith(companion_endings(base.config.formats))])
    found = named(tensors, base.family, base.config, str(root))
    notes = (*found.notes, tokenizer_note(present), unnamed_note(present, names))
    return replace(
        base,
        files=files,
        tensors=found.tensors,
        stored=found.stored,
        stacked=found.stacked,
        notes=tuple(note for note in notes if note),
    )


def companion_endings(formats: tuple[WeightFormat, ...]) -> tuple[str, ...]:
    """What the names of scales and the like end with, which the configuration's weight formats account for."""
    names = (n for f in formats for n in (*f.companions("x.weight"), *(d.name for d in f.left_out("x.weight"))))
    return tuple(name.removeprefix("x.weight").removeprefix("x") for name in names)


def read_shards(
    root: Path, names: list[str], remote: Mapping[str, Shard] | None
) -> tuple[dict[str, ShardFile], dict[str, TensorInfo], list[str], list[UnsupportedCheckpoint]]:
    """Files and tensors by name, what is wrong with them, and what is whole and not supported."""
    files: dict[str, ShardFile] = {}
    tensors: dict[str, TensorInfo] = {}
    errors: list[str] = []
    unsupported: list[UnsupportedCheckpoint] = []
    for name in names:
        try:
            file, infos = remote[name] if remote else _read_shard(root / name)
        except UnsupportedCheckpoint as e:
            unsupported.append(e)
            continue
        except CheckpointError as e:
            errors.append(e.message)
            continue
        files[name] = file
        for info in infos:
            if info.name in tensors:
                errors.append(f"{shorten(info.name)}: in {tensors[info.name].file} and again in {name}.")
            tensors[info.name] = info
    return files, tensors, errors, unsupported


def refuse_doubt(root: Path, index: Mapping[str, str], present: Collection[str]) -> None:
    """Raises CheckpointError where two sets of weights are there and nothing says which is the model's."""
    named_files = set(index.values())
    if not index or SINGLE not in present or SINGLE in named_files:
        shards = sorted(n for n in present if SHARD_OF.fullmatch(n))
        if not index and SINGLE in present and shards:
            raise CheckpointError(
                f"{root}: has {SINGLE} and {len(shards)} shards ({shards[0]}, ...) without {INDEX}: which are the "
                "model's weights is not clear.",
                f"Move {SINGLE} or the shards away; shards need {INDEX}.",
            )
        return
    if not named_files & set(present):
        raise CheckpointError(
            f"{root}: {INDEX} is stale: none of the {len(named_files)} files it names is here, {SINGLE} is.",
            f"If {SINGLE} is the model, move {INDEX} away; if not, download the shards.",
        )
    raise CheckpointError(
        f"{root}: has {SINGLE}, and {INDEX} that names {len(named_files)} other files: transformers would read "
        "the first, other programs the second.",
        f"Move {SINGLE} away, or {INDEX} and its shards.",
    )


def _read_shard(path: Path) -> Shard:
    if not path.is_file():
        if (found := _irregular(path)) and not path.is_symlink():
            raise CheckpointError(f"{path}: is no regular file: it is {found}.")
        raise CheckpointError(f"{path}: missing, named by {INDEX}.")
    infos, header_digest = read_header(path)
    stat = path.stat()
    return ShardFile(path, stat.st_size, stat.st_mtime_ns, header_digest), infos


def _irregular(path: Path) -> str:
    """What it is, if something is there that is no file."""
    if path.is_file():
        return ""
    if path.is_dir():
        return "a directory"
    if path.is_symlink():
        return "a link that leads to no file"
    return "a pipe, a socket or a device" if path.exists() else ""


def has_weights(root: Path) -> bool:
    """Whether there are weights, or an index that promises them."""
    return any(root.glob("*.safetensors")) or any(root.glob("*.safetensors.index.json"))


def read_small(path: Path, limit: int = MAX_CONFIG_BYTES) -> bytes:
    """A text file of bounded size."""
    try:
        if path.stat().st_size > limit:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes is too large for this file.")
        return path.read_bytes()
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror}.") from None


def index_of(names: Collection[str], where: str) -> str:
    """The index among these files: tools that quantise give it other names.  "" if there is none.  Raises
    CheckpointError if there are several, and none of the usual name."""
    found = sorted(n for n in names if INDEX_NAME.fullmatch(n))
    if INDEX in found:
        return INDEX
    if len(found) > 1:
        raise CheckpointError(
            f"{where}: has {len(found)} indexes: {', '.join(found[:SOME])}.",
            "Leave that of the weights.",
        )
    return found[0] if found else ""


def read_index(root: Path) -> dict[str, str]:
    """{tensor: file name}, {} if there is no index.  Raises CheckpointError for one that cannot be believed."""
    name = index_of(names_in(root), str(root))
    if not name:
        return {}
    path = root / name
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


def unindexed(root: Path) -> list[str]:
    if (root / SINGLE).is_file():
        return [SINGLE]
    if found := _irregular(root / SINGLE):
        raise CheckpointError(
            f"{root / SINGLE}: is no regular file: it is {found}.",
            "Download it again, or copy the file itself here.",
        )
    shards = sorted(p.name for p in root.glob("*.safetensors"))
    if shards and "adapter_config.json" not in names_in(root):
        raise CheckpointError(
            f"{root}: {len(shards)} safetensors files and no {INDEX} to say which belong to the model.",
            f"Download {INDEX} too.",
        )
    raise without_weights(str(root), names_in(root))


def without_weights(where: str, files: Collection[str]) -> CheckpointError:
    """The error for a directory or repository with no weights that are read, by what it has instead."""
    if found := weightless(files):
        return UnsupportedCheckpoint(f"{where}: has no *.safetensors files; it has {found[0]}.", found[1])
    return CheckpointError(
        f"{where}: has no *.safetensors files.", "Download the weights too: they are needed as safetensors."
    )


def disagreements(index: dict[str, str], tensors: dict[str, TensorInfo]) -> list[str]:
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
