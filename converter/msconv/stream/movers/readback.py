"""Reading back what other machines wrote, before the journal speaks of it.

Files are opened anew: on NFS that is when this machine learns what others have written and closed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import xxhash

from msconv_runtime.errors import ResourceError

from ...layout.plan import Plan
from ..outputs import RankFiles
from ..transform import Moved

BLOCK_BYTES = 4 << 20


def check_written(files: RankFiles, plan: Plan, moved: Iterable[Moved], writer: str) -> None:
    """Hold sizes and digests of all that was moved against the files.  Raises ResourceError."""
    fds: dict[tuple[int, int], int] = {}
    block = memoryview(bytearray(BLOCK_BYTES))
    try:
        for (tensor, part, rank), digest in (item for m in moved for item in m.parts.items()):
            entry = plan.tensors[tensor]
            key = rank, entry.file
            if key not in fds:
                fds[key] = _open(files, plan, *key)
            offset = len(plan.files[entry.file].header) + entry.begin + sum(entry.parts[:part])
            if _digest(fds[key], offset, entry.parts[part], block) != digest:
                raise ResourceError(
                    f"{files.temporary(*key)}: {entry.name}: this machine reads other bytes at {offset:,} than "
                    f"{writer} wrote.",
                    "The storage does not show what another machine has written and closed: mount it alike "
                    "everywhere, without caching of its own; then run the same command again.",
                )
    except OSError as e:
        raise ResourceError(
            f"{files.root}: what {writer} wrote cannot be read back: {e.strerror}.",
            "Run the same command again: it resumes.",
        ) from None
    finally:
        for fd in fds.values():
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def _open(files: RankFiles, plan: Plan, rank: int, i: int) -> int:
    path, size = files.temporary(rank, i), plan.files[i].size
    fd = os.open(path, os.O_RDONLY)
    if (found := os.fstat(fd).st_size) == size:
        return fd
    os.close(fd)
    raise ResourceError(
        f"{path}: has {found:,} bytes, not {size:,}: something else wrote there.",
        "End what else uses this directory, then run the same command again with --force.",
    )


def _digest(fd: int, offset: int, nbytes: int, block: memoryview) -> str:
    hasher, done = xxhash.xxh3_128(), 0
    while done < nbytes:
        n = os.preadv(fd, [block[: min(len(block), nbytes - done)]], offset + done)
        if not n:
            break
        hasher.update(block[:n])
        done += n
    return "xxh3:" + hasher.hexdigest()
