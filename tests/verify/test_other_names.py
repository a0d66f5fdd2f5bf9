"""Models that are published under other names, or in another spelling, and compute what a supported family does:
small random ones in the form of each config.json, converted, compiled and proven."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import Stored, make_qwen3, read_safetensors, write_safetensors
from tests.commands import run_python
from tests.every import EVERY
from tests.moe_checkpoints import add_mtp, make_deepseek_v3, make_qwen3_moe, quantise_fp8
from tests.stream.test_stored_names import renamed, stack
from tests.warm import run_warm

pytestmark = pytest.mark.slow

FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
CODE = {
    "AutoConfig": "configuration_deepseek.DeepseekV3Config",
    "AutoModel": "modeling_deepseek.DeepseekV3Model",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
}
PUBLISHED_V3 = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": CODE,
    "ep_size": 1,
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.3",
    "use_cache": True,
}
PUBLISHED_QWEN = {
    "attention_dropout": 0.0,
    "max_window_layers": 2,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_sliding_window": False,
}
V3_YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 64,
    "type": "yarn",
}
SMALL = {"num_hidden_layers": 2, "vocab_size": 203, "hidden_size": 64, "intermediate_size": 64}
SMALL_V3 = {**SMALL, "hidden_size": 192, "intermediate_size": 320, "moe_intermediate_size": 192}
KIMI = {"n_group": 1, "topk_group": 1, "n_routed_experts": 24, "routed_scaling_factor": 2.827}
MOONLIGHT = {"n_shared_experts": 2, "q_lora_rank": None, "routed_scaling_factor": 2.446, "rms_norm_eps": 1e-5}
Maker = Callable[..., Path]


@dataclass(frozen=True)
class Case:
    """A model as published, made small.  `values`: for transformers; `rope`: theta and rope_scaling; `said`: what
    its config.json has besides; `change`: what is done with its tensors."""

    make: Maker
    values: dict[str, Any]
    theta: float
    said: dict[str, Any]
    rope: dict[str, Any] | None = None
    fp8: dict[str, Any] = field(default_factory=dict)
    mtp: bool = False
    body: str = "model."


CASES = {
    "DeepSeek-V3-0324": Case(make_deepseek_v3, SMALL_V3, 1e4, PUBLISHED_V3, V3_YARN, FP8, mtp=True),
    "DeepSeek-R1-0528": Case(make_deepseek_v3, SMALL_V3, 1e4, PUBLISHED_V3, V3_YARN, FP8, mtp=True),
    "DeepSeek-V3.1": Case(
        make_deepseek_v3, SMALL_V3, 1e4, PUBLISHED_V3, V3_YARN, {**FP8, "scale_fmt": "ue8m0"}, mtp=True
    ),
    "Kimi-K2-Instruct": Case(
        make_deepseek_v3,
        {**SMALL_V3, **KIMI},
        5e4,
        {**PUBLISHED_V3, "model_type": "kimi_k2", "aux_loss_alpha": 0.001, "seq_aux": True, "pretraining_tp": 1},
        {**V3_YARN, "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
        FP8,
    ),
    "Moonlight-16B-A3B": Case(
        make_deepseek_v3,
        {**SMALL, "n_group": 1, "topk_group": 1, **MOONLIGHT},
        5e4,
        {**PUBLISHED_V3, "aux_loss_alpha": 0.001, "seq_aux": True, "pretraining_tp": 1},
    ),
    "Qwen3-Embedding-0.6B": Case(make_qwen3, {**SMALL, "tie_word_embeddings": True}, 1e6, PUBLISHED_QWEN, body=""),
    "Qwen3-Reranker-4B": Case(make_qwen3, {**SMALL, "tie_word_embeddings": True}, 1e6, PUBLISHED_QWEN),
    "Qwen3-Reranker-8B": Case(make_qwen3, SMALL, 1e6, PUBLISHED_QWEN),
    "Qwen3-4B-Instruct-2507": Case(make_qwen3, {**SMALL, "tie_word_embeddings": True}, 5e6, PUBLISHED_QWEN),
    "Qwen3-30B-A3B-Instruct-2507": Case(make_qwen3_moe, {**SMALL, "mlp_only_layers": []}, 1e7, PUBLISHED_QWEN),
    "Qwen3-235B-A22B-Thinking-2507": Case(make_qwen3_moe, {**SMALL, "mlp_only_layers": []}, 5e6, PUBLISHED_QWEN),
    "Qwen3-Coder-480B-A35B-Instruct": Case(
        make_qwen3_moe,
        {**SMALL, "mlp_only_layers": []},
        1e7,
        {**PUBLISHED_QWEN, "qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0},
    ),
    "Qwen3-30B-A3B-Thinking-2507-FP8": Case(
        make_qwen3_moe,
        {**SMALL_V3, "mlp_only_layers": []},
        1e7,
        PUBLISHED_QWEN,
        fp8={**FP8, "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"]},
    ),
}


OF_EACH_KIND = (
    "DeepSeek-V3.1",
    "Kimi-K2-Instruct",
    "Moonlight-16B-A3B",
    "Qwen3-Embedding-0.6B",
    "Qwen3-30B-A3B-Thinking-2507-FP8",
)
PROVED = CASES if EVERY else OF_EACH_KIND  # `make test-names` takes all


def publish(case: Case, directory: Path) -> Path:
    """The checkpoint as it would be published: names, spelling of config.json, element types."""
    scaling = {("rope_type" if k == "type" else k): v for k, v in (case.rope or {"type": "default"}).items()}
    values = {**case.values, "rope_theta": case.theta, "rope_parameters": scaling}
    model = case.make(directory / "made", **values)
    if case.mtp:
        model = add_mtp(model)
    if case.fp8:
        model = quantise_fp8(model, directory / "fp8")
    if case.body != "model.":
        model = renamed(model, directory / "renamed", case.body, "")
    path = model / "config.json"
    raw = json.loads(path.read_text())
    for key in ("rope_parameters", "dtype", "qk_head_dim", "rope_interleave", "layer_types", "pad_token_id"):
        raw.pop(key, None)
    if "v_head_dim" in raw:
        raw.pop("head_dim", None)
    raw |= {"rope_theta": case.theta, "rope_scaling": case.rope, **case.said}
    if case.fp8:
        raw["quantization_config"] = case.fp8
    path.write_text(json.dumps(raw))
    return model


def powers_of_two(model: Path) -> None:
    """Scales as DeepSeek-V3.1 has them, float32 without a mantissa."""
    for path in model.glob("*.safetensors"):
        tensors = read_safetensors(path)
        for name, tensor in tensors.items():
            if name.endswith("_scale_inv"):
                exponents = np.floor(np.log2(tensor.bits.view(np.float32)))
                tensors[name] = Stored("F32", np.exp2(exponents).astype(np.float32).view(np.uint32))
        write_safetensors(path, tensors)


def prove(model: Path, root: Path) -> None:
    """By the command line: convert, compile for the CPU, verify.  Each ends with 0."""
    for arguments in (
        ("convert", "--model", str(model), "--tp", "1", "--dtype", "float32", "--output", str(root)),
        ("compile", str(root), "--target", "cpu"),
        ("verify", str(root), "--target", "cpu"),
    ):
        done = run_warm(*arguments)
        assert done.code == 0, f"{' '.join(arguments)}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("name", PROVED)
def test_the_same_graph_under_another_name_is_proven(tmp_path: Path, name: str) -> None:
    model = publish(CASES[name], tmp_path)
    if "scale_fmt" in CASES[name].fp8:
        powers_of_two(model)
    prove(model, tmp_path / "artifact")
    served = json.loads((tmp_path / "artifact" / "config.json").read_text())
    assert served == json.loads((model / "config.json").read_text())


SGLANG = """
import sys
sys.path[:0] = sys.argv[2:]
from sglang.srt.utils.hf_transformers_utils import get_config
c = get_config(sys.argv[1], trust_remote_code=False)
print("resolved", c.model_type, c.architectures[0], c.n_routed_experts, c.rope_parameters["factor"])
"""
STANDINS = Path(__file__).parents[2] / "runtime" / "msconv_runtime" / "sglang" / "standins"


def test_sglang_knows_the_type_of_kimi_without_its_code(tmp_path: Path) -> None:
    model = publish(CASES["Kimi-K2-Instruct"], tmp_path)
    done = run_python(SGLANG, model, *STANDINS.glob("for_*"), timeout=300)
    assert "resolved kimi_k2 DeepseekV3ForCausalLM 24 32.0" in done.stdout, done.stderr


def test_stacked_experts_under_a_prefix_are_proven(tmp_path: Path) -> None:
    plain = make_qwen3_moe(tmp_path / "plain", **{**SMALL, "mlp_only_layers": []})
    stacked = stack(plain, tmp_path / "stacked", 16)
    prove(renamed(stacked, tmp_path / "prefixed", "_orig_mod.model.", "_orig_mod."), tmp_path / "artifact")


def test_a_window_in_no_layer_is_proven(tmp_path: Path) -> None:
    values = {**SMALL, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}
    prove(make_qwen3(tmp_path / "model", **values), tmp_path / "artifact")
