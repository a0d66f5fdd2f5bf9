"""A checkpoint on a Hugging Face hub: its commit, its list of files, its headers, and where its files lie here.

Files lie in the user's cache, laid out as huggingface_hub does (blobs by digest, snapshots by commit), so that
either finds what the other downloaded.  Only names on the lists below are ever asked for: no code, no pickles.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.file_download import get_hf_file_metadata, repo_folder_name
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils._runtime import is_xet_available

from msconv_runtime.errors import CheckpointError

from . import directory
from .concurrency import each, locked
from .directory import INDEX, INDEX_NAME, SHARD_NAME, SINGLE, Checkpoint, Shard, ShardFile
from .headers import PREFIX_BYTES, header_length, parse_header, read_header
from .http import http
from .hub_errors import HubError, Purpose, explain
from .reach import unreachable
from .remote import CONFIGURATION, ETAG, Cancelled, Progress, RemoteFile, is_wanted
from .transfer import Patience, fetch, read_range
from .unsupported import UnsupportedCheckpoint, weightless

COMMIT = re.compile(r"[0-9a-f]{40}")
FIRST_RANGE = 64 << 10  # holds the whole header of most shards
HEADERS_AT_ONCE = 8
NAMED = (http.HTTPError, HFValidationError)  # ValueErrors that are explained elsewhere


@dataclass(frozen=True)
class Place:
    """Where a file of a repository goes: `blob` with its bytes, `final` by its name (the same, or a link)."""

    final: Path
    blob: Path
    lock: Path

    @property
    def partial(self) -> Path:
        return self.blob.with_name(self.blob.name + ".incomplete")

    def publish(self) -> None:
        """The bytes are complete in `partial` or `blob`: give them their name."""
        if self.partial.exists():
            self.partial.replace(self.blob)
        if self.final == self.blob or self.final.exists():
            return
        self.final.parent.mkdir(parents=True, exist_ok=True)
        self.final.unlink(missing_ok=True)
        try:
            self.final.symlink_to(os.path.relpath(self.blob, self.final.parent))
        except OSError:  # a file system without links
            self.blob.replace(self.final)


@dataclass(frozen=True)
class Repository:
    """owner/name at a commit.  `files`: those we may need.  `own`: a directory that shards go to instead of the
    user's cache, and are deleted from as they have been read; None, they stay."""

    name: str
    revision: str
    commit: str
    files: dict[str, RemoteFile]
    others: tuple[str, ...] = ()
    own: Path | None = None

    @property
    def reference(self) -> str:
        """owner/name@commit"""
        return f"{self.name}@{self.commit}"

    @cached_property
    def cache(self) -> Path:
        return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.name, repo_type="model")

    @property
    def root(self) -> Path:
        """The model directory: what has been downloaded of this commit."""
        return self.cache / "snapshots" / self.commit

    def place(self, name: str) -> Place:
        final = self.root / name
        if self.own and SHARD_NAME.fullmatch(name) and not final.exists():
            own = self.own / name
            return Place(own, own, own.with_name(name + ".lock"))
        etag = self.files[name].etag
        locks = self.cache.parent / ".locks" / self.cache.name
        return Place(final, self.cache / "blobs" / etag, locks / f"{etag}.lock")

    def is_here(self, name: str) -> bool:
        """Whether the file is complete on this machine."""
        path = self.place(name).final
        return path.is_file() and path.stat().st_size == self.files[name].size

    def missing_bytes(self, names: Iterable[str]) -> int:
        """What is still to be downloaded of these files."""
        total = 0
        for name in names:
            if not self.is_here(name):
                place, size = self.place(name), self.files[name].size
                there = (p.stat().st_size for p in (place.blob, place.partial) if p.is_file())
                total += max(0, size - next(there, 0))
        return total

    def url(self, name: str) -> str:
        return hf_hub_url(self.name, name, revision=self.commit)

    def download(self, name: str, progress: Progress, cancelled: threading.Event) -> Path:
        """Bring one file here, or what is missing of it.  `progress` gets the bytes that come.
        Raises MsconvError, Cancelled."""
        file, place = self.files[name], self.place(name)
        try:
            if self.is_here(name):
                return place.final
            place.blob.parent.mkdir(parents=True, exist_ok=True)
            place.lock.parent.mkdir(parents=True, exist_ok=True)
            if not place.partial.exists() and self._has_xet(name, cancelled):
                bar: Any = counting_bar(progress)
                hf_hub_download(self.name, name, revision=self.commit, local_dir=self.own, tqdm_class=bar)
                return self.place(name).final
            with locked(place.lock, cancelled):
                if not (place.blob.is_file() and place.blob.stat().st_size == file.size):
                    fetch(self.url(name), file, place.partial, progress, cancelled)
                place.publish()
        except Cancelled:
            raise
        except Exception as e:
            raise explain(e, self.reference, name) from e
        return place.final

    def download_small(self, names: Iterable[str]) -> None:
        """The files among these that the repository has."""
        for name in names:
            if name in self.files:
                self.download(name, lambda n: None, threading.Event())

    def _has_xet(self, name: str, cancelled: threading.Event) -> bool:
        """Whether the hub offers this shard by Xet, and its client is installed.  That one downloads all of a file
        or nothing, and checks its digests itself."""
        if not is_xet_available() or not SHARD_NAME.fullmatch(name):
            return False
        patience = Patience(cancelled)
        while True:
            try:
                metadata = get_hf_file_metadata(self.url(name), timeout=constants.HF_HUB_ETAG_TIMEOUT)
                return metadata.xet_file_data is not None
            except http.HTTPError as e:
                patience.wait(e)


