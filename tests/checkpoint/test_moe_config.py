"""config.json of models with experts: both spellings, what absence means, and all that is wrong said at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from msconv.families import configure
from msconv.families.config import DecoderConfig, Mla, Moe
from msconv.quant.fp8_block import Fp8Block
from msconv_runtime.errors import CheckpointError, UsageError
from tests.commands import run_msconv
from tests.moe_checkpoints import SMALL_DEEPSEEK_V3, SMALL_QWEN3_MOE

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def published(name: str, **changes: Any) -> dict[str, Any]:
    """A published configuration; a change to `...` removes the key."""
    raw = {**json.loads((CONFIGS / f"{name}.json").read_text()), **changes}
    return {key: value for key, value in raw.items() if value is not ...}


def read(name: str, **changes: Any) -> DecoderConfig:
    return configure(published(name, **changes), "config.json")[1]


def moe(name: str, **changes: Any) -> Moe:
    found = read(name, **changes).moe
    assert found is not None
    return found


def mla(**changes: Any) -> Mla:
    found = read("DeepSeek-V3", **changes).mla
    assert found is not None
    return found


def problems(name: str, **changes: Any) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        read(name, **changes)
    head, *lines = caught.value.message.splitlines()
    assert head.startswith("config.json: ")
    return [line.strip() for line in lines]


# Published


def test_qwen3_moe_as_published() -> None:
    family, config = configure(published("Qwen3-235B-A22B"), "x")
    assert family.name == "qwen3_moe"
    wanted = Moe(layers=(True,) * 94, experts=128, top_k=8, ffn=1536, scoring="softmax", normalise=True)
    assert config.moe == wanted
    assert (config.mla, config.formats, config.mtp_layers) == (None, (), 0)
    assert (config.heads, config.kv_heads, config.head_dim, config.hidden) == (64, 4, 128, 4096)
    assert config.softmax_scale == 128**-0.5


@pytest.mark.parametrize("name", ["DeepSeek-V3", "DeepSeek-R1"])
def test_deepseek_as_published(name: str) -> None:
    family, config = configure(published(name), "x")
    assert family.name == "deepseek_v3"
    assert config.moe == Moe(
        layers=(False,) * 3 + (True,) * 58,
        experts=256,
        top_k=8,
        ffn=2048,
        shared_ffn=2048,
        scoring="sigmoid",
        groups=8,
        top_groups=4,
        normalise=True,
        scale=2.5,
    )
    assert config.mla == Mla(q_lora=1536, kv_lora=512, nope=128, rope=64, v_dim=128, interleaved=True)
    assert (config.mtp_layers, config.head_dim, config.rope_dim) == (1, 192, 64)
    assert config.formats == (Fp8Block(128, 128),)
    assert config.softmax_scale == pytest.approx(0.1352337788608801)  # 192 ** -0.5 * (0.1 ln 40 + 1) ** 2


# Both spellings


def saved(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    """What transformers writes for these values."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**values, architectures=[f"{kind}ForCausalLM"])
    return dict(json.loads(config.to_json_string()))


def test_what_transformers_writes_of_qwen3_is_read_like_what_is_published() -> None:
    old = {k: v for k, v in SMALL_QWEN3_MOE.items() if k != "rope_parameters"}
    old |= {"architectures": ["Qwen3MoeForCausalLM"], "hidden_act": "silu", "decoder_sparse_step": 1}
    values = {k: v for k, v in old.items() if k not in ("architectures", "rope_theta")}
    new = saved("Qwen3Moe", {**values, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}})
    a, b = configure(old, "old")[1], configure(new, "new")[1]
    assert (a.moe, a.rope, a.sizes()) == (b.moe, b.rope, b.sizes())
    assert a.moe is not None
    assert a.moe.layers == (True, False, True, True)


@pytest.mark.parametrize("q_lora", [48, None])
def test_what_transformers_writes_of_deepseek_is_read_like_what_is_published(q_lora: int | None) -> None:
    values = {**SMALL_DEEPSEEK_V3, "q_lora_rank": q_lora}
    scaling = {**values.pop("rope_parameters")}
    theta = values.pop("rope_theta")
    old = {**values, "architectures": ["DeepseekV3ForCausalLM"], "hidden_act": "silu", "rope_theta": theta}
    old["rope_scaling"] = {("type" if k == "rope_type" else k): v for k, v in scaling.items()}
    new = saved("DeepseekV3", {**values, "rope_parameters": {**scaling, "rope_theta": theta}})
    a, b = configure(old, "old")[1], configure(new, "new")[1]
    assert (a.moe, a.mla, a.rope, a.sizes()) == (b.moe, b.mla, b.rope, b.sizes())
    assert a.softmax_scale == b.softmax_scale


