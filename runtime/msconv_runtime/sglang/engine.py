"""SGLang as a serving engine: versions, environment, and the command of its MindSpore slot."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping

from .. import __version__
from ..artifact import Artifact
from ..doctor import Beside, Finding, Machine, Needs, Package, Variable
from ..doctor.findings import NPU, SERVE
from ..kv_pool import Pool
from ..serving.engine import Engine
from ..serving.halves import Half
from ..serving.nodes import Nodes
from ..targets import Target
from . import flags, halves
from .accepted import untried
from .environment import VERSIONS, server_environment
from .keys import hide_words
from .served import PACKAGE
from .speculation import drafts, speculation_notes

NOT_NEEDED = "an artifact is served without it, and fills the slot that it was for"
NEEDS = Needs(
    packages={
        "msconv": Package(
            (__version__,), SERVE, "`pip install --no-deps .`: by its package SGLang finds the plug-in"
        ),
        "sglang": Package(VERSIONS, SERVE),
        "torch_npu": Package((), NPU, "for an NPU only: install the torch_npu made for this torch"),
    },
    variables={
        "SGLANG_EXTERNAL_MODEL_PACKAGE": Variable(f"|{re.escape(PACKAGE)}", "wrong", f"none, or {PACKAGE}", SERVE),
        "SGLANG_RUST_SERVER": Variable(
            "|0|(?i:false)", "wrong", "none: it would pass msconv's list of endpoints", SERVE
        ),
        "SGLANG_PLUGINS": Variable(r"|(.*,)?\s*msconv\s*(,.*)?", "wrong", "none, or msconv among them", SERVE),
    },
    tokens_flag=flags.TOKENS,
    no_tokenizer=flags.NO_TOKENIZER,
    for_flags={"--enable-metrics": "prometheus_client"},
    beside=(
        Beside(
            "sgl-mindspore",
            "sglang",
            (0, 5, 16),
            "its Qwen3, Qwen3-MoE and Llama do not import there (get_attention_tp_rank is gone)",
            NOT_NEEDED,
        ),
        Beside(
            "sgl-mindspore",
            "sglang",
            (0, 5, 21),
            "it does not import there (get_world_group is gone from sglang.srt.distributed)",
            NOT_NEEDED,
        ),
    ),
)


class SGLang(Engine):
    title = "SGLang"
    needs = NEEDS
    aliases = flags.ALIASES
    set_elsewhere = flags.SET_ELSEWHERE

    def command(self) -> list[str]:
        return [sys.executable, "-m", "sglang.launch_server"]

    def flags(self, artifact: Artifact, target: Target, nodes: Nodes, host: str, port: int) -> dict[str, str]:
        return {
            "--model-path": str(artifact.root),
            "--model-impl": "mindspore",
            **flags.name_flags(artifact),
            **flags.device_flags(artifact, target),
            **flags.parallel_flags(artifact.manifest.parallel),
            **flags.node_flags(nodes),
            "--host": host,
            "--port": str(port),
        }

    def sized(self, context: int, requests: int) -> dict[str, int]:
        return {"context-length": context, "max-running-requests": requests}

    def environment(self, target: Target, ranks: int, machines: int) -> dict[str, str]:
        return server_environment(target, ranks, machines)

    def copies(self, given: Mapping[str, str]) -> int:
        return flags.copies(given)

    def pool(self, artifact: Artifact, target: Target, given: Mapping[str, str]) -> Pool:
        return flags.given_pool(artifact, target, given)

    def problems(self, artifact: Artifact, target: Target, given: Mapping[str, str]) -> list[str]:
        return flags.given_problems(artifact, target, given)

    def untried(self, given: Mapping[str, str]) -> list[str]:
        return untried(given)

    def drafts(self, given: Mapping[str, str]) -> list[Artifact]:
        return drafts(given)

    def half_flags(self, half: Half, target: Target) -> dict[str, str]:
        return halves.half_flags(half, target)

    def half_environment(self, target: Target, host: str) -> dict[str, str]:
        return halves.half_environment(target, host)

    def half_findings(self, machine: Machine, target: Target) -> list[Finding]:
        return list(halves.half_findings(machine, target))

    def half_problems(self, target: Target, given: Mapping[str, str], elsewhere: bool) -> list[str]:
        return halves.half_problems(target, given, elsewhere)

    def half_notes(self, target: Target) -> list[str]:
        return halves.half_notes(target)

    def notes(self, target: Target, given: Mapping[str, str]) -> list[str]:
        return speculation_notes(target, given)

    def without_keys(self, argv: list[str]) -> list[str]:
        return hide_words(argv)


ENGINE = SGLang()
