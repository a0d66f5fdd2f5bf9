"""Where a model is: a directory, a repository on a hub, or a directory of an object store.  Decided here, once:
all else asks the location."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from msconv_runtime.errors import UsageError

from .checkpoint import directory
from .checkpoint.client import require_client
from .checkpoint.directory import AUXILIARY, Checkpoint
from .checkpoint.hubs import REPOSITORY, Hub
from .checkpoint.remote import CONFIGURATION
from .checkpoint.urls import checked_url, is_url, require_driver
from .layout.plan import Plan
from .stream.source import DirectoryShards, SourceLocation
from .workspace.names import recordable

if TYPE_CHECKING:
    from .checkpoint.hub import Repository  # imported when there is one: the hub's client takes a while
    from .checkpoint.store import Store

HF = "hf://"


class Location(Protocol):
    """A place that a checkpoint, or its configuration alone, is read from."""

    def has_weights(self) -> bool:
        """Whether there are weights, or an index that promises them."""

    def open_configuration(self, harmless: Collection[str] = ()) -> Checkpoint:
        """Only config.json: enough to plan and to compile.  `harmless`: keys of it, on no list, that a person says
        change nothing.  Raises MsconvError."""

    def open_checkpoint(self, harmless: Collection[str] = ()) -> Checkpoint:
        """Configuration and the headers of all shards.  Raises MsconvError."""

    def bring_small(self) -> None:
        """Configuration and tokenizer are on this machine on return."""

    def bring(self) -> Path:
        """The whole checkpoint as a directory: downloaded, if it is not."""

    def missing_bytes(self, shards: Iterable[str]) -> int:
        """Bytes of these files that are not on this machine yet."""

    @property
    def is_kept(self) -> bool:
        """Whether what comes from elsewhere stays on this machine."""
        return True

    def try_coming(self, shards: Iterable[str]) -> float:
        """How many bytes of these files, that are not on this machine, come in a second: some are asked for and
        thrown away.  0 if none has to come.  Raises MsconvError."""
        return 0.0

    @property
    def buffered_bytes(self) -> int:
        """Memory that reading takes besides a worker's buffers."""
        return 0

    def origin(self) -> str:
        """What an artifact records of it.  Raises UsageError if that cannot be recorded."""

    def deleting_into(self, downloads: Path) -> Location:
        """The same, but shards go to `downloads` and are deleted from there as they have been read.
        Raises UsageError if they are not ours to delete."""

    def shards(self, checkpoint: Checkpoint) -> SourceLocation:
        """Where the tensors of this checkpoint are read from: a value."""


@dataclass(frozen=True)
class LocalDirectory(Location):
    """A directory on this machine."""

    root: Path

    def has_weights(self) -> bool:
        return directory.has_weights(self.root)

    def open_configuration(self, harmless: Collection[str] = ()) -> Checkpoint:
        return directory.open_configuration(self.root, harmless)

    def open_checkpoint(self, harmless: Collection[str] = ()) -> Checkpoint:
        return directory.open_checkpoint(self.root, harmless=harmless)

    def bring_small(self) -> None:
        """They are here."""

    def bring(self) -> Path:
        return self.root

    def missing_bytes(self, shards: Iterable[str]) -> int:
        return 0

    def origin(self) -> str:
        return recordable(self.root)

    def deleting_into(self, downloads: Path) -> Location:
        raise UsageError(
            f"{self.root}: is a directory; --delete-source-as-you-go deletes only what a conversion downloads "
            "itself.",
            "Leave the flag out, or give owner/name on Hugging Face.",
        )

    def shards(self, checkpoint: Checkpoint) -> SourceLocation:
        return DirectoryShards(checkpoint.files)


