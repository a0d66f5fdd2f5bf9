"""Modules of transformers' model with the arithmetic of W8A8: linears, experts, and norms with a bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .arithmetic import Quotients, by_input, by_token, product
from .codes import is_divided
from .lead import Lead

HEADS = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
GATED = ("gate_proj.weight", "up_proj.weight")


def stored_name(module: str, has_heads: bool) -> str:
    """The matrix under whose name an artifact has that of this module: matrices that share an input are one.
    `has_heads`: attention with keys and values of its own, else latent."""
    name = module + ".weight"
    for parts, joined in ((HEADS if has_heads else (), "qkv_proj.weight"), (GATED, "gate_up_proj.weight")):
        for part in parts:
            if name.endswith("." + part):
                return name.removesuffix(part) + joined
    return name


class QuantisedLinear(nn.Module):
    """A linear with int8 weights.  Static, if `is_static`, else with a scale a token; then ranks that divide its
    columns each round their own, `ranks` of them."""

    def __init__(self, linear: nn.Linear, matrix: str, is_static: bool, ranks: int, lead: Lead) -> None:
        super().__init__()
        rows, columns = linear.out_features, linear.in_features
        self.matrix, self.is_static, self.lead = matrix, is_static, lead
        self.width = columns // ranks if is_divided(matrix) else columns
        self.as_values = False
        self.register_buffer("weight", torch.empty((rows, columns), dtype=torch.int8))
        if is_static:
            self.register_buffer("deq_scale", torch.empty(rows))
            self.register_buffer("quant_bias", torch.empty(rows, dtype=torch.int32))
            self.register_buffer("input_scale", torch.empty(1))
            self.register_buffer("input_offset", torch.empty(1))
        else:
            self.register_buffer("weight_scale", torch.empty((rows, 1)))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[.., K] -> [.., O]."""
        rows = x.reshape(-1, x.shape[-1])
        y = self._of_values(rows) if self.as_values else self._of_codes(rows)
        if self.bias is not None:
            y = y + self.bias.double()
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)

    def _of_codes(self, x: torch.Tensor) -> torch.Tensor:
        total: Any = 0
        for part, begin in enumerate(range(0, x.shape[1], self.width)):
            columns = slice(begin, begin + self.width)
            found = self._quotients(x[:, columns])
            acc = product(self.lead.codes(self.matrix, part, found), self.weight[:, columns])
            total = total + (acc if self.is_static else acc * self.weight_scale.double().T * found.scale)
        return (total + self.quant_bias.double()) * self.deq_scale.double() if self.is_static else total

    def _quotients(self, x: torch.Tensor) -> Quotients:
        return by_input(x, self.input_scale, self.input_offset) if self.is_static else by_token(x)

    def _of_values(self, x: torch.Tensor) -> torch.Tensor:
        """With x as it is: what calibration took for the unquantised model, as far as that can be known."""
        if not self.is_static:
            return x.double() @ (self.weight.double() * self.weight_scale.double()).T
        codes, scale = self.weight.double(), self.deq_scale.double()
        rest = (
            self.quant_bias.double() + codes.sum(1) * self.input_offset.double()
        )  # a bias, in steps of deq_scale
        return (x.double() @ codes.T / self.input_scale.double() + rest) * scale


class QuantisedExperts(nn.Module):
    """All experts of a layer with int8 weights and a scale a token.  Each expert's inner width is divided over
    `ranks`."""

    def __init__(self, experts: Any, prefix: str, ranks: int, lead: Lead) -> None:
        super().__init__()
        self.prefix, self.ranks, self.lead, self.as_values = prefix, ranks, lead, False
        self.act: Callable[[torch.Tensor], torch.Tensor] = experts.act_fn
        for name in ("gate_up_proj", "down_proj"):
            shape = getattr(experts, name).shape
            self.register_buffer(name, torch.empty(shape, dtype=torch.int8))
            self.register_buffer(name + "_scale", torch.empty((*shape[:2], 1)))

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x [T, H]; ids and weights of the chosen experts [T, k] -> [T, H]."""
        out = torch.zeros(x.shape, dtype=torch.float64)
        found = by_token(x)
        codes = None if self.as_values else self.lead.codes(self.prefix + "gate_up_proj.weight", 0, found)
        for expert in ids.unique().tolist():
            rows, slot = torch.where(ids == expert)
            scale = self.gate_up_proj_scale[expert].double().T
            if codes is None:
                both = x[rows].double() @ self.gate_up_proj[expert].double().T * scale
            else:
                both = product(codes[rows], self.gate_up_proj[expert]) * scale * found.scale[rows]
            gate, up = both.to(x.dtype).chunk(2, -1)
            y = self._down(expert, rows, self.act(gate) * up)
            out.index_add_(0, rows, y * weights[rows, slot, None].double())
        return out.to(x.dtype)

    def _down(self, expert: int, rows: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        matrix, scale = self.down_proj[expert], self.down_proj_scale[expert].double().T
        if self.as_values:
            return h.double() @ matrix.double().T * scale
        width = h.shape[1] // self.ranks
        total: Any = 0
        for part in range(self.ranks):
            columns = slice(part * width, (part + 1) * width)
            found = by_token(h[:, columns])
            name = self.prefix + "down_proj.weight"
            codes = self.lead.codes_of_expert(name, part, expert, rows, found)
            total = total + product(codes, matrix[:, columns]) * scale * found.scale
        return total


def shift(norm: nn.Module) -> None:
    """Give a norm a bias, added after its weight."""
    norm.register_parameter("bias", nn.Parameter(torch.empty_like(norm.weight), requires_grad=False))
    norm.register_forward_hook(lambda module, _inputs, out: out + module.bias)
