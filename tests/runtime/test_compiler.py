"""The C++ compiler: which one is taken, and one line about what is none."""

from __future__ import annotations

import ctypes
import shlex
from pathlib import Path

import pytest

from msconv_runtime.errors import EnvironmentProblem
from msconv_runtime.kernels import compiler
from msconv_runtime.kernels.compiler import find_compiler

FLAGS = ("-shared", "-fPIC")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "seven.cc"
    path.write_text('extern "C" int seven() { return SEVEN; }')
    return path


@pytest.mark.parametrize("told", ["", " ", "c++", "g++ -O1"])
def test_a_compiler_builds_a_library(monkeypatch: pytest.MonkeyPatch, source: Path, told: str) -> None:
    monkeypatch.setenv("CXX", told)
    made = source.with_suffix(".so")
    found = find_compiler()
    found.build((*FLAGS, "-DSEVEN=7", str(source)), made)
    assert ctypes.CDLL(str(made)).seven() == 7
    assert not told.strip() or found.command == tuple(told.split())


def test_a_key_names_the_compiler_its_options_and_its_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = []
    for version in ("13.1", "13.2"):
        wrapper = script(
            tmp_path / "wrapper", f'case "$*" in *--version) echo {version};; *) exec g++ "$@";; esac'
        )
        for told in (str(wrapper), f"{wrapper} -O1"):
            monkeypatch.setenv("CXX", told)
            keys.append(find_compiler().key)
    monkeypatch.setenv("LANG", "de_DE.UTF-8")
    assert len(set(keys)) == 4
    assert find_compiler().key == keys[-1]


def test_an_error_of_the_source_is_said(monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    monkeypatch.setenv("CXX", "g++")
    with pytest.raises(EnvironmentProblem, match=r"^CXX=g\+\+: .*seven.cc:1:.* error: .*SEVEN"):
        find_compiler().build((*FLAGS, str(source)), source.with_suffix(".so"))


def test_a_compiler_that_builds_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path
) -> None:
    lazy = script(tmp_path / "lazy", 'case "$*" in *-shared*) ;; *) exec g++ "$@" ;; esac')
    monkeypatch.setenv("CXX", str(lazy))
    with pytest.raises(EnvironmentProblem, match=f"^CXX={lazy}: it built nothing\n"):
        find_compiler().build((*FLAGS, str(source)), source.with_suffix(".so"))


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ("/no/such/compiler", ": No such file or directory"),
        ("no-such-compiler -O1", ": No such file or directory"),
        ("/etc/passwd", ": Permission denied"),
        ("/etc", ": Permission denied"),
        ("/bin/true", " is not a C++ compiler"),
        ("/bin/false", " is not a C++ compiler"),
        ("/bin/cat", " is not a C++ compiler"),
        ("/bin/echo", " is not a C++ compiler"),
        ("python3", " is not a C++ compiler"),
        ("g++ --no-such-option", " is not a C++ compiler"),
        ("g++ '-O1", ": No closing quotation"),
    ],
)
def test_what_is_no_compiler_is_named(monkeypatch: pytest.MonkeyPatch, told: str, why: str) -> None:
    monkeypatch.setenv("CXX", told)
    with pytest.raises(EnvironmentProblem) as e:
        find_compiler()
    assert e.value.message == f"CXX={told}{why}"
    assert e.value.hint == "set CXX to a C++ compiler such as g++, or unset it"


def test_without_cxx_the_default_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bad = script(tmp_path / "c++", "exit 1")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentProblem) as e:
        find_compiler()
    assert (e.value.message, e.value.hint) == (
        f"{bad} is not a C++ compiler",
        "CXX may name another C++ compiler",
    )


def test_a_file_that_cannot_be_run_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("no program\n")
    text.chmod(0o700)
    monkeypatch.setenv("CXX", shlex.quote(str(text)))
    with pytest.raises(EnvironmentProblem, match=f"^CXX={text}: Exec format error\n"):
        find_compiler()


def test_a_compiler_without_an_answer_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slow = script(tmp_path / "slow", "exec sleep 60")
    monkeypatch.setattr(compiler, "ANSWER_S", 0.1)
    monkeypatch.setenv("CXX", str(slow))
    with pytest.raises(EnvironmentProblem, match=f"^CXX={slow}: no answer in 0.1 s\n"):
        find_compiler()


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return path