@dataclass(frozen=True)
class HubRepository(Location):
    """owner/name at a commit."""

    repository: Repository

    def has_weights(self) -> bool:
        from .checkpoint import hub

        return hub.has_weights(self.repository)

    def open_configuration(self, harmless: Collection[str] = ()) -> Checkpoint:
        from .checkpoint import hub

        return hub.open_configuration(self.repository, harmless)

    def open_checkpoint(self, harmless: Collection[str] = ()) -> Checkpoint:
        from .checkpoint import hub

        return hub.open_checkpoint(self.repository, harmless)

    def bring_small(self) -> None:
        self.repository.download_small(AUXILIARY)

    def bring(self) -> Path:
        from .checkpoint import hub
        from .checkpoint.downloads import bring

        index = directory.index_of(self.repository.files, self.repository.reference)
        self.repository.download_small((*AUXILIARY, *CONFIGURATION, index))
        bring(self.repository, hub.shards(self.repository))
        return self.repository.root

    def missing_bytes(self, shards: Iterable[str]) -> int:
        return self.repository.missing_bytes(shards)

    def try_coming(self, shards: Iterable[str]) -> float:
        from .checkpoint.downloads import try_downloads

        return try_downloads(self.repository, shards)

    def origin(self) -> str:
        return self.repository.reference

    def deleting_into(self, downloads: Path) -> Location:
        return HubRepository(replace(self.repository, own=downloads))

    def shards(self, checkpoint: Checkpoint) -> SourceLocation:
        from .stream.hub_source import HubShards

        return HubShards(self.repository, checkpoint.files, checkpoint.tensors)


@dataclass(frozen=True)
class StoreDirectory(Location):
    """A directory of an object store or a web server: weights are read where they are, and not kept."""

    store: Store

    def has_weights(self) -> bool:
        from .checkpoint import store

        return store.has_weights(self.store)

    def open_configuration(self, harmless: Collection[str] = ()) -> Checkpoint:
        from .checkpoint import store

        return store.open_configuration(self.store, harmless)

    def open_checkpoint(self, harmless: Collection[str] = ()) -> Checkpoint:
        from .checkpoint import store

        return store.open_checkpoint(self.store, harmless)

    def bring_small(self) -> None:
        self.store.download_small(AUXILIARY)

    def bring(self) -> Path:
        from .checkpoint import store

        return store.bring(self.store)

    def missing_bytes(self, shards: Iterable[str]) -> int:
        return 0  # none will be kept here

    @property
    def is_kept(self) -> bool:
        return False

    def try_coming(self, shards: Iterable[str]) -> float:
        from .checkpoint import store

        return store.try_reading(self.store, shards)

    @property
    def buffered_bytes(self) -> int:
        from .stream.store_source import BUFFERED_BYTES

        return BUFFERED_BYTES

    def origin(self) -> str:
        return self.store.url

    def deleting_into(self, downloads: Path) -> Location:
        raise UsageError(
            f"{self.store.url}: is read where it is: nothing is downloaded that --delete-source-as-you-go could "
            "delete.",
            "Leave the flag out.",
        )

    def shards(self, checkpoint: Checkpoint) -> SourceLocation:
        from .stream.store_source import StoreShards

        return StoreShards(self.store, checkpoint.files)


def bytes_to_download(location: Location, plan: Plan) -> int:
    """Bytes of the shards that a conversion reads and that are not on this machine yet."""
    return location.missing_bytes({plan.sources[n].file for n in plan.read_names})


def open_reference(ref: str, hub: Hub = "huggingface", weights: bool = True) -> Location:
    """A directory, if there is one of this name; else the address of one in a store, or the repository
    owner/name[@revision] as its commit is now, which may be written hf://owner/name too.

    `weights`: they will be needed (ModelScope's client brings them at once).
    Raises MsconvError; a string that can be neither is taken for a directory.
    """
    path = Path(ref)
    if is_url(ref) and not _exists(path):
        if not ref.startswith(HF):
            url = checked_url(ref)
            require_driver(url)
            from .checkpoint.store import open_store

            return StoreDirectory(open_store(url))
        ref, path = ref.removeprefix(HF), Path(HF)
        if REPOSITORY.fullmatch(ref) is None:
            raise UsageError(f"{HF}{ref[:300]}: is no name of a model.", f"Give {HF}owner/name[@revision].")
    match = REPOSITORY.fullmatch(ref)
    if match is None or _exists(path):
        return LocalDirectory(path)
    name, revision = match[1], match[2] or ""
    require_client(f"{ref}: no such directory here", ", or give the directory of a checkpoint that is here")
    if hub == "modelscope":
        from .checkpoint.modelscope import download

        return LocalDirectory(download(name, revision, weights))
    from .checkpoint.hub import open_repository

    return HubRepository(open_repository(name, revision))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return True
