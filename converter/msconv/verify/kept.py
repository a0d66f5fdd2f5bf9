"""What a proof has computed so far, kept for the same proof after a kill: tensors and numbers by name.

It lies in the user's private cache, never in an artifact, which may come from a stranger.  It holds for one
identity: digests of weights and graphs, versions, options, this code.  A file counts when its digest is in the
journal, which is written after it; anything else is as if it were not there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msconv_runtime.artifact import replace_file
from msconv_runtime.cache_directory import cache, private
from msconv_runtime.errors import ResourceError

JOURNAL = "journal.json"
INTERVAL_S = 20.0  # between states of the ranks, which replace each other


class Kept:
    """Values of one identity in a directory; none are kept where that is None.  `is_old`: an earlier run
    kept some."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory
        self._digests: dict[str, str] = {}
        self._saved_at = time.monotonic()
        if directory is not None:
            self._digests = _journal(directory)["files"]
        self.is_old = bool(self._digests)

    @property
    def is_there(self) -> bool:
        return self.directory is not None

    @property
    def is_due(self) -> bool:
        """Whether it is time for another state that can be made again."""
        return self.is_there and time.monotonic() - self._saved_at >= INTERVAL_S

    def save(self, name: str, tensors: dict[str, Any], numbers: Any = None) -> None:
        """Keep tensors by name, and what JSON can say.  Where there is no room, nothing is kept from now on."""
        from safetensors.torch import save

        if self.directory is None:
            return
        data = save(
            {k: v.detach().clone().contiguous() for k, v in tensors.items()}, {"numbers": json.dumps(numbers)}
        )
        try:
            replace_file(self.directory / f"{name}.safetensors", data)
            self._digests[name] = hashlib.sha256(data).hexdigest()
            text = json.dumps({**_journal(self.directory), "files": self._digests})
            replace_file(self.directory / JOURNAL, text.encode())
        except OSError:
            self.directory = None
        self._saved_at = time.monotonic()

    def load(self, name: str) -> tuple[dict[str, Any], Any] | None:
        """Tensors and numbers of that name, None if they are not there as they were written."""
        from safetensors import safe_open

        if self.directory is None or name not in self._digests:
            return None
        path = self.directory / f"{name}.safetensors"
        try:
            with path.open("rb") as f:
                found = hashlib.file_digest(f, "sha256").hexdigest()
            if found != self._digests[name]:
                return None
            with safe_open(path, framework="pt") as opened:
                names, numbers = list(opened.keys()), json.loads(opened.metadata()["numbers"])
                return {k: opened.get_tensor(k) for k in names}, numbers
        except OSError:
            return None


NOTHING = Kept()


@contextmanager
def keeping(root: Path, target: str, identity: dict[str, Any]) -> Iterator[Kept]:
    """What was kept of the proof with this identity; of another one of the same artifact and target it is thrown
    away.  All of it goes when the block ends without an exception.  Nothing is kept where there is no private
    directory or no room, or while another process proves the same."""
    try:
        name = hashlib.sha256(f"{root.resolve()}\0{target}".encode()).hexdigest()[:16]
        place = private(cache()) / "verify" / name
        place.mkdir(0o700, parents=True, exist_ok=True)
        fd = os.open(place / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except (OSError, ResourceError):
        yield NOTHING
        return
    try:
        wanted = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        values = place / "values"
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _journal(values).get("identity") != wanted:
                shutil.rmtree(values, ignore_errors=True)
                values.mkdir(0o700)
                replace_file(values / JOURNAL, json.dumps({"identity": wanted, "files": {}}).encode())
        except OSError:
            yield NOTHING
            return
        yield Kept(values)
        shutil.rmtree(place, ignore_errors=True)
    finally:
        os.close(fd)


def _journal(directory: Path) -> dict[str, Any]:
    try:
        found = json.loads((directory / JOURNAL).read_bytes())
    except (OSError, ValueError):
        found = {}
    return found if isinstance(found, dict) and isinstance(found.get("files"), dict) else {"files": {}}


def code_digest() -> str:
    """Of the sources of msconv that a proof runs."""
    import msconv
    import msconv_runtime

    digest = hashlib.sha256()
    for package in (msconv, msconv_runtime):
        assert package.__file__
        for path in sorted(Path(package.__file__).parent.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
