"""Graphs of small models, exported in this process, with the entries that a manifest has for them."""

from __future__ import annotations

import functools
from typing import Any

from msconv.families import FAMILIES
from msconv.families.config import DecoderConfig
from msconv.families.config_json import read_config
from msconv.layout.cuts import make_mesh
from msconv_runtime.artifact import Graph, digest_bytes
from msconv_runtime.roles import ROLES
from msconv_runtime.targets import TARGETS
from tests.checkpoints import SMALL
from tests.int8 import Int8Types, quantised
from tests.moe_checkpoints import SMALL_DEEPSEEK_V3, SMALL_QWEN3_MOE

PLAIN: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {**SMALL, **PLAIN, "num_hidden_layers": 1},
    "qwen3 tied": {
        **SMALL,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "num_hidden_layers": 1,
        "rope_parameters": YARN,
    },
    "qwen3_moe": {**SMALL_QWEN3_MOE, **PLAIN, "num_hidden_layers": 2},
    "qwen3_moe top 1": {
        **SMALL_QWEN3_MOE,
        **PLAIN,
        "num_experts_per_tok": 1,
        "norm_topk_prob": False,
        "num_hidden_layers": 1,
        "mlp_only_layers": [],
    },
    "deepseek_v3": {**SMALL_DEEPSEEK_V3, "num_hidden_layers": 2},
    "deepseek_v3 plain": {
        **SMALL_DEEPSEEK_V3,
        **PLAIN,
        "num_hidden_layers": 2,
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "rope_interleave": False,
    },
    "deepseek_v3 no shared": {
        **SMALL_DEEPSEEK_V3,
        "n_shared_experts": 0,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 0,
    },
}


INT8 = {  # how matrices are kept, and whether norms have biases
    "qwen3 int8": ("static", True),
    "qwen3 unshifted int8": ("dynamic", False),
    "qwen3_moe int8": ("dynamic", True),
    "deepseek_v3 dynamic int8": ("dynamic", True),
    "deepseek_v3 int8": ("mixed", True),
}
MODELS |= {name: MODELS[name.partition(" ")[0]] for name in INT8}


class AllInBfloat16(dict[str, str]):
    """The stored type of every weight, whatever its name."""

    def get(self, name: str, default: Any = None) -> Any:
        return "bfloat16"


def config_named(model: str) -> DecoderConfig:
    family = next(f for f in FAMILIES if f.name == model.partition(" ")[0])
    return read_config({"model_type": family.name, **MODELS[model]}, family, model)


@functools.cache
def exported(
    model: str, target: str, role: str, variant: str = "", tp: int = 1, ep: int = 1, fused: tuple[str, ...] = ()
) -> tuple[bytes, Graph]:
    """The graph's bytes, and its entry."""
    from msconv.graph.export import export
    from msconv.graph.spec import Local

    config, types = config_named(model), AllInBfloat16()
    if model in INT8:
        config, types = quantised(config), Int8Types(*INT8[model])
    made = export(Local(config, make_mesh(tp, ep), TARGETS[target], ROLES[role], variant, types, fused=fused))
    entry = Graph(
        target=target,
        role=role,
        variant=variant,
        path=f"graphs/{target}/{role}{variant}.mindir",
        size=len(made.proto),
        digest=digest_bytes(made.proto),
        mindspore="2.10.0",
        nodes=made.nodes,
        inputs=made.inputs,
        outputs=made.outputs,
        reads=made.parameters,
        groups=made.groups,
        nz=made.nz,
        kinds=made.kinds,
        fused=list(fused),
    )
    return made.proto, entry
