"""Faults of Qwen3: in weights, and in graphs for Ascend and the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.verify.planting import CACHED, FLOAT16, Fault, GraphEdit, Ranks

# What a failed proof must name.
EMBEDDING = r"model\.embed_tokens"
HEAD = r"lm_head"


def attention(layer: int) -> str:
    return rf"model\.layers\.{layer}\.self_attn"


def mlp(layer: int) -> str:
    return rf"model\.layers\.{layer}\.mlp"


def name_of(layer: int, rest: str) -> str:
    return f"model.layers.{layer}.{rest}"


# Faults in weights.  Sizes are those of the tests' model at tp 2: 4 query and 2 key heads a rank, of 16.
Q, KV = 64, 32


def exchange_rows(name: str, a: slice, b: slice) -> Callable[[Ranks], None]:
    def change(ranks: Ranks) -> None:
        for values in ranks:
            first, second = values[name][a].copy(), values[name][b].copy()
            values[name][a], values[name][b] = second, first

    return change


def between_ranks(*names: str) -> Callable[[Ranks], None]:
    """Both ranks have each other's; all tensors if none is named."""

    def change(ranks: Ranks) -> None:
        for name in names or tuple(ranks[0]):
            ranks[0][name], ranks[1][name] = ranks[1][name], ranks[0][name]

    return change


def exchange(a: str, b: str) -> Callable[[Ranks], None]:
    def change(ranks: Ranks) -> None:
        for values in ranks:
            values[a], values[b] = values[b], values[a]

    return change


def copy_from(name: str, other: str) -> Callable[[Ranks], None]:
    def change(ranks: Ranks) -> None:
        for values in ranks:
            values[name] = values[other].copy()

    return change


def layers_exchanged(ranks: Ranks) -> None:
    for values in ranks:
        for name in [n for n in values if n.startswith("model.layers.1.")]:
            other = name.replace(".1.", ".2.", 1)
            values[name], values[other] = values[other], values[name]


def exponent_flipped(ranks: Ranks) -> None:
    ranks[1][name_of(1, "mlp.down_proj.weight")][3, 5] ^= 1 << 27


def same_vocab_start(ranks: Ranks) -> None:
    ranks[1]["vocab_start"] = ranks[0]["vocab_start"].copy()


def one_rank_forgets(name: str) -> Callable[[Ranks], None]:
    def change(ranks: Ranks) -> None:
        ranks[1][name][:] = 0

    return change


def not_a_number_on_the_last_rank(name: str) -> Callable[[Ranks], None]:
    def change(ranks: Ranks) -> None:
        ranks[1][name].reshape(-1)[3] = 0x7FC00000

    return change


def shifted_rows(name: str) -> Callable[[Ranks], None]:
    def change(ranks: Ranks) -> None:
        ranks[1][name] = np.roll(ranks[1][name], 1, axis=0)

    return change


def heads_turned(ranks: Ranks) -> None:
    """A head's rows as interleaved rotation stores them."""
    name = name_of(1, "self_attn.qkv_proj.weight")
    for values in ranks:
        head = values[name][:16].copy()
        values[name][:16] = head.reshape(2, 8, -1).transpose(1, 0, 2).reshape(16, -1)


