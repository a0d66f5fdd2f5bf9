"""Plans of the published models, and what a plan refuses."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msconv.families import configure
from msconv.families.config import DecoderConfig, Family
from msconv.layout.cuts import COPY, Mesh
from msconv.layout.model import TensorInfo, expected_sources
from msconv.layout.names import fold, listing
from msconv.layout.plan import Plan
from msconv.layout.planning import make_plan
from msconv.layout.rules import keep, only
from msconv_runtime.errors import PlanError

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
DENSE = {
    "Qwen3-0.6B": 0.596,
    "Qwen3-1.7B": 1.721,
    "Qwen3-4B": 4.022,
    "Qwen3-8B": 8.191,
    "Qwen3-14B": 14.768,
    "Qwen3-32B": 32.762,
}
ELEMENT_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4}


def published(name: str, **changes: Any) -> tuple[Family, DecoderConfig]:
    raw = json.loads((CONFIGS / f"{name}.json").read_text())
    return configure({**raw, **changes}, name)


def plan_of(
    name: str,
    tp: int = 1,
    dtype: str | None = None,
    sources: dict[str, TensorInfo] | None = None,
    **options: Any,
) -> Plan:
    family, config = published(name)
    found = sources_of(name) if sources is None else sources
    return make_plan(family.table, config.sizes(), found, Mesh(tp), dtype, **options)


def sources_of(name: str) -> dict[str, TensorInfo]:
    family, config = published(name)
    return {
        n: replace(t, nbytes=count(t.shape) * 2)
        for n, t in expected_sources(family.table, config.sizes(), "bfloat16").items()
    }


def count(shape: tuple[int, ...]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


def headers(plan: Plan) -> list[dict[str, Any]]:
    """Each file's header, as any safetensors reader sees it."""
    out = []
    for file in plan.files:
        (length,) = struct.unpack("<Q", file.header[:8])
        assert len(file.header) == 8 + length
        out.append(json.loads(file.header[8:]))
    return out


@pytest.mark.parametrize("name", DENSE)
def test_a_published_model_has_its_published_parameter_count(name: str) -> None:
    assert round(plan_of(name).parameters / 1e9, 3) == DENSE[name]


@pytest.mark.parametrize("name", DENSE)
def test_a_published_model_uses_every_tensor_once(name: str) -> None:
    sources = sources_of(name)
    plan = plan_of(name)
    assert set(plan.moves) == set(sources)
    assert all(len(moves) == 1 for moves in plan.moves.values())
    assert not plan.dropped
    assert plan.dtype == plan.source_dtype == "bfloat16"


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("name", DENSE)
def test_a_published_model_splits_over_the_usual_ranks(name: str, tp: int) -> None:
    plan = plan_of(name, tp)
    whole = plan_of(name).rank_bytes
    assert whole / tp < plan.rank_bytes < whole / tp * 1.05  # norms are copied, little else


@pytest.mark.parametrize("tp", [1, 2, 8, 16])
def test_file_headers_describe_their_files_without_holes(tp: int) -> None:
    plan = plan_of("Qwen3-8B", tp, part_bytes=1 << 30)
    for file, header in zip(plan.files, headers(plan), strict=True):
        end = 0
        for name, entry in header.items():
            if name != "__metadata__":
                assert entry["data_offsets"][0] == end
                end = entry["data_offsets"][1]
                size = count(tuple(entry["shape"])) * ELEMENT_BYTES[entry["dtype"]]
                assert end - entry["data_offsets"][0] == size
        assert len(file.header) + end == file.size
        assert len(file.header) % 64 == 0


def test_weights_are_split_into_parts_of_the_wanted_size() -> None:
    limit = 1 << 30
    plan = plan_of("Qwen3-8B", part_bytes=limit)
    largest = max(t.nbytes for t in plan.tensors)
    assert largest > limit  # the embedding: a tensor is never torn
    sizes = [sum(t.nbytes for t in plan.tensors if t.file == i) for i in range(len(plan.files))]
    assert len(sizes) >= plan.rank_bytes // largest
    assert all(size <= max(limit, largest) for size in sizes)
    assert sum(size > limit for size in sizes) == 2  # embedding and head, each alone
    names = [n for header in headers(plan) for n in header if n != "__metadata__"]
    assert sorted(names) == sorted(t.name for t in plan.tensors)


def test_a_small_model_is_one_part() -> None:
    assert len(plan_of("Qwen3-0.6B").files) == 1


def test_a_tied_head_is_not_in_the_output() -> None:
    names = {t.name for t in plan_of("Qwen3-0.6B").tensors}
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_the_same_inputs_give_the_same_plan() -> None:
    backwards = dict(reversed(sources_of("Qwen3-0.6B").items()))
    a, b = plan_of("Qwen3-0.6B", 4), plan_of("Qwen3-0.6B", 4, sources=backwards)
    assert (a.files, a.tensors) == (b.files, b.tensors)


def test_everything_wrong_is_said_at_once_and_folded() -> None:
    sources = sources_of("Qwen3-8B")
    for layer in range(36):
        del sources[f"model.layers.{layer}.mlp.up_proj.weight"]
        name = f"model.layers.{layer}.self_attn.q_norm.weight"
        sources[name] = replace(sources[name], shape=(64,))
    sources["model.surprise.weight"] = TensorInfo("model.surprise.weight", "bfloat16", (3,))
    with pytest.raises(PlanError) as caught:
        plan_of("Qwen3-8B", 3, sources=sources)
    message = caught.value.message
    assert "model.layers.{0..35}.mlp.up_proj.weight  (36 tensors)" in message
    assert "model.surprise.weight" in message
    assert "model.layers.{0..35}.self_attn.q_norm.weight: has shape [64]" in message
    assert "[128]" in message
    assert "12288 rows" not in message  # 3 divides it
    assert "32 heads do not split over tp=3" in message
    assert "8 kv heads do not split over tp=3" in message
    assert len(message.splitlines()) < 20


