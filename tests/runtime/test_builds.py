"""Libraries in the cache directory: built once, and only loaded from a private place as they were built."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from msconv_runtime.cache_directory import cache
from msconv_runtime.errors import ResourceError
from msconv_runtime.kernels.builds import cached_build
from tests.commands import run_python

CODE = bytes(range(256)) * 4
STRANGER = 4321
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


class Compiler:
    """Stands for one: quick, and counts."""

    def __init__(self, code: bytes = CODE) -> None:
        self.code, self.runs = code, 0

    def __call__(self, made: Path) -> None:
        self.runs += 1
        made.write_bytes(self.code)


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "msconv"


def build(compiler: Compiler | None = None, *key: str) -> Path:
    return cached_build("kernels", key or ("g++ 12",), compiler or Compiler())


def digest(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def rebuilt(path: Path, caplog: pytest.LogCaptureFixture, why: str) -> None:
    """What is there is not used: it is built again, which the log says in one line."""
    caplog.clear()
    compiler = Compiler()
    assert build(compiler) == path
    assert compiler.runs == 1
    (line,) = caplog.messages
    assert f"{path} is built again: " in line
    assert why in line
    assert path.read_bytes() == CODE
    assert not path.is_symlink()
    build(compiler)
    assert compiler.runs == 1


# What is kept


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_a_library_is_built_once_and_kept(home: Path, umask: int, caplog: pytest.LogCaptureFixture) -> None:
    compiler, before = Compiler(), os.umask(umask)
    try:
        path = build(compiler)
    finally:
        os.umask(before)
    assert build(compiler) == path
    assert compiler.runs == 1
    assert path.parent == home
    assert path.read_bytes() == CODE
    modes = {p.name: oct(stat.S_IMODE(p.stat().st_mode)) for p in (home.parent, home, *home.iterdir())}
    assert set(modes.values()) == {"0o700", "0o600"}, modes
    assert sorted(modes) == sorted(["cache", "msconv", path.name, digest(path).name, path.name + ".lock"])
    assert not caplog.messages


def test_a_digest_is_what_sha256sum_checks(home: Path) -> None:
    path = build()
    done = subprocess.run(["sha256sum", "--check", digest(path)], cwd=home, capture_output=True, text=True)
    assert done.stdout == f"{path.name}: OK\n"


def test_another_key_is_another_library(home: Path) -> None:
    keys = [("g++", "-O3"), ("g++", "-O2"), ("g++-O3",), ("g++", "-O", "3"), ("clang++", "-O3")]
    assert len({build(None, *key) for key in keys}) == len(keys)
    assert len(list(home.glob("*.so"))) == len(keys)


def test_what_its_check_refuses_is_not_kept(home: Path) -> None:
    def refuse(made: Path) -> None:
        assert made.read_bytes() == CODE
        raise ArithmeticError("off by 2")

    with pytest.raises(ArithmeticError, match="off by 2"):
        cached_build("kernels", ["g++ 12"], Compiler(), refuse)
    assert [p.suffix for p in home.iterdir()] == [".lock"]


# What is not loaded


def test_no_damaged_byte_is_used(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = build()
    for place in range(0, len(CODE), len(CODE) // 30):
        damaged = bytearray(CODE)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        rebuilt(path, caplog, "its digest differs")


@pytest.mark.parametrize("size", [0, 1, len(CODE) // 2, len(CODE) - 1, len(CODE) + 1])
def test_no_library_of_another_size_is_used(home: Path, size: int, caplog: pytest.LogCaptureFixture) -> None:
    path = build()
    os.truncate(path, size)
    rebuilt(path, caplog, "its digest differs")


@pytest.mark.parametrize("text", [b"", b"\xff\xfe\x00", b"0" * 64, b"sha256", None])
def test_a_library_needs_its_digest(home: Path, text: bytes | None, caplog: pytest.LogCaptureFixture) -> None:
    path = build()
    if text is None:
        digest(path).unlink()
    else:
        digest(path).write_bytes(text)
    rebuilt(path, caplog, f"there is no {path.name}.sha256" if text is None else "its digest differs")


def test_a_library_of_another_key_is_not_used(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, other = build(), build(Compiler(b"other"), "g++ 13")
    shutil.copy2(other, path)
    shutil.copy2(digest(other), digest(path))
    rebuilt(path, caplog, "its digest differs")


@pytest.mark.parametrize("which", ["library", "digest"])
def test_a_symbolic_link_is_not_followed(
    home: Path, tmp_path: Path, which: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = build()
    file = path if which == "library" else digest(path)
    elsewhere = file.rename(tmp_path / "elsewhere")
    elsewhere_bytes = elsewhere.read_bytes()
    file.symlink_to(elsewhere)
    rebuilt(path, caplog, "is no regular file")
    assert elsewhere.read_bytes() == elsewhere_bytes


def test_a_library_that_others_may_write_is_not_used(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = build()
    path.chmod(0o666)
    rebuilt(path, caplog, "has mode 0666")


@ROOT
def test_a_library_of_another_user_is_not_used(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = build()
    os.chown(path, STRANGER, STRANGER)
    rebuilt(path, caplog, f"belongs to user {STRANGER}")


# Where nothing is kept


def refused(said: str) -> None:
    compiler = Compiler()
    with pytest.raises(ResourceError, match=said) as e:
        build(compiler)
    assert "XDG_CACHE_HOME may name another directory" in e.value.hint
    assert compiler.runs == 0


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o722])
def test_a_directory_that_others_may_write_is_refused(home: Path, mode: int) -> None:
    build()
    home.chmod(mode)
    refused(f"others may write in {home}, its mode is {mode:04o}")


@pytest.mark.parametrize(("mode", "why"), [(0o777, "others may write in"), (0o1777, ""), (0o755, "")])
def test_a_parent_that_others_may_write_must_be_sticky(home: Path, mode: int, why: str) -> None:
    build()
    home.parent.chmod(mode)
    if why:
        refused(f"others may write in {home.parent}, its mode is {mode:04o}")
    else:
        build()


@ROOT
@pytest.mark.parametrize(("group", "fine"), [(0, True), (STRANGER, False)])
def test_a_parent_may_be_written_by_the_users_own_group(home: Path, group: int, fine: bool) -> None:
    home.parent.mkdir()
    os.chown(home.parent, -1, group)
    home.parent.chmod(0o775)
    if fine:
        build()
    else:
        refused(f"others may write in {home.parent}")


@ROOT
@pytest.mark.parametrize("up", [0, 1])
def test_a_directory_of_another_user_is_refused(home: Path, up: int) -> None:
    build()
    place = (home, home.parent)[up]
    os.chown(place, STRANGER, STRANGER)
    refused(f"{place} belongs to user {STRANGER}, this is user {os.geteuid()}")


@ROOT
def test_a_link_to_a_directory_of_another_user_is_refused(home: Path, tmp_path: Path) -> None:
    build()
    theirs = home.rename(tmp_path / "theirs")
    home.symlink_to(theirs)
    os.chown(theirs, STRANGER, STRANGER)
    refused(f"{theirs} belongs to user {STRANGER}")


def test_a_link_to_a_directory_of_this_user_is_followed(home: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    home.parent.mkdir()
    home.symlink_to(tmp_path / "disk")
    assert build().parent == tmp_path / "disk"


def test_the_user_is_the_one_that_the_process_runs_as(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build()
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    refused(f"{home} belongs to user {os.getuid()}, this is user {STRANGER}")


@pytest.mark.parametrize("told", ["cache", "./cache", "../cache", ""])
def test_a_relative_cache_directory_is_ignored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", told)
    assert cache() == tmp_path / "home" / ".cache" / "msconv"
    assert build().parent == cache()
    assert not list((tmp_path / "work").iterdir())
    assert not (tmp_path / "cache").exists()
    assert bool(told) == any(f"XDG_CACHE_HOME is {Path(told)}, a relative path" in m for m in caplog.messages)


def test_without_an_absolute_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "somewhere")
    refused("HOME is somewhere, a relative path")


def test_a_place_that_cannot_be_made_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    refused("Not a directory")


def test_a_full_disk_is_named(home: Path) -> None:
    def full(made: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(made))

    with pytest.raises(ResourceError, match=f"{home}: .*No space left on device"):
        cached_build("kernels", ["g++ 12"], full)
    assert build().exists()


# Several processes, and their ends

SCRIPT = """
import os, sys, time
from pathlib import Path
from msconv_runtime.kernels.builds import cached_build

