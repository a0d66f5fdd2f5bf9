"""The kernels' variants on processors that this machine does not have, by QEMU: they compute what NumPy does.

Compilers and emulators come from the system: `make test-processors` installs and runs.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from msconv_runtime import kernels
from msconv_runtime.kernels import check
from msconv_runtime.kernels.variants import VARIANTS, Variant, features, machine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("MSCONV_PROCESSORS"), reason="other processors: `make test-processors` runs them"
    ),
]
HERE, SOURCES = Path(__file__).parent, Path(kernels.__file__).parent
EXAMPLES = {rounds: check.examples(np.random.default_rng(0), rounds) for rounds in (False, True)}
GCC_ARM, CLANG_ARM = "aarch64-linux-gnu-g++", "clang++ --target=aarch64-linux-gnu"
ARM = "qemu-aarch64 -L /usr/aarch64-linux-gnu -cpu"
NATIVE = ""
SIGILL = "uncaught target signal 4"  # as QEMU says it


@dataclass(frozen=True)
class Case:
    variant: str
    compiler: str
    emulator: str

    @property
    def of_processor(self) -> Variant:
        (found,) = (v for v in VARIANTS if v.name == self.variant)
        return found

    @property
    def examples(self) -> check.Examples:
        return EXAMPLES[self.of_processor.rounds]

    def __str__(self) -> str:
        return (
            f"{self.variant}, {self.compiler.split()[0]}, {self.emulator.split()[-1] if self.emulator else 'here'}"
        )


CASES = (
    Case("neon", GCC_ARM, f"{ARM} cortex-a53"),
    Case("neon", CLANG_ARM, f"{ARM} cortex-a53"),
    Case("dotprod", GCC_ARM, f"{ARM} max"),
    Case("dotprod", CLANG_ARM, f"{ARM} max"),
    Case("sse2", "g++", "qemu-x86_64 -cpu Nehalem"),
    Case("sse2", "clang++", "qemu-x86_64 -cpu Nehalem"),
    Case("avx2", "g++", "qemu-x86_64 -cpu Haswell"),
    Case("avx2", "clang++", "qemu-x86_64 -cpu Haswell"),
    *(
        Case(name, compiler, NATIVE)
        for name in ("avxvnni", "avx512", "avx512vnni", "avx512bf16")
        for compiler in ("g++", "clang++", "g++-11", "g++-10")
    ),
)


def build(case: Case, directory: Path) -> Path:
    """The library beside `run`, both built by this case's compiler."""
    variant = case.of_processor
    if shutil.which(case.compiler.split()[0]) is None:
        pytest.skip(f"no {case.compiler.split()[0]}")
    if case.emulator and shutil.which(case.emulator.split()[0]) is None:
        pytest.skip(f"no {case.emulator.split()[0]}")
    if not case.emulator and not (variant.machine == machine() and variant.needs <= features()):
        pytest.skip(f"this processor has no {case.variant}")
    compiler, made = shlex.split(case.compiler), directory / "kernels.so"
    units = [SOURCES / name for name in kernels.UNITS]
    subprocess.run([*compiler, *kernels.FLAGS, *variant.flags, *units, "-o", made], check=True)
    subprocess.run([*compiler, "-O1", "-std=c++17", HERE / "run.cc", "-o", directory / "run", "-ldl"], check=True)
    return made


def write_example(file: Path, name: str, inputs: Sequence[check.Array], outputs: Sequence[check.Array]) -> None:
    lines = [name.partition(" ")[0], str(len(inputs) + len(outputs))]
    for array in (*inputs, *outputs):
        sizes = " ".join(map(str, array.shape))
        lines.append(f"{check.TYPES[str(array.dtype)].decode()} {array.ndim} {sizes}")
    head = "\n".join([*lines, str(len(outputs))]) + "\n"
    file.write_bytes(head.encode() + b"".join(np.ascontiguousarray(a).tobytes() for a in inputs))


def run(case: Case, made: Path, name: str) -> subprocess.CompletedProcess[bytes]:
    inputs, expected = case.examples[name]
    example = made.with_name("example")
    write_example(example, name, inputs, expected)
    command = [*shlex.split(case.emulator), str(made.with_name("run")), str(made), str(example)]
    return subprocess.run(command, capture_output=True, timeout=300)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_variant_computes_what_numpy_does(case: Case, tmp_path: Path) -> None:
    """Int8 to the last bit: the same integers on every processor."""
    made = build(case, tmp_path)
    for name, (_, expected) in case.examples.items():
        done = run(case, made, name)
        assert done.returncode == 0, (name, done.stderr)
        values, found = np.frombuffer(done.stdout, np.float32), []
        for array in expected:
            found.append(values[: array.size].reshape(array.shape))
            values = values[array.size :]
        assert not values.size
        assert check.difference(name, found, expected) == ""


@pytest.mark.parametrize(
    "case",
    [Case("avx2", "g++", "qemu-x86_64 -cpu Nehalem"), Case("dotprod", GCC_ARM, f"{ARM} cortex-a53")],
    ids=str,
)
def test_an_emulated_processor_lacks_what_it_should(case: Case, tmp_path: Path) -> None:
    """A variant for a better one ends there: what passes elsewhere ran on the processor that was named."""
    name = "ProductInt8"
    assert SIGILL in run(case, build(case, tmp_path), name).stderr.decode()
