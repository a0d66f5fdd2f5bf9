"""Products of int8 with Ascend's primitives: aclnnDynamicQuant, aclnnAscendQuant, aclnnQuantMatmulV4 and
aclnnGroupedMatmulV4 (CANN 8.2 to 8.5), in the order in which SGLang's NPU backend calls them.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, ops
from mindspore.ops import auto_generate as fused

from ..spec import Local


def product(dtype: Any) -> Any:
    """(codes [T, inner], codes [out, inner], scales [out], offset, bias, the rows' scales) -> [T, out]."""
    return fused.QuantBatchMatmul(transpose_x1=False, transpose_x2=True, dtype=dtype)


class DynamicProduct(nn.Cell):
    """Each row of x gets a scale of its own."""

    def __init__(self, dtype: Any) -> None:
        super().__init__()
        self.quantise = fused.DynamicQuantExt()
        self.product = product(dtype)

    def construct(self, x: Any, weight: Any, scale: Any) -> Any:
        codes, token_scales = self.quantise(x, None)
        return self.product(codes, weight, scale.reshape(-1), None, None, token_scales)


class StaticProduct(nn.Cell):
    """All rows of x have one scale and offset.  They are applied in float32: the reciprocal of a scale, rounded to
    bfloat16, would be up to half a code wrong at the far end."""

    def __init__(self, dtype: Any) -> None:
        super().__init__()
        self.one = Tensor(1.0, ms.float32)
        self.quantise = fused.QuantV2()
        self.product = product(dtype)

    def construct(self, x: Any, weight: Any, deq_scale: Any, bias: Any, scale: Any, offset: Any) -> Any:
        x = ops.cast(x, ms.float32)
        codes = self.quantise(x, self.one / scale, offset, False, "ROUND", ms.int8)
        return self.product(codes, weight, deq_scale, None, bias, None)


class DynamicGroupedProduct(nn.Cell):
    """As `experts.GroupedProduct`.  Rows that no group reaches become codes too, and are never multiplied."""

    def __init__(self, local: Local, dtype: Any) -> None:
        super().__init__()
        self.group_list_type = 0 if local.target.cumulative_counts else 1
        self.dtype = dtype
        self.quantise = fused.DynamicQuantExt()
        self.product = fused.GroupedMatmulV4()

    def construct(self, x: Any, groups: Any, weight: Any, scale: Any) -> Any:
        codes, token_scales = self.quantise(x, None)
        experts, _, width = scale.shape
        return self.product(
            [codes],
            [weight],
            None,
            [scale.reshape(experts, width)],
            None,
            None,
            None,
            [token_scales],
            groups,
            split_item=3,
            group_type=0,
            group_list_type=self.group_list_type,
            output_dtype=self.dtype,
        )[0]
