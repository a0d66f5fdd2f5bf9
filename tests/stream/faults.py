"""Runs msconv in this process and lets something happen to it at a chosen system call.

`python faults.py SPEC ARGS...` runs one command with one fault; `python faults.py --sweep SPEC ARGS...` runs it
once for every step it takes, and again after each, in forked processes: real ones, killed for real.
Steps are the calls that change the disk.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import shutil
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

SYNCING = ("fsync", "fdatasync")
WRITING = ("mkdir", "posix_fallocate", "pwrite", "write", *SYNCING, "replace", "unlink")
READING = ("preadv",)
LOCKING = ("flock",)
ON_FD = ("posix_fallocate", "pwrite", "write", *SYNCING, *READING, *LOCKING)


@dataclass(frozen=True)
class Fault:
    """What happens before the `at`-th step (counted from 1) among the calls in `of` whose path has `path` in it.

    `do`: `kill`; `cut` (the power goes: what was not synced is garbage, then kill); a signal's name, which comes
    `times` steps in a row; an errno's name, raised from then on; `lose` (a sync fails with EIO, this once, and
    what was not synced of its file is garbage: so does Linux); `truncate`, `touch`, `rewrite`, `swap` or `unlink`
    of the file `target`; `sleep` for some `seconds`; or nothing.
    """

    do: str = ""
    at: int = 0
    of: tuple[str, ...] = WRITING
    path: str = ""
    directories: bool = False  # only where the path is that of a directory
    target: str = ""
    times: int = 1
    seconds: float = 60
    capacity: int = 0  # of a disk that ends at the directory `target`, in bytes
    durable_every: int = 1  # bytes read between two durable points
    report: str = ""  # a file that gets the name of every step

    def text(self) -> str:
        return json.dumps(asdict(self))


@dataclass
class Steps:
    """The calls of `os`, wrapped.  Threads may call them at once."""

    fault: Fault
    names: list[str] = field(default_factory=list)
    unsynced: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # by inode
    held: dict[int, int] = field(default_factory=dict)  # a descriptor of our own: files are closed and renamed
    calls: dict[str, Callable[..., Any]] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.RLock)

    def install(self) -> None:
        for name in WRITING + READING + LOCKING:
            module = fcntl if name in LOCKING else os
            self.calls[name] = getattr(module, name)
            setattr(module, name, self._wrap(name, self.calls[name]))
        if self.fault.capacity:
            usage = shutil.disk_usage
            setattr(shutil, "disk_usage", lambda p: usage(p)._replace(free=self._room()))  # noqa: B010

    def _wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            at = 1 if name == "replace" else 0
            where = str(Path(f"/proc/self/fd/{args[0]}").readlink() if name in ON_FD else args[at])
            with self.lock:
                file = os.fstat(args[0]) if name in ON_FD else None
                if name in self.fault.of and self.fault.path in where and self._is_kind(file):
                    self.names.append(f"{name} {Path(where).name}")
                    self._act(file)
                if self.fault.capacity:
                    self._limit(name, args)
                if file and name in ("pwrite", "write"):
                    if file.st_ino not in self.held:
                        self.held[file.st_ino] = os.dup(args[0])
                    begin = args[2] if name == "pwrite" else file.st_size
                    self.unsynced.setdefault(file.st_ino, []).append((begin, len(args[1])))
                before = 0
                if file and name in SYNCING:
                    before = len(self.unsynced.get(file.st_ino, ()))
            done = call(*args, **kwargs)
            if file and before:
                with self.lock:
                    del self.unsynced[file.st_ino][:before]
            return done

        return wrapped

    def _is_kind(self, file: os.stat_result | None) -> bool:
        return not self.fault.directories or (file is not None and stat.S_ISDIR(file.st_mode))

    def _act(self, file: os.stat_result | None) -> None:
        fault, step = self.fault, len(self.names)
        first = step == fault.at
        if fault.do == "lose" and first:
            assert file is not None
            self._lose_unsynced(file.st_ino)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if fault.do.startswith("E") and step >= fault.at:
            number = getattr(errno, fault.do)
            raise OSError(number, os.strerror(number))
        if fault.do.startswith("SIG") and fault.at <= step < fault.at + fault.times:
            os.kill(os.getpid(), getattr(signal, fault.do))
        if fault.do == "sleep" and first:
            print("sleeping", flush=True)
            time.sleep(fault.seconds)
        if fault.do in ("kill", "cut") and first:
            if fault.do == "cut":
                for inode in list(self.unsynced):
                    self._lose_unsynced(inode)
            os.kill(os.getpid(), signal.SIGKILL)
        if fault.target and first and not fault.capacity:
            _change(Path(fault.target), fault.do)

    def _lose_unsynced(self, inode: int) -> None:
        for begin, size in self.unsynced.pop(inode, ()):
            fd = self.held[inode]
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND:  # torn somewhere
                os.ftruncate(fd, random.randint(begin, begin + size))
                break
            self.calls["pwrite"](fd, b"\xa5" * size, begin)

    def _room(self) -> int:
        used = sum(p.stat().st_blocks * 512 for p in Path(self.fault.target).rglob("*"))
        return max(0, self.fault.capacity - used)

    def _limit(self, name: str, args: Sequence[Any]) -> None:
        room = self._room()
        if name == "posix_fallocate":
            full = args[2] - os.fstat(args[0]).st_blocks * 512 > room
        else:
            full = name in ("mkdir", "write", "fsync") and room == 0
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _change(path: Path, how: str) -> None:
    if how == "truncate":
        with path.open("r+b") as f:
            f.truncate(path.stat().st_size // 3)
    elif how == "touch":
        path.touch()
    elif how == "rewrite":
        with path.open("r+b") as f:
            f.seek(-1, os.SEEK_END)
            f.write(b"\xff")
    elif how == "swap":
        copy = path.with_name("copy")
        shutil.copyfile(path, copy)
        copy.rename(path)
    elif how == "unlink":
        path.unlink()
    else:
        raise ValueError(how)


def run(fault: Fault, arguments: list[str]) -> int:
    """The command, with the fault.  Its exit code."""
    import msconv.steps.convert
    import msconv.stream.execute
    from msconv.cli import main

    msconv.stream.execute.CHECKPOINT_BYTES = fault.durable_every
    steps = Steps(fault)
    steps.install()
    sys.argv = ["msconv", *arguments]
    try:
        main()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    sys.stdout.flush()
    if fault.report:
        Path(fault.report).write_text("\n".join(steps.names))
    return code


def fork(fault: Fault, arguments: list[str], log: Path) -> int:
    """`run` in a process of its own.  Its exit code, or minus the signal that ended it."""
    pid = os.fork()
    if not pid:
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        code = 99
        try:
            code = run(fault, arguments)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def sweep(
    do: str,
    times: int,
    begin: str,
    durable_every: int,
    seed: int,
    root: Path,
    jobs: Sequence[int],
    arguments: list[str],
    most: int = 0,
) -> dict[str, Any]:
    """Let `do` happen at every step of a command that writes into `root`, or at `most` of them, evenly spread, and
    in half of the cases once more while the next run resumes.  The command finds, as `begin` says, `nothing`, `the
    last step undone`, `a lost file` or `all done`.  Returns the steps' names, how many runs ended early, and what
    went wrong."""
    import msconv.steps.convert
    import msconv.steps.reshard  # noqa: F401  (once, before the forks)
    from tests.synthetic import digests

    rng = random.Random(seed)
    root.mkdir()
    log, report = root / "log", root / "steps"

    def go(out: Path, fault: Fault) -> int:
        fault = replace(fault, durable_every=durable_every, of=SYNCING if do == "lose" else WRITING)
        return fork(fault, [*arguments, "--output", str(out), "--jobs", str(rng.choice(jobs))], log)

    def prepare(out: Path) -> None:
        if begin == "the last step undone":
            go(out, Fault("kill", len(first)))
        elif begin != "nothing":
            shutil.copytree(root / "whole", out)
            if begin == "a lost file":
                next((out / "weights").iterdir()).unlink()

    if code := go(root / "whole", Fault(report=str(report))):
        raise SystemExit(f"exit code {code}: {log.read_text()}")
    names = first = report.read_text().split("\n")
    expected = digests(root / "whole")
    if begin != "nothing":
        prepare(root / "again")
        go(root / "again", Fault(report=str(report)))
        names = report.read_text().split("\n")
    ended, problems = 0, list[str]()
    every = max(1, len(names) // most) if most else 1
    for step, name in list(enumerate(names, 1))[rng.randrange(every) :: every]:
        out = root / str(step)
        prepare(out)
        codes = [go(out, Fault(do, step, times=times))]
        if rng.random() < 0.5:
            codes.append(go(out, Fault(do, rng.randint(1, len(first)), times=times)))
        ended += sum(code != 0 for code in codes)
        where = f"step {step} ({name}), exit codes {codes}"
        if not set(codes) <= {0, {"kill": -signal.SIGKILL, "cut": -signal.SIGKILL, "lose": 5}.get(do, 130)}:
            problems.append(f"{where}: {log.read_text()[-500:]}")
        if begin != "a lost file" and pretends(out):
            problems.append(f"{where}: looks finished and is not: {pretends(out)}")
        if code := go(out, Fault()):
            problems.append(f"{where}: then it does not resume, exit code {code}: {log.read_text()[-500:]}")
        elif found := sorted(set(digests(out).items()) ^ set(expected.items())):
            problems.append(f"{where}: then other bytes: {found[:4]}")
        shutil.rmtree(out, ignore_errors=True)
    return {"steps": names, "ended": ended, "problems": problems}


def pretends(root: Path) -> list[Any]:
    """What is wrong with an artifact that says it is finished."""
    from msconv_runtime.artifact import Artifact
    from msconv_runtime.artifact.integrity import check_artifact
    from msconv_runtime.errors import ArtifactError

    try:
        return check_artifact(Artifact(root))
    except ArtifactError:
        return []  # it says itself that it is unfinished


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    if sys.argv[1] == "--sweep":
        spec = json.loads(sys.argv[2])
        print(json.dumps(sweep(**spec | {"root": Path(spec["root"])}, arguments=sys.argv[3:])))
    else:
        values = json.loads(sys.argv[1])
        sys.exit(run(Fault(**values | {"of": tuple(values["of"])}), sys.argv[2:]))
