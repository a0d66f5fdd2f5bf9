"""Faults of models with experts and latent attention, planted like those of faults.py.

Sizes are those of the tests' models for four ranks in two groups: two ranks share each half of the 16 experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.checkpoints import Bits
from tests.verify.faults import (
    attention,
    between_ranks,
    copy_from,
    exchange,
    flash,
    keys_not_turned,
    mlp,
    name_of,
    paged,
    turned_part,
    write_is_dead,
)
from tests.verify.planting import CACHED, Fault, GraphEdit, Ranks

HALF = 16  # columns of gate, and of up, that a rank has of an expert
HEAD, ROPE = 24, 8  # rows of a query head, and of its rotated part

Edit = Callable[[GraphEdit], None]
Change = Callable[[Ranks], None]

GATE_UP, DOWN = "mlp.experts.gate_up_proj.weight", "mlp.experts.down_proj.weight"
ROUTER, BIAS = "mlp.gate.weight", "mlp.gate.e_score_correction_bias"
SHARED_DOWN = "mlp.shared_experts.down_proj.weight"


# Weights.
def experts_exchanged(layer: int, a: int, b: int) -> Change:
    """On the ranks of the first group."""

    def change(ranks: Ranks) -> None:
        for values in ranks[:2]:
            for part in (GATE_UP, DOWN):
                values[name_of(layer, part)][[a, b]] = values[name_of(layer, part)][[b, a]]

    return change


def renumbered(layer: int, a: int, b: int) -> Change:
    """Two experts, their rows of the router and their biases change places: the same model."""

    def change(ranks: Ranks) -> None:
        experts_exchanged(layer, a, b)(ranks)
        for values in ranks:
            for part in (ROUTER, BIAS):
                if name_of(layer, part) in values:
                    values[name_of(layer, part)][[a, b]] = values[name_of(layer, part)][[b, a]]

    return change


def gate_and_up_exchanged(layer: int, expert: int) -> Change:
    def change(ranks: Ranks) -> None:
        for values in ranks[2:]:
            matrix = values[name_of(layer, GATE_UP)][expert]
            matrix[:] = np.concatenate([matrix[:, HALF:], matrix[:, :HALF]], 1)

    return change


def order_of_ranks(order: tuple[int, ...], *names: str) -> Change:
    """Each rank has what another has."""

    def change(ranks: Ranks) -> None:
        for name in names:
            for values, found in zip(ranks, [ranks[r][name].copy() for r in order], strict=True):
                values[name] = found

    return change


def all_start_at_0(ranks: Ranks) -> None:
    for values in ranks:
        values["expert_start"] = np.zeros_like(values["expert_start"])


def start_is_one_late(ranks: Ranks) -> None:
    for values in ranks[2:]:
        values["expert_start"] = values["expert_start"] + 1


def zeroed(name: str) -> Change:
    def change(ranks: Ranks) -> None:
        for values in ranks:
            values[name][:] = 0

    return change


def doubled(name: str) -> Change:
    def change(ranks: Ranks) -> None:
        for values in ranks:
            values[name] = (values[name].view(np.float32) * 2).view(np.uint32)

    return change


def rows_rolled(name: str) -> Change:
    def change(ranks: Ranks) -> None:
        for values in ranks:
            values[name] = np.roll(values[name], 1, axis=0)

    return change


def bias_rounded(ranks: Ranks) -> None:
    """To bfloat16, as all other weights may be."""
    for values in ranks:
        values[name_of(1, BIAS)] &= np.uint32(0xFFFF0000)


def interleaved(rows: Bits) -> None:
    rows[:] = rows.reshape(2, ROPE // 2, -1).transpose(1, 0, 2).reshape(rows.shape)


def queries_interleaved(ranks: Ranks) -> None:
    for values in ranks:
        rows = values[name_of(1, "self_attn.q_b_proj.weight")]
        for end in range(HEAD, len(rows) + 1, HEAD):
            interleaved(rows[end - ROPE : end])


def keys_interleaved(ranks: Ranks) -> None:
    for values in ranks:
        interleaved(values[name_of(1, "self_attn.kv_a_proj_with_mqa.weight")][-ROPE:])


def both_interleaved(ranks: Ranks) -> None:
    queries_interleaved(ranks)
    keys_interleaved(ranks)


def rope_before_latent(ranks: Ranks) -> None:
    """The rotated rows of kv_a at the beginning instead of at the end."""
    for values in ranks:
        name = name_of(1, "self_attn.kv_a_proj_with_mqa.weight")
        values[name] = np.roll(values[name], ROPE, axis=0)


def sound_weights(family: str) -> list[Fault]:
    """Those that both families can have; their first layer of experts is layer 1."""
    ascend = "ascend910b" if family == "deepseek" else "ascend310p"
    parts = (name_of(1, GATE_UP), name_of(1, DOWN))
    return [
        Fault("two experts are exchanged", ascend, mlp(1), experts_exchanged(1, 2, 5)),
        Fault("two experts are exchanged, on cpu", "cpu", mlp(1), experts_exchanged(1, 0, 7)),
        Fault("gate and up of an expert are exchanged", ascend, mlp(1), gate_and_up_exchanged(1, 3)),
        Fault("experts are on the other group's ranks", ascend, mlp(1), order_of_ranks((2, 3, 0, 1), *parts)),
        Fault("experts are dealt out to ranks in turn", "cpu", mlp(1), order_of_ranks((0, 2, 1, 3), *parts)),
        Fault("all ranks start at expert 0", ascend, mlp(1), all_start_at_0),
        Fault("all ranks start at expert 0, on cpu", "cpu", mlp(1), all_start_at_0),
        Fault("experts start one late", "cpu", mlp(1), start_is_one_late),
        Fault("experts start at another rank's", ascend, mlp(1), order_of_ranks((2, 3, 0, 1), "expert_start")),
        Fault("down is that of the other half", ascend, mlp(1), order_of_ranks((1, 0, 3, 2), name_of(1, DOWN))),
        Fault(
            "gate and up are those of the other half",
            "cpu",
            mlp(1),
            order_of_ranks((1, 0, 3, 2), name_of(1, GATE_UP)),
        ),
        Fault("the router's rows are shifted", ascend, mlp(1), rows_rolled(name_of(1, ROUTER))),
    ]


DEEPSEEK_WEIGHTS = [
    *sound_weights("deepseek"),
    Fault("the bias is zero", "ascend910b", mlp(1), zeroed(name_of(1, BIAS))),
    Fault("the bias is another layer's", "cpu", mlp(1), copy_from(name_of(1, BIAS), name_of(2, BIAS))),
    Fault("the shared expert is zero", "ascend910b", mlp(1), zeroed(name_of(1, SHARED_DOWN))),
    Fault("the shared expert counts twice", "cpu", mlp(1), doubled(name_of(1, SHARED_DOWN))),
    Fault("the shared expert is the wrong rank's", "ascend910b", mlp(1), between_ranks(name_of(1, SHARED_DOWN))),
    Fault("queries are interleaved", "ascend910b", attention(1), queries_interleaved),
    Fault("keys are interleaved", "cpu", attention(1), keys_interleaved),
    Fault("queries and keys are interleaved", "ascend910b", attention(1), both_interleaved),
    Fault("the rotated part is before the latent", "ascend910b", attention(1), rope_before_latent),
    Fault(
        "keys and values of the latent are exchanged",
        "ascend910b",
        attention(1),
        exchange(name_of(1, "self_attn.kv_b_proj_k.weight"), name_of(1, "self_attn.kv_b_proj_v.weight")),
    ),
    Fault(
        "keys are made for the wrong rank's heads",
        "cpu",
        attention(2),
        between_ranks(name_of(2, "self_attn.kv_b_proj_k.weight")),
    ),
    Fault(
        "values are made for the wrong rank's heads",
        "ascend910b",
        attention(2),
        between_ranks(name_of(2, "self_attn.kv_b_proj_v.weight")),
    ),
    Fault(
        "the latent's norm is another layer's",
        "ascend910b",
        attention(0),
        copy_from(name_of(0, "self_attn.kv_a_layernorm.weight"), name_of(1, "self_attn.kv_a_layernorm.weight")),
    ),
    Fault(
        "the queries' norm is another layer's",
        "cpu",
        attention(0),
        copy_from(name_of(0, "self_attn.q_a_layernorm.weight"), name_of(1, "self_attn.q_a_layernorm.weight")),
    ),
]
QWEN_WEIGHTS = sound_weights("qwen")


# Graphs of DeepSeek for Ascend.
def choice(index: int, value: float) -> Edit:
    return lambda edit: edit.set(edit.all("FusedAddTopKDiv")[0], index, value)


def one_group(edit: GraphEdit) -> None:
    choice(2, 1)(edit)
    choice(3, 1)(edit)


def bias_forgotten(edit: GraphEdit) -> None:
    node = edit.all("FusedAddTopKDiv")[0]
    node.input[1] = edit.add(node, "ZerosLike", [node.input[1]])


def latent_norm(edit: GraphEdit, part: str) -> Any:
    return edit.one("RmsNorm", name_of(1, f"self_attn.{part}_layernorm.weight"))


def norm_skipped(part: str) -> Edit:
    def change(edit: GraphEdit) -> None:
        norm = latent_norm(edit, part)
        edit.rewire(turned_part(edit, norm, 0).output[0], norm.input[0])

    return change


def norm_with(part: str, eps: float) -> Edit:
    return lambda edit: edit.set(latent_norm(edit, part), 2, eps)


def written(edit: GraphEdit) -> Any:
    """The parts of what layer 1 writes: latent and rotated key."""
    return edit.made(edit.made(edit.all("ReshapeAndCache")[1].input[0]).input[0])


def written_before_the_norm(edit: GraphEdit) -> None:
    written(edit).input[0] = latent_norm(edit, "kv_a").input[0]


def written_unrotated(edit: GraphEdit) -> None:
    written(edit).input[1] = edit.all("ApplyRotaryPosEmb")[1].input[1]


def written_key_first(edit: GraphEdit) -> None:
    parts = written(edit)
    parts.input[:] = list(reversed(parts.input))


def queries_not_turned(edit: GraphEdit) -> None:
    turned = edit.all("ApplyRotaryPosEmb")[1]
    edit.rewire(turned_part(edit, turned, 0).output[0], turned.input[0])


def rotation_unscaled(edit: GraphEdit) -> None:
    """Without yarn's factor on cos."""
    (scaled,) = edit.users(edit.one("Cos"), "Muls")
    edit.set(scaled, 1, 1.0)


