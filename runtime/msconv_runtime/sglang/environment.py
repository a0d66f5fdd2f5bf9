"""The environment of SGLang's processes, and stand-ins for packages that it imports and that have no CPU build.

`python -m msconv_runtime.sglang.environment` prints the line that puts these stand-ins on the path of other
programs of SGLang's, such as its benchmark.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

from ..serving.settings import TARGET
from ..targets import CPU, Target
from .meeting import one_machine_environment

VERSIONS = ("0.5.23",)  # versions of SGLang: the plug-in changes functions of this very one
STANDINS = Path(__file__).with_name("standins")
STARTUP = Path(__file__).with_name("startup")  # what a process does before it imports anything
NO_COMPILING = "TORCHDYNAMO_DISABLE"
NO_COREDUMP = {"SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0"}  # else a server that lost a process waits 60 s for CUDA


def server_environment(target: Target, ranks: int, machines: int) -> dict[str, str]:
    """What a server of so many ranks, over all machines, gets beside this process's environment."""
    common = NO_COREDUMP | (one_machine_environment() if machines == 1 else {})
    if not target.device.is_host:
        return common
    return common | cpu_environment() | fast_start_environment() | rank_environment(ranks, machines)


def rank_environment(ranks: int, machines: int = 1) -> dict[str, str]:
    """What more than one rank on CPUs needs, unless the user has set it.

    SGLang wants a NUMA node or a list of cores for each rank, those on other machines too.  MindSpore says
    hundreds of times that it waits for the other ranks, as a warning.
    """
    if ranks == 1:
        return {}
    here = cores_by_rank(sorted(os.sched_getaffinity(0)), ranks // machines)
    needed = {"SGLANG_CPU_OMP_THREADS_BIND": "|".join([here] * machines), "GLOG_v": "3"}
    return {name: value for name, value in needed.items() if name not in os.environ}


def cores_by_rank(cores: list[int], tp: int) -> str:
    """Cores in equal shares, `0,1|2,3`: what SGLANG_CPU_OMP_THREADS_BIND takes.  Ranks share if there are more."""
    share = max(1, len(cores) // tp)
    begins = [rank * share % (len(cores) // share * share) for rank in range(tp)]
    return "|".join(",".join(map(str, cores[begin : begin + share])) for begin in begins)


def cpu_environment() -> dict[str, str]:
    """SGLang's CPU switch, no hub, and stand-ins for packages that have no CPU build and are not there."""
    environment = {
        **NO_COREDUMP,
        "SGLANG_USE_CPU_ENGINE": "1",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # torch_npu, where it is installed, would want CANN
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "OPENBLAS_NUM_THREADS": "1",  # its threads would keep SGLang's processes from being copies of one
    }
    return environment | python_path(standins())


def fast_start_environment() -> dict[str, str]:
    """For the processes of a server, not for a user's program: few searches for garbage while SGLang is imported,
    and what torch would compile runs as it is (parts of SGLang's sampling), unless the user wants it otherwise.
    Getting ready to compile takes 0.6 s."""
    path = python_path([str(STARTUP), *standins()])
    return path | ({} if NO_COMPILING in os.environ else {NO_COMPILING: "1"})


def standins() -> list[str]:
    """Folders of the stand-ins for what does not import here."""
    return [str(STANDINS / f"for_{name}") for name in ("torchvision", "sgl_kernel") if not imports(name)]


def python_path(first: list[str]) -> dict[str, str]:
    """PYTHONPATH with these folders before what it says now; nothing without folders."""
    before = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p not in first]
    return {"PYTHONPATH": os.pathsep.join([*first, *before])} if first else {}


def use_cpu(tp: int = 1) -> None:
    """Make this process, and what it starts, fit for SGLang on a CPU: what `msconv serve` sets for a server.  Call
    it before sglang is imported."""
    environment = {**cpu_environment(), **rank_environment(tp), **one_machine_environment(), TARGET: CPU.name}
    for path in reversed(environment.get("PYTHONPATH", "").split(os.pathsep)):
        if path.startswith(str(STANDINS)) and path not in sys.path:
            sys.path.insert(0, path)
    os.environ.update(environment)


def imports(name: str) -> bool:
    """Whether the real package is there and can be imported (CUDA builds cannot, next to a CPU torch)."""
    spec = importlib.util.find_spec(name)
    if spec is None or (spec.origin and str(STANDINS) in spec.origin):
        return False
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True).returncode == 0


def main() -> None:
    """Prints what a POSIX shell is to `eval`; nothing where nothing is missing."""
    for name, value in python_path(standins()).items():
        print(f"export {name}={shlex.quote(value)}")


if __name__ == "__main__":
    main()
