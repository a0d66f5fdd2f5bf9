"""The keys of config.json: every published one is on a list, every other is refused by name.

`published_keys.json` has the names of keys; those of models whose config.json was not at hand are put together
from public descriptions of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msconv.families import FAMILIES, configure
from msconv.families.keys import ROPE, Keys
from msconv.quant.fp8_block import Fp8Block
from msconv_runtime.errors import CheckpointError, UsageError

DATA = Path(__file__).parents[1] / "data"
CONFIGS = sorted((DATA / "configs").glob("*.json"))
PUBLISHED: dict[str, dict[str, Any]] = json.loads((DATA / "published_keys.json").read_text())
FAMILY = {f.name: f for f in FAMILIES}
BASES = {"qwen3": "Qwen3-8B", "qwen3_moe": "Qwen3-30B-A3B", "deepseek_v3": "DeepSeek-V3"}
INVENTED = [
    f"{stem}_{end}"
    for stem in ("attention", "rope", "router", "expert", "layer", "logits", "head", "norm", "residual", "window")
    for end in ("gain", "offset", "warp", "gate_power", "phase")
]

QUANTIZATION = Keys(Fp8Block.keys, Fp8Block.harmless, {})


def base(family: str, **changes: Any) -> dict[str, Any]:
    raw = json.loads((DATA / "configs" / f"{BASES[family]}.json").read_text())
    return {**raw, **changes}


def refusal(raw: dict[str, Any], harmless: tuple[str, ...] = ()) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        configure(raw, "config.json", harmless)
    return caught.value


def is_listed(keys: Keys, name: str) -> bool:
    return name in keys.obeyed or name in keys.harmless or name in keys.off


# Published


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_published_configuration_is_read(path: Path) -> None:
    raw = json.loads(path.read_text())
    family, _ = configure(raw, path.name)
    assert all(is_listed(family.keys, key) for key in raw)


@pytest.mark.parametrize("model", PUBLISHED)
def test_every_key_of_a_published_model_is_on_a_list(model: str) -> None:
    entry = PUBLISHED[model]
    keys = FAMILY[entry["family"]].keys
    assert [key for key in entry["keys"] if not is_listed(keys, key)] == []
    assert [key for key in entry.get("rope", []) if not is_listed(ROPE["yarn"], key)] == []
    assert [key for key in entry.get("quantization", []) if not is_listed(QUANTIZATION, key)] == []


@pytest.mark.parametrize(
    ("kind", "name"), [("Qwen3", "qwen3"), ("Qwen3Moe", "qwen3_moe"), ("DeepseekV3", "deepseek_v3")]
)
@pytest.mark.parametrize("everything", [False, True])
def test_every_key_that_transformers_writes_is_on_a_list(kind: str, name: str, everything: bool) -> None:
    import transformers

    config = getattr(transformers, f"{kind}Config")(architectures=[f"{kind}ForCausalLM"])
    raw = json.loads(config.to_json_string(use_diff=not everything))
    assert configure(raw, "config.json")[0].name == name


def test_every_list_gives_a_reason() -> None:
    for family in FAMILIES:
        assert all(family.keys.harmless.values())
        assert all(off.what for off in family.keys.off.values())
        assert not family.keys.obeyed & family.keys.harmless.keys()


# Not known


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("key", INVENTED)
def test_an_invented_key_is_refused_by_name(family: str, key: str) -> None:
    error = refusal(base(family, **{key: 1.5}))
    assert key in error.message
    assert f"--harmless {key}" in error.hint
    configure(base(family, **{key: 1.5}), "config.json", [key])


def test_all_invented_keys_are_refused_at_once() -> None:
    error = refusal(base("qwen3", **dict.fromkeys(INVENTED, 2)))
    assert all(key in error.message for key in INVENTED)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        (
            "qwen3",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attn_factor": 0.5}},
            "rope_scaling.attn_factor",
        ),
        ("deepseek_v3", {"rope_parameters": {"extrapolation_factor": 2}}, "rope_parameters.extrapolation_factor"),
        ("qwen3", {"rope_scaling": {"rope_type": "default", "factor": 4.0}}, "rope_scaling.factor"),
        (
            "qwen3",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 8}},
            "rope_scaling.beta_fast",
        ),
        ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "alpha": 8}}, "rope_scaling.alpha"),
        ("qwen3", {"rope_scaling": {"rope_type": "default", "use_fope": True}}, "rope_scaling.use_fope"),
        (
            "qwen3",
            {"rope_scaling": None, "rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters.full_attention",
        ),
        (
            "qwen3",
            {"rope_scaling": {"mrope_section": [24, 20, 20], "type": "default"}},
            "rope_scaling.mrope_section",
        ),
        ("qwen3", {"dual_chunk_attention_config": {"chunk_size": 262144}}, "dual_chunk_attention_config"),
        ("qwen3", {"attention_chunk_size": 8192}, "attention_chunk_size"),
        ("qwen3_moe", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("qwen3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("deepseek_v3", {"swiglu_limit": 7.0}, "swiglu_limit"),
        ("deepseek_v3", {"head_dim": 100}, "head_dim 100"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 512}, "shared_expert_intermediate_size"),
        ("qwen3", {"vision_config": {}}, "vision_config"),
        ("qwen3", {"is_causal": False}, "is_causal"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 35}, "layers"),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 48}, "sliding"),
        ("deepseek_v3", {"sliding_window": 4096}, "sliding"),
        ("qwen3", {"sparse_attention_config": {"k": 1}}, "sparse_attention_config"),
        ("deepseek_v3", {"use_sliding_window": False, "n_hash_functions": 2}, "n_hash_functions"),
    ],
)
def test_a_key_that_changes_the_computation_is_refused_by_name(
    family: str, changes: dict[str, Any], words: str
) -> None:
    assert words in refusal(base(family, **changes)).message


@pytest.mark.parametrize(
    "changes",
    [
        {"dual_chunk_attention_config": None, "attention_chunk_size": None, "final_logit_softcapping": None},
        {"partial_rotary_factor": 1.0, "is_causal": True, "is_encoder_decoder": False, "pruned_heads": {}},
        {"attention_dropout": 0.3, "pretraining_tp": 4, "transformers_version": "5.0", "use_cache": False},
        {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 1.0}},
    ],
)
def test_a_key_that_changes_nothing_is_read_past(changes: dict[str, Any]) -> None:
    assert configure(base("qwen3", **changes), "config.json")[1] == configure(base("qwen3"), "config.json")[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2.0}},
        {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ],
)
def test_two_values_for_one_thing_are_refused(changes: dict[str, Any]) -> None:
    message = refusal(base("qwen3", **changes)).message
    assert "only one can hold" in message or "and rope_type" in message


def test_two_counts_of_experts_are_refused() -> None:
    assert "only one can hold" in refusal(base("qwen3_moe", num_local_experts=64)).message
    assert configure(base("qwen3_moe", num_local_experts=128), "x")[1].moe


def test_another_model_type_than_the_architecture_has_is_refused() -> None:
    with pytest.raises(UsageError, match="qwen3_next"):
        configure(base("qwen3", model_type="qwen3_next"), "config.json")


@pytest.mark.parametrize(
    ("architecture", "word"),
    [
        ("Qwen3Model", "without a head"),
        ("Qwen3ForSequenceClassification", "classes"),
        ("DeepseekV3ForTokenClassification", "classes"),
        ("KimiK25ForConditionalGeneration", "4 bits"),
    ],
)
def test_an_architecture_without_next_tokens_is_told_so(architecture: str, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        configure(base("qwen3", architectures=[architecture]), "config.json")


# Said to be harmless


def test_a_key_said_to_be_harmless_that_is_not_there_or_obeyed_is_refused() -> None:
    for name, word in (
        ("no_such", "no such key"),
        ("rope_theta", "obeyed"),
        ("rope_scaling.factor", "no such key"),
    ):
        with pytest.raises(UsageError, match=word):
            configure(base("qwen3"), "config.json", [name])


def test_a_nested_key_may_be_said_to_be_harmless() -> None:
    raw = base("qwen3", rope_scaling={"type": "yarn", "factor": 4.0, "attn_factor": 1.0})
    config = configure(raw, "x", ["rope_scaling.attn_factor"])[1]
    assert config.rope.factor == 4.0
    assert "attn_factor" in refusal({**raw, "other": 1}, ("other",)).message


NAMES = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=3, max_size=30).filter(lambda n: "." not in n)
VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)


@given(
    place=st.sampled_from(["", "rope_scaling", "rope_parameters", "quantization_config"]),
    family=st.sampled_from(sorted(BASES)),
    name=NAMES,
    value=VALUES | st.lists(VALUES, max_size=3) | st.dictionaries(NAMES, VALUES, max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_any_key_on_no_list_is_refused_wherever_it_is(place: str, family: str, name: str, value: object) -> None:
    raw = base(family)
    nested: dict[str, dict[str, Any]] = {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
        "rope_parameters": {"rope_type": "linear", "factor": 4.0},
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    }
    keys = {"": FAMILY[family].keys, "quantization_config": QUANTIZATION}.get(place, ROPE["yarn"])
    if is_listed(keys, name):
        return
    raw["rope_scaling"] = None
    if place:
        raw[place] = {**nested[place], name: value}
        name = f"{place}.{name}"
    else:
        raw[name] = value
    assert name in refusal(raw).message
    configure(raw, "config.json", [name])
