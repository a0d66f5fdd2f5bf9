"""Nodes, constants and weights of an ONNX graph while it is made.  Knows no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from msconv_runtime.artifact import GraphInput, GraphOutput, GraphParameter, TensorEntry, Weights

from ..spec import CannotCompute

TYPES: dict[str, int] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
}
FLOAT: int = TensorProto.FLOAT
BOOL: int = TensorProto.BOOL


class Builder:
    """One graph.  Values are names; what a weight is called is what the artifact calls it."""

    def __init__(self, weights: Weights) -> None:
        self.stored = {t.name: t for t in weights.tensors}
        self.files = [f.path for f in weights.files if f.rank == 0]
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.kinds: Counter[str] = Counter()
        self.reads: dict[str, GraphParameter] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._float: dict[str, str] = {}
        self._count = 0

    def name(self) -> str:
        """One that no other value has."""
        self._count += 1
        return f"v{self._count}"

    def op(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """A node that gives one value; `name`: the value's, if it is an output of the graph."""
        return self.node(kind, inputs, [name or self.name()], **attributes)[0]

    def node(self, kind: str, inputs: tuple[str, ...], outputs: list[str], **attributes: Any) -> list[str]:
        """A node that gives several values."""
        self.kinds[kind] += 1
        self.nodes.append(helper.make_node(kind, list(inputs), outputs, **attributes))
        return outputs

    def split(self, x: str, sizes: list[int], axis: int = -1) -> list[str]:
        """Pieces of these sizes."""
        return self.node("Split", (x, self.whole(sizes)), [self.name() for _ in sizes], axis=axis)

    def reshape(self, x: str, *shape: int) -> str:
        """To constant sizes; one of them may be -1."""
        return self.op("Reshape", x, self.whole(list(shape)))

    def whole(self, value: int | list[int] | NDArray[np.int64]) -> str:
        """A constant of int64."""
        return self.constant(np.asarray(value, np.int64))

    def real(self, value: float | NDArray[np.float32]) -> str:
        """A constant of float32."""
        return self.constant(np.asarray(value, np.float32))

    def constant(self, value: NDArray[Any]) -> str:
        key = (str(value.dtype), value.shape, value.tobytes())
        if key not in self._constants:
            self._constants[key] = name = f"c{len(self._constants)}"
            self.initializers.append(numpy_helper.from_array(value, name))
        return self._constants[key]

    def weight(self, name: str) -> str:
        """A stored weight, in the type it is stored as: bytes of the rank's file, not of the graph's.  Raises
        CannotCompute for codes."""
        if name not in self.reads:
            entry = self.stored[name]
            if entry.dtype not in TYPES:
                raise CannotCompute(
                    f"onnx: {name} is stored as {entry.dtype}: ONNX files of quantised weights are not made.",
                    "Convert the checkpoint without --quant, or one that is not quantised.",
                )
            self.reads[name] = GraphParameter(name, entry.dtype, list(entry.shape))
            self.initializers.append(self._external(entry))
        return name

    def _external(self, entry: TensorEntry) -> Any:
        held = TensorProto(name=entry.name, data_type=TYPES[entry.dtype], dims=entry.shape)
        held.data_location = TensorProto.EXTERNAL
        place = {"location": self.files[entry.file], "offset": entry.begin, "length": entry.nbytes}
        for key, value in place.items():
            held.external_data.add(key=key, value=str(value))
        return held

    def values(self, name: str) -> str:
        """A whole stored weight in float32."""
        if self.stored[name].dtype == "float32":
            return self.weight(name)
        if name not in self._float:
            self._float[name] = self.op("Cast", self.weight(name), to=FLOAT)
        return self._float[name]

    def rows(self, name: str, ids: str) -> str:
        """Rows of a stored weight in float32: only those are widened."""
        found = self.op("Gather", self.weight(name), ids, axis=0)
        return found if self.stored[name].dtype == "float32" else self.op("Cast", found, to=FLOAT)

    def has(self, name: str) -> bool:
        return name in self.stored

    @contextmanager
    def body(self) -> Iterator[list[Any]]:
        """Nodes that are made in here go into a list of their own: a loop's."""
        outside, self.nodes = self.nodes, []
        try:
            yield self.nodes
        finally:
            self.nodes = outside


def value_info(value: GraphInput | GraphOutput, names: tuple[str, ...]) -> Any:
    """A graph's input or output; `names`: of the dimensions, used for those that are dynamic."""
    dims = [name if n is None else n for n, name in zip(value.shape, names, strict=True)]
    return helper.make_tensor_value_info(value.name, TYPES[value.dtype], dims)