WEIGHTS = [
    Fault("the files of two ranks are exchanged", "ascend910b", HEAD, between_ranks()),
    Fault(
        "q and k are exchanged",
        "ascend910b",
        attention(1),
        exchange_rows(name_of(1, "self_attn.qkv_proj.weight"), slice(0, KV), slice(Q, Q + KV)),
    ),
    Fault(
        "k and v are exchanged",
        "ascend310p",
        attention(2),
        exchange_rows(name_of(2, "self_attn.qkv_proj.weight"), slice(Q, Q + KV), slice(Q + KV, Q + 2 * KV)),
    ),
    Fault(
        "gate and up are exchanged",
        "ascend910b",
        mlp(0),
        exchange_rows(name_of(0, "mlp.gate_up_proj.weight"), slice(0, 48), slice(48, 96)),
    ),
    Fault("one exponent bit is flipped on one rank", "ascend910b", mlp(1), exponent_flipped),
    Fault(
        "heads are on the wrong rank",
        "ascend910b",
        attention(1),
        between_ranks(name_of(1, "self_attn.qkv_proj.weight")),
    ),
    Fault(
        "o_proj has the columns of the wrong rank",
        "ascend310p",
        attention(0),
        between_ranks(name_of(0, "self_attn.o_proj.weight")),
    ),
    Fault(
        "down_proj has the columns of the wrong rank",
        "cpu",
        mlp(1),
        between_ranks(name_of(1, "mlp.down_proj.weight")),
    ),
    Fault("vocab_start is another rank's", "ascend910b", EMBEDDING, same_vocab_start),
    Fault("vocab_start is another rank's, on cpu", "cpu", EMBEDDING, same_vocab_start),
    Fault(
        "a rank's vocabulary is shifted by a row",
        "ascend910b",
        EMBEDDING,
        shifted_rows("model.embed_tokens.weight"),
    ),
    Fault(
        "a norm is another layer's",
        "ascend910b",
        r"model\.layers\.1\.post_attention_layernorm",
        copy_from(name_of(1, "post_attention_layernorm.weight"), name_of(2, "post_attention_layernorm.weight")),
    ),
    Fault(
        "q_norm and k_norm are exchanged",
        "ascend310p",
        attention(1),
        exchange(name_of(1, "self_attn.q_norm.weight"), name_of(1, "self_attn.k_norm.weight")),
    ),
    Fault("two layers are exchanged", "ascend910b", r"model\.layers\.1\.", layers_exchanged),
    Fault("a head is stored interleaved", "ascend910b", attention(1), heads_turned),
    Fault(
        "a rank has no bias",
        "ascend910b",
        attention(2),
        one_rank_forgets(name_of(2, "self_attn.qkv_proj.bias")),
    ),
    Fault(
        "a norm is lost on the last rank only",
        "ascend910b",
        r"model\.layers\.1\.(post_attention_layernorm|mlp)",
        one_rank_forgets(name_of(1, "post_attention_layernorm.weight")),
    ),
    Fault(
        "a weight of the last rank is not a number",
        "ascend910b",
        attention(0),
        not_a_number_on_the_last_rank(name_of(0, "self_attn.k_norm.weight")),
    ),
    Fault("lm_head is the wrong rank's", "ascend910b", HEAD, between_ranks("lm_head.weight")),
    Fault("lm_head has a row too many before it", "cpu", HEAD, shifted_rows("lm_head.weight")),
    Fault("rank_onehot is the wrong rank's", "cpu", HEAD, between_ranks("rank_onehot")),
]


# Faults in graphs.
def reduced(edit: GraphEdit, weight: str) -> Any:
    """The AllReduce after a projection."""
    (node,) = edit.users(edit.product(weight), "AllReduce")
    return node


def not_reduced(weight: str) -> Callable[[GraphEdit], None]:
    return lambda edit: edit.bypass(reduced(edit, weight))


def embedding_not_reduced(edit: GraphEdit) -> None:
    edit.bypass(edit.all("AllReduce")[0])


def reduction(name: str, value: str) -> Callable[[GraphEdit], None]:
    return lambda edit: edit.attribute(reduced(edit, name_of(1, "self_attn.o_proj.weight")), name, value)


def gathered(name: str, value: int | str) -> Callable[[GraphEdit], None]:
    return lambda edit: edit.attribute(edit.one("AllGather"), name, value)


def without_last(kind: str) -> Callable[[GraphEdit], None]:
    return lambda edit: edit.bypass(edit.all(kind)[-1])


def flash(layer: int, index: int, value: float) -> Callable[[GraphEdit], None]:
    return lambda edit: edit.set(edit.all("FlashAttentionScore")[layer], index, value)


def paged(layer: int, index: int, value: float) -> Callable[[GraphEdit], None]:
    return lambda edit: edit.set(edit.all("PagedAttention")[layer], index, value)


def positions_later(edit: GraphEdit) -> None:
    (cast,) = (n for n in edit.all("Cast") if n.input[0] == edit.inputs[1])
    cast.input[0] = edit.add(cast, "Add", [cast.input[0], edit.constant(cast, 1)])


def frequencies_wrong(edit: GraphEdit) -> None:
    """The constant that the positions are multiplied by."""
    (cast,) = (n for n in edit.all("Cast") if n.input[0] == edit.inputs[1])
    (angle,) = edit.users(edit.users(cast, "Reshape")[0], "Mul")
    tensor = edit.made(angle.input[1]).attribute[0].tensors[0]
    tensor.raw_data = (np.frombuffer(tensor.raw_data, np.float32) * np.float32(1.01)).tobytes()


