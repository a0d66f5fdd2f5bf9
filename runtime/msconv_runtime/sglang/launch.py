"""The exact command and environment that serve an artifact.  Builds them; runs nothing, imports no SGLang."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ..artifact import Manifest, Parallel, read_manifest
from ..errors import ArtifactError, EnvironmentProblem, UsageError

STANDINS = Path(__file__).with_name("standins")
STRICT_AOT = "MSCONV_STRICT_AOT"  # "0": a start that would compile for other shapes goes on all the same
CHECK_DIGESTS = "MSCONV_CHECK_DIGESTS"  # "1": the slot compares every digest of its rank before it loads
PAGE_SIZE = 16
ALIASES = {
    "--tp-size": ("--tp", "--tensor-parallel-size"),
    "--ep-size": ("--ep", "--expert-parallel-size"),
    "--model-path": ("--model",),
}
POOL_BYTES = 4 << 30  # most memory the KV pools of all ranks take by default on a CPU
POOL_TOKENS = (4096, 131072)  # least and most


@dataclass(frozen=True)
class Launch:
    """A process to start.  `environment` holds only what is added to the caller's."""

    argv: list[str]
    environment: dict[str, str]

    def shell(self) -> str:
        """As one would type it."""
        return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in self.environment.items()), shlex.join(self.argv)])


def plan_launch(root: Path, device: str, host: str, port: int, extra: list[str]) -> Launch:
    """Check the artifact, this machine and `extra`, and build the command.  What the user passes in `extra` wins
    over our defaults.  Raises one error that lists all that does not fit, each with what mends it."""
    if device not in ("cpu", "npu"):
        raise UsageError(f"--device {device}: cpu or npu.")
    manifest = read_manifest(root)
    if device == "npu":
        raise EnvironmentProblem(
            f"{root}: serving on an NPU is not there yet: nothing here has run on a device.", "Use --device cpu."
        )
    refuse(root, manifest, extra)
    flags = {
        "--model-path": str(root),
        "--model-impl": "mindspore",
        "--device": "cpu",
        "--attention-backend": "torch_native",
        "--dtype": "float32",
        "--page-size": str(PAGE_SIZE),
        **parallel_flags(manifest.parallel),
        "--mem-fraction-static": "0.3",
        "--max-total-tokens": str(pool_tokens(root, manifest)),
        "--host": host,
        "--port": str(port),
    }
    given = given_flags(extra)
    argv = [sys.executable, "-m", "sglang.launch_server"]
    for name, value in flags.items():
        if not given.keys() & {name, *ALIASES.get(name, ())}:
            argv += [name, value] if value else [name]
    return Launch([*argv, *extra], {**cpu_environment(), **rank_environment(manifest.parallel.tp)})


def refuse(root: Path, manifest: Manifest, extra: list[str]) -> None:
    """Raises ArtifactError or EnvironmentProblem that lists whatever keeps the artifact from being served here."""
    from ..doctor import Machine, examine

    findings = examine(Machine(), root).against("serve_cpu")
    problems = [f"  {f.name}: {f.found}; needed: {f.needed}.  {f.hint}" for f in findings]
    given = given_flags(extra)
    for name, wanted in {**parallel_flags(manifest.parallel), "--dtype": "float32", "--device": "cpu"}.items():
        for spelled in {name, *ALIASES.get(name, ())} & given.keys():
            if wanted and given[spelled] != wanted:
                mend = ", or make another artifact with `msconv reshard`" if name in ALIASES else ""
                problems.append(
                    f"  {spelled} {given[spelled]}: this artifact is served with {name} {wanted}.  "
                    f"Leave the flag out{mend}"
                )
    if not problems:
        return
    damaged = any(f.name in ("artifact", "file", "weights") or f.name.startswith("graphs") for f in findings)
    kind = ArtifactError if damaged else EnvironmentProblem if findings else UsageError
    raise kind(f"{root}: cannot be served here:\n" + "\n".join(problems), f"`msconv doctor {root}` says more.")


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


def rank_environment(tp: int) -> dict[str, str]:
    """What more than one rank on a CPU needs, unless the user has set it.

    SGLang wants a NUMA node or a list of cores for each rank.  MindSpore says hundreds of times that it waits
    for the other ranks, as a warning.
    """
    if tp == 1:
        return {}
    needed = {"SGLANG_CPU_OMP_THREADS_BIND": cores_by_rank(sorted(os.sched_getaffinity(0)), tp), "GLOG_v": "3"}
    return {name: value for name, value in needed.items() if name not in os.environ}


def cores_by_rank(cores: list[int], tp: int) -> str:
    """Cores in equal shares, `0,1|2,3`: what SGLANG_CPU_OMP_THREADS_BIND takes.  Ranks share if there are more."""
    share = max(1, len(cores) // tp)
    begins = [rank * share % (len(cores) // share * share) for rank in range(tp)]
    return "|".join(",".join(map(str, cores[begin : begin + share])) for begin in begins)


def pool_tokens(root: Path, manifest: Manifest) -> int:
    """Tokens of KV cache for a CPU server: within POOL_BYTES, whole pages."""
    caches = [i for i in manifest.graphs_for("cpu")[0].inputs if "_cache." in i.name]
    per_token = 4 * sum((i.shape[2] or 1) * (i.shape[3] or 1) for i in caches)
    least, most = POOL_TOKENS
    return max(least, min(most, POOL_BYTES // max(1, manifest.parallel.tp * per_token))) // PAGE_SIZE * PAGE_SIZE


def cpu_environment() -> dict[str, str]:
    """SGLang's CPU switch, no hub, and stand-ins for packages that have no CPU build and are not there.

    Without the coredump switch a server that lost a process waits 60 s for CUDA before it ends.
    """
    roots = [str(STANDINS / f"for_{name}") for name in ("torchvision", "sgl_kernel") if not _imports(name)]
    environment = {
        "SGLANG_USE_CPU_ENGINE": "1",
        "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    if roots:
        before = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
        environment["PYTHONPATH"] = os.pathsep.join([*roots, *(p for p in before if p not in roots)])
    return environment


def use_cpu(tp: int = 1) -> None:
    """Make this process, and what it starts, fit for SGLang on a CPU: what `msconv serve` sets for a server.  Call
    it before sglang is imported."""
    environment = {**cpu_environment(), **rank_environment(tp)}
    for path in reversed(environment.get("PYTHONPATH", "").split(os.pathsep)):
        if path.startswith(str(STANDINS)) and path not in sys.path:
            sys.path.insert(0, path)
    os.environ.update(environment)


def _imports(name: str) -> bool:
    """Whether the real package is there and can be imported (CUDA builds cannot, next to a CPU torch)."""
    spec = importlib.util.find_spec(name)
    if spec is None or (spec.origin and str(STANDINS) in spec.origin):
        return False
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True).returncode == 0
