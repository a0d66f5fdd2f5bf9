"""A checkpoint in an object store or on a web server: its list of files, its headers, and ranges of bytes.

All of it goes through fsspec, whose drivers know the stores and find credentials.  Configuration and tokenizer are
copied to a directory of this machine's cache, by what the store says of them; weights are read where they are.
Only names on the lists of `remote` are ever asked for: no code, no pickles.
"""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from msconv_runtime.artifact import MANIFEST, digest_of
from msconv_runtime.cache_directory import cache
from msconv_runtime.errors import CheckpointError, MsconvError, ResourceError, UsageError

from . import directory
from .concurrency import each, locked
from .directory import AUXILIARY, INDEX, SINGLE, Checkpoint, Shard, ShardFile
from .headers import PREFIX_BYTES, header_length, parse_header
from .remote import CONFIGURATION, Cancelled, Progress, RemoteFile, is_wanted
from .store_errors import Patience, ShortRead, StoreError, explain
from .unsupported import UnsupportedCheckpoint, weightless
from .urls import scheme_of

FIRST_RANGE = 64 << 10  # holds the whole header of most shards
RANGE_BYTES = 8 << 20  # of a download
AT_ONCE, FILES_AT_ONCE = 8, 4
TIMEOUT_S = 60
WITHOUT_LISTS = ("http", "https")  # their files are asked for by name
DIGESTS = ("ETag", "etag", "generation", "md5Hash", "content_md5", "crc32c")
TIMES = ("LastModified", "last_modified", "Last-Modified", "updated", "mtime", "created")
T = TypeVar("T")
NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,99}", re.ASCII)


def filesystem(scheme: str) -> Any:
    """The driver of such addresses.  It asks once: who calls it tries again."""
    options: dict[str, Any] = {}
    if scheme == "s3":
        limits: dict[str, object] = {
            "retries": {"total_max_attempts": 1},
            "connect_timeout": 10,
            "read_timeout": TIMEOUT_S,
        }
        limits["request_checksum_calculation"] = "when_required"  # what is sent has its MD5 with it
        options = {"config_kwargs": limits, "use_listings_cache": False}
    elif scheme in WITHOUT_LISTS:
        options = {"headers": {"Accept-Encoding": "identity"}}
    made = fsspec.filesystem(scheme, **options)
    if scheme == "s3":
        made.retries = 1
    return made


@dataclass(frozen=True)
class Store:
    """A directory at an address without credentials.  `files`: those that may be needed, with what tells their
    version; `others`: names of the rest, where a list is to be had."""

    url: str
    files: dict[str, RemoteFile]
    others: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The model's name: the last part of the address."""
        last = self.url.rpartition("/")[2]
        return last if NAME.fullmatch(last) else "model"

    @cached_property
    def root(self) -> Path:
        """The directory of this machine for what has been copied of this version."""
        version = digest_of([self.url, *(f"{f.name} {f.size} {f.etag}" for f in self.files.values())])
        return cache() / "stores" / version.rpartition(":")[2][:16] / self.name

    def address(self, name: str) -> str:
        return f"{self.url}/{name}"

    def is_here(self, name: str) -> bool:
        """Whether the file is complete on this machine."""
        path = self.root / name
        return path.is_file() and path.stat().st_size == self.files[name].size

    def read(self, name: str, begin: int, end: int, cancelled: threading.Event) -> bytes:
        """Bytes [begin, end) of a file.  Raises MsconvError, Cancelled."""
        address = self.address(name)
        scheme = scheme_of(address)

        def ask() -> bytes:
            data = _range(filesystem(scheme), address, scheme, begin, end, self.files[name].size)
            if len(data) != end - begin:
                raise ShortRead(f"{len(data)} bytes came of {end - begin} at byte {begin}")
            return data

        return patiently(ask, address, cancelled)

    def current(self, name: str) -> RemoteFile:
        """The file as the store has it now.  Raises MsconvError."""
        address = self.address(name)

        def ask() -> RemoteFile:
            driver = filesystem(scheme_of(address))
            driver.invalidate_cache()
            return _remote_file(name, driver.info(address))

        return patiently(ask, address, threading.Event())

    def download(self, name: str, progress: Progress, cancelled: threading.Event) -> Path:
        """Bring one file here, or what is missing of it.  Raises MsconvError, Cancelled."""
        final, size = self.root / name, self.files[name].size
        if self.is_here(name):
            return final
        partial = final.with_name(f"{name}.incomplete")
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            with locked(final.with_name(f"{name}.lock"), cancelled):  # another command may bring the same file
                if self.is_here(name):
                    return final
                with partial.open("ab") as f:
                    while (begin := f.tell()) < size:
                        if cancelled.is_set():
                            raise Cancelled
                        f.write(self.read(name, begin, min(size, begin + RANGE_BYTES), cancelled))
                        progress(f.tell() - begin)
                partial.replace(final)
        except OSError as e:
            raise ResourceError(
                f"{e.filename or partial}: cannot be written: {e.strerror}.",
                "Point XDG_CACHE_HOME at a writable directory with enough room.",
            ) from None
        return final

    def download_small(self, names: Iterable[str]) -> None:
        """The files among these that the store has."""
        for name in names:
            if name in self.files:
                self.download(name, lambda n: None, threading.Event())

    def check_unchanged(self, names: Iterable[str]) -> None:
        """Raises CheckpointError if one of these files is another than was listed."""
        listed = None if scheme_of(self.url) in WITHOUT_LISTS else _listed(self.url).files
        for name in names:
            then = self.files[name]
            now = self.current(name) if listed is None else listed.get(name, RemoteFile(name, 0, "none"))
            if now != then:
                raise CheckpointError(
                    f"{self.address(name)}: changed while it was read (size {then.size} -> {now.size}, version "
                    f"{then.etag[:80]} -> {now.etag[:80]}).",
                    "Let the upload finish, then run the same command again.",
                )