def test_the_count_of_experts_has_two_names() -> None:
    assert moe("Qwen3-30B-A3B", num_experts=..., num_local_experts=64).experts == 64
    assert moe("Qwen3-30B-A3B", num_experts=64).experts == 64


DEFAULTS: list[tuple[str, Any]] = [
    ("n_group", lambda c: c.moe.groups),
    ("topk_group", lambda c: c.moe.top_groups),
    ("routed_scaling_factor", lambda c: c.moe.scale),
    ("norm_topk_prob", lambda c: c.moe.normalise),
    ("n_shared_experts", lambda c: c.moe.shared_ffn // c.moe.ffn),
    ("first_k_dense_replace", lambda c: c.moe.layers.index(True)),
    ("q_lora_rank", lambda c: c.mla.q_lora),
    ("rope_interleave", lambda c: c.mla.interleaved),
]


@pytest.mark.parametrize(("key", "found"), DEFAULTS, ids=[key for key, _ in DEFAULTS])
def test_a_key_that_is_absent_means_what_transformers_means_by_it(key: str, found: Any) -> None:
    """Or it is an error.  Never something else."""
    from transformers import DeepseekV3Config

    try:
        config = read("DeepSeek-V3", **{key: ...})
    except CheckpointError as e:
        assert key in e.message
    else:
        assert found(config) == getattr(DeepseekV3Config(), key)


@pytest.mark.parametrize(
    ("key", "found"), [("norm_topk_prob", lambda m: m.normalise), ("decoder_sparse_step", lambda m: sum(m.layers))]
)
def test_a_key_that_is_absent_in_qwen3_means_what_transformers_means_by_it(key: str, found: Any) -> None:
    from transformers import Qwen3MoeConfig

    wanted = getattr(Qwen3MoeConfig(), key)
    if key == "decoder_sparse_step":
        wanted = 48 // wanted
    assert found(moe("Qwen3-30B-A3B", **{key: ...})) == wanted


# Which layers, and how tokens are routed


@pytest.mark.parametrize(
    ("changes", "dense"),
    [
        ({}, set()),
        ({"mlp_only_layers": [0, 5, 47]}, {0, 5, 47}),
        ({"mlp_only_layers": None}, set()),
        ({"mlp_only_layers": ...}, set()),
        ({"decoder_sparse_step": 2}, set(range(0, 48, 2))),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [2]}, {i for i in range(48) if i % 3 != 2} | {2}),
    ],
)
def test_layers_with_and_without_experts(changes: dict[str, Any], dense: set[int]) -> None:
    config = read("Qwen3-30B-A3B", **changes)
    assert {i for i in range(48) if not config.has_experts(i)} == dense
    sizes = config.sizes()
    assert {i for i in range(48) if sizes.holds("dense_layer", i)} == dense
    assert {i for i in range(48) if sizes.holds("moe_layer", i)} == set(range(48)) - dense


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("name", ["DeepSeek-V3", "Qwen3-30B-A3B"])
def test_weights_of_chosen_experts_are_normalised_if_it_says_so(name: str, value: bool) -> None:
    assert moe(name, norm_topk_prob=value).normalise is value


def test_a_query_without_a_low_rank_and_a_model_without_shared_experts() -> None:
    assert mla(q_lora_rank=None).q_lora == 0
    sizes = read("DeepSeek-V3", q_lora_rank=None, n_shared_experts=0).sizes()
    assert sizes.holds("no_q_lora", 5)
    assert not sizes.holds("q_lora", 5)
    assert not any(sizes.holds("shared_expert", i) for i in range(61))
    assert moe("DeepSeek-V3", n_shared_experts=None).shared_ffn == 0
    assert moe("DeepSeek-V3", n_shared_experts=2).shared_ffn == 4096


def test_rows_that_are_not_interleaved_stay_where_they_are() -> None:
    assert not mla(rope_interleave=False).interleaved
    assert read("DeepSeek-V3", rope_interleave=False).sizes().dims["pairs"] == 0
    assert read("DeepSeek-V3").sizes().dims["pairs"] == 64


