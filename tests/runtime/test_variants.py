"""Kernels by what a processor has: which variant is taken, what follows it; no other processor's is loaded."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from msconv_runtime import kernels
from msconv_runtime.errors import EnvironmentProblem
from msconv_runtime.kernels import library, variants
from msconv_runtime.kernels.compiler import Compiler, problem
from msconv_runtime.kernels.variants import VARIANTS, rounding_choice, usable

LAPTOP = "sse sse2 avx avx2 fma"
XEON = f"{LAPTOP} avx512f avx512bw avx512dq avx512vl"


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache directory, and nothing remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("MSCONV_COMPILED", "MSCONV_NATIVE", "MSCONV_KERNELS", "CXX"):
        monkeypatch.delenv(name, raising=False)
    library.cache_clear()
    yield tmp_path / "cache" / "msconv"
    library.cache_clear()


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[Processor]:
    Processor.patch, Processor.file = monkeypatch, tmp_path / "cpuinfo"
    return Processor


class Processor:
    """Another one than this machine's, as /proc/cpuinfo tells of it."""

    patch: pytest.MonkeyPatch
    file: Path

    def __init__(self, machine: str, has: str, *others: str) -> None:
        title = "Features" if machine == "aarch64" else "flags"
        self.file.write_text("".join(f"{title}\t: {one}\n\n" for one in (has, *others)))
        self.patch.setattr("platform.machine", lambda: machine)
        self.patch.setattr(variants, "CPUINFO", self.file)


@pytest.mark.parametrize(
    ("machine", "has", "names"),
    [
        ("x86_64", f"{XEON} avx512_vnni", ["avx512vnni", "avx512", "avx2", "sse2"]),
        ("x86_64", f"{XEON} avx512_vnni avx512_bf16", ["avx512vnni", "avx512", "avx2", "sse2"]),
        ("x86_64", f"{XEON} avx512_vnni avx_vnni", ["avx512vnni", "avx512", "avxvnni", "avx2", "sse2"]),
        ("x86_64", XEON, ["avx512", "avx2", "sse2"]),
        ("x86_64", "avx2 avx512f fma", ["avx2", "sse2"]),
        ("AMD64", f"{LAPTOP} avx_vnni", ["avxvnni", "avx2", "sse2"]),
        ("x86_64", "sse sse2 avx avx2", ["sse2"]),
        ("aarch64", "fp asimd asimddp i8mm", ["dotprod", "neon"]),
        ("arm64", "", ["neon"]),
    ],
)
def test_the_best_that_a_processor_can_run_comes_first(
    on: type[Processor], machine: str, has: str, names: list[str]
) -> None:
    on(machine, has)
    assert [v.name for v in usable()] == names


def test_what_rounds_is_taken_only_by_its_name(on: type[Processor]) -> None:
    on("x86_64", f"{XEON} avx512_vnni avx512_bf16")
    assert not any(v.rounds for v in usable())
    assert [(v.name, v.rounds) for v in usable("avx512bf16")] == [("avx512bf16", True)]


@pytest.mark.parametrize(
    ("choice", "rounds"), [("avx512bf16", True), (" avx512bf16 ", True), ("avx2", False), ("", False)]
)
def test_a_choice_that_rounds_is_told(monkeypatch: pytest.MonkeyPatch, choice: str, rounds: bool) -> None:
    monkeypatch.setenv("MSCONV_KERNELS", choice)
    assert rounding_choice() == ("avx512bf16" if rounds else "")


def test_what_only_some_cores_have_is_not_taken(on: type[Processor]) -> None:
    on("aarch64", "asimd asimddp", "asimd")
    assert [v.name for v in usable()] == ["neon"]


