"""The rehearsal device's library: a C++ extension of torch, built where it runs, once for each torch."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from msconv_runtime.errors import EnvironmentProblem
from msconv_runtime.kernels.builds import cached_build
from msconv_runtime.kernels.compiler import find_compiler

NAME = "msconv-rehearsal"
DEVICE = Path(__file__).with_name("device")
SOURCE = DEVICE / "npu.cc"
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-shared", "-Wno-deprecated-declarations")


def build_device() -> Path:
    """The library, built now (half a minute) if it was not.  Raises EnvironmentProblem without a C++ compiler or
    torch, ResourceError without a private place to keep it."""
    try:
        import torch
    except ImportError as e:
        raise EnvironmentProblem(
            f"torch cannot be imported ({e}).", "`make setup` installs what a rehearsal needs."
        ) from None
    root = Path(torch.__file__).parent
    includes = (root / "include", root / "include/torch/csrc/api/include")
    compiler = find_compiler()
    arguments = (
        *FLAGS,
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        *(f"-I{path}" for path in includes),
        str(SOURCE),
        *(f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}"),
    )
    key = [*compiler.key, *arguments, torch.__version__, SOURCE.read_bytes()]
    return cached_build(NAME, key, partial(compiler.build, arguments))
