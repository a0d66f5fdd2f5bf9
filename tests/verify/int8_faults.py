"""Faults of int8 artifacts: codes, scales, biases and norms as a wrong converter leaves them, and products as a
wrong compiler makes them.

The dense model's layer 0 is static and its layer 1 dynamic, for two ranks; the model with experts and latent
attention is dynamic throughout, for four ranks in two groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.verify.faults import attention, between_ranks, mlp, name_of
from tests.verify.planting import Fault, GraphEdit, Ranks

Change = Callable[[Ranks], None]
TARGET = "ascend910b"
QKV, O_PROJ = "self_attn.qkv_proj", "self_attn.o_proj"
GATE_UP, DOWN = "mlp.gate_up_proj", "mlp.down_proj"
EXPERTS = "mlp.experts."
ROPE = 8  # rows of a query head, or of the latent's key, that are rotated


# Weights.
def times(name: str, row: int, factor: float) -> Change:
    """One scale, on every rank."""

    def change(ranks: Ranks) -> None:
        for values in ranks:
            values[name].reshape(-1).view(np.float32)[row] *= np.float32(factor)

    return change


def rolled(name: str, axis: int = 0) -> Change:
    """Each row has its neighbour's."""

    def change(ranks: Ranks) -> None:
        for values in ranks:
            values[name] = np.roll(values[name], 1, axis=axis)

    return change


def halves_exchanged(name: str, axis: int = 0) -> Change:
    def change(ranks: Ranks) -> None:
        for values in ranks:
            first, second = np.split(values[name], 2, axis=axis)
            values[name] = np.concatenate([second, first], axis)

    return change


def items_exchanged(name: str) -> Change:
    """Those of two experts, on the ranks of the first group."""

    def change(ranks: Ranks) -> None:
        for values in ranks[:2]:
            values[name][[0, 1]] = values[name][[1, 0]]

    return change


def whole_bias_everywhere(module: str) -> Change:
    def change(ranks: Ranks) -> None:
        total = sum(values[module + ".quant_bias"].view(np.int32) for values in ranks)
        for values in ranks:
            values[module + ".quant_bias"] = total.astype(np.int32).view(np.uint32)

    return change


def without_bias(module: str) -> Change:
    """What was not the offset's, lost from rank 0."""

    def change(ranks: Ranks) -> None:
        offset = ranks[0][module + ".input_offset"].view(np.float32)[0]
        own = -ranks[0][module + ".weight"].astype(np.int64).sum(1) * int(offset)
        ranks[0][module + ".quant_bias"] = own.astype(np.int32).view(np.uint32)

    return change


def offset_dropped(module: str) -> Change:
    def change(ranks: Ranks) -> None:
        for values in ranks:
            values[module + ".input_offset"][:] = 0

    return change


def copied(name: str, other: str) -> Change:
    def change(ranks: Ranks) -> None:
        for values in ranks:
            values[name] = values[other].copy()

    return change


def clamped(name: str) -> Change:
    def change(ranks: Ranks) -> None:
        assert any((values[name] == -128).any() for values in ranks), name
        for values in ranks:
            values[name] = np.maximum(values[name], np.int8(-127))

    return change


def bit_flipped(name: str, bit: int = 0) -> Change:
    def change(ranks: Ranks) -> None:
        ranks[1][name].reshape(-1)[77] ^= np.int8(1 << bit)

    return change


def cut_short(name: str) -> Change:
    """Rounded towards zero."""

    def change(ranks: Ranks) -> None:
        for values in ranks:
            values[name] = (values[name] - np.sign(values[name]) * (values[name] % 5 == 0)).astype(np.int8)

    return change


def unrounded(name: str) -> Change:
    """Scales in float32 where bfloat16 was rounded to."""

    def change(ranks: Ranks) -> None:
        for values in ranks:
            values[name] = values[name] | np.uint32(0x1234)

    return change


def zeroed(name: str) -> Change:
    def change(ranks: Ranks) -> None:
        for values in ranks:
            values[name][:] = 0

    return change


