"""The two ways to write a graph: operators of opset 23 for any shape, and plain ones of opset 17 for fixed shapes.

Shape legend: B sequences, S new tokens of each, P tokens before them, T = P + S, N heads of one kind, D head_dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from ..spec import Fixed
from .builder import Builder


@dataclass(frozen=True)
class Heads:
    """What attention multiplies: q [B, H, S, D], then new and earlier k and v [B, K, ., .].  `scale` of scores."""

    q: str
    k: str
    v: str
    num_heads: int
    num_kv_heads: int
    scale: float


class Form(ABC):
    """Operators of one form, for a builder."""

    opset: int
    ir_version: int
    hidden_score: float  # what is added to scores that a token must not see

    def __init__(self, b: Builder) -> None:
        self.b = b

    @abstractmethod
    def shaped(self, x: str, *sizes: int) -> str:
        """[B*S, ...] -> [B, S, *sizes]."""

    @abstractmethod
    def norm(self, x: str, weight: str, eps: float) -> str:
        """RMS norm of the last dimension times the weight, without a bias."""

    @abstractmethod
    def rotate(self, x: str, cos: str, sin: str) -> str:
        """[B, N, S, D] with cos and sin [B, S, D/2]: halves are turned together."""

    @abstractmethod
    def attend(self, heads: Heads, mask: str) -> str:
        """-> [B, H, S, width of v]; k and v hold all T tokens, mask [B, 1, S, T] is added to scores."""

    @abstractmethod
    def grow(self, past: str, new: str, output: str) -> str:
        """All tokens' rows [B, N, T, .] of the cache; `output`: the name of what the caller keeps of it."""


class Fused(Form):
    """Attention, RotaryEmbedding and RMSNormalization of opset 23; any shape."""

    opset = 23
    ir_version = 11
    hidden_score = -1e9

    def __init__(self, b: Builder) -> None:
        super().__init__(b)
        self.batch_and_tokens = b.op("Shape", "input_ids")

    def shaped(self, x: str, *sizes: int) -> str:
        shape = self.b.op("Concat", self.batch_and_tokens, self.b.whole(list(sizes)), axis=0)
        return self.b.op("Reshape", x, shape)

    def norm(self, x: str, weight: str, eps: float) -> str:
        return self.b.op("RMSNormalization", x, weight, axis=-1, epsilon=eps)

    def rotate(self, x: str, cos: str, sin: str) -> str:
        return self.b.op("RotaryEmbedding", x, cos, sin)

    def attend(self, heads: Heads, mask: str) -> str:
        return self.b.op("Attention", heads.q, heads.k, heads.v, mask, scale=heads.scale)

    def grow(self, past: str, new: str, output: str) -> str:
        return self.b.op("Concat", past, new, axis=2, name=output)


class Plain(Form):
    """Basic operators of opset 17, four dimensions at most, every size fixed and none of them zero."""

    opset = 17
    ir_version = 8
    hidden_score = -10000.0  # fits float16

    def __init__(self, b: Builder, fixed: Fixed, num_tokens: int) -> None:
        super().__init__(b)
        self.batch, self.new, self.total = fixed.batch, num_tokens, fixed.context + num_tokens

    def shaped(self, x: str, *sizes: int) -> str:
        return self.b.reshape(x, self.batch, self.new, *sizes)

    def norm(self, x: str, weight: str, eps: float) -> str:
        mean = self.b.op("ReduceMean", self.b.op("Mul", x, x), axes=[-1], keepdims=1)
        root = self.b.op("Sqrt", self.b.op("Add", mean, self.b.real(eps)))
        return self.b.op("Mul", self.b.op("Div", x, root), weight)

    def rotate(self, x: str, cos: str, sin: str) -> str:
        op, one = self.b.op, self.b.whole([1])
        cos, sin = op("Unsqueeze", cos, one), op("Unsqueeze", sin, one)
        first, second = self.b.node("Split", (x,), [self.b.name(), self.b.name()], axis=-1)
        turned = op("Sub", op("Mul", first, cos), op("Mul", second, sin))
        other = op("Add", op("Mul", second, cos), op("Mul", first, sin))
        return op("Concat", turned, other, axis=-1)

    def attend(self, heads: Heads, mask: str) -> str:
        """Heads that share keys are rows of one product: [B, K, H/K * S, D]."""
        b, group = self.b, heads.num_heads // heads.num_kv_heads
        q = b.op("Mul", heads.q, b.real(heads.scale))
        q = self._grouped(q, heads.num_kv_heads, group * self.new)
        scores = b.op("MatMul", q, b.op("Transpose", heads.k, perm=[0, 1, 3, 2]))
        scores = b.op("Add", self._grouped(scores, heads.num_heads, self.new), mask)
        shares = self._grouped(b.op("Softmax", scores, axis=-1), heads.num_kv_heads, group * self.new)
        return self._grouped(b.op("MatMul", shares, heads.v), heads.num_heads, self.new)

    def _grouped(self, x: str, heads: int, rows: int) -> str:
        """The same values as [B, heads, rows, .]; of the last size, what is left."""
        return self.b.reshape(x, self.batch, heads, rows, -1)

    def grow(self, past: str, new: str, output: str) -> str:
        """The caller gets the new rows only: it has a place for them in what it keeps."""
        self.b.op("Identity", new, name=output)
        return self.b.op("Concat", past, new, axis=2)