def latents_read_too_early(edit: GraphEdit) -> None:
    """The cache is read as it came in, and nothing makes the write come first."""
    write, attend = edit.all("ReshapeAndCache")[1], edit.all("PagedAttention")[1]
    attend.input[1] = attend.input[2] = write.input[2]


def another_layers_latents(edit: GraphEdit) -> None:
    attend = edit.all("PagedAttention")
    attend[2].input[1], attend[2].input[2] = attend[1].input[1], attend[1].input[2]


def keys_for_values(edit: GraphEdit) -> None:
    """The parts of kv_b, in the graph alone."""
    names = [f"msconv:{name_of(1, f'self_attn.kv_b_proj_{part}.weight')}" for part in "kv"]
    swap = dict(zip(names, reversed(names), strict=True))
    for node in edit.nodes:
        node.input[:] = [swap.get(i, i) for i in node.input]


def together(edit: GraphEdit) -> tuple[Any, Any]:
    """The sum of experts and shared expert of layer 1, and the sum over ranks."""
    product = edit.product(name_of(1, SHARED_DOWN))
    (add,) = edit.users(product, "Add")
    (reduce,) = edit.users(add, "AllReduce")
    return add, reduce


def shared_dropped(edit: GraphEdit) -> None:
    edit.bypass(together(edit)[0], 0)