@pytest.mark.parametrize("first", [0, 61, 80])
def test_any_number_of_first_layers_may_be_dense(first: int) -> None:
    assert moe("DeepSeek-V3", first_k_dense_replace=first).layers == tuple(i >= first for i in range(61))


@pytest.mark.parametrize(("value", "count"), [(0, 0), (None, 0), (..., 0), (3, 3)])
def test_layers_for_multi_token_prediction_are_counted(value: Any, count: int) -> None:
    assert read("DeepSeek-V3", num_nextn_predict_layers=value).mtp_layers == count


def test_no_quantisation_is_no_block() -> None:
    assert read("DeepSeek-V3", quantization_config=...).formats == ()
    assert read("DeepSeek-V3", quantization_config=None).formats == ()
    other = read("DeepSeek-V3", quantization_config={**FP8, "weight_block_size": [64, 256]})
    assert other.formats == (Fp8Block(64, 256),)


# Wrong

WRONG: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("DeepSeek-V3", {"scoring_func": "softmax"}, ("scoring_func", "softmax", "only sigmoid")),
    ("DeepSeek-V3", {"topk_method": "group_limited_greedy"}, ("topk_method", "only noaux_tc")),
    ("DeepSeek-V3", {"n_group": 7}, ("n_routed_experts 256", "n_group 7")),
    ("DeepSeek-V3", {"n_group": 512}, ("n_routed_experts 256", "n_group 512")),
    ("DeepSeek-V3", {"n_group": 256, "topk_group": 8}, ("groups of 1 expert",)),
    ("DeepSeek-V3", {"n_group": 0}, ("n_group = 0",)),
    ("DeepSeek-V3", {"topk_group": 9}, ("topk_group 9", "n_group 8")),
    ("DeepSeek-V3", {"num_experts_per_tok": 129}, ("num_experts_per_tok 129", "4 groups of 32")),
    ("DeepSeek-V3", {"qk_rope_head_dim": 63}, ("qk_rope_head_dim 63 is odd",)),
    ("DeepSeek-V3", {"attention_bias": True}, ("attention_bias is true",)),
    ("DeepSeek-V3", {"moe_layer_freq": 2}, ("moe_layer_freq",)),
    ("DeepSeek-V3", {"index_topk": 2048}, ("index_topk", "V3.2")),
    ("DeepSeek-V3", {"index_n_heads": 64, "index_head_dim": 128}, ("index_n_heads", "V3.2")),
    ("DeepSeek-V3", {"num_key_value_heads": 8}, ("num_key_value_heads 8", "128 heads")),
    ("DeepSeek-V3", {"kv_lora_rank": None}, ("kv_lora_rank = None",)),
    ("DeepSeek-V3", {"v_head_dim": ...}, ("v_head_dim",)),
    ("DeepSeek-V3", {"n_routed_experts": None}, ("n_routed_experts",)),
    ("DeepSeek-V3", {"n_routed_experts": 1 << 30}, ("n_routed_experts",)),
    ("DeepSeek-V3", {"n_shared_experts": -1}, ("n_shared_experts = -1",)),
    ("DeepSeek-V3", {"first_k_dense_replace": "3"}, ("first_k_dense_replace = '3'",)),
    ("DeepSeek-V3", {"routed_scaling_factor": 0}, ("routed_scaling_factor = 0",)),
    ("DeepSeek-V3", {"norm_topk_prob": 1}, ("norm_topk_prob = 1",)),
    ("DeepSeek-V3", {"num_nextn_predict_layers": 1 << 40}, ("num_nextn_predict_layers",)),
    ("DeepSeek-V3", {"hidden_act": "gelu"}, ("hidden_act", "only silu")),
    ("Qwen3-30B-A3B", {"num_experts_per_tok": 129}, ("num_experts_per_tok 129", "num_experts 128")),
    ("Qwen3-30B-A3B", {"num_experts": 0}, ("num_experts = 0",)),
    ("Qwen3-30B-A3B", {"num_experts": ...}, ("num_local_experts",)),
    ("Qwen3-30B-A3B", {"decoder_sparse_step": 0}, ("decoder_sparse_step = 0",)),
    ("Qwen3-30B-A3B", {"mlp_only_layers": "0"}, ("mlp_only_layers",)),
    ("Qwen3-30B-A3B", {"mlp_only_layers": [0.5]}, ("mlp_only_layers",)),
    ("Qwen3-30B-A3B", {"mlp_only_layers": [True]}, ("mlp_only_layers",)),
    ("Qwen3-30B-A3B", {"moe_intermediate_size": -1}, ("moe_intermediate_size = -1",)),
    ("Qwen3-30B-A3B", {"use_sliding_window": True, "sliding_window": 4096}, ("use_sliding_window",)),
]