def pairs_together(name: str, end: int) -> Change:
    """The last rows before each multiple of `end` as rotation stores them: x0 y0 x1 y1 .."""

    def change(ranks: Ranks) -> None:
        for values in ranks:
            rows = values[name]
            for last in range(end, len(rows) + 1, end):
                part = rows[last - ROPE : last]
                part[:] = part.reshape(2, ROPE // 2, -1).transpose(1, 0, 2).reshape(part.shape)

    return change


def weights(name: str, place: str, change: Change) -> Fault:
    return Fault(name, TARGET, place, weights=change)


def of(layer: int, module: str, rest: str = "") -> str:
    return rf"model\.layers\.{layer}\.{module}".replace("experts.", r"experts\.") + rest


STATIC_QKV, STATIC_O = name_of(0, QKV), name_of(0, O_PROJ)
DENSE_WEIGHTS = [
    weights("a scale is 1 % off", of(1, QKV), times(name_of(1, QKV) + ".weight_scale", 3, 1.01)),
    weights("a scale is an ulp off", of(1, DOWN), unrounded(name_of(1, DOWN) + ".weight_scale")),
    weights("scales are those of other rows", of(1, GATE_UP), rolled(name_of(1, GATE_UP) + ".weight_scale")),
    weights("gate's and up's scales", of(1, GATE_UP), halves_exchanged(name_of(1, GATE_UP) + ".weight_scale")),
    weights("gate and up are exchanged", of(1, GATE_UP), halves_exchanged(name_of(1, GATE_UP) + ".weight")),
    weights("deq_scale is of another row", of(0, QKV), rolled(STATIC_QKV + ".deq_scale")),
    weights("a deq_scale is 1 % off", of(0, DOWN), times(name_of(0, DOWN) + ".deq_scale", 5, 1.01)),
    weights("quant_bias is whole on every rank", of(0, O_PROJ), whole_bias_everywhere(STATIC_O)),
    weights("quant_bias is another rank's", of(0, DOWN), between_ranks(name_of(0, DOWN) + ".quant_bias")),
    weights("quant_bias without the bias", of(0, O_PROJ), without_bias(STATIC_O)),
    weights("quant_bias is of another row", of(0, GATE_UP), rolled(name_of(0, GATE_UP) + ".quant_bias")),
    weights("an offset is dropped", of(0, QKV), offset_dropped(STATIC_QKV)),
    weights(
        "input_scale is another's",
        of(0, DOWN),
        copied(name_of(0, DOWN) + ".input_scale", STATIC_O + ".input_scale"),
    ),
    weights("codes of -128 are clamped", of(0, QKV), clamped(STATIC_QKV + ".weight")),
    weights("one bit of a code is flipped", of(1, O_PROJ), bit_flipped(name_of(1, O_PROJ) + ".weight")),
    weights("codes are cut short", of(1, DOWN), cut_short(name_of(1, DOWN) + ".weight")),
    weights("columns of the wrong rank", of(1, O_PROJ), between_ranks(name_of(1, O_PROJ) + ".weight")),
    weights("heads on the wrong rank", of(0, QKV), between_ranks(STATIC_QKV + ".weight")),
    weights("their deq_scale on the wrong rank", of(0, QKV), between_ranks(STATIC_QKV + ".deq_scale")),
]
GATE_UP_OF_EXPERTS, DOWN_OF_EXPERTS = EXPERTS + "gate_up_proj.weight", EXPERTS + "down_proj.weight"
EXPERT_WEIGHTS = [
    weights(
        "two experts' scales",
        of(1, GATE_UP_OF_EXPERTS),
        items_exchanged(name_of(1, GATE_UP_OF_EXPERTS + "_scale")),
    ),
    weights("two experts' codes", of(1, DOWN_OF_EXPERTS), items_exchanged(name_of(1, DOWN_OF_EXPERTS))),
    weights(
        "an expert's scales of rows", of(1, DOWN_OF_EXPERTS), rolled(name_of(1, DOWN_OF_EXPERTS + "_scale"), -1)
    ),
    weights(
        "a scale of an expert", of(1, DOWN_OF_EXPERTS), times(name_of(1, DOWN_OF_EXPERTS + "_scale"), 9, 1.01)
    ),
    weights(
        "experts' gate and up", of(1, GATE_UP_OF_EXPERTS), halves_exchanged(name_of(1, GATE_UP_OF_EXPERTS), -1)
    ),
    weights(
        "an expert's half on the wrong rank", of(1, DOWN_OF_EXPERTS), between_ranks(name_of(1, DOWN_OF_EXPERTS))
    ),
    weights(
        "scales of queries are not permuted",
        of(0, "self_attn.q_b_proj"),
        pairs_together(name_of(0, "self_attn.q_b_proj.weight_scale"), 24),
    ),
    weights(
        "scales of the latent's key are not permuted",
        of(1, "self_attn.kv_a_proj"),
        pairs_together(name_of(1, "self_attn.kv_a_proj_with_mqa.weight_scale"), 40),
    ),
    weights(
        "the shared expert's scales",
        of(1, "mlp.shared_experts"),
        rolled(name_of(1, "mlp.shared_experts.down_proj.weight_scale")),
    ),
]

# What no comparison of codes sees, and some that it sees first: by running.
NORM = "post_attention_layernorm"
RUN_WEIGHTS = [
    weights("a norm's bias is dropped", rf"{mlp(0)}|{NORM}", zeroed(name_of(0, NORM + ".bias"))),
    weights(
        "a norm's bias is another's",
        rf"{attention(1)}|input_layernorm",
        copied(name_of(1, "input_layernorm.bias"), name_of(1, NORM + ".bias")),
    ),
    weights("a scale is 1 % off", attention(1), times(name_of(1, QKV) + ".weight_scale", 3, 1.01)),
    *(f for f in DENSE_WEIGHTS if f.name in ("quant_bias is whole on every rank", "an offset is dropped")),
]


# Graphs.
def product(edit: GraphEdit, layer: int, module: str) -> Any:
    return edit.one("QuantBatchMatmul", name_of(layer, module) + ".weight")


def quantiser(edit: GraphEdit, layer: int, module: str) -> Any:
    """The node that makes codes for a static product."""
    return edit.made(product(edit, layer, module).input[0])


def scales_of_other_tokens(edit: GraphEdit) -> None:
    product(edit, 1, GATE_UP).input[5] = product(edit, 1, QKV).input[5]


def no_scales_of_tokens(edit: GraphEdit) -> None:
    node = product(edit, 1, DOWN)
    node.input[5] = node.input[3]


def no_quant_bias(edit: GraphEdit) -> None:
    node = product(edit, 0, O_PROJ)
    node.input[4] = node.input[3]


def another_offset(edit: GraphEdit) -> None:
    quantiser(edit, 0, GATE_UP).input[2] = quantiser(edit, 0, QKV).input[2]


def no_offset(edit: GraphEdit) -> None:
    node = quantiser(edit, 0, O_PROJ)
    node.input[2] = edit.add(node, "Sub", [node.input[2], node.input[2]])


def another_scale(edit: GraphEdit) -> None:
    quantiser(edit, 0, DOWN).input[1] = quantiser(edit, 0, O_PROJ).input[1]


def codes_of_another_input(edit: GraphEdit) -> None:
    product(edit, 1, GATE_UP).input[0] = product(edit, 1, QKV).input[0]


def input_cut_at_zero(edit: GraphEdit) -> None:
    node = quantiser(edit, 0, QKV)
    node.input[0] = edit.add(node, "ReLU", [node.input[0]])


def rounded_down(edit: GraphEdit) -> None:
    edit.set(quantiser(edit, 0, DOWN), 4, 1)


def no_bias_of_norm(edit: GraphEdit) -> None:
    edit.bypass(edit.one("Add", name_of(1, NORM) + ".bias"))


def not_summed(edit: GraphEdit) -> None:
    (node,) = edit.users(product(edit, 1, O_PROJ), "AllReduce")
    edit.bypass(node)


def scales_of_tokens_of_experts(edit: GraphEdit) -> None:
    first, second = edit.all("GroupedMatmulV4")
    second.input[7] = first.input[7]


def experts_scales_of_others(edit: GraphEdit) -> None:
    """Each expert's product with its neighbour's scales."""
    node = edit.all("GroupedMatmulV4")[0]
    pieces = edit.made(node.input[3])
    value = edit.made(pieces.input[0])
    pieces.input[0] = edit.add(pieces, "Mul", [value.output[0], value.output[0]])


def graph(name: str, place: str, change: Callable[[GraphEdit], None], refused: bool = False) -> Fault:
    return Fault(name, TARGET, place, graph=change, refused=refused)


DENSE_GRAPHS = [
    graph("tokens' scales are another input's", mlp(1), scales_of_other_tokens),
    graph("tokens' scales are left out", r"layers\.1\.|model\.norm|last layer", no_scales_of_tokens),
    graph("quant_bias is left out", rf"{attention(0)}|{mlp(0)}", no_quant_bias),
    graph("the offset is another input's", mlp(0), another_offset),
    graph("the offset is 0", attention(0), no_offset),
    graph("input_scale is another input's", mlp(0), another_scale),
    graph("codes are another input's", mlp(1), codes_of_another_input),
    graph("inputs below zero are lost", attention(0), input_cut_at_zero),
    graph("codes are rounded down", mlp(0), rounded_down, refused=True),
    graph("a norm's bias is left out", rf"{mlp(1)}|{NORM}", no_bias_of_norm),
    graph("ranks' sums are not added up", rf"{attention(1)}|{mlp(1)}", not_summed),
]
EXPERT_GRAPHS = [
    graph("tokens' scales of experts are another's", r"layers\.1\.mlp|last layer", scales_of_tokens_of_experts),
    graph("experts' scales are squared", mlp(1), experts_scales_of_others),
]