def experts_dropped(edit: GraphEdit) -> None:
    edit.bypass(together(edit)[0], 1)


def shared_twice(edit: GraphEdit) -> None:
    add, _ = together(edit)
    add.input[1] = edit.add(add, "Add", [add.input[1], add.input[1]])


def shared_summed_twice(edit: GraphEdit) -> None:
    """Once by itself and once with the experts: as if each rank had all of it."""
    add, _ = together(edit)
    add.input[1] = edit.add(add, "AllReduce", [add.input[1]])


def shared_not_summed(edit: GraphEdit) -> None:
    """Added after the sum over ranks: each rank has its own part."""
    add, reduce = together(edit)
    edit.rewire(reduce.output[0], add.output[0])
    reduce.input[0] = add.input[0]
    add.input[0] = reduce.output[0]


def experts_not_summed(edit: GraphEdit) -> None:
    edit.bypass(together(edit)[1])


def gate_of_experts_takes_up(edit: GraphEdit) -> None:
    product = edit.all("GroupedMatmulV4")[0]
    (whole,) = edit.users(product, "TupleGetItem")
    (split,) = edit.users(whole, "Split")
    gate, up = turned_part(edit, split, 0), turned_part(edit, split, 1)
    gate.input[1], up.input[1] = up.input[1], gate.input[1]


