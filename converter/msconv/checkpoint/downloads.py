"""Several files of a repository at a time, in the order in which they will be read; who needs one waits for it."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from msconv_runtime.errors import ResourceError

from .hub import Repository
from .hub_errors import RESUMES, explain
from .remote import Cancelled, Progress
from .transfer import try_range

AT_ONCE = 4
TRIED_S = 1.0  # in which a download is tried
KEPT = 6  # of files that are deleted after use: how many may be here, whole or in part


def try_downloads(repository: Repository, names: Iterable[str]) -> float:
    """Bytes a second, of the beginnings of files that are not here, as many at a time as a download takes.  0 if
    all are here.  Raises HubError."""
    chosen = [n for n in names if not repository.is_here(n)][:AT_ONCE]
    if not chosen:
        return 0.0
    repository.cache.mkdir(parents=True, exist_ok=True)

    def one(name: str) -> float:
        try:
            return try_range(repository.url(name), repository.files[name], repository.cache, TRIED_S)
        except Exception as e:
            raise explain(e, repository.reference, name) from e

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return sum(pool.map(one, chosen))


class Downloads:
    """Threads that download; they end with `stop`, or with the first error, which every `wait` then raises."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self._changed = threading.Condition()
        self._cancelled = threading.Event()
        self._queue: list[str] = []
        self._asked: set[str] = set()
        self._landed: dict[str, Path] = {}
        self._deleted = 0
        self._wanted: Counter[str] = Counter()
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []

    def expect(self, names: Iterable[str], progress: Progress) -> None:
        """These files will be needed, in this order.  Raises ResourceError if they find no room."""
        new = [n for n in dict.fromkeys(names) if n not in self._asked]
        self._check_room(new)
        with self._changed:
            self._asked.update(new)
            self._queue += new
            for _ in range(min(AT_ONCE - len(self._threads), len(new))):
                thread = threading.Thread(target=self._work, args=(progress,), name="download", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._changed.notify_all()

    def wait(self, name: str) -> Path:
        """Where the file is, once it is whole and its digest right.  Raises what went wrong with any file, or
        Cancelled."""
        with self._changed:
            self._wanted[name] += 1
            if name in self._queue:  # sooner than was expected
                self._queue.remove(name)
                self._queue.insert(0, name)
            self._changed.notify_all()
            self._changed.wait_for(lambda: name in self._landed or self._cancelled.is_set())
            self._wanted[name] -= 1
            if name in self._landed:
                return self._landed[name]
            raise self._error or Cancelled

    def delete(self, name: str) -> None:
        """Delete a file that is not needed again and whose place is our own."""
        with self._changed:
            self._landed.pop(name).unlink(missing_ok=True)
            self._deleted += 1
            self._changed.notify_all()

    def cancel(self) -> None:
        """Whoever waits stops waiting; threads end with the next bytes."""
        self._cancelled.set()
        with self._changed:
            self._changed.notify_all()

    def stop(self) -> None:
        """Wait until no thread is left: at once, or when a silent server runs into its timeout."""
        self.cancel()
        for thread in self._threads:
            thread.join()

    def _work(self, progress: Progress) -> None:
        try:
            while True:
                name = self._next()
                path = self.repository.download(name, progress, self._cancelled)
                with self._changed:
                    self._landed[name] = path
                    self._changed.notify_all()
        except Cancelled:
            return
        except BaseException as e:
            with self._changed:
                self._error = self._error or e
            self.cancel()

    def _next(self) -> str:
        with self._changed:
            self._changed.wait_for(lambda: self._cancelled.is_set() or self._has_room())
            if self._cancelled.is_set():
                raise Cancelled
            return self._queue.pop(0)

    def _has_room(self) -> bool:
        """Whether there is a next file and it may come: of those that will be deleted only a few, or one that is
        waited for."""
        if not self._queue:
            return False
        begun = len(self._asked) - len(self._queue) - self._deleted
        return self.repository.own is None or begun < KEPT or self._wanted[self._queue[0]] > 0

    def _check_room(self, names: list[str]) -> None:
        repository = self.repository
        need = repository.missing_bytes(names)
        if repository.own:
            sizes = sorted((repository.files[n].size for n in names), reverse=True)
            need = min(need, sum(sizes[:KEPT]))
        place = repository.own or repository.cache
        place.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(place).free
        if need > free:
            raise ResourceError(
                f"{place}: not enough disk for the download: {need:,} bytes are still needed, {free:,} are free, "
                f"{need - free:,} are missing.",
                "Free that much, point HF_HOME at a larger disk, or use --delete-source-as-you-go.  " + RESUMES,
            )


def bring(repository: Repository, names: list[str]) -> None:
    """These files are on this machine on return.  Raises MsconvError."""
    downloads = Downloads(repository)
    try:
        downloads.expect(names, lambda n: None)
        for name in names:
            downloads.wait(name)
    finally:
        downloads.stop()