def counting_bar(progress: Progress) -> type:
    """A class that huggingface_hub takes for a progress bar, and that only counts."""

    class Bar:
        def __init__(self, *args: object, total: int | None = None, **kwargs: object) -> None:
            self.total, self.n = total, 0

        def update(self, n: float = 1) -> None:
            self.n += int(n)
            progress(int(n))

        def update_transfer(self, n: float) -> None: ...
        def set_postfix_str(self, *args: object, **kwargs: object) -> None: ...
        def set_transfer_postfix_str(self, *args: object, **kwargs: object) -> None: ...
        def refresh(self, *args: object, **kwargs: object) -> None: ...
        def close(self) -> None: ...
        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *exc: object) -> None: ...

    return Bar


def open_repository(name: str, revision: str = "") -> Repository:
    """Resolve the revision ("" is the default branch) to a commit and list its files: one request, none offline.
    Raises HubError, UsageError, CheckpointError."""
    if constants.is_offline_mode():
        return _from_cache(name, revision)
    repository = resolve(name, revision, is_wanted)
    if "config.json" not in repository.files:
        asked = f"{name}@{revision}" if revision else name
        if found := weightless((*repository.files, *repository.others)):
            raise UnsupportedCheckpoint(f"{asked}: has no config.json; it has {found[0]}.", found[1])
        raise CheckpointError(f"{asked}: has no config.json.", "Give the repository of a model in safetensors.")
    _remember(repository)
    return repository


def resolve(name: str, revision: str, wanted: Callable[[str], bool], purpose: Purpose = "convert") -> Repository:
    """The revision's commit and those of its files whose names are `wanted`.  Raises HubError, UsageError."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what it would warn of, we say ourselves
    asked = f"{name}@{revision}" if revision else name
    try:
        validate_repo_id(name)
    except HFValidationError as e:
        raise explain(e, asked, purpose=purpose) from e
    if why := unreachable(constants.ENDPOINT):
        raise _out_of_reach(asked, name, why, purpose)
    patience = Patience(threading.Event())
    while True:
        try:
            info = HfApi().model_info(
                name,
                revision=revision or None,
                files_metadata=True,
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            )
            break
        except Exception as e:
            if isinstance(e, KeyError | TypeError | ValueError) and not isinstance(e, NAMED):
                raise HubError(
                    f"{asked}: {constants.ENDPOINT} does not answer as a hub does.", "Check HF_ENDPOINT."
                ) from e
            try:
                patience.wait(e)
            except Exception as last:
                raise explain(last, asked, purpose=purpose) from e
    files: dict[str, RemoteFile] = {}
    others: list[str] = []
    for entry in info.siblings or ():
        etag = (entry.lfs.sha256 if entry.lfs else entry.blob_id) or ""
        if not wanted(entry.rfilename):
            others.append(entry.rfilename)
        elif not ETAG.fullmatch(etag) or entry.size is None or entry.size < 0:
            raise HubError(f"{asked}: {entry.rfilename} is listed without size or digest.", "Check HF_ENDPOINT.")
        else:
            files[entry.rfilename] = RemoteFile(entry.rfilename, entry.size, etag)
    if not COMMIT.fullmatch(info.sha or ""):
        raise HubError(f"{asked}: {constants.ENDPOINT} names no commit.", "Check HF_ENDPOINT.")
    return Repository(name, revision, info.sha or "", files, tuple(others))


def _out_of_reach(asked: str, name: str, why: str, purpose: Purpose) -> HubError:
    """The error of a machine without a network, with what can be done on it."""
    cached = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "refs"
    ways = {
        "convert": "give the directory of a checkpoint that is here, or HF_ENDPOINT of a mirror",
        "pull": "copy the artifact's directory, or give HF_ENDPOINT of a mirror",
        "push": "copy the artifact's directory",
    }
    here = "  HF_HUB_OFFLINE=1 takes what is in the cache." if cached.is_dir() and purpose == "convert" else ""
    return HubError(
        f"{asked}: no such directory here, and {constants.ENDPOINT} cannot be reached: {why}."
        if purpose == "convert"
        else f"{asked}: {constants.ENDPOINT} cannot be reached: {why}.",
        f"Without a network {ways[purpose]}.{here}",
    )


def _remember(repository: Repository) -> None:
    """Which commit a branch is, for HF_HUB_OFFLINE."""
    ref = repository.cache / "refs" / (repository.revision or constants.DEFAULT_REVISION)
    try:
        if not COMMIT.fullmatch(repository.revision) and ".." not in ref.parts:
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(repository.commit)
    except OSError as e:
        raise explain(e, repository.name) from None


def _from_cache(name: str, revision: str) -> Repository:
    """What earlier downloads left: the files' digests are the names of their blobs."""
    found = Repository(name, revision, revision, {})
    asked = f"{name}@{revision}" if revision else name
    if not COMMIT.fullmatch(revision):
        try:
            commit = (found.cache / "refs" / (revision or constants.DEFAULT_REVISION)).read_text().strip()
        except OSError:
            raise explain(OfflineModeIsEnabled(), asked) from None
        found = replace(found, commit=commit)
    if not COMMIT.fullmatch(found.commit) or not (found.root / "config.json").is_file():
        raise explain(OfflineModeIsEnabled(), asked)
    files = {
        p.name: RemoteFile(p.name, p.stat().st_size, p.resolve().name)
        for p in found.root.iterdir()
        if p.is_file() and is_wanted(p.name)
    }
    return replace(found, files=files)


