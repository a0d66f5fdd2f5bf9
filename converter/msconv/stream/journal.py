"""The journal: what is durably done, and for which plan.  One JSON line each; a torn last line is ignored."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import msgspec

from msconv_runtime.artifact import replace_file
from msconv_runtime.errors import PlanError

from ..workspace.names import JOURNAL
from ..workspace.state import Identity
from .transform import Moved


class _Line(msgspec.Struct, frozen=True):
    name: str
    source_digest: str
    parts: list[tuple[int, int, int, str]]


class Journal:
    """Open with `resume`: reads what is there, or begins anew."""

    def __init__(self, root: Path, identity: Identity) -> None:
        self.path = root / JOURNAL
        self.identity = identity
        self.done: dict[str, Moved] = {}
        self._fd = -1
        self._error: OSError | None = None

    @classmethod
    def resume(cls, root: Path, identity: Identity) -> Journal:
        """Raises PlanError if the directory holds half of another conversion."""
        journal = cls(root, identity)
        journal.path.parent.mkdir(parents=True, exist_ok=True)
        keep = b""
        if journal.path.exists():
            lines = journal.path.read_bytes().split(b"\n")
            keep = journal._load(lines)
        journal._begin(keep)
        return journal

    def restart(self) -> None:
        """Forget what was done."""
        self.done.clear()
        self._begin(b"")

    def _begin(self, lines: bytes) -> None:
        self.close()
        replace_file(self.path, lines or msgspec.json.encode(self.identity) + b"\n")
        self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def _load(self, lines: list[bytes]) -> bytes:
        try:
            found = msgspec.json.decode(lines[0], type=Identity)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return b""
        if different := found.differences(self.identity):
            raise PlanError(
                f"{self.path.parent.parent}: holds a half-done conversion of something else; changed since: "
                + "; ".join(different)
                + ".",
                "Run with --force to start over, or give another --output.",
            )
        good = [lines[0]]
        for line in lines[1:]:
            try:
                entry = msgspec.json.decode(line, type=_Line)
            except (msgspec.DecodeError, UnicodeDecodeError):
                break  # torn by a crash: what it described is simply done again
            parts = {(tensor, part, rank): digest for tensor, part, rank, digest in entry.parts}
            self.done[entry.name] = Moved(entry.name, entry.source_digest, parts)
            good.append(line)
        return b"\n".join(good) + b"\n"

    def append(self, moved: list[Moved]) -> None:
        """Record tensors whose bytes have been synced.  Durable on return.  Raises OSError, and then ever again:
        a sync that failed once says nothing about what was lost the next time."""
        if self._error:
            raise self._error
        if not moved:
            return
        lines = [
            msgspec.json.encode(_Line(m.name, m.source_digest, [(*key, d) for key, d in m.parts.items()]))
            for m in moved
        ]
        data = b"\n".join(lines) + b"\n"
        try:
            while data:
                data = data[os.write(self._fd, data) :]
            os.fdatasync(self._fd)
        except OSError as e:
            e.filename = str(self.path)
            self._error = e
            raise
        self.done.update({m.name: m for m in moved})

    def remove(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()