def unsorted(edit: GraphEdit, layer: int = 0) -> Any:
    return edit.all("InnerMoeTokenUnpermute")[layer]


def rest_kept(index: int) -> Edit:
    """Rows that no group reaches come into the sum."""
    return lambda edit: edit.bypass(edit.made(unsorted(edit).input[0]), index)


def not_sorted_back(edit: GraphEdit) -> None:
    """Rows are taken as they lie."""
    node = unsorted(edit)
    node.input[0] = edit.add(
        node, "Gather", [node.input[0], node.input[1], *(edit.constant(node, 0) for _ in "xy")]
    )


def groups_of_the_next(edit: GraphEdit) -> None:
    product = edit.all("GroupedMatmulV4")[0]
    cut = edit.made(edit.made(product.input[8]).input[0])
    for index, value in ((1, (1,)), (2, (9,)), (4, 0)):
        edit.set(cut, index, value)


def sorting(index: int, value: float) -> Edit:
    return lambda edit: edit.set(edit.all("MoeInitRoutingV2")[0], index, value)


def product(index: int, value: float) -> Edit:
    return lambda edit: edit.set(edit.all("GroupedMatmulV4")[0], index, value)


def down_of_another_layer(edit: GraphEdit) -> None:
    products = edit.all("GroupedMatmulV4")
    products[1].input[1] = products[3].input[1]


DEEPSEEK_ASCEND = [
    ("groups are ignored", mlp(1), choice(3, 4)),
    ("groups are one", mlp(1), one_group),
    ("a group counts by its best alone", mlp(1), choice(4, 1)),
    ("one expert too few", mlp(1), choice(5, 3)),
    ("one expert too many", mlp(1), choice(5, 5)),
    ("weights are not normalised", mlp(1), choice(7, 0)),
    ("weights are not scaled", mlp(1), choice(8, 1.0)),
    ("another activation", "FusedAddTopKDiv", choice(6, 1)),
    ("the bias is forgotten", mlp(1), bias_forgotten),
    ("the latent's norm is skipped", attention(1), norm_skipped("kv_a")),
    ("the queries' norm is skipped", attention(1), norm_skipped("q_a")),
    ("the latent's norm has another epsilon", attention(1), norm_with("kv_a", 1e-2)),
    ("the queries' norm has another epsilon", attention(1), norm_with("q_a", 1e-2)),
    ("queries are not rotated", attention(1), queries_not_turned),
    ("keys are not rotated", attention(1), keys_not_turned),
    ("cos has no factor", attention(0), rotation_unscaled),
    ("the shared expert is dropped", mlp(1), shared_dropped),
    ("the experts are dropped", mlp(1), experts_dropped),
    ("the shared expert is added twice", mlp(1), shared_twice),
    ("the shared expert is summed once a rank", mlp(1), shared_summed_twice),
    ("the shared expert is not summed", mlp(1), shared_not_summed),
    ("the experts are not summed over ranks", mlp(1), experts_not_summed),
    ("silu is of up", mlp(1), gate_of_experts_takes_up),
    ("rows behind the last group are kept", mlp(1), rest_kept(0)),
    ("rows are not brought back in order", mlp(1), not_sorted_back),
    ("groups are those of the next experts", mlp(1) + "|GroupedMatmul", groups_of_the_next),
    ("the sort says where groups end", mlp(1) + "|GroupedMatmul", sorting(6, 1)),
    ("counts are read as ends", mlp(1) + "|GroupedMatmul", product(14, 0)),
    ("the sort knows half of the experts", "MoeInitRouting", sorting(4, 8)),
    ("the sort drops tokens", "MoeInitRouting", sorting(3, 2)),
    ("down is another layer's", mlp(1), down_of_another_layer),
]
WHOLE_SCALE = HEAD**-0.5  # without yarn's mscale
DEEPSEEK_GRAPHS = [
    *(Fault(name, "ascend910b", place, graph=change) for name, place, change in DEEPSEEK_ASCEND),
    Fault(
        "attention has no mscale",
        "ascend910b",
        attention(1) + ".* in prefill",
        graph=flash(1, 12, WHOLE_SCALE),
        graph_names=("prefill",),
    ),
    *(
        Fault(name, "ascend910b", place, graph=change, graph_names=CACHED)
        for name, place, change in (
            ("paged attention has no mscale", attention(1) + ".* in decode", paged(1, 11, WHOLE_SCALE)),
            ("values are a column short", attention(1) + "|Reshape", paged(1, 15, 31)),
            ("values are whole keys", attention(1) + "|Reshape", paged(1, 15, 0)),
            ("latents are of two heads", attention(1) + "|PagedAttention", paged(1, 12, 2)),
            ("the latent is written before its norm", attention(1) + ".* in decode", written_before_the_norm),
            ("the key is written unrotated", attention(1) + ".* in decode", written_unrotated),
            ("the key is written before the latent", attention(1) + ".* in decode", written_key_first),
            ("latents are read before they are written", attention(1) + "|PagedAttention", latents_read_too_early),
            ("another layer's latents are read", attention(2) + ".* in decode", another_layers_latents),
            ("keys are made as values", attention(1) + ".* in decode", keys_for_values),
        )
    ),
    Fault(
        "the prompt's latent is written before its norm",
        "ascend910b",
        attention(1) + ".* in decode",
        graph=written_before_the_norm,
        graph_names=("prefill",),
    ),
    Fault(
        "the prompt's latents are not written",
        "ascend910b",
        attention(1) + "|ReshapeAndCache",
        graph=write_is_dead,
        graph_names=("prefill",),
    ),
]