def compiler(made):
    with (Path(sys.argv[1]) / "runs").open("a") as f:
        f.write("x")
    time.sleep(0.5)
    made.write_bytes(bytes(range(256)) * 4)

print(cached_build("kernels", ["g++ 12"], compiler))
"""

DYING = """
import os, signal, sys
from pathlib import Path
from msconv_runtime.kernels.builds import cached_build

left = [int(sys.argv[1])]

def step(work):
    def stepped(*arguments):
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return work(*arguments)
    return stepped

def half(made):
    made.write_bytes(bytes(range(256)) * 2)

def rest(made):
    with made.open("ab") as f:
        f.write(bytes(range(256)) * 2)

def compiler(made):
    step(half)(made)
    step(rest)(made)

os.fsync, Path.replace, Path.chmod = step(os.fsync), step(Path.replace), step(Path.chmod)
cached_build("kernels", ["g++ 12"], compiler)
"""
STEPS = 9  # half, rest; chmod and fsync twice; replace twice; the directory's fsync


def test_several_processes_build_once(home: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = {process.communicate(timeout=60)[0].strip() for process in running}
    assert said == {str(build())}
    assert (tmp_path / "runs").read_text() == "x"


@pytest.mark.parametrize("step", range(STEPS + 1))
def test_a_build_that_is_killed_leaves_a_usable_cache(home: Path, step: int) -> None:
    done = run_python(DYING, step)
    assert done.code == (-signal.SIGKILL if step < STEPS else 0), done.stderr
    compiler = Compiler()
    path = build(compiler)
    assert compiler.runs == (step < STEPS - 1)  # until both files have their names
    assert path.read_bytes() == CODE
    assert [p.name for p in home.glob("*.so")] == [path.name]
    assert not list(home.glob("*.part/*"))


@pytest.mark.parametrize("step", range(STEPS + 1))
def test_a_rebuild_that_is_killed_leaves_a_usable_cache(home: Path, step: int) -> None:
    path = build()
    os.truncate(path, 100)
    assert run_python(DYING, step).code == (-signal.SIGKILL if step < STEPS else 0)
    assert build() == path
    assert path.read_bytes() == CODE
