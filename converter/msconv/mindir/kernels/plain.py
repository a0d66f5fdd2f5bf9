"""Primitives that mean what their name says (MindSpore's API documentation, mindspore.ops)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .table import Context, kernel, upcast

TYPE_IDS = {  # mindspore/core/include/mindapi/base/type_id.h
    30: torch.bool,
    32: torch.int8,
    33: torch.int16,
    34: torch.int32,
    35: torch.int64,
    37: torch.uint8,
    42: torch.float16,
    43: torch.float32,
    44: torch.float64,
    45: torch.bfloat16,
}


Attributes = dict[str, Any]


def _ints(values: Any) -> list[int]:
    if isinstance(values, Tensor):
        return [int(v) for v in values.reshape(-1).tolist()]
    return [int(v) for v in values] if isinstance(values, tuple | list) else [int(values)]


@kernel("Load")
def load(c: Context, a: Attributes, x: Any, *monads: Any) -> Any:
    return x


@kernel("Depend")
def depend(c: Context, a: Attributes, x: Any, *after: Any) -> Any:
    return x


@kernel("UpdateState")
def update_state(c: Context, a: Attributes, *inputs: Any) -> None:
    return None


@kernel("MakeTuple")
def make_tuple(c: Context, a: Attributes, *items: Any) -> tuple[Any, ...]:
    return items


@kernel("TupleGetItem")
def tuple_get_item(c: Context, a: Attributes, items: Any, index: int) -> Any:
    return items[int(index)]


@kernel("Shape")
def shape(c: Context, a: Attributes, x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


@kernel("ScalarMul")
def scalar_mul(c: Context, a: Attributes, x: Any, y: Any) -> Any:
    return x * y


@kernel("ScalarSub")
def scalar_sub(c: Context, a: Attributes, x: Any, y: Any) -> Any:
    return x - y


@kernel("ScalarToTensor")
def scalar_to_tensor(c: Context, a: Attributes, x: Any, dtype: int) -> Tensor:
    return torch.tensor(x, dtype=c.keep(TYPE_IDS[int(dtype)]))


@kernel("TensorToScalar")
def tensor_to_scalar(c: Context, a: Attributes, x: Tensor) -> Any:
    return x.item()


@kernel("TensorToTuple")
def tensor_to_tuple(c: Context, a: Attributes, x: Tensor) -> tuple[Any, ...]:
    return tuple(x.tolist())


@kernel("Cast")
def cast(c: Context, a: Attributes, x: Tensor, dtype: int) -> Tensor:
    return x.to(c.keep(TYPE_IDS[int(dtype)]))


@kernel("Add")
def add(c: Context, a: Attributes, x: Any, y: Any) -> Any:
    return x + y


@kernel("Sub")
def sub(c: Context, a: Attributes, x: Any, y: Any) -> Any:
    return x - y


@kernel("Mul", "Muls")
def mul(c: Context, a: Attributes, x: Any, y: Any) -> Any:
    return x * y


@kernel("Div")
def div(c: Context, a: Attributes, x: Any, y: Any) -> Any:
    return x / y


@kernel("FloorDiv")
def floor_div(c: Context, a: Attributes, x: Any, y: Any) -> Any:
    return x // y


@kernel("RemainderTensorScalar")
def remainder(c: Context, a: Attributes, x: Any, y: Any) -> Any:
    return x % y


@kernel("Less", "LessScalar")
def less(c: Context, a: Attributes, x: Any, y: Any) -> Any:
    return x < y


@kernel("LessEqual")
def less_equal(c: Context, a: Attributes, x: Any, y: Any) -> Any:
    return x <= y


@kernel("GreaterEqual", "GreaterEqualScalar")
def greater_equal(c: Context, a: Attributes, x: Any, y: Any) -> Any:
    return x >= y


@kernel("Greater")
def greater(c: Context, a: Attributes, x: Any, y: Any) -> Any:
    return x > y


@kernel("Equal")
def equal(c: Context, a: Attributes, x: Any, y: Any) -> Any:
    return x == y


@kernel("LogicalAnd")
def logical_and(c: Context, a: Attributes, x: Any, y: Any) -> Any:
    return x & y


@kernel("Minimum")
def minimum(c: Context, a: Attributes, x: Tensor, y: Any) -> Tensor:
    return torch.minimum(x, torch.as_tensor(y, dtype=x.dtype))


@kernel("Maximum")
def maximum(c: Context, a: Attributes, x: Tensor, y: Any) -> Tensor:
    return torch.maximum(x, torch.as_tensor(y, dtype=x.dtype))


@kernel("NanToNum")
def nan_to_num(c: Context, a: Attributes, x: Tensor, nan: float, above: float, below: float) -> Tensor:
    return torch.nan_to_num(x, nan, above, below)


@kernel("Select")
def select(c: Context, a: Attributes, condition: Tensor, x: Any, y: Any) -> Tensor:
    return torch.where(condition, x, y)


@kernel("ZerosLike")
def zeros_like(c: Context, a: Attributes, x: Tensor) -> Tensor:
    return torch.zeros_like(x)


@kernel("Cos")
def cos(c: Context, a: Attributes, x: Tensor) -> Tensor:
    return upcast(x).cos().to(x.dtype)


@kernel("Sin")
def sin(c: Context, a: Attributes, x: Tensor) -> Tensor:
    return upcast(x).sin().to(x.dtype)


@kernel("Rsqrt")
def rsqrt(c: Context, a: Attributes, x: Tensor) -> Tensor:
    return upcast(x).rsqrt().to(x.dtype)


@kernel("Sigmoid")
def sigmoid(c: Context, a: Attributes, x: Tensor) -> Tensor:
    return upcast(x).sigmoid().to(x.dtype)


@kernel("Abs")
def absolute(c: Context, a: Attributes, x: Tensor) -> Tensor:
    return x.abs()


@kernel("Round")
def to_nearest(c: Context, a: Attributes, x: Tensor, decimals: Any = 0) -> Tensor:
    """Half to even."""
    if int(decimals):
        raise ValueError(f"Round: to {int(decimals)} decimals is not known here")
    return x.round()


@kernel("OnesLike")
def ones_like(c: Context, a: Attributes, x: Tensor) -> Tensor:
    return torch.ones_like(x)


@kernel("ReLU")
def relu(c: Context, a: Attributes, x: Tensor) -> Tensor:
    return x.relu()


@kernel("SiLU")
def silu(c: Context, a: Attributes, x: Tensor) -> Tensor:
    return torch.nn.functional.silu(upcast(x)).to(x.dtype)


@kernel("Softmax")
def softmax(c: Context, a: Attributes, x: Tensor, axis: Any) -> Tensor:
    return torch.softmax(upcast(x), _ints(axis)[0]).to(x.dtype)


@kernel("SumExt")
def sum_ext(c: Context, a: Attributes, x: Tensor, axis: Any, keep: Any, dtype: Any) -> Tensor:
    out = upcast(x).sum(_ints(axis), keepdim=bool(keep)) if axis is not None else upcast(x).sum()
    return out.to(x.dtype if dtype is None else c.keep(TYPE_IDS[int(dtype)]))


@kernel("ReduceMean")
def reduce_mean(c: Context, a: Attributes, x: Tensor, axis: Any, keep: Any) -> Tensor:
    return upcast(x).mean(_ints(axis), keepdim=bool(keep)).to(x.dtype)


@kernel("ReduceMax")
def reduce_max(c: Context, a: Attributes, x: Tensor, axis: Any, keep: Any) -> Tensor:
    axes = _ints(axis)
    return x.amax(axes or None, keepdim=bool(keep)) if axes else x.max()


@kernel("TopK", attributes=("sorted",))
def top_k(c: Context, a: Attributes, x: Tensor, count: Any) -> tuple[Tensor, Tensor]:
    values, index = torch.topk(x, int(count), -1, sorted=bool(a["sorted"]))
    return values, index.int()


@kernel("TopkExt")
def top_k_ext(
    c: Context, a: Attributes, x: Tensor, count: Any, axis: Any, largest: Any, ordered: Any
) -> tuple[Tensor, Tensor]:
    values, index = torch.topk(x, int(count), int(axis), bool(largest), bool(ordered))
    return values, index


@kernel("CumSum")
def cumsum(c: Context, a: Attributes, x: Tensor, axis: Any, exclusive: Any, reverse: Any) -> Tensor:
    if exclusive or reverse:
        raise ValueError("CumSum: exclusive and reverse are not known here")
    return x.cumsum(_ints(axis)[0]).to(x.dtype)


@kernel("Range")
def arange(c: Context, a: Attributes, start: Any, limit: Any, delta: Any, most: Any = None) -> Tensor:
    """int64 whatever whole numbers it is given."""
    if any(float(v) != int(v) for v in (start, limit, delta)):
        raise ValueError("Range: fractions are not known here")
    return torch.arange(int(start), int(limit), int(delta), dtype=torch.int64)


@kernel("Concat")
def concat(c: Context, a: Attributes, items: Any, axis: int) -> Tensor:
    return torch.cat(list(items), int(axis))


@kernel("Stack", attributes=("axis", "N", "num"))
def stack(c: Context, a: Attributes, items: Any) -> Tensor:
    return torch.stack(list(items), int(a["axis"]))


@kernel("Split")
def split(c: Context, a: Attributes, x: Tensor, axis: Any, count: Any) -> tuple[Tensor, ...]:
    if x.shape[int(axis)] % int(count):
        raise ValueError(f"Split: {x.shape[int(axis)]} into {int(count)} parts")
    return tuple(p.clone() for p in x.chunk(int(count), int(axis)))


@kernel("SplitWithSize")
def split_with_size(c: Context, a: Attributes, x: Tensor, sizes: Any, axis: Any) -> tuple[Tensor, ...]:
    return tuple(p.clone() for p in torch.split(x, _ints(sizes), int(axis)))


@kernel("Reshape")
def reshape(c: Context, a: Attributes, x: Tensor, to: Any) -> Tensor:
    return x.reshape(_ints(to)).clone()  # MindSpore copies: a write through a view must not be seen


@kernel("Transpose")
def transpose(c: Context, a: Attributes, x: Tensor, order: Any) -> Tensor:
    return x.permute(_ints(order)).clone()


@kernel("ExpandDims")
def expand_dims(c: Context, a: Attributes, x: Tensor, axis: Any) -> Tensor:
    return x.unsqueeze(int(axis)).clone()


@kernel("BroadcastTo")
def broadcast_to(c: Context, a: Attributes, x: Tensor, to: Any) -> Tensor:
    return x.expand(_ints(to)).clone()


@kernel("Tile")
def tile(c: Context, a: Attributes, x: Tensor, times: Any) -> Tensor:
    return x.repeat(_ints(times))


@kernel("StridedSlice")
def strided_slice(c: Context, a: Attributes, x: Tensor, begin: Any, end: Any, step: Any, *masks: Any) -> Tensor:
    begin_mask, end_mask, ellipsis, new_axis, shrink = (int(m) for m in masks)
    if ellipsis or new_axis or shrink:
        raise ValueError("StridedSlice: only begin and end masks are known here")
    cuts = tuple(
        slice(None if begin_mask >> i & 1 else b, None if end_mask >> i & 1 else e, s)
        for i, (b, e, s) in enumerate(zip(_ints(begin), _ints(end), _ints(step), strict=True))
    )
    return x[cuts].clone()


@kernel("Gather")
def gather(c: Context, a: Attributes, x: Tensor, index: Tensor, axis: Any, batch: Any) -> Tensor:
    if int(batch):
        raise ValueError("Gather: batch_dims is not known here")
    axis = int(axis) % x.ndim
    index = index.long()
    if index.numel() and (index.min() < 0 or index.max() >= x.shape[axis]):
        raise IndexError(f"Gather: index {int(index.min())}..{int(index.max())} of {x.shape[axis]}")
    flat = x.index_select(axis, index.reshape(-1))
    flat = flat.to(c.keep(flat.dtype))  # a table may be given as it is stored
    return flat.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


@kernel("GatherD")
def gather_d(c: Context, a: Attributes, x: Tensor, axis: Any, index: Tensor) -> Tensor:
    if index.numel() and (index.min() < 0 or index.max() >= x.shape[int(axis)]):
        raise IndexError(f"GatherD: index {int(index.min())}..{int(index.max())} of {x.shape[int(axis)]}")
    return x.gather(int(axis), index.long())


@kernel("ScatterNd")
def scatter_nd(c: Context, a: Attributes, index: Tensor, rows: Tensor, to: Any) -> Tensor:
    """Zeros with rows added at index [N, 1]: those of one place add up."""
    sizes = _ints(to)
    if index.shape[-1] != 1:
        raise ValueError(f"ScatterNd: index {tuple(index.shape)} is not known here")
    place = index.reshape(-1).long()
    if place.numel() and (place.min() < 0 or place.max() >= sizes[0]):
        raise IndexError(f"ScatterNd: index {int(place.min())}..{int(place.max())} of {sizes[0]}")
    return torch.zeros(sizes, dtype=rows.dtype).index_add_(0, place, rows)


@kernel("MatMul", "BatchMatMul")
def matmul(c: Context, a: Attributes, x: Tensor, y: Tensor, tx: Any, ty: Any) -> Tensor:
    x2, y2 = (x.mT if tx else x), (y.mT if ty else y)
    return (upcast(x2) @ upcast(y2)).to(x.dtype)


@kernel("ScatterUpdate")
def scatter_update(c: Context, a: Attributes, x: Tensor, index: Tensor, rows: Tensor, *monads: Any) -> Tensor:
    """In place: x[index[i]] = rows[i]."""
    place = index.long()
    if place.numel() and (place.min() < 0 or place.max() >= len(x)):
        raise IndexError(f"ScatterUpdate: index {int(place.min())}..{int(place.max())} of {len(x)}")
    x[place] = rows.to(x.dtype)
    return x