# Graphs for the CPU.
def scores(edit: GraphEdit) -> Any:
    return edit.all("Sigmoid")[0]


def biased(edit: GraphEdit) -> Any:
    (add,) = edit.users(scores(edit), "Add")
    return add


def bias_weighs(edit: GraphEdit) -> None:
    edit.all("GatherD")[0].input[0] = biased(edit).output[0]


def bias_forgotten_cpu(edit: GraphEdit) -> None:
    edit.bypass(biased(edit))


def softmax_for_sigmoid(edit: GraphEdit) -> None:
    node = scores(edit)
    node.input.append(edit.constant(node, (-1,)))
    edit.become(node, "Softmax")


def best(number: int, value: int) -> Edit:
    """A layer has three: the best of each group, the best groups, the best experts."""
    return lambda edit: edit.set(edit.all("TopK")[number], 1, value)


def not_divided(edit: GraphEdit) -> None:
    edit.bypass(edit.all("Div")[0])


def not_scaled(edit: GraphEdit) -> None:
    (node,) = edit.users(edit.all("Div")[0], "Muls")
    edit.set(node, 1, 1.0)


def others_kept(edit: GraphEdit) -> None:
    """Weights of other ranks' experts are not made zero."""
    here = edit.users(edit.all("LogicalAnd")[1], "Cast")[0]
    (share,) = (n for n in edit.users(here, "Reshape") if edit.made(n.input[1]).attribute[0].values[1].i in (4, 0))
    (node,) = edit.users(share, "Mul")
    edit.bypass(node)


def others_tokens_added(edit: GraphEdit) -> None:
    edit.bypass(edit.made(edit.all("ScatterNd")[0].input[1]))


def placed_one_on(edit: GraphEdit) -> None:
    """The first token of an expert in the second place."""
    rows = edit.all("ScatterNd")[0]
    place = edit.made(edit.made(rows.input[0]).input[0])
    order = edit.made(edit.made(place.input[1]).input[0])
    edit.set(order, 1, 0)


def cache_before_the_norm_cpu(edit: GraphEdit) -> None:
    rows = edit.made(edit.made(edit.made(edit.all("ScatterUpdate")[1].input[2]).input[0]).input[0])
    latent = edit.made(rows.input[0])
    latent.input[0] = edit.made(edit.made(latent.input[0]).input[0]).input[0]


def scale_without_mscale_cpu(edit: GraphEdit) -> None:
    def value(node: Any) -> float:
        return float(edit.made(node.input[1]).attribute[0].f)

    scaled = [n for n in edit.all("Muls") if 0.2 < value(n) < 0.3 and value(n) != WHOLE_SCALE]
    edit.set(scaled[2], 1, WHOLE_SCALE)  # of layer 1, of one part of the query