@pytest.mark.parametrize(
    ("choice", "why"),
    [
        ("avx512", "MSCONV_KERNELS=avx512: this processor cannot run them"),
        ("avx512bf16", "MSCONV_KERNELS=avx512bf16: this processor cannot run them"),
        ("neon", "MSCONV_KERNELS=neon: this processor cannot run them"),
        ("best", "MSCONV_KERNELS=best: no such kernels"),
    ],
)
def test_a_choice_that_cannot_be_had_is_said(on: type[Processor], choice: str, why: str) -> None:
    on("x86_64", LAPTOP)
    with pytest.raises(EnvironmentProblem) as e:
        usable(choice)
    assert (e.value.message, e.value.hint) == (why, "unset it, or set it to one of avx2, sse2")


def test_another_kind_of_processor_serves_without(on: type[Processor], fresh: Path) -> None:
    on("riscv64", "")
    assert library().path is None
    assert library().why == (
        "no kernels for a processor of riscv64; there are some for aarch64, x86_64; "
        "MindSpore's own operations serve in their place"
    )


class Builds:
    """Stands for a compiler and for the trial: quick.  `broken` flags are those it does not know."""

    def __init__(self, patch: pytest.MonkeyPatch, broken: Sequence[str] = ()) -> None:
        self.built: list[str] = []
        self.broken = broken
        found = shutil.which("true")
        patch.setattr(kernels, "find_compiler", lambda: Compiler((str(found),), "1", "old-g++"))
        patch.setattr(Compiler, "build", lambda _, arguments, path: self.build(arguments, path))
        patch.setattr(kernels, "_try", lambda *_: None)
        patch.setattr("ctypes.CDLL", str)

    def build(self, arguments: Sequence[str], path: Path) -> None:
        (variant,) = (v for v in VARIANTS if set(v.flags) == {a for a in arguments if a.startswith("-m")})
        if wrong := set(self.broken) & set(arguments):
            raise problem("old-g++", f": error: unrecognized command-line option '{min(wrong)}'")
        self.built.append(variant.name)
        path.write_text(variant.name)


def test_a_variant_that_is_not_built_leaves_the_next(
    on: type[Processor], fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Said once, with the reason."""
    caplog.set_level(logging.WARNING)
    on("x86_64", f"{LAPTOP} avx_vnni")
    builds = Builds(monkeypatch, broken=["-mavxvnni"])
    assert (library().variant, library().variant, builds.built) == ("avx2", "avx2", ["avx2"])
    assert caplog.messages == [
        "msconv: kernels for avx2 serve, not those for avxvnni: "
        "old-g++: error: unrecognized command-line option '-mavxvnni'"
    ]


def test_where_none_is_built_the_first_reason_is_given(
    on: type[Processor], fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on("x86_64", LAPTOP)
    Builds(monkeypatch, broken=["-mfma", "-march=x86-64"])
    assert library().path is None
    assert library().why.startswith("old-g++: error: unrecognized command-line option '-march=x86-64'; CXX may")
    assert not caplog.messages


def test_a_cache_of_another_processor_is_not_loaded(
    on: type[Processor], fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A home directory on a network: what another machine built, whole and with its digest, stays its own."""
    builds = Builds(monkeypatch)
    on("x86_64", XEON)
    other = library().path
    assert other is not None
    planted = b"another machine's"
    other.write_bytes(planted)
    digest = other.with_name(f"{other.name}.sha256")
    digest.write_text(f"{hashlib.sha256(planted).hexdigest()}  {other.name}\n")
    for has, name in ((LAPTOP, "avx2"), (f"{XEON} avx512_vnni", "avx512vnni"), (f"{XEON} sha_ni", "avx512")):
        on("x86_64", has)
        library.cache_clear()
        found = library()
        assert (found.variant, found.path != other) == (name, True)
        assert found.path is not None
        assert found.path.read_text() == name
    assert builds.built == ["avx512", "avx2", "avx512vnni", "avx512"]
    on("x86_64", XEON)  # back on the first: its own again, as it is
    library.cache_clear()
    assert library().path == other
    assert (len(builds.built), other.read_bytes()) == (4, planted)
