"""The exact command and environment that serve an artifact.  Builds them; runs nothing, imports no SGLang."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ..artifact import Manifest, read_manifest
from ..errors import EnvironmentProblem, UsageError
from ..graphs import graphs_of
from ..weights import check_size, required

STANDINS = Path(__file__).with_name("standins")
CHECK_DIGESTS = "MSCONV_CHECK_DIGESTS"  # "1": the slot compares every digest of its rank before it loads
PAGE_SIZE = 16
POOL_BYTES = 4 << 30  # most memory the KV pool takes by default on a CPU
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
    """Check the artifact and build the command.  What the user passes in `extra` wins over our defaults."""
    manifest = read_manifest(root)
    if device == "npu":
        raise EnvironmentProblem(
            f"{root}: has no graphs for an NPU: this version compiles for the CPU.", "Use --device cpu."
        )
    if device != "cpu":
        raise UsageError(f"--device {device}: cpu or npu.")
    graphs_of(root, manifest, "cpu")
    for file in required(root, manifest).files:
        check_size(root / file.path, file.size)
    if importlib.util.find_spec("sglang") is None:
        raise EnvironmentProblem(
            "sglang is not installed.", "`make setup` installs it with everything it needs on a CPU."
        )
    flags = {
        "--model-path": str(root),
        "--model-impl": "mindspore",
        "--device": "cpu",
        "--attention-backend": "torch_native",
        "--dtype": "float32",
        "--page-size": str(PAGE_SIZE),
        "--tp-size": str(manifest.parallel.tp),
        "--mem-fraction-static": "0.3",
        "--max-total-tokens": str(pool_tokens(root, manifest)),
        "--host": host,
        "--port": str(port),
    }
    given = {a.split("=")[0] for a in extra}
    aliases = {"--tp-size": {"--tp", "--tensor-parallel-size"}, "--model-path": {"--model"}}
    argv = [sys.executable, "-m", "sglang.launch_server"]
    for name, value in flags.items():
        if not given & {name, *aliases.get(name, set())}:
            argv += [name, value]
    return Launch([*argv, *extra], cpu_environment())


def pool_tokens(root: Path, manifest: Manifest) -> int:
    """Tokens of KV cache for a CPU server: within POOL_BYTES, whole pages."""
    caches = [i for i in manifest.graphs_for("cpu")[0].inputs if "_cache." in i.name]
    per_token = 4 * sum((i.shape[2] or 1) * (i.shape[3] or 1) for i in caches)
    least, most = POOL_TOKENS
    return max(least, min(most, POOL_BYTES // max(1, per_token))) // PAGE_SIZE * PAGE_SIZE


def cpu_environment() -> dict[str, str]:
    """SGLang's CPU switch, no hub, and stand-ins for packages that have no CPU build and are not there."""
    roots = [str(STANDINS / f"for_{name}") for name in ("torchvision", "sgl_kernel") if not _imports(name)]
    environment = {"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if roots:
        before = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
        environment["PYTHONPATH"] = os.pathsep.join([*roots, *(p for p in before if p not in roots)])
    return environment


def _imports(name: str) -> bool:
    """Whether the real package is there and can be imported (CUDA builds cannot, next to a CPU torch)."""
    spec = importlib.util.find_spec(name)
    if spec is None or (spec.origin and str(STANDINS) in spec.origin):
        return False
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True).returncode == 0