DEEPSEEK_GRAPHS += [
    Fault(name, "cpu", place, graph=change, graph_names=phases)
    for name, place, change, phases in (
        ("the bias takes part in the weights", mlp(1), bias_weighs, ("prefill", "decode")),
        ("the bias is forgotten, on cpu", mlp(1), bias_forgotten_cpu, ("prefill",)),
        ("softmax instead of sigmoid", mlp(1), softmax_for_sigmoid, ("prefill", "decode")),
        ("a group counts by its best alone, on cpu", mlp(1), best(0, 1), ("prefill",)),
        ("groups are ignored, on cpu", mlp(1), best(1, 4), ("decode",)),
        ("one expert too few, on cpu", mlp(1) + "|Reshape|BroadcastTo|Mul|BatchMatMul", best(2, 3), ("prefill",)),
        ("weights are not normalised, on cpu", mlp(1), not_divided, ("prefill",)),
        ("weights are not scaled, on cpu", mlp(1), not_scaled, ("decode",)),
        ("other ranks' experts count", mlp(1) + ".* in decode", others_kept, ("decode",)),
        ("other ranks' tokens are added", mlp(1) + ".* in prefill", others_tokens_added, ("prefill",)),
        ("tokens are placed one on", mlp(1) + "|ScatterNd|Gather", placed_one_on, ("prefill",)),
        ("the shared expert is summed once a rank, on cpu", mlp(1), shared_summed_twice, ("prefill", "decode")),
        ("the experts are not summed over ranks, on cpu", mlp(1), experts_not_summed, ("decode",)),
        (
            "the latent is written before its norm, on cpu",
            attention(1),
            cache_before_the_norm_cpu,
            ("prefill", "decode"),
        ),
        ("a part of attention has no mscale, on cpu", attention(1), scale_without_mscale_cpu, ("decode",)),
    )
]


# Graphs of Qwen3 for 310P, which has other primitives.
def softmax(edit: GraphEdit) -> Any:
    return edit.all("Softmax")[0]


def sigmoid_for_softmax(edit: GraphEdit) -> None:
    node = softmax(edit)
    del node.input[1]
    edit.become(node, "Sigmoid")


def softmax_over_tokens(edit: GraphEdit) -> None:
    edit.set(softmax(edit), 1, (0,))


def taken(index: int, value: int) -> Edit:
    return lambda edit: edit.set(edit.all("TopkExt")[0], index, value)


def last_row_kept(edit: GraphEdit) -> None:
    node = edit.made(unsorted(edit).input[0])
    while edit.kind(node) != "Less":
        node = edit.made(node.input[0])
    edit.become(node, "LessEqual")


def experts_alone_not_summed(edit: GraphEdit) -> None:
    (reduce,) = edit.users(unsorted(edit), "AllReduce")
    edit.bypass(reduce)


def experts_summed_twice(edit: GraphEdit) -> None:
    (reduce,) = edit.users(unsorted(edit), "AllReduce")
    reduce.input[0] = edit.add(reduce, "AllReduce", [reduce.input[0]])


QWEN_GRAPHS = [
    Fault(name, "ascend310p", place, graph=change)
    for name, place, change in (
        ("sigmoid instead of softmax", mlp(1), sigmoid_for_softmax),
        ("softmax over tokens", mlp(1), softmax_over_tokens),
        ("one expert too few", mlp(1), taken(1, 3)),
        ("the worst experts are taken", mlp(1), taken(3, 0)),
        ("experts are chosen by token", mlp(1) + r"|model\.layers\.2\.input_layernorm", taken(2, 0)),
        ("weights are not normalised", mlp(1), not_divided),
        ("silu is of up", mlp(1), gate_of_experts_takes_up),
        ("rows behind the last group are kept", mlp(1), rest_kept(1)),
        ("the row behind the last group is kept", mlp(1), last_row_kept),
        ("the sort says how many, not where groups end", mlp(1) + "|GroupedMatmul", sorting(6, 2)),
        ("ends are read as counts", mlp(1) + "|GroupedMatmul", product(14, 1)),
        ("the experts are not summed over ranks", mlp(1), experts_alone_not_summed),
        ("the experts are summed twice", mlp(1), experts_summed_twice),
        ("the experts are not brought back in order", mlp(1), not_sorted_back),
    )
]

DEEPSEEK = [*DEEPSEEK_WEIGHTS, *DEEPSEEK_GRAPHS]
QWEN = [*QWEN_WEIGHTS, *QWEN_GRAPHS]