def sine_negative(edit: GraphEdit) -> None:
    (scaled,) = edit.users(edit.one("Sin"), "Muls")
    edit.set(scaled, 1, -1.0)


def keys_not_turned(edit: GraphEdit) -> None:
    turned = edit.all("ApplyRotaryPosEmb")[1]
    edit.rewire(turned_part(edit, turned, 1).output[0], turned.input[1])


def turned_part(edit: GraphEdit, node: Any, index: int) -> Any:
    """TupleGetItem of one output."""
    for user in edit.users(node, "TupleGetItem"):
        if edit.made(user.input[1]).attribute[0].i == index:
            return user
    raise LookupError(index)


def norm_epsilon(edit: GraphEdit) -> None:
    edit.set(edit.one("AddRmsNorm", name_of(1, "post_attention_layernorm.weight")), 3, 1e-2)


def residual_dropped(edit: GraphEdit) -> None:
    norm = edit.one("AddRmsNorm", name_of(1, "post_attention_layernorm.weight"))
    norm.input[1] = edit.add(norm, "ZerosLike", [norm.input[1]])


def residual_is_the_norm(edit: GraphEdit) -> None:
    norm = edit.one("AddRmsNorm", name_of(1, "post_attention_layernorm.weight"))
    edit.set(turned_part(edit, norm, 2), 1, 0)


def last_norm_skipped(edit: GraphEdit) -> None:
    edit.set(turned_part(edit, edit.one("AddRmsNorm", "model.norm.weight"), 0), 1, 2)


def activation_dropped(edit: GraphEdit) -> None:
    edit.bypass(edit.all("SiLU")[1])


def gate_takes_up(edit: GraphEdit) -> None:
    silu = edit.all("SiLU")[1]
    gate = edit.made(silu.input[0])
    (up,) = (n for n in edit.users(edit.made(gate.input[0]), "TupleGetItem") if n is not gate)
    gate.input[1], up.input[1] = up.input[1], gate.input[1]


def written_at_positions(edit: GraphEdit) -> None:
    edit.all("ReshapeAndCache")[1].input[4] = edit.inputs[1]


def values_written_as_keys(edit: GraphEdit) -> None:
    write = edit.all("ReshapeAndCache")[1]
    write.input[0], write.input[1] = write.input[1], write.input[0]


def another_layers_cache(edit: GraphEdit) -> None:
    attend = edit.all("PagedAttention")
    attend[2].input[1] = attend[1].input[1]


def keys_read_as_values(edit: GraphEdit) -> None:
    attend = edit.all("PagedAttention")[1]
    attend.input[2] = attend.input[1]


def positions_for_tables(edit: GraphEdit) -> None:
    edit.all("PagedAttention")[0].input[3] = edit.inputs[1]


def lengths_exchanged(edit: GraphEdit) -> None:
    attend = edit.all("PagedAttention")[0]
    attend.input[4], attend.input[8] = attend.input[8], attend.input[4]


def first_tokens(edit: GraphEdit) -> None:
    (last,) = edit.users(edit.one("CumSum"), "Sub")
    last.input[1] = edit.inputs[5]


def one_token_early(edit: GraphEdit) -> None:
    (last,) = edit.users(edit.one("CumSum"), "Sub")
    edit.set(last, 1, 2)


def first_sequence_only(edit: GraphEdit) -> None:
    """The slice that cuts the padding keeps one row as well."""
    cut = edit.all("StridedSlice")[-1]
    edit.set(cut, 2, (1, 203))
    edit.set(cut, 5, 0)


def bias_dropped(edit: GraphEdit) -> None:
    edit.bypass(edit.one("Add", name_of(2, "self_attn.qkv_proj.bias")))


def bias_once_a_rank(edit: GraphEdit) -> None:
    reduce = reduced(edit, name_of(1, "self_attn.o_proj.weight"))
    (add,) = edit.users(reduce, "Add")
    edit.rewire(add.output[0], reduce.output[0])
    add.input[0] = reduce.input[0]
    reduce.input[0] = add.output[0]
    edit.move_after(reduce, add)


