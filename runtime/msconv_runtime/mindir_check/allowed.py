"""What a graph may hold: the primitives, attributes and results that the exporter writes, and no other.  Data.

Each table is what the graphs of all families have on that kind of target: a test exports them, and fails for what
is missing here and for what no graph uses.  A primitive that reads or writes files, prints, calls Python, or loads
a library is in none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..targets import SWIGLU

LIBRARY = "msconv-native-1"  # what graphs call the compiled kernels: another number for another set of them
GROUP = "<the group of all ranks>"
RANKS = "<how many ranks there are>"
TP_GROUP = "msconv_tp"  # in every graph with collectives: the ranks that share one model; who loads it creates it

Value = bool | int | str | tuple["Value", ...]  # a list begins with LIST or TUPLE
Attributes = Mapping[str, Value]


class Primitive(NamedTuple):
    """`inputs`: how many, least and most.  `results`: what a node of it gives.  `is_function`: MindSpore's
    PRIMITIVE_FUNCTION.  `attributes`: each set of attributes that it may have."""

    inputs: tuple[int, int]
    results: tuple[str, ...] = ("tensor",)
    is_function: bool = True
    attributes: tuple[Attributes, ...] = ({},)


def function(inputs: int, *attributes: Attributes, result: str = "tensor") -> Primitive:
    return Primitive((inputs, inputs), (result,), True, attributes or ({},))


def builtin(inputs: int, *attributes: Attributes, result: str = "tensor") -> Primitive:
    """One of MindSpore's front end, or from before its primitive functions."""
    return Primitive((inputs, inputs), (result,), False, attributes or ({},))


def names(inputs: str, output: str, kind: str = "LIST") -> dict[str, Value]:
    """The names that older primitives carry along."""
    return {"input_names": (kind, *inputs.split()), "output_names": (kind, *output.split())}


def kernel(name: str, inputs: int, outputs: int) -> Primitive:
    """A function of our library, by exactly the attributes that the exporter writes."""
    takes, gives = (" ".join(f"{letter}{i}" for i in range(n)) for letter, n in (("x", inputs), ("y", outputs)))
    attributes: dict[str, Value] = {
        "autodiff": False,
        "cpp_infer_shape": True,
        "cpp_infer_type": True,
        "func_name": f"{LIBRARY}:{name}",
        "func_type": "aot",
        "imply_path": "",
        "multi_output": outputs > 1,
        "primitive_target": "CPU",
        "pure_input_names": ("LIST", *takes.split()),
        "reg_op_name": name,
        "uniq_name": f"Custom_{name}_{LIBRARY}:{name}",
        **names(takes, gives),
    }
    return builtin(inputs, attributes, result="tuple" if outputs > 1 else "tensor")


KERNELS = {  # functions of the library: how many inputs and outputs
    "AddNorm": (4, 2),
    "AfterAttentionInt8": (11, 2),
    "Attend": (6, 1),
    "Attention": (16, 1),
    "AttentionInt8": (18, 1),
    "Experts": (6, 1),
    "ExpertsInt8": (8, 1),
    "HeadsInt8": (9, 3),
    "Layer": (21, 2),
    "LayerInt8": (25, 2),
    "Mlp": (3, 1),
    "MlpInt8": (5, 1),
    "Norm": (3, 1),
    "Product": (2, 1),
    "ProductInt8": (3, 1),
    "ProductInt8Static": (6, 1),
    "Rows": (2, 1),
    "SplitHeads": (7, 3),
    "Swiglu": (1, 1),
}
MOST_ITEMS = 256  # of a tuple
MOST_WAITED_FOR = 4096  # at one point of a graph: all weights, where layers are one node each
COLLECTIVE: dict[str, Value] = {"fusion": 0, "group": GROUP, "index": 0, "no_eliminate": True}
FROM_SCALAR = names("input_scalar dtype", "output_data")
FROM_TENSOR = names("input_tensor", "output_data")
SLICED = "x begin end strides begin_mask end_mask ellipsis_mask new_axis_mask shrink_axis_mask"
GROUPS_OF_INPUTS: Value = ("TUPLE", 1, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0)  # which of GroupedMatmulV4's are lists
GROUPS_WITH_SCALES: Value = ("TUPLE", 1, 1, 0, 1, 0, 0, 0, 1, 1, 0, 0, 0)

