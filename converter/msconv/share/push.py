"""An artifact to a repository of a hub, by huggingface_hub: weights in several commits, all else with READY in the
last one, so that no commit holds half an artifact that claims to be whole.

What the hub has already, committed or not, is not uploaded again; the state directory never is.
"""

from __future__ import annotations

import io
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils._runtime import is_xet_available

from msconv_runtime.artifact import MANIFEST, READY, SIGNATURE, Manifest, digest_bytes
from msconv_runtime.errors import ArtifactError, MsconvError, UsageError

from ..checkpoint.concurrency import each
from ..checkpoint.http import http
from ..checkpoint.hub import Repository, resolve
from ..checkpoint.hub_errors import HubError, explain
from ..checkpoint.remote import Cancelled, Progress
from ..checkpoint.transfer import Patience, read_range
from ..layout.names import shorten
from ..workspace.names import REPORT
from .card import MARK, card
from .parts import CARD, NAMES, Sum, has_digest, is_part, parts, split_reference

AT_ONCE = 4
FILES_A_COMMIT = 16  # of weights: what was uploaded and not committed, a hub deletes after a while
HARMLESS = (".gitattributes", ".gitignore", CARD, "LICENSE", "LICENSE.md", "LICENSE.txt")
CARD_BYTES = 1 << 20  # that are searched for our mark
T = TypeVar("T")


@dataclass(frozen=True)
class Pushed:
    """What a push did.  `bytes_uploaded`: by this run; `files`: of the artifact.
    `kept_card`: there is a README.md that msconv did not write, and it was left as it is."""

    artifact: Path
    repository: str
    commit: str
    bytes_uploaded: int
    files: int
    seconds: float
    kept_card: bool


def target(to: str) -> str:
    """owner/name, as --to has it.  Raises UsageError."""
    name, revision = split_reference(to)
    if revision:
        raise UsageError(f"{to}: names a revision.", f"Give --to {name} --revision {revision}.")
    return name


def push(
    root: Path,
    manifest: Manifest,
    name: str,
    revision: str = "",
    private: bool = False,
    progress: Progress = lambda n: None,
) -> Pushed:
    """Upload a checked artifact to owner/name, which is created if need be.  `revision`: a branch, likewise.
    `progress` gets the bytes that go.  Raises MsconvError; what was uploaded is kept."""
    started = time.monotonic()
    if constants.is_offline_mode():
        raise explain(OfflineModeIsEnabled(), name, purpose="push")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what it would warn of, we say ourselves
    disable_progress_bars()
    names = list(parts(manifest))
    weights = [n for n in names if n.startswith("weights/")]
    graphs = [n for n in names if n not in weights]
    try:
        repository = _open(name, revision, private)
        upload = _Upload(root, repository, revision or constants.DEFAULT_REVISION, progress)
        keeps_card = _has_foreign_card(repository)
        beside = [n for n in (*NAMES, REPORT) if n not in (MANIFEST, READY) and (root / n).is_file()]
        data = (root / MANIFEST).read_bytes()
        contents: dict[str, Path | bytes] = {n: root / n for n in (*graphs, *beside)}
        if not keeps_card:
            contents[CARD] = card(name, revision, manifest).encode()
        contents |= {MANIFEST: data, READY: f"{digest_bytes(data)}\n".encode()}
        stale = [n for n in repository.files if is_part(n) and n not in names]
        stale += [n for n in repository.files if n == SIGNATURE and n not in contents]
        commit = upload.run(weights, contents, stale)
    except (MsconvError, Cancelled):
        raise
    except Exception as e:
        raise _explained(e, name) from e
    files = len(weights) + len(contents)
    return Pushed(root, name, commit, upload.sent.total, files, time.monotonic() - started, keeps_card)


def _open(name: str, revision: str, private: bool) -> Repository:
    """The branch as it is, made if it is not there.  Refuses what holds something else than an artifact."""
    api = HfApi()
    _patiently(lambda: api.create_repo(name, private=private or None, exist_ok=True))
    if revision:
        _patiently(lambda: api.create_branch(name, branch=revision, exist_ok=True))
    repository = resolve(name, revision, lambda n: True, "push")
    others = [n for n in repository.files if n not in HARMLESS]
    if others and not any(n == MANIFEST or is_part(n) for n in others):
        raise UsageError(
            f"{name}: holds something else than an artifact ({', '.join(map(shorten, others[:5]))}); "
            "nothing was uploaded.",
            "Give a new name with --to.",
        )
    return repository