def write_is_dead(edit: GraphEdit) -> None:
    """Nothing that leads to the output needs the write: who loads the graph drops the node."""
    write = edit.all("ReshapeAndCache")[1]
    for user in edit.users(write):
        if edit.kind(user) == "Depend":
            edit.bypass(user)
    for user in edit.users(write):
        user.input[:] = [i for i in user.input if i != write.output[0]]


def read_does_not_wait(edit: GraphEdit) -> None:
    """The cache is read as it came in, not after the write; the order of the file alone says otherwise."""
    write, attend = edit.all("ReshapeAndCache")[1], edit.all("PagedAttention")[1]
    attend.input[1], attend.input[2] = write.input[2], write.input[3]


def read_before_the_write(edit: GraphEdit) -> None:
    read_does_not_wait(edit)
    write, attend = edit.all("ReshapeAndCache")[1], edit.all("PagedAttention")[1]
    for user in edit.users(write, "Depend"):
        edit.bypass(user)
    for user in edit.users(write):
        user.input[:] = [i for i in user.input if i != write.output[0]]
    edit.move_after(write, attend)


def written_to_a_copy(kind: str, index: int) -> Callable[[GraphEdit], None]:
    def change(edit: GraphEdit) -> None:
        write = edit.all(kind)[-1]
        shape = (-1, 1, 2, 16) if kind == "ScatterUpdate" else (-1, 16, 2, 16)
        write.input[index] = edit.add(write, "Reshape", [write.input[index], edit.constant(write, shape)])

    return change


def parameter_dims(edit: GraphEdit) -> None:
    (p,) = (p for p in edit.model.graph.parameter if p.name.endswith(name_of(1, "mlp.down_proj.weight")))
    p.dims[:] = reversed(p.dims)


def parameter_type(edit: GraphEdit) -> None:
    (p,) = (p for p in edit.model.graph.parameter if p.name.endswith(name_of(1, "mlp.down_proj.weight")))
    p.data_type = FLOAT16


def unknown_primitive(edit: GraphEdit) -> None:
    edit.become(edit.all("SiLU")[1], "HSwish")


def unknown_attribute(edit: GraphEdit) -> None:
    edit.attribute(edit.one("MatMul", name_of(1, "mlp.down_proj.weight")), "transpose_c", 1)


def cpu_epsilon(edit: GraphEdit) -> None:
    normed = edit.one("Mul", name_of(1, "post_attention_layernorm.weight"))
    rsqrt = edit.made(edit.made(edit.made(normed.input[0]).input[1]).input[0])
    edit.set(edit.made(rsqrt.input[0]), 1, 1e-2)


def cpu_scale(edit: GraphEdit) -> None:
    def value(node: Any) -> float:
        return float(edit.made(node.input[1]).attribute[0].f)

    edit.set([n for n in edit.all("Muls") if value(n) == 0.25][1], 1, 0.3)


def becomes(kind: str, other: str) -> Callable[[GraphEdit], None]:
    return lambda edit: edit.become(edit.all(kind)[-1], other)


def sees_up_to(edit: GraphEdit, before_the_end: int) -> None:
    """In decode: the last slot seen is that many before the sequence's length."""
    (last,) = (n for n in edit.nodes if edit.kind(n).startswith("Sub") and n.input[0] == edit.inputs[4])
    edit.set(last, 1, before_the_end)


def sees_all_cpu(edit: GraphEdit) -> None:
    mask = next(n for n in edit.all("Muls") if edit.kind(edit.made(n.input[0])) == "ReLU")
    edit.set(mask, 1, 0.0)


def positions_for_slots(edit: GraphEdit) -> None:
    edit.all("ScatterUpdate")[0].input[1] = edit.inputs[1]


def values_written_to_keys_cpu(edit: GraphEdit) -> None:
    writes = edit.all("ScatterUpdate")
    edit.move_after(writes[2], writes[3])  # layer 1: both rows are made before the second write
    writes[2].input[2], writes[3].input[2] = writes[3].input[2], writes[2].input[2]


