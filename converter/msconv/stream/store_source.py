"""Reading source tensors out of an object store: blocks of a file, a few ahead, in a bounded number of them.

Nothing is kept on this machine.  A read waits for its blocks, which threads of their own fetch, so that a signal
need not wait for a server.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from ..checkpoint.directory import ShardFile
from ..checkpoint.remote import Cancelled
from ..checkpoint.store import Store
from ..layout.model import TensorInfo
from .source import Source, SourceLocation
from .transform import Stopped

BLOCK_BYTES = 4 << 20
MOST_BLOCKS = 12  # here at a time, whole or on their way
AHEAD = 3  # blocks of the same file that are asked for before they are read
THREADS = 6
DRIVER_BYTES = 64 << 20  # a driver, its libraries and connections: 51 MB measured with s3fs
BUFFERED_BYTES = 2 * MOST_BLOCKS * BLOCK_BYTES + DRIVER_BYTES  # twice: a block is copied as it comes

Key = tuple[str, int]  # file, number of the block


@dataclass(frozen=True)
class StoreShards(SourceLocation):
    """The shards of a checkpoint in a store."""

    store: Store
    files: Mapping[str, ShardFile]

    def open(self) -> Source:
        return StoreSource(self)


class StoreSource(Source):
    """Blocks of shards, the ones used last."""

    def __init__(self, shards: StoreShards) -> None:
        self._store, self._files = shards.store, shards.files
        self._changed = threading.Condition()
        self._cancelled = threading.Event()
        self._blocks: OrderedDict[Key, bytes | None] = OrderedDict()  # None: on its way
        self._wanted = Counter[Key]()  # by how many that wait for it now
        self._used = set[Key]()
        self._queue: list[Key] = []
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []

    def read(self, info: TensorInfo, begin: int, out: memoryview) -> None:
        done, at = 0, info.offset + begin
        while done < len(out):
            number, skip = divmod(at + done, BLOCK_BYTES)
            block = self._take((info.file, number))
            piece = memoryview(block)[skip : skip + len(out) - done]
            out[done : done + len(piece)] = piece
            done += len(piece)

    def release(self, info: TensorInfo) -> None:
        """Blocks leave as others come."""

    def interrupt(self) -> None:
        with self._changed:
            self._cancelled.set()
            self._changed.notify_all()

    def check_unchanged(self) -> None:
        self._store.check_unchanged(self._files)

    def elsewhere(self) -> SourceLocation:
        return StoreShards(self._store, self._files)

    def close(self) -> None:
        self.interrupt()

    def _take(self, key: Key) -> bytes:
        with self._changed:
            self._wanted[key] += 1
            try:
                while True:
                    if self._error:
                        raise self._error
                    if self._cancelled.is_set():
                        raise Stopped
                    self._ask(key)
                    block = self._blocks.get(key)
                    if block is not None:
                        self._blocks.move_to_end(key)
                        self._used.add(key)
                        return block
                    self._changed.wait()
            finally:
                self._wanted[key] -= 1

    def _ask(self, key: Key) -> None:
        """Have a block fetched if it is not here, and those after it while there is room."""
        name, number = key
        last = (self._files[name].size - 1) // BLOCK_BYTES
        for n in range(number, min(number + AHEAD, last) + 1):
            if (name, n) in self._blocks:
                continue
            if not self._has_room(for_one_ahead=n > number):
                return  # a block that somebody waits for will come first
            self._blocks[name, n] = None
            self._queue.insert(0 if n == number else len(self._queue), (name, n))
            if len(self._threads) < THREADS:
                thread = threading.Thread(target=self._work, name="store", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._changed.notify_all()

    def _has_room(self, for_one_ahead: bool) -> bool:
        """Whether another block may come, in the place of the one that was used longest ago if need be."""
        if len(self._blocks) < MOST_BLOCKS:
            return True
        free = [k for k, block in self._blocks.items() if block is not None and not self._wanted[k]]
        used = [k for k in free if k in self._used]
        if not used and (for_one_ahead or not free):
            return False
        old = (used or free)[0]
        del self._blocks[old]
        self._used.discard(old)
        return True

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._cancelled.is_set() or self._error)
                if self._cancelled.is_set() or self._error:
                    return
                key = self._queue.pop(0)
            name, begin = key[0], key[1] * BLOCK_BYTES
            try:
                data = self._store.read(
                    name, begin, min(begin + BLOCK_BYTES, self._files[name].size), self._cancelled
                )
            except Cancelled:
                return
            except BaseException as e:
                with self._changed:
                    self._error = self._error or e
                    self._changed.notify_all()
                return
            with self._changed:
                self._blocks[key] = data
                self._changed.notify_all()