def patiently(ask: Callable[[], T], address: str, cancelled: threading.Event, writing: bool = False) -> T:
    """What `ask` gives, asked again where that may help.  Raises MsconvError, Cancelled."""
    patience = Patience(cancelled)
    while True:
        try:
            return ask()
        except Exception as e:
            try:
                patience.wait(e)
            except Cancelled:
                raise
            except Exception:
                raise explain(e, address, writing) from None


def _range(driver: Any, address: str, scheme: str, begin: int, end: int, size: int) -> bytes:
    """One request.  A web server that ignores ranges is noticed before it sends a whole file."""
    if begin == end:
        return b""
    if scheme not in WITHOUT_LISTS:
        return bytes(driver.cat_file(address, start=begin, end=end))
    with driver.open(address, block_size=end - begin, cache_type="none", size=size) as f:
        f.seek(begin)
        return bytes(f.read(end - begin))


def _remote_file(name: str, info: Mapping[str, Any]) -> RemoteFile:
    size = info.get("size")
    if not isinstance(size, int) or size < 0:
        raise StoreError(f"{name}: the store does not say how large it is.", "Give a server that does.")
    etag = next((str(info[key]) for key in (*DIGESTS, *TIMES) if info.get(key)), "")
    return RemoteFile(name, size, etag)


def open_store(url: str) -> Store:
    """The files at an address, as they are now.  Raises StoreError, UsageError, CheckpointError."""
    store = _probed(url) if scheme_of(url) in WITHOUT_LISTS else _listed(url)
    if MANIFEST in store.others:
        raise UsageError(
            f"{url}: this is an msconv artifact, not a checkpoint.",
            "Convert from the original model; an artifact is used from a directory: download or mount it.",
        )
    if "config.json" not in store.files:
        if found := weightless((*store.files, *store.others)):
            raise UnsupportedCheckpoint(f"{url}: has no config.json; it has {found[0]}.", found[1])
        raise UsageError(
            f"{url}: has no config.json.", "Give the directory that holds config.json and *.safetensors."
        )
    return store


def _listed(url: str) -> Store:
    def ask() -> list[dict[str, Any]]:
        driver = filesystem(scheme_of(url))
        driver.invalidate_cache()
        found: list[dict[str, Any]] = driver.ls(url, detail=True)
        return found

    files: dict[str, RemoteFile] = {}
    others: list[str] = []
    for entry in patiently(ask, url, threading.Event()):
        name = str(entry["name"]).rstrip("/").rpartition("/")[2]
        if entry.get("type") == "file" and is_wanted(name):
            files[name] = _remote_file(name, entry)
        elif entry.get("type") == "file":
            others.append(name)
    return Store(url, files, tuple(others))


