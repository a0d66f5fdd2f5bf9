"""Products of int8 with MindSpore's CPU operations, which have none: codes become float32, and are multiplied in
pieces so short that every sum is a whole number that float32 holds.  Right, and slower than a product of values.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, ops

from ..operations import alike

PIECE = 1024  # of the inner dimension: 1024 * 128 * 128 = 2**24, up to which float32 holds every whole number


class Sums(nn.Cell):
    """(codes float32 [T, inner], codes int8 [out, inner]) -> int32 [T, out]."""

    def __init__(self, product: Any) -> None:
        super().__init__()
        self.product = product

    def construct(self, codes: Any, weight: Any) -> Any:
        inner = weight.shape[-1]
        if inner <= PIECE:
            return ops.cast(self.product(codes, ops.cast(weight, ms.float32)), ms.int32)
        total: Any = 0
        for begin in range(0, inner, PIECE):
            end = min(begin + PIECE, inner)
            piece = ops.cast(weight[:, begin:end], ms.float32)
            total = total + ops.cast(self.product(codes[:, begin:end], piece), ms.int32)
        return total


class SumsOfExperts(nn.Cell):
    """(codes float32 [N, R, inner], codes int8 [N, inner, out]) -> int32 [N, R, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.matmul = ops.BatchMatMul()

    def construct(self, codes: Any, weight: Any) -> Any:
        inner = weight.shape[1]
        if inner <= PIECE:
            return ops.cast(self.matmul(codes, ops.cast(weight, ms.float32)), ms.int32)
        total: Any = 0
        for begin in range(0, inner, PIECE):
            end = min(begin + PIECE, inner)
            piece = ops.cast(weight[:, begin:end, :], ms.float32)
            total = total + ops.cast(self.matmul(codes[:, :, begin:end], piece), ms.int32)
        return total


class Quantise(nn.Cell):
    """x [.., inner] -> codes, whole numbers in float32, and their scales [.., 1]: a row of zeros has scale 0."""

    def __init__(self) -> None:
        super().__init__()
        self.most = ops.ReduceMax(keep_dims=True)
        self.largest_code, self.nothing = Tensor(127.0, ms.float32), Tensor(0.0, ms.float32)

    def construct(self, x: Any) -> Any:
        scale = self.most(ops.abs(x), -1) / self.largest_code
        divisor = ops.select(scale > self.nothing, scale, ops.ones_like(scale))
        return ops.round(x / alike(divisor, x)), scale


class DynamicProduct(nn.Cell):
    def __init__(self, product: Any) -> None:
        super().__init__()
        self.quantise = Quantise()
        self.sums = Sums(product)

    def construct(self, x: Any, weight: Any, scale: Any) -> Any:
        codes, token_scales = self.quantise(x)
        y = ops.cast(self.sums(codes, weight), ms.float32) * scale.reshape(-1)
        return y * alike(token_scales, y)


class StaticProduct(nn.Cell):
    def __init__(self, product: Any) -> None:
        super().__init__()
        self.sums = Sums(product)
        self.one = Tensor(1.0, ms.float32)
        self.least, self.most = Tensor(-128.0, ms.float32), Tensor(127.0, ms.float32)

    def construct(self, x: Any, weight: Any, deq_scale: Any, bias: Any, scale: Any, offset: Any) -> Any:
        codes = ops.round(x * (self.one / scale) + offset)
        codes = ops.minimum(ops.maximum(codes, self.least), self.most)
        return ops.cast(self.sums(codes, weight) + bias, ms.float32) * deq_scale


class DynamicProductOfChosen(nn.Cell):
    """As `experts.ProductOfChosen`."""

    def __init__(self) -> None:
        super().__init__()
        self.quantise = Quantise()
        self.sums = SumsOfExperts()

    def construct(self, x: Any, ids: Any, weight: Any, scale: Any) -> Any:
        codes, token_scales = self.quantise(x)
        y = ops.cast(self.sums(codes, ops.gather(weight, ids, 0)), ms.float32) * ops.gather(scale, ids, 0)
        return y * alike(token_scales, y)


class DynamicProductOfAll(nn.Cell):
    """As `experts.ProductOfAll`."""

    def __init__(self) -> None:
        super().__init__()
        self.quantise = Quantise()
        self.sums = SumsOfExperts()

    def construct(self, x: Any, ids: Any, weight: Any, scale: Any) -> Any:
        codes, token_scales = self.quantise(x)
        y = ops.cast(self.sums(codes, weight), ms.float32)
        y = y * alike(scale, y)
        return y * alike(token_scales, y)