def _has_foreign_card(repository: Repository) -> bool:
    file = repository.files.get(CARD)
    if file is None or file.size == 0:
        return False
    text = read_range(repository.url(CARD), 0, min(file.size, CARD_BYTES), threading.Event())
    return MARK.encode() not in text


class _Upload:
    """Commits to one branch.  `sent` counts the bytes that went."""

    def __init__(self, root: Path, repository: Repository, branch: str, progress: Progress) -> None:
        self.root, self.repository, self.branch = root, repository, branch
        self.sent = Sum(progress)
        self._api = HfApi()
        self._cancelled = threading.Event()

    def run(self, weights: list[str], contents: dict[str, Path | bytes], stale: list[str]) -> str:
        """Weights, then the rest; the commit that has all.  While weights change there is no READY."""
        remote = self.repository.files
        missing = [n for n in weights if not self._has(n, self.root / n)]
        unready: list[Any] = [CommitOperationDelete(READY)] if missing and READY in remote else []
        for i in range(0, len(missing), FILES_A_COMMIT):
            names = missing[i : i + FILES_A_COMMIT]
            group = [_Counted(n, self.root / n, self.sent, self._cancelled) for n in names]
            self._send(group)
            self._commit([*unready, *group], f"Weights, {i + len(names)} of {len(missing)} files")
            unready = []
        changed = {n: c for n, c in contents.items() if not self._has(n, c) or (n == READY and missing)}
        last: list[Any] = [CommitOperationAdd(n, c) for n, c in changed.items()]
        if not last and not stale:
            return self.repository.commit
        commit = self._commit([*(CommitOperationDelete(n) for n in stale), *last], "An artifact of msconv")
        self.sent.add(sum(op.upload_info.size for op in last))
        return commit

    def _has(self, name: str, content: Path | bytes) -> bool:
        """Whether the branch has these bytes."""
        file = self.repository.files.get(name)
        return file is not None and has_digest(content, file)

    def _send(self, group: list[_Counted]) -> None:
        """Their bytes, without a commit.  An interruption ends within some bytes."""
        if is_xet_available():  # has threads of its own, and sends only what is new
            self._api.preupload_lfs_files(self.repository.name, group, revision=self.branch)
            self.sent.add(sum(op.upload_info.size for op in group))
            return
        each(group, self._send_one, self._cancelled.set, AT_ONCE)

    def _send_one(self, op: _Counted) -> None:
        try:
            self._api.preupload_lfs_files(self.repository.name, [op], revision=self.branch, num_threads=1)
        except Exception as e:
            raise _explained(e, self.repository.name, op.path_in_repo) from e

    def _commit(self, operations: list[Any], message: str) -> str:
        name, branch = self.repository.name, self.branch
        done = _patiently(
            lambda: self._api.create_commit(name, operations, commit_message=message, revision=branch)
        )
        return str(done.oid)


class _Counted(CommitOperationAdd):
    """A file whose bytes are counted as they go."""

    def __init__(self, name: str, path: Path, sent: Sum, cancelled: threading.Event) -> None:
        super().__init__(name, str(path))
        self._sent, self._cancelled = sent, cancelled

    @contextmanager
    def as_file(self, with_tqdm: bool = False) -> Iterator[BinaryIO]:
        with _CountingFile(str(self.path_or_fileobj), self._sent, self._cancelled) as f:
            yield f


class _CountingFile(io.FileIO):
    def __init__(self, path: str, sent: Sum, cancelled: threading.Event) -> None:
        super().__init__(path)
        self._sent, self._cancelled = sent, cancelled

    def read(self, size: int | None = -1, /) -> bytes:
        if self._cancelled.is_set():
            raise Cancelled
        data = super().read(-1 if size is None else size) or b""
        self._sent.add(len(data))
        return data


def _patiently(call: Callable[[], T]) -> T:
    patience = Patience(threading.Event())
    while True:
        try:
            return call()
        except Exception as e:
            patience.wait(e)


def _explained(error: Exception, name: str, what: str = "") -> Exception:
    """In words; huggingface_hub wraps what happens to a file in a RuntimeError."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, Cancelled):
        return error
    if isinstance(error, OSError) and not isinstance(error, http.HTTPError | ConnectionError):
        return ArtifactError(f"{error.filename or what}: cannot be read: {error.strerror}.")
    if isinstance(error, KeyError | TypeError) or type(error) is ValueError:
        said = f"{name}: {constants.ENDPOINT} refuses the upload, or does not answer as a hub does"
        return HubError(f"{said}: {str(error)[:300]}.", "Check HF_ENDPOINT.")
    return explain(error, name, what, "push")