@pytest.mark.parametrize(("name", "changes", "words"), WRONG)
def test_what_cannot_be_obeyed_is_refused_by_name(
    name: str, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    found = problems(name, **changes)
    assert any(all(word in problem for word in words) for problem in found), found
    assert len(found) <= 2  # what a bad number spoils further is no news


@pytest.mark.parametrize(
    ("quantisation", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, ("quant_method = 'gptq' (GPTQ): only compressed-tensors, fp8",)),
        ({"quant_method": "awq"}, ("quant_method = 'awq'",)),
        ({**FP8, "fmt": "e5m2"}, ("fmt = 'e5m2': only e4m3",)),
        ({**FP8, "weight_block_size": None}, ("weight_block_size = None",)),
        ({**FP8, "weight_block_size": [128]}, ("weight_block_size = [128]",)),
        ({**FP8, "weight_block_size": [128, 0]}, ("weight_block_size",)),
        ({**FP8, "weight_block_size": [128, 128, 128]}, ("weight_block_size",)),
        ({**FP8, "weight_block_size": [128, 1.5]}, ("weight_block_size",)),
        ({**FP8, "weight_block_size": [True, True]}, ("weight_block_size",)),
        ("fp8", ("quantization_config = 'fp8'",)),
        (["fp8"], ("quantization_config",)),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, ("config_groups = {}",)),
    ],
)
@pytest.mark.parametrize("name", ["DeepSeek-V3", "Qwen3-30B-A3B"])
def test_another_quantisation_is_refused_by_name(name: str, quantisation: Any, words: tuple[str, ...]) -> None:
    found = problems(name, quantization_config=quantisation)
    assert all(any(word in problem for problem in found) for word in words), found


def test_everything_wrong_is_said_at_once() -> None:
    found = problems(
        "DeepSeek-V3",
        scoring_func="softmax",
        topk_method="greedy",
        n_group=7,
        qk_rope_head_dim=63,
        attention_bias=True,
        moe_layer_freq=2,
        index_topk=2048,
        num_key_value_heads=1,
        quantization_config={"fmt": "e5m2"},
        hidden_act="gelu",
        norm_topk_prob="yes",
    )
    for word in (
        *("scoring_func", "topk_method", "n_group 7", "qk_rope_head_dim", "attention_bias", "moe_layer_freq"),
        *(
            "index_topk",
            "num_key_value_heads",
            "fmt = ",
            "weight_block_size",
            "hidden_act",
            "norm_topk_prob",
        ),
    ):
        assert sum(word in problem for problem in found) == 1, word
    assert len(found) == 12


# Neighbours


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("DeepseekV2ForCausalLM", ("DeepSeek-V2", "softmax", "sigmoid")),
        ("DeepseekV32ForCausalLM", ("index_topk", "V3.2")),
        ("Qwen3NextForCausalLM", ("linear attention",)),
    ],
)
def test_a_model_that_looks_alike_is_refused_with_what_differs(architecture: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        read("DeepSeek-V3", architectures=[architecture])
    assert caught.value.exit_code == 2
    assert all(word in caught.value.message for word in (architecture, *words))
    for supported in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM"):
        assert supported in caught.value.hint


@pytest.mark.parametrize("command", ["convert", "plan"])
def test_the_command_line_exits_2_for_a_model_that_looks_alike(command: str, tmp_path: Path) -> None:
    raw = published("DeepSeek-V3", architectures=["DeepseekV32ForCausalLM"], model_type="deepseek_v32")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    done = run_msconv(command, "--model", tmp_path, "--tp", 2, "--output", tmp_path / "out", "--json")
    assert done.code == 2
    assert done.json["error"]["code"] == "usage"
    assert "sparse attention" in done.json["error"]["message"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model_type", "family"), [("deepseek_v3", "DeepSeek-V3"), ("qwen3_moe", "Qwen3-30B-A3B")]
)
def test_without_architectures_the_type_of_the_model_counts(model_type: str, family: str) -> None:
    raw = published(family, architectures=...)
    assert configure(raw, "x")[0].name == model_type