def open_configuration(repository: Repository, harmless: Iterable[str] = ()) -> Checkpoint:
    """Only config.json, downloaded if need be.  Raises as directory.open_configuration does, and HubError."""
    repository.download_small((*CONFIGURATION, directory.index_of(repository.files, repository.reference)))
    return _named(directory.open_configuration(repository.root, harmless), repository)


def has_weights(repository: Repository) -> bool:
    """Whether there are safetensors, or an index that promises them."""
    return any(SHARD_NAME.fullmatch(name) or INDEX_NAME.fullmatch(name) for name in repository.files)


def open_checkpoint(repository: Repository, harmless: Iterable[str] = ()) -> Checkpoint:
    """Configuration and every header: those of shards that are not here are read from the hub, by ranges.
    Raises as directory.open_checkpoint does, and HubError."""
    open_configuration(repository, harmless)
    names = shards(repository)
    cancelled = threading.Event()
    read = each(names, lambda name: _read_shard(repository, name, cancelled), cancelled.set, HEADERS_AT_ONCE)
    remote = dict(zip(names, read, strict=True))
    listed = (*repository.files, *repository.others)
    return _named(directory.open_checkpoint(repository.root, remote, harmless, listed), repository)


def _named(checkpoint: Checkpoint, repository: Repository) -> Checkpoint:
    short = repository.name.rpartition("/")[2]
    return replace(checkpoint, name=short, repository=repository.name, commit=repository.commit)


def shards(repository: Repository) -> list[str]:
    """The weights' files: what the index names, or the only one."""
    index = (
        directory.read_index(repository.root) if directory.index_of(repository.files, repository.reference) else {}
    )
    names = sorted(set(index.values())) or [SINGLE]
    missing = [n for n in names if n not in repository.files]
    if not missing:
        return names
    if constants.is_offline_mode():
        raise explain(OfflineModeIsEnabled(), repository.reference, ", ".join(missing[:5]))
    if index:
        raise CheckpointError(
            f"{repository.reference}: has no {', '.join(missing[:5])}, named by {INDEX} ({len(missing)} files).",
            "Give another @revision, or tell the owner of the repository.",
        )
    adapter = "adapter_config.json" in repository.others
    if not adapter and any(SHARD_NAME.fullmatch(n) for n in repository.files):
        raise CheckpointError(
            f"{repository.reference}: has safetensors files, and no {INDEX} to say which belong to the model.",
            "Give the repository that the model was published in.",
        )
    raise directory.without_weights(repository.reference, repository.others)


def _read_shard(repository: Repository, name: str, cancelled: threading.Event) -> Shard:
    file, path = repository.files[name], repository.place(name).final
    if repository.is_here(name):
        infos, digest = read_header(path)
    else:
        url, where = repository.url(name), Path(repository.reference, name)
        try:
            data = read_range(url, 0, min(FIRST_RANGE, file.size), cancelled)
            end = PREFIX_BYTES + header_length(data[:PREFIX_BYTES], where, file.size)
            data = data[:end] + (read_range(url, len(data), end, cancelled) if end > len(data) else b"")
        except Cancelled:
            raise
        except Exception as e:
            raise explain(e, repository.reference, name) from e
        infos, digest = parse_header(data, where, file.size)
    return ShardFile(path, file.size, 0, digest, file.etag), infos