GRAPHS = [
    Fault(
        "attention is not summed over ranks",
        "ascend910b",
        attention(1),
        graph=not_reduced(name_of(1, "self_attn.o_proj.weight")),
    ),
    Fault(
        "mlp is not summed over ranks", "ascend310p", mlp(0), graph=not_reduced(name_of(0, "mlp.down_proj.weight"))
    ),
    Fault(
        "mlp is not summed over ranks, on cpu",
        "cpu",
        mlp(1),
        graph=not_reduced(name_of(1, "mlp.down_proj.weight")),
        graph_names=("decode",),
    ),
    Fault("the embedding is not summed over ranks", "ascend910b", EMBEDDING, graph=embedding_not_reduced),
    Fault("a sum is a maximum", "ascend910b", r"AllReduce.*max", graph=reduction("op", "max"), refused=True),
    Fault(
        "a sum is over another group",
        "ascend910b",
        r"AllReduce.*hccl_world_group",
        graph=reduction("group", "hccl_world_group"),
        refused=True,
    ),
    Fault(
        "a gather is of one rank",
        "ascend910b",
        r"AllGather.*1 ranks of 2",
        graph=gathered("rank_size", 1),
        refused=True,
    ),
    Fault(
        "a gather is over another group",
        "ascend310p",
        r"AllGather.*dp",
        graph=gathered("group", "dp"),
        refused=True,
    ),
    Fault("a gather is laid out rank by rank", "ascend910b", HEAD, graph=without_last("Transpose")),
    Fault("the padding of the vocabulary is kept", "ascend910b", HEAD, graph=without_last("StridedSlice")),
    Fault(
        "only the first sequence has logits",
        "ascend910b",
        HEAD,
        graph=first_sequence_only,
        graph_names=("decode",),
    ),
    Fault(
        "attention is scaled wrongly",
        "ascend910b",
        attention(1) + ".* in prefill",
        graph=flash(1, 12, 0.3),
        graph_names=("prefill",),
    ),
    Fault(
        "paged attention is scaled wrongly",
        "ascend310p",
        attention(2) + ".* in decode",
        graph=paged(2, 11, 0.2),
        graph_names=CACHED,
    ),
    Fault(
        "attention has half the heads", "ascend910b", attention(0), graph=flash(0, 10, 2), graph_names=("prefill",)
    ),
    Fault(
        "paged attention has one key head",
        "ascend910b",
        attention(1) + "|PagedAttention",
        graph=paged(1, 12, 1),
        graph_names=CACHED,
    ),
    Fault(
        "attention sees the next token",
        "ascend910b",
        "FlashAttentionScore",
        graph=flash(1, 14, 1),
        graph_names=("prefill",),
        refused=True,
    ),
    Fault(
        "attention sees four tokens back",
        "ascend910b",
        "FlashAttentionScore|" + attention(1),
        graph=flash(1, 13, 4),
        graph_names=("prefill",),
    ),
    Fault(
        "attention has another sparse mode",
        "ascend310p",
        "FlashAttentionScore",
        graph=flash(1, 17, 3),
        graph_names=("prefill",),
        refused=True,
    ),
    Fault(
        "rotation is of another form",
        "ascend910b",
        "ApplyRotaryPosEmb",
        graph=lambda e: e.set(e.all("ApplyRotaryPosEmb")[1], 5, 0),
        refused=True,
    ),
    Fault(
        "decode is rotated one position on",
        "ascend910b",
        attention(0) + ".* in decode",
        graph=positions_later,
        graph_names=("decode",),
    ),
    Fault("frequencies are wrong by a hundredth", "ascend910b", attention(0), graph=frequencies_wrong),
    Fault("rotation has the wrong sign", "ascend310p", attention(0), graph=sine_negative),
    Fault("keys are not rotated", "ascend910b", attention(1), graph=keys_not_turned),
    Fault(
        "a norm's epsilon is 1e-2", "ascend910b", r"model\.layers\.1\.post_attention_layernorm", graph=norm_epsilon
    ),
    Fault(
        "a residual is dropped",
        "ascend910b",
        r"model\.layers\.1\.post_attention_layernorm",
        graph=residual_dropped,
    ),
    Fault("a residual is the norm's output", "ascend910b", mlp(1), graph=residual_is_the_norm),
    Fault("the last norm is skipped", "ascend910b", HEAD, graph=last_norm_skipped),
    Fault("silu is dropped", "ascend310p", mlp(1), graph=activation_dropped),
    Fault("silu is of up", "cpu", mlp(1), graph=gate_takes_up),
    Fault("keys go to slots by position", "ascend910b", attention(1) + ".* in decode", graph=written_at_positions),
    Fault(
        "keys are cached as values",
        "ascend910b",
        attention(1) + ".* in decode",
        graph=values_written_as_keys,
        graph_names=("prefill",),
    ),
    Fault(
        "the cache of another layer is read",
        "ascend910b",
        attention(2) + ".* in decode",
        graph=another_layers_cache,
        graph_names=CACHED,
    ),
    Fault(
        "keys are read as values",
        "ascend310p",
        attention(1) + ".* in decode",
        graph=keys_read_as_values,
        graph_names=CACHED,
    ),
    Fault(
        "positions are read as block tables",
        "ascend910b",
        "PagedAttention",
        graph=positions_for_tables,
        graph_names=CACHED,
        refused=True,
    ),
    Fault(
        "lengths are exchanged",
        "ascend910b",
        "PagedAttention",
        graph=lengths_exchanged,
        graph_names=CACHED,
        refused=True,
    ),
    Fault("the first token's logits are given", "ascend910b", HEAD, graph=first_tokens, graph_names=("prefill",)),
    Fault(
        "the last token is taken one early",
        "ascend910b",
        "Gather|" + HEAD,
        graph=one_token_early,
        graph_names=("prefill", "decode"),
    ),
    Fault("a bias is missing", "ascend910b", attention(2), graph=bias_dropped),
    Fault("a bias is missing, on cpu", "cpu", attention(2), graph=bias_dropped),
    Fault("a bias is added once a rank", "ascend910b", attention(1), graph=bias_once_a_rank),
    Fault(
        "the cache is read before it is written",
        "ascend910b",
        attention(1) + ".* in decode",
        graph=read_before_the_write,
        graph_names=CACHED,
    ),
    Fault(
        "the cache's read does not wait for its write",
        "ascend910b",
        attention(1) + "|PagedAttention|ReshapeAndCache",
        graph=read_does_not_wait,
        graph_names=CACHED,
    ),
    Fault(
        "the cache's write leads nowhere",
        "ascend910b",
        attention(1) + "|ReshapeAndCache",
        graph=write_is_dead,
        graph_names=("prefill",),
    ),
    Fault(
        "the cache is written through a copy",
        "ascend910b",
        attention(2) + "|ReshapeAndCache",
        graph=written_to_a_copy("ReshapeAndCache", 2),
        graph_names=("prefill",),
    ),
    Fault(
        "the cache is written through a copy, on cpu",
        "cpu",
        attention(2) + "|ScatterUpdate",
        graph=written_to_a_copy("ScatterUpdate", 0),
        graph_names=("prefill",),
    ),
    Fault(
        "a parameter has another shape than its weight", "ascend910b", mlp(1), graph=parameter_dims, refused=True
    ),
    Fault(
        "a parameter has another type than its target's", "ascend910b", mlp(1), graph=parameter_type, refused=True
    ),
    Fault(
        "a primitive is unknown", "ascend910b", r"n\d+ \(HSwish.*not known", graph=unknown_primitive, refused=True
    ),
    Fault(
        "an attribute is unknown",
        "ascend910b",
        r"MatMul, " + mlp(1) + ".*transpose_c",
        graph=unknown_attribute,
        refused=True,
    ),
    Fault(
        "a norm's epsilon is 1e-2, on cpu", "cpu", r"model\.layers\.1\.post_attention_layernorm", graph=cpu_epsilon
    ),
    Fault("attention is scaled wrongly, on cpu", "cpu", attention(1), graph=cpu_scale),
    Fault(
        "a token does not see itself, on cpu",
        "cpu",
        attention(0),
        graph=lambda edit: sees_up_to(edit, 2),
        graph_names=("decode",),
    ),
    Fault(
        "a token sees one slot too many, on cpu",
        "cpu",
        attention(0) + ".* in decode",
        graph=lambda edit: sees_up_to(edit, 0),
        graph_names=("decode",),
    ),
    Fault(
        "tokens see what comes after them, on cpu",
        "cpu",
        attention(0),
        graph=sees_all_cpu,
        graph_names=("prefill",),
    ),
    Fault("keys are written to positions, on cpu", "cpu", attention(0), graph=positions_for_slots),
    Fault("the vocabulary is not summed over ranks, on cpu", "cpu", HEAD, graph=without_last("AllReduce")),
]

FAULTS = [*WEIGHTS, *GRAPHS]