def _probed(url: str) -> Store:
    """Without a list: names that a checkpoint may have are asked for, then those in its index."""
    store = Store(url, {})
    files = _asked(store, ("config.json",))
    files |= _asked(store, (*AUXILIARY, *CONFIGURATION, INDEX, SINGLE), optional=True)
    found = replace(store, files=files)
    if INDEX in files:
        found.download_small([INDEX, "config.json"])
        files |= _asked(store, sorted(set(directory.read_index(found.root).values())))
    return Store(url, files)


def _asked(store: Store, names: Iterable[str], optional: bool = False) -> dict[str, RemoteFile]:
    def ask(name: str) -> RemoteFile | None:
        try:
            return store.current(name)
        except MsconvError:
            if not optional:  # a server may forbid what it does not have
                raise
            return None

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return {file.name: file for file in pool.map(ask, names) if file}


def open_configuration(store: Store, harmless: Iterable[str] = ()) -> Checkpoint:
    """Only config.json, copied here.  Raises as directory.open_configuration does, and StoreError."""
    store.download_small((*CONFIGURATION, directory.index_of(store.files, store.url)))
    return replace(directory.open_configuration(store.root, harmless), name=store.name)


def has_weights(store: Store) -> bool:
    """Whether there are safetensors, or an index that promises them."""
    return any(".safetensors" in name for name in store.files)


def open_checkpoint(store: Store, harmless: Iterable[str] = ()) -> Checkpoint:
    """Configuration and every header, by ranges.  Raises as directory.open_checkpoint does, and StoreError."""
    open_configuration(store, harmless)
    names = shards(store)
    cancelled = threading.Event()
    read = each(names, lambda name: _read_shard(store, name, cancelled), cancelled.set, AT_ONCE)
    remote = dict(zip(names, read, strict=True))
    listed = (*store.files, *store.others)
    return replace(directory.open_checkpoint(store.root, remote, harmless, listed), name=store.name)


def shards(store: Store) -> list[str]:
    """The weights' files: what the index names, or the only one.  Raises CheckpointError."""
    index = directory.read_index(store.root) if directory.index_of(store.files, store.url) else {}
    names = sorted(set(index.values())) or [SINGLE]
    missing = [n for n in names if n not in store.files]
    if not missing:
        return names
    if index:
        raise CheckpointError(
            f"{store.url}: has no {', '.join(missing[:5])}, named by {INDEX} ({len(missing)} files).",
            "Upload them too.",
        )
    if any(n.endswith(".safetensors") for n in store.files):
        raise CheckpointError(
            f"{store.url}: has safetensors files, and no {INDEX} to say which belong to the model.",
            f"Upload {INDEX} too.",
        )
    raise directory.without_weights(store.url, store.others)


def _read_shard(store: Store, name: str, cancelled: threading.Event) -> Shard:
    size, where = store.files[name].size, Path(store.root, name)
    data = store.read(name, 0, min(FIRST_RANGE, size), cancelled)
    try:
        end = PREFIX_BYTES + header_length(data[:PREFIX_BYTES], where, size)
        data = data[:end] + (store.read(name, len(data), end, cancelled) if end > len(data) else b"")
        infos, digest = parse_header(data, where, size)
    except CheckpointError as e:
        raise type(e)(e.message.replace(str(where), store.address(name)), "Upload this file again.") from None
    return ShardFile(where, size, 0, digest, store.files[name].etag), infos


def try_reading(store: Store, names: Iterable[str]) -> float:
    """Bytes a second, of one range of some of these files, several at a time.  Raises MsconvError."""
    started, cancelled = time.monotonic(), threading.Event()

    def one(name: str) -> int:
        return len(store.read(name, 0, min(RANGE_BYTES, store.files[name].size), cancelled))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return sum(pool.map(one, list(names)[:AT_ONCE])) / (time.monotonic() - started)


def bring(store: Store) -> Path:
    """The whole checkpoint as a directory of this machine.  Raises MsconvError."""
    index = directory.index_of(store.files, store.url)
    store.download_small((*AUXILIARY, *CONFIGURATION, index))
    names, cancelled = shards(store), threading.Event()
    need = sum(store.files[n].size for n in names if not store.is_here(n))
    free = shutil.disk_usage(store.root).free
    if need > free:
        raise ResourceError(
            f"{store.root}: not enough disk: {need:,} bytes of {store.url} are needed, {free:,} are free.",
            "Free that much, or point XDG_CACHE_HOME at a larger disk.",
        )
    each(names, lambda name: store.download(name, lambda n: None, cancelled), cancelled.set, FILES_AT_ONCE)
    store.check_unchanged(names)
    return store.root
