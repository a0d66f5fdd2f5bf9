"""What is counted in graphs is what a checkpoint's headers and its configuration's formulas say."""

from __future__ import annotations

from typing import Any

import pytest

from msconv.mindir.outline import outline
from msconv.mindir.shapes import Batch
from msconv.mindir.work import Total, total, works
from tests.docs.pages import ROOT
from tests.exports import MODELS, exported
from tests.roofline.counting import Expected, decode, every_layout, prefill

pytestmark = pytest.mark.slow

SEQUENCES, CONTEXT, PROMPT = 3, 50, 70
FUSED = ("swiglu",)
LAYOUTS = [
    ("qwen3", 2, 1),
    ("qwen3_moe", 2, 2),
    ("deepseek_v3", 4, 2),
    *(
        pytest.param(*layout, marks=every_layout)
        for layout in (("qwen3", 1, 1), ("qwen3_moe", 2, 1), ("qwen3_moe", 1, 1))
    ),
    *(pytest.param(*layout, marks=every_layout) for layout in (("deepseek_v3", 1, 1), ("deepseek_v3", 4, 1))),
]


def config_of(model: str) -> dict[str, Any]:
    config = {"model_type": model, "decoder_sparse_step": 1, "mlp_only_layers": [], **MODELS[model]}
    return {**config, "tie_word_embeddings": False}


def counted(model: str, role: str, tp: int, ep: int, batch: Batch) -> Total:
    data, _ = exported(model, "ascend910b", role, tp=tp, ep=ep)
    config = config_of(model.partition(" ")[0])
    experts = config.get("num_experts") or config.get("n_routed_experts") or 0
    mask = (128, 128) if role == "prefill" else (1, 1)
    return total([(work, 1) for work in works(outline(data, model), batch, experts, mask)])


def check(found: Total, expected: Expected) -> None:
    assert found.weight_bytes == pytest.approx(expected.weight_bytes, rel=1e-9)
    assert found.kv_bytes == expected.kv_bytes
    assert found.half_operations == pytest.approx(expected.operations, rel=1e-9)
    assert found.int8_operations == 0


@pytest.mark.parametrize(("model", "tp", "ep"), LAYOUTS)
def test_a_step_of_decode_reads_and_multiplies_what_the_configuration_says(model: str, tp: int, ep: int) -> None:
    found = counted(model, "decode", tp, ep, Batch(SEQUENCES, 1, CONTEXT))
    check(found, decode(config_of(model), tp, ep, SEQUENCES, CONTEXT))


@pytest.mark.parametrize(("model", "tp", "ep"), LAYOUTS)
def test_a_prompt_reads_and_multiplies_what_the_configuration_says(model: str, tp: int, ep: int) -> None:
    found = counted(model, "prefill", tp, ep, Batch(1, PROMPT, PROMPT))
    check(found, prefill(config_of(model), tp, ep, PROMPT))


def test_collectives_move_the_residual_stream_twice_a_layer_and_the_vocabulary_once() -> None:
    config = config_of("qwen3")
    found = counted("qwen3", "decode", 2, 1, Batch(SEQUENCES, 1, CONTEXT)).collectives
    rows = 2 * SEQUENCES * config["hidden_size"]
    of_all = 2 * SEQUENCES * 2 * -(-config["vocab_size"] // 2)
    layers = config["num_hidden_layers"]
    assert dict(found) == {("AllReduce", rows): 2 * layers + 1, ("AllGather", of_all): 1}


def test_int8_matrices_are_a_byte_an_element_and_a_scale_a_row() -> None:
    """What is quantised are the layers' matrices; embedding, head and norms stay as they are."""
    config = config_of("qwen3")
    batch = Batch(SEQUENCES, 1, CONTEXT)
    plain, int8 = (counted(model, "decode", 2, 1, batch) for model in ("qwen3", "qwen3 unshifted int8"))
    hidden, ffn, width = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"] // 2, 1
    rows = (
        (heads + 2 * kv_heads) * width + hidden + ffn + hidden
    )  # of qkv, o, gate_up and down on one of two ranks
    elements = (heads + 2 * kv_heads) * width * hidden + hidden * heads * width + ffn * hidden + hidden * ffn // 2
    layers = config["num_hidden_layers"]
    assert plain.weight_bytes - int8.weight_bytes == layers * (elements - 4 * rows)
    assert int8.int8_operations == 2 * SEQUENCES * layers * elements
    assert plain.half_operations == int8.half_operations + int8.int8_operations
    assert plain.kv_bytes == int8.kv_bytes


def test_an_activation_that_is_fused_reads_and_writes_a_third_and_weights_stay() -> None:
    config, batch = config_of("qwen3"), Batch(SEQUENCES, 1, CONTEXT)
    plain = counted("qwen3", "decode", 2, 1, batch)
    data, _ = exported("qwen3", "ascend910b", "decode", tp=2, fused=FUSED)
    fused = total([(work, 1) for work in works(outline(data, "fused"), batch, 0)])
    layers, row = config["num_hidden_layers"], 2 * SEQUENCES * config["intermediate_size"] // 2
    assert plain.launches - fused.launches == 2 * layers
    assert plain.activation_bytes - fused.activation_bytes == (9 - 3) * layers * row
    assert (fused.weight_bytes, fused.kv_bytes) == (plain.weight_bytes, plain.kv_bytes)
    assert (fused.half_operations, fused.collectives) == (plain.half_operations, plain.collectives)


LAYERS = [  # of the page's table: the model, its layout, and which layer
    ("Qwen3", "qwen3", 2, 1, 0),
    ("Qwen3, int8 (dynamic)", "qwen3 unshifted int8", 2, 1, 0),
    ("Qwen3-MoE, ep", "qwen3_moe", 2, 2, 0),
    ("DeepSeek-V3, dense", "deepseek_v3", 4, 2, 0),
    ("DeepSeek-V3, experts, ep", "deepseek_v3", 4, 2, 1),
    pytest.param("Qwen3-MoE", "qwen3_moe", 2, 1, 0, marks=every_layout),
    pytest.param("DeepSeek-V3, experts", "deepseek_v3", 4, 1, 1, marks=every_layout),
]


@pytest.mark.parametrize(("row", "model", "tp", "ep", "layer"), LAYERS)
def test_a_layer_has_as_many_nodes_as_the_page_says(row: str, model: str, tp: int, ep: int, layer: int) -> None:
    data, _ = exported(model, "ascend910b", "decode", tp=tp, ep=ep)
    done = works(outline(data, model), Batch(SEQUENCES, 1, CONTEXT), 16)
    launched = sum(work.launches for work in done if work.layer == layer)
    data, _ = exported(model, "ascend910b", "decode", tp=tp, ep=ep, fused=FUSED)
    done = works(outline(data, model), Batch(SEQUENCES, 1, CONTEXT), 16)
    fused = sum(work.launches for work in done if work.layer == layer)
    assert f"| {row} | {launched} | {fused} |" in (ROOT / "docs" / "roofline.md").read_text()