def test_a_tp_that_does_not_divide_names_the_number_and_what_would() -> None:
    with pytest.raises(PlanError) as caught:
        plan_of("Qwen3-8B", 5)
    assert "model.layers.{0..35}.mlp.gate_proj.weight: 12288 rows do not split over tp=5" in caught.value.message
    assert caught.value.hint == "Try --tp 1, 2, 4, 8, 16 or 32."


def test_the_hint_offers_only_what_fits() -> None:
    with pytest.raises(PlanError) as caught:
        plan_of("Qwen3-14B", 32)  # 40 heads
    assert "40 heads do not split over tp=32" in caught.value.message
    assert caught.value.hint == "Try --tp 1, 2, 4 or 8."


def test_a_vocabulary_that_does_not_divide_is_padded_and_noted() -> None:
    family, config = published("Qwen3-0.6B", vocab_size=151_935)
    sizes = config.sizes()
    sources = expected_sources(family.table, sizes, "bfloat16")
    plan = make_plan(family.table, sizes, sources, Mesh(8))
    assert plan.vocab == (151_935, 151_936)


def test_mixed_element_types_need_a_word() -> None:
    sources = sources_of("Qwen3-0.6B")
    sources["model.norm.weight"] = replace(sources["model.norm.weight"], dtype="float32", nbytes=4096)
    with pytest.raises(PlanError) as caught:
        plan_of("Qwen3-0.6B", sources=sources)
    assert "--dtype" in caught.value.message
    assert "model.norm.weight" in caught.value.message
    assert {t.dtype for t in plan_of("Qwen3-0.6B", dtype="float16", sources=sources).tensors} == {"float16"}


def test_an_element_type_that_is_no_weight_type_is_refused() -> None:
    sources = sources_of("Qwen3-0.6B")
    sources["model.norm.weight"] = replace(sources["model.norm.weight"], dtype="int8", nbytes=1024)
    with pytest.raises(PlanError, match=r"model\.norm\.weight: element type int8"):
        plan_of("Qwen3-0.6B", dtype="bfloat16", sources=sources)


def test_a_cast_changes_sizes_and_is_in_the_plan() -> None:
    plan = plan_of("Qwen3-0.6B", dtype="float32")
    assert (plan.source_dtype, plan.dtype) == ("bfloat16", "float32")
    assert sum(t.nbytes for t in plan.tensors) == 2 * plan.read_bytes


def test_rotary_buffers_of_old_checkpoints_are_dropped_with_a_reason() -> None:
    sources = sources_of("Qwen3-0.6B")
    for layer in range(28):
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        sources[name] = TensorInfo(name, "float32", (64,))
    plan = plan_of("Qwen3-0.6B", sources=sources)
    assert len(plan.dropped) == 28
    assert all("rotary" in d.reason for d in plan.dropped)


def test_names_are_folded_over_their_numbers() -> None:
    names = [f"model.layers.{i}.mlp.{p}.weight" for i in (0, 1, 2, 5, 7, 8) for p in ("up", "down")]
    assert fold([*names, "lm_head.weight"]) == [
        ("model.layers.{0..2,5,7..8}.mlp.up.weight", 6),
        ("model.layers.{0..2,5,7..8}.mlp.down.weight", 6),
        ("lm_head.weight", 1),
    ]


def test_two_numbers_fold_only_where_all_pairs_are_there() -> None:
    full = [f"l.{i}.e.{j}.w" for i in range(3) for j in range(4)]
    assert fold(full) == [("l.{0..2}.e.{0..3}.w", 12)]
    assert fold(full[:-1]) == [("l.{0..1}.e.{0..3}.w", 8), ("l.2.e.{0..2}.w", 3)]


def test_a_digit_inside_a_word_is_not_a_number() -> None:
    assert fold(["w1.weight", "w2.weight"]) == [("w1.weight", 1), ("w2.weight", 1)]


@given(st.lists(st.text("ab{}0.1!:[]", min_size=1, max_size=12), unique=True))
def test_any_names_fold_and_none_is_lost(names: list[str]) -> None:
    assert sum(n for _, n in fold(names)) == len(names)


@pytest.mark.parametrize("name", ["a.{x}.w", "a.{0.__class__}.3.w", "a.}.w", "{", "{}", "9" * 5000, "1." * 3000])
def test_odd_names_from_outside_are_listed_like_any_other(name: str) -> None:
    assert listing([name]).strip()[:3] == name[:3]


def test_a_long_listing_is_cut_off_and_says_so() -> None:
    text = listing([f"name_{i}x.weight" for i in range(50)], limit=5)
    assert len(text.splitlines()) == 6
    assert "45 more" in text


def test_a_condition_is_added_to_those_that_rules_have() -> None:
    """A rule of a model with a bias, for layers with experts, is for neither without the other."""
    bias = keep("model.layers.{layer}.mlp.bias", ("hidden",), COPY, when="attention_bias")
    (rule,) = only("moe_layer", (bias,))
    for traits, layers, expected in (
        ({"attention_bias"}, ({"moe_layer"}, set()), [True, False]),
        (set(), ({"moe_layer"}, set()), [False, False]),
    ):
        sizes = replace(
            published("Qwen3-0.6B")[1].sizes(),
            layers=2,
            traits=frozenset(traits),
            layer_traits=tuple(map(frozenset, layers)),
        )
        assert [sizes.holds(rule.when, layer) for layer in range(2)] == expected
