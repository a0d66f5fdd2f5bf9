"""The rehearsal device's library: a C++ extension of torch, built where it runs, once a machine and version of torch."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from msconv_runtime.errors import EnvironmentProblem

DEVICE = Path(__file__).with_name("device")
SOURCE = DEVICE / "npu.cc"
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-shared", "-Wno-deprecated-declarations")
BUILD_S = 600


def build_device() -> Path:
    """The library, built now (half a minute) if it was not.  Raises EnvironmentProblem if it cannot be built."""
    from msconv_runtime.native.builds import Unsafe, cached_build

    compiler = _compiler()
    command = [*compiler, *FLAGS, *_of_torch()]
    try:
        version = _run([*compiler, "--version"])
        return cached_build(
            "msconv-rehearsal",
            (SOURCE.read_bytes(), command, version),
            lambda path: _run([*command, str(SOURCE), "-o", str(path), *_libraries()]) and None,
        )
    except subprocess.CalledProcessError as e:
        said = (e.stderr or "").strip().splitlines() or [f"it ended with {e.returncode}"]
        raise EnvironmentProblem(
            f"The rehearsal device could not be built: {shlex.join(compiler)}: {said[0]}",
            "g++ 11 or newer builds it; $CXX names another compiler.",
        ) from None
    except (Unsafe, OSError, subprocess.SubprocessError) as e:
        raise EnvironmentProblem(f"The rehearsal device could not be built: {e}.") from None


def _compiler() -> list[str]:
    found = shutil.which("c++") or shutil.which("g++")
    named = shlex.split(os.environ.get("CXX", ""))
    if not named and not found:
        raise EnvironmentProblem(
            "There is no C++ compiler (c++, g++ or $CXX): the rehearsal device is built where it runs.",
            "Install g++ (Debian, Ubuntu: apt-get install g++).",
        )
    return named or [str(found)]


def _torch() -> Path:
    try:
        import torch
    except ImportError as e:
        raise EnvironmentProblem(
            f"torch cannot be imported ({e}).", "`make setup` installs what a rehearsal needs."
        ) from None
    return Path(torch.__file__).parent


def _of_torch() -> list[str]:
    """Flags that an extension of this torch needs."""
    import torch

    include = _torch() / "include"
    abi = int(torch._C._GLIBCXX_USE_CXX11_ABI)
    return [
        f"-D_GLIBCXX_USE_CXX11_ABI={abi}",
        f"-DTORCH_VERSION_TEXT={torch.__version__.replace('+', '_')}",  # another torch, another library
        *(f"-I{path}" for path in (include, include / "torch/csrc/api/include")),
    ]


def _libraries() -> list[str]:
    place = _torch() / "lib"
    return [f"-L{place}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{place}"]


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=BUILD_S).stdout
