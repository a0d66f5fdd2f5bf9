"""The exact command and environment that serve an artifact.  Builds them; runs nothing, imports no SGLang."""

from __future__ import annotations

import errno
import importlib.util
import os
import shlex
import socket
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..artifact import Artifact, GraphInput, Parallel
from ..artifact.weights import LoadMode
from ..errors import ArtifactError, EnvironmentProblem, UsageError
from ..targets import TARGETS, Target, target_named

if TYPE_CHECKING:
    from ..doctor import Ability

STANDINS = Path(__file__).with_name("standins")
LOCALHOST = "127.0.0.1"
PAGE_SIZE = 16
OF_ALL_RANKS = ("ranks on devices", "memory to serve")  # findings that take this machine for the only one
ALIASES = {
    "--tp-size": ("--tp", "--tensor-parallel-size"),
    "--ep-size": ("--ep", "--expert-parallel-size"),
    "--model-path": ("--model",),
}
NO_COREDUMP = {"SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0"}  # else a server that lost a process waits 60 s for CUDA
POOL_BYTES = 4 << 30  # most memory the KV pools of all ranks take by default on a CPU
POOL_TOKENS = (4096, 131072)  # least and most


@dataclass(frozen=True)
class Settings:
    """What `msconv serve` tells the slot, through the environment.

    strict_aot: a start that would compile for other shapes fails.  check_digests: every digest of the rank is
    compared before it loads.  load_mode: `mmap` or `read`.  target: whose graphs.  meeting_host: where the ranks
    of a CPU server meet.  ranks_here: how many share this machine's processors, 0 for all of the artifact's.
    """

    strict_aot: bool = True
    check_digests: bool = False
    load_mode: LoadMode = "mmap"
    target: str = "cpu"
    meeting_host: str = LOCALHOST
    ranks_here: int = 0

    def environment(self) -> dict[str, str]:
        """What differs from the defaults, and what this process's environment has."""
        values = {f"MSCONV_{f.name.upper()}": (getattr(self, f.name), f.default) for f in fields(self)}
        needed = {name: value for name, (value, usual) in values.items() if value != usual or name in os.environ}
        return {name: str(int(v) if isinstance(v, bool) else v) for name, v in needed.items()}

    @staticmethod
    def read() -> Settings:
        """From this process's environment.  Raises UsageError for a load mode that there is not."""
        mode, ranks = os.environ.get("MSCONV_LOAD_MODE", "mmap"), os.environ.get("MSCONV_RANKS_HERE", "0")
        if mode not in ("mmap", "read"):
            raise UsageError(f"MSCONV_LOAD_MODE={mode}: mmap or read.")
        return Settings(
            os.environ.get("MSCONV_STRICT_AOT", "1") != "0",
            os.environ.get("MSCONV_CHECK_DIGESTS", "0") == "1",
            "mmap" if mode == "mmap" else "read",
            os.environ.get("MSCONV_TARGET", "cpu"),
            os.environ.get("MSCONV_MEETING_HOST", LOCALHOST),
            int(ranks) if ranks.isdecimal() else 0,
        )


@dataclass(frozen=True)
class Launch:
    """A process to start.  `environment` holds only what is added to the caller's."""

    argv: list[str]
    environment: dict[str, str]

    def shell(self) -> str:
        """As one would type it."""
        return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in self.environment.items()), shlex.join(self.argv)])


@dataclass(frozen=True)
class Nodes:
    """Machines that serve one model together, in SGLang's words.  `address`: HOST:PORT of the first one."""

    count: int = 1
    rank: int = 0
    address: str | None = None

    def flags(self, parallel: Parallel) -> dict[str, str]:
        """Raises UsageError if these machines cannot be."""
        if self.rank >= self.count:
            raise UsageError(
                f"--node-rank {self.rank}: of {self.count} machines the last is {self.count - 1}.",
                f"Give --node-rank 0 to {self.count - 1}, another on each machine.",
            )
        if self.count > 1 and not self.address:
            raise UsageError(
                f"--nnodes {self.count} needs --dist-init-addr.",
                "Give HOST:PORT of the first machine, the same on all of them.",
            )
        if self.count > 1 and parallel.tp % self.count:
            raise UsageError(
                f"--nnodes {self.count}: {parallel.tp} ranks are not the same number on each machine.",
                "Give a number of machines that divides the artifact's tp.",
            )
        several = {"--nnodes": str(self.count), "--node-rank": str(self.rank)} if self.count > 1 else {}
        return several | ({"--dist-init-addr": self.address} if self.address else {})


