"""A matrix of the model in a graph: the tensors it is stored as, and the products with it."""

from __future__ import annotations

from typing import Any

from mindspore import ParameterTuple, nn, ops


class Matrix(nn.Cell):
    """A matrix [out, inner], or experts' matrices [E, inner, out].  Called with x [T, inner] it gives [T, out];
    experts' matrices are called with x and `places`, which say each row's expert in the target's own way.

    `product` takes what the matrix is called with, then the tensors.  `decode` makes the matrix of the tensors, in
    the type of the target's own products; None if the first tensor is the matrix, or if only `product` reads them.
    """

    def __init__(self, tensors: list[Any], product: Any, decode: Any | None) -> None:
        super().__init__()
        self.tensors = ParameterTuple(tensors)
        self.product = product
        self.is_encoded = decode is not None
        self.decode: Any = decode

    def name_product(self, name: str) -> None:
        """What the graph's file calls the product: its bytes hold that name, "product" unless it is told."""
        if isinstance(self.product, ops.Primitive):
            self.product.set_prim_instance_name(name)

    def construct(self, x: Any, *places: Any) -> Any:
        return self.product(x, *places, *self.tensors)

    def values(self) -> Any:
        """The matrix itself."""
        if self.is_encoded:
            return self.decode(*self.tensors)
        return self.tensors[0]

    def operands(self) -> tuple[Any, ...]:
        """What a product takes that knows several matrices: the matrix if it is decoded, else its tensors."""
        if self.is_encoded:
            return (self.decode(*self.tensors),)
        return self.tensors


class Decoded(nn.Cell):
    """A product with the matrix that `decode` makes of the tensors."""

    def __init__(self, product: Any, decode: Any) -> None:
        super().__init__()
        self.product = product
        self.decode = decode

    def construct(self, x: Any, *tensors: Any) -> Any:
        return self.product(x, self.decode(*tensors))


class DecodedExperts(nn.Cell):
    """The same of experts' matrices."""

    def __init__(self, product: Any, decode: Any) -> None:
        super().__init__()
        self.product = product
        self.decode = decode

    def construct(self, x: Any, places: Any, *tensors: Any) -> Any:
        return self.product(x, places, self.decode(*tensors))
