"""Commands in processes that begin as copies of one which has imported MindSpore, torch and transformers: a new
process imports them for seconds.

No module of msconv's is loaded before the copy is made: what a command loads, changes, prints and leaves is its
own, as its exit code is.  What must be there before the imports (variables that they read, a torch of another
kind) and what is said of the imports themselves need a real start: `tests.commands.run_msconv`.
"""

from __future__ import annotations

import functools
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from tests.commands import Result

NUMPY = {"MSCONV_NUMBA": "0"}  # numba's loops give the same bytes, and would be compiled anew in each process
START_S = 240  # of the first one, on a machine that is busy
FIRST = """
import json, os, runpy, sys, traceback

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # as msconv does before it imports torch
import mindspore, torch, transformers.modeling_utils


def become(asked):
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(asked[name], os.O_WRONLY), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["directory"])
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.argv = asked["words"]
    if sys.argv[0] == "msconv":
        runpy.run_module("msconv", run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


assert "msconv" not in sys.modules
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        code = 1
        try:
            become(json.loads(line))
            code = 0
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else int(e.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Warm:
    """The first process.  It ends when this one does, which has the other end of its stdin."""

    def __init__(self) -> None:
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, "-c", FIRST],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            start_new_session=True,
        )
        self._answer(START_S, lambda line: line == "ready")

    def run(self, words: list[str], directory: Path, environment: Mapping[str, str], timeout: float) -> Result:
        """`msconv ARGS`, or a script with its arguments, as `python` would run it in `directory`."""
        assert self.process.stdin is not None
        with tempfile.TemporaryDirectory() as place:
            files = {name: Path(place) / name for name in ("stdout", "stderr")}
            for path in files.values():
                path.touch()
            asked = {"words": words, "directory": str(directory), "environment": dict(environment)}
            print(json.dumps(asked | {n: str(p) for n, p in files.items()}), file=self.process.stdin, flush=True)
            code = int(self._answer(timeout, lambda line: line.lstrip("-").isdigit()))
            out, err = (path.read_text("utf-8", errors="replace") for path in files.values())
        return Result(code, out, err)

    def _answer(self, seconds: float, expected: Any) -> str:
        """Its next line.  Without one in time, it and what it has begun are ended."""
        stdout = self.process.stdout
        assert stdout is not None
        line = stdout.readline().strip() if select.select([stdout], [], [], seconds)[0] else ""
        if not expected(line):
            first.cache_clear()
            os.killpg(self.process.pid, 9)
            self.process.wait()
            self.errors.seek(0)
            raise AssertionError(f"no answer in {seconds} s: {line!r} {self.errors.read().decode()[-2000:]}")
        return line


@functools.cache
def first() -> Warm:
    return Warm()


def run_warm(*args: object, cwd: Path | None = None, timeout: float = 120) -> Result:
    """`msconv ARGS`, in a copy."""
    environment = {**NUMPY, **os.environ, "PYTHONFAULTHANDLER": "1", "NO_COLOR": "1"}
    return first().run(["msconv", *map(str, args)], cwd or Path.cwd(), environment, timeout)