def plan_launch(
    root: Path,
    device: str,
    host: str,
    port: int,
    extra: list[str],
    settings: Settings = Settings(),
    nodes: Nodes = Nodes(),
    elsewhere: bool = False,
    target: str | None = None,
) -> Launch:
    """Check the artifact, this machine and `extra`, and build the command.  What the user passes in `extra` wins
    over our defaults.  Raises one error that lists all that does not fit, each with what mends it.

    `elsewhere`: the command is for another machine, so this one needs no NPU.  `target`: whose graphs, where the
    artifact has several for the device; `settings.target` is set here.
    """
    if device not in ("cpu", "npu"):
        raise UsageError(f"--device {device}: cpu or npu.")
    artifact = Artifact(root)
    manifest = artifact.manifest
    chosen = cpu_target(artifact) if device == "cpu" else npu_target(artifact, target)
    settings = replace(settings, target=chosen.name)
    kind = cpu_flags(artifact) if chosen.is_cpu else npu_flags(artifact, chosen)
    needed = {**parallel_flags(manifest.parallel), **kind}
    others = OF_ALL_RANKS if nodes.count > 1 else ()
    refuse(artifact, chosen, extra, needed, elsewhere and not chosen.is_cpu, others)
    flags = {
        "--model-path": str(root),
        "--model-impl": "mindspore",
        **kind,
        **parallel_flags(manifest.parallel),
        **nodes.flags(manifest.parallel),
        "--host": host,
        "--port": str(port),
    }
    given = given_flags(extra)
    argv = [sys.executable, "-m", "sglang.launch_server"]
    for name, value in flags.items():
        if not given.keys() & {name, *ALIASES.get(name, ())}:
            argv += [name, value] if value else [name]
    if nodes.count > 1 and nodes.address:
        settings = replace(settings, meeting_host=nodes.address.rpartition(":")[0].strip("[]"))
    ranks = manifest.parallel.tp * copies(given)
    if ranks // nodes.count != manifest.parallel.tp:
        settings = replace(settings, ranks_here=ranks // nodes.count)
    environment = settings.environment() | NO_COREDUMP
    if chosen.is_cpu:
        environment |= {**cpu_environment(), **rank_environment(ranks, nodes.count)}
    return Launch([*argv, *extra], environment)


def cpu_flags(artifact: Artifact) -> dict[str, str]:
    return {
        "--device": "cpu",
        "--attention-backend": "torch_native",
        "--dtype": "float32",
        "--page-size": str(PAGE_SIZE),
        "--mem-fraction-static": "0.3",
        "--max-total-tokens": str(pool_tokens(artifact)),
    }


def npu_flags(artifact: Artifact, target: Target) -> dict[str, str]:
    """As SGLang's documentation of its MindSpore models has them.  Has not run on a device."""
    cache, pages = widest_cache(artifact, target), target.paging.pages
    return {
        "--device": "npu",
        "--attention-backend": "ascend",
        "--dtype": cache.dtype,
        "--page-size": str(next((p for p in pages if not pool_problems(target, cache, p)), pages[-1])),
    }


def widest_cache(artifact: Artifact, target: Target) -> GraphInput:
    caches = artifact.graphs(target.name)[0].caches
    return max(caches, key=lambda i: i.shape[-1] or 1)


def pool_problems(target: Target, cache: GraphInput, page: int, kv_dtype: str = "auto") -> list[str]:
    """Why a target's graphs, which take `cache`, could not take a KV pool of such pages and elements."""
    problems = []
    multiple, most = target.paging.multiple, target.paging.elements
    if page < multiple or page % multiple or page * (cache.shape[-1] or 1) > most:
        problems.append(
            f"--page-size {page}: Ascend's attention takes multiples of {multiple}, and at most {most} elements "
            f"of a head in a page; a head has {cache.shape[-1]}"
        )
    if kv_dtype not in ("auto", cache.dtype) and (kv_dtype, cache.dtype) != ("bf16", "bfloat16"):
        problems.append(f"--kv-cache-dtype {kv_dtype}: the graphs take a cache of {cache.dtype}")
    return problems


def cpu_target(artifact: Artifact) -> Target:
    """That of CPUs.  Raises ArtifactError if the artifact has no graphs for it, with what it has."""
    root, there = artifact.root, artifact.targets
    if found := [t for name in there if (t := TARGETS.get(name)) and t.is_cpu]:
        return found[0]
    compile_ = f"`msconv compile {root} --target cpu` makes them"
    if not there:
        raise ArtifactError(f"{root}: has no graphs.", f"{compile_} for a CPU, --target ascend910b for an NPU.")
    raise ArtifactError(
        f"{root}: has graphs for {', '.join(there)}, none for a CPU.",
        f"`msconv serve {root} --device npu` serves them on an NPU, `msconv rehearse {root}` here; {compile_}.",
    )


def npu_target(artifact: Artifact, named: str | None = None) -> Target:
    """The one target for NPUs that the artifact has graphs for, or the one that is `named`, here or by
    MSCONV_TARGET."""
    root = artifact.root
    there = [name for name in artifact.targets if name in TARGETS and not TARGETS[name].is_cpu]
    named = named or os.environ.get("MSCONV_TARGET")
    if named in there:
        return target_named(str(named))
    if len(there) == 1 and named is None:
        return target_named(there[0])
    if not there:
        raise ArtifactError(
            f"{root}: has no graphs for an NPU.", f"`msconv compile {root} --target ascend910b` makes them."
        )
    raise UsageError(
        f"{root}: has graphs for {', '.join(there)}" + (f", not for {named}." if named else "."),
        f"Name one of them: --target {there[0]}, or MSCONV_TARGET={there[0]}.",
    )


def refuse(
    artifact: Artifact,
    target: Target,
    extra: list[str],
    needed: dict[str, str],
    elsewhere: bool = False,
    besides: tuple[str, ...] = (),
) -> None:
    """Raises an error that lists whatever keeps the artifact from being served here with these flags: but for this
    machine's findings if it is `elsewhere`, and for those named `besides`."""
    from ..doctor import Machine, examine

    root = artifact.root
    ability: Ability = "serve_cpu" if target.is_cpu else "serve_npu"
    given = given_flags(extra)
    findings = [] if elsewhere else examine(Machine(), root, number(given, "--max-total-tokens")).against(ability)
    findings = [f for f in findings if f.name not in besides]
    problems = [f"  {f.name}: {f.found}; needed: {f.needed}.  {f.hint}" for f in findings]
    for name in ("--tp-size", "--ep-size", "--dtype", "--device"):
        wanted = needed.get(name, "1")
        for spelled in {name, *ALIASES.get(name, ())} & given.keys():
            if given[spelled] != wanted:
                mend = ", or make another artifact with `msconv reshard`" if name in ALIASES else ""
                problems.append(
                    f"  {spelled} {given[spelled]}: this artifact is served with {name} {wanted}.  "
                    f"Leave the flag out{mend}"
                )
    if not target.is_cpu:
        page = number(given, "--page-size") or int(needed["--page-size"])
        cache = widest_cache(artifact, target)
        unfit = pool_problems(target, cache, page, given.get("--kv-cache-dtype", "auto"))
        problems += [f"  {problem}.  Leave the flag out" for problem in unfit]
    if not problems:
        return
    damaged = any(f.name in ("artifact", "file", "weights") or f.name.startswith("graphs") for f in findings)
    kind = ArtifactError if damaged else EnvironmentProblem if findings else UsageError
    raise kind(f"{root}: cannot be served here:\n" + "\n".join(problems), f"`msconv doctor {root}` says more.")


def copies(given: dict[str, str]) -> int:
    """How many copies of the model --dp-size asks for."""
    return number(given, "--dp-size", "--dp", "--data-parallel-size") or 1


def number(given: dict[str, str], *names: str) -> int:
    """What the user gave as one of these flags, or 0; SGLang itself refuses what is no number."""
    value = next((given[name] for name in names if name in given), "")
    return int(value) if value.isdecimal() else 0


def refuse_taken(host: str, port: int) -> None:
    """Raises EnvironmentProblem if no server can listen there: SGLang finds out after it has loaded the model."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(address)
    except OSError as e:
        taken = e.errno == errno.EADDRINUSE
        raise EnvironmentProblem(
            f"Nothing can listen at {host} port {port}: {e.strerror}.",
            "Another server may be running there; give another --port." if taken else "Give another --host.",
        ) from None


def given_flags(extra: list[str]) -> dict[str, str]:
    """Flags as the user wrote them, with their values ("" if none follows)."""
    found: dict[str, str] = {}
    for i, word in enumerate(extra):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            follows = extra[i + 1] if i + 1 < len(extra) and not extra[i + 1].startswith("--") else ""
            found[name] = value if equals else follows
    return found


def parallel_flags(parallel: Parallel) -> dict[str, str]:
    """The layout the artifact was converted for, in SGLang's words.

    Without --sleep-on-idle every rank that waits for a request keeps a core busy.
    """
    experts = {"--ep-size": str(parallel.ep)} if parallel.ep > 1 else {}
    idle = {"--sleep-on-idle": ""} if parallel.tp > 1 else {}
    return {"--tp-size": str(parallel.tp), **experts, **idle}


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


def pool_tokens(artifact: Artifact) -> int:
    """Tokens of KV cache for a CPU server: within POOL_BYTES, whole pages."""
    caches = artifact.graphs("cpu")[0].caches
    per_token = 4 * sum((i.shape[2] or 1) * (i.shape[3] or 1) for i in caches)
    least, most = POOL_TOKENS
    return max(least, min(most, POOL_BYTES // max(1, artifact.tp * per_token))) // PAGE_SIZE * PAGE_SIZE


def cpu_environment() -> dict[str, str]:
    """SGLang's CPU switch, no hub, and stand-ins for packages that have no CPU build and are not there."""
    roots = [str(STANDINS / f"for_{name}") for name in ("torchvision", "sgl_kernel") if not imports(name)]
    environment = {
        **NO_COREDUMP,
        "SGLANG_USE_CPU_ENGINE": "1",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # torch_npu, where it is installed, would want CANN
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "OPENBLAS_NUM_THREADS": "1",  # its threads would keep SGLang's processes from being copies of one
    }
    if roots:
        before = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
        environment["PYTHONPATH"] = os.pathsep.join([*roots, *(p for p in before if p not in roots)])
    return environment


def use_cpu(tp: int = 1) -> None:
    """Make this process, and what it starts, fit for SGLang on a CPU: what `msconv serve` sets for a server.  Call
    it before sglang is imported."""
    environment = {**cpu_environment(), **rank_environment(tp), "MSCONV_TARGET": "cpu"}
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