PRIMITIVES = {
    "Abs": function(1),
    "Add": function(2),
    "AddRmsNorm": function(4, result="tuple"),
    "AllGather": builtin(1, {**COLLECTIVE, "rank_size": RANKS}),
    "AllReduce": builtin(1, {**COLLECTIVE, "op": "sum"}),
    "ApplyRotaryPosEmb": function(6, result="tuple"),
    "BatchMatMul": function(4),
    "BroadcastTo": function(2),
    "Cast": function(2, names("x dst_type", "output"), {}),
    "Concat": function(2),
    "Cos": function(1),
    "CumSum": function(4),
    "Depend": Primitive((2, 2), ("tensor", "tuple"), False, ({"side_effect_propagate": 1},)),
    "Div": function(2),
    "DynamicQuantExt": function(2, result="tuple"),
    "Equal": function(2),
    "ExpandDims": function(2),
    "FlashAttentionScore": function(18, result="tuple"),
    "FusedAddTopKDiv": function(12, result="tuple"),
    "Gather": function(4),
    "GatherD": function(3),
    "Greater": function(2),
    "GreaterEqual": function(2),
    "GroupedMatmulV4": function(
        17, {"group_info": GROUPS_OF_INPUTS}, {"group_info": GROUPS_WITH_SCALES}, result="tuple"
    ),
    "InnerMoeTokenUnpermute": function(5),
    "Less": function(2),
    "LessScalar": function(2),
    "Load": builtin(2),
    "LogicalAnd": function(2),
    "MakeTuple": Primitive((1, MOST_WAITED_FOR), ("tuple",), False),
    "MatMul": function(4),
    "Maximum": function(2),
    "Minimum": function(2),
    "MoeInitRoutingV2": function(8, result="tuple"),
    "Mul": function(2),
    "Muls": function(2),
    "NanToNum": function(4),
    "OnesLike": function(1),
    "PagedAttention": function(16),
    "QuantBatchMatmul": function(9),
    "QuantV2": function(6),
    "Range": function(4),
    "ReLU": function(1),
    "ReduceMax": function(3),
    "ReduceMean": function(3),
    "Reshape": function(2),
    "ReshapeAndCache": function(6, {"side_effect_mem": True}),
    "RmsNorm": function(3, result="tuple"),
    "Round": function(2),
    "Rsqrt": function(1),
    "ScalarMul": function(2, result="scalar"),
    "ScalarSub": function(2, result="scalar"),
    "ScalarToTensor": function(2, FROM_SCALAR, {}),
    "ScatterNd": function(3),
    "ScatterUpdate": builtin(4, {"side_effect_mem": True, "use_locking": True, **names("x indices updates", "y")}),
    "Select": function(3),
    "Shape": function(1, result="tuple"),
    "SiLU": function(1),
    "Sigmoid": function(1),
    "Sin": function(1),
    "Softmax": function(2),
    "Split": function(3, result="tuple"),
    "StridedSlice": function(9, names(SLICED, "output", "TUPLE"), {}),
    "Sub": function(2, names("x y", "output")),
    "SumExt": function(4),
    "Swiglu": function(2),
    "TensorToScalar": builtin(1, FROM_TENSOR, result="scalar"),
    "TensorToTuple": builtin(1, FROM_TENSOR, result="tuple"),
    "Tile": function(2),
    "TopK": builtin(2, {"sorted": True, **names("input k", "values indices")}, result="tuple"),
    "TopkExt": function(5, result="tuple"),
    "Transpose": function(2),
    "TupleGetItem": Primitive((2, 2), ("tensor", "scalar"), False),
    "UpdateState": builtin(2, result="monad"),
    "ZerosLike": function(1),
    **{f"{LIBRARY}:{name}": kernel(name, *counts) for name, counts in KERNELS.items()},
}
EVERYWHERE = """
    Add AllReduce BatchMatMul BroadcastTo Cast Concat Cos CumSum Depend Div Gather GreaterEqual LessScalar Load
    LogicalAnd MakeTuple MatMul Mul Muls Reshape Select Shape Sin Softmax Split StridedSlice Sub SumExt
    Transpose TupleGetItem UpdateState ZerosLike
"""
KINDS = {  # of graphs: what they may have besides
    "cpu": """
        Abs Equal ExpandDims GatherD Greater Maximum Minimum OnesLike Range ReLU ReduceMax ReduceMean Round Rsqrt
        ScalarMul ScalarSub
        ScalarToTensor ScatterNd ScatterUpdate SiLU Sigmoid TensorToScalar Tile TopK
    """,
    "compiled": "Equal ExpandDims GatherD Greater ScatterUpdate Sigmoid TopK "
    + " ".join(f"{LIBRARY}:{name}" for name in KERNELS),
    "ascend": """
        AddRmsNorm AllGather ApplyRotaryPosEmb DynamicQuantExt FlashAttentionScore FusedAddTopKDiv GroupedMatmulV4
        InnerMoeTokenUnpermute Less MoeInitRoutingV2 NanToNum PagedAttention QuantBatchMatmul QuantV2 Range
        ReshapeAndCache RmsNorm ScalarToTensor SiLU TensorToScalar TensorToTuple Tile TopkExt
    """,
}
OF_EARLIER_VERSIONS = "AfterAttentionInt8", "HeadsInt8"  # kernels that this one loads and writes no more
OF_MINDSPORE_28 = {"cpu": " Less", "compiled": " Less", "ascend": ""}  # what only that version writes
ALLOWED = {
    kind: {name: PRIMITIVES[name] for name in (EVERYWHERE + own + OF_MINDSPORE_28[kind]).split()}
    for kind, own in KINDS.items()
}
FUSED = {SWIGLU: {"Swiglu": PRIMITIVES["Swiglu"]}}  # what a graph has besides if it was asked for
GRAPH_ATTRIBUTES: Attributes = {
    "FIAS_SP_RUN_ONCE_ONLY": True,
    "FLASH_SP_RUN_ONCE_ONLY": True,
    "auto_parallel_finish_pre_action": True,
    "check_set_strategy_valid_once_only": True,
    "compile_phase": "export.mindir",
    "flash_sp_send_recv_has_attached": True,
    "has_shard": False,
    "less_bn": False,
    "phase": "export",
}
