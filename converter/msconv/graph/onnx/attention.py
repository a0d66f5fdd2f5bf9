"""Attention of one layer: with keys and values of its own, or from latents."""

from __future__ import annotations

from ...families.attention import Attention
from ...families.config import DecoderConfig
from .builder import Builder
from .forms import Form, Heads
from .steps import Step, past_names, present_names

LATENT_EPS = 1e-6  # of the norms inside latent attention: the published code takes it from nowhere


class Layers:
    """What layers of all kinds are made of: products and norms by the names of their weights."""

    def __init__(self, b: Builder, form: Form, config: DecoderConfig, step: Step) -> None:
        self.b, self.form, self.config, self.step = b, form, config, step

    def linear(self, x: str, name: str) -> str:
        """[T, in] -> [T, out] with weight [out, in] as it is stored, and the bias that is stored beside it."""
        bias = [self.b.values(name + ".bias")] if self.b.has(name + ".bias") else []
        return self.b.op("Gemm", x, self.b.values(name + ".weight"), *bias, transB=1)

    def norm(self, x: str, name: str, eps: float) -> str:
        """RMS norm, and the bias by which quantisation shifted what comes out, if one is stored."""
        y = self.form.norm(x, self.b.values(name + ".weight"), eps)
        return self.b.op("Add", y, self.b.values(name + ".bias")) if self.b.has(name + ".bias") else y

    def gated(self, gate_up: str, width: int) -> str:
        """[.., 2*width] -> [.., width]: silu of the first half times the second."""
        gate, up = self.b.split(gate_up, [width, width])
        return self.b.op("Mul", self.b.op("Mul", gate, self.b.op("Sigmoid", gate)), up)

    def mlp(self, x: str, prefix: str, width: int) -> str:
        return self.linear(self.gated(self.linear(x, prefix + "gate_up_proj"), width), prefix + "down_proj")

    def turned(self, x: str) -> str:
        """[B, S, N, D] <-> [B, N, S, D]."""
        return self.b.op("Transpose", x, perm=[0, 2, 1, 3])

    def flat(self, x: str, width: int) -> str:
        """[B, N, S, D] -> [B*S, N*D]."""
        return self.b.reshape(self.turned(x), -1, width)


def attention(of: Layers, x: str, layer: int, spec: Attention) -> str:
    """[B*S, hidden] -> the same."""
    prefix = f"model.layers.{layer}.self_attn."
    attend = _with_heads if spec.kind == "heads" else _from_latents
    return of.linear(attend(of, x, layer, spec, prefix), prefix + "o_proj")


def _with_heads(of: Layers, x: str, layer: int, spec: Attention, prefix: str) -> str:
    form, step, dim = of.form, of.step, spec.head_dim
    widths = [spec.heads * dim, spec.kv_heads * dim, spec.kv_heads * dim]
    q, k, v = of.b.split(of.linear(x, prefix + "qkv_proj"), widths)

    def heads(x: str, count: int, norm: str) -> str:
        x = form.shaped(x, count, dim)
        x = of.norm(x, prefix + norm, of.config.eps) if spec.qk_norm else x
        return form.rotate(of.turned(x), step.cos, step.sin)

    q, k = heads(q, spec.heads, "q_norm"), heads(k, spec.kv_heads, "k_norm")
    v = of.turned(form.shaped(v, spec.kv_heads, dim))
    past, present = past_names(layer), present_names(layer)
    k, v = (form.grow(p, new, out) for p, new, out in zip(past, (k, v), present, strict=True))
    found = form.attend(Heads(q, k, v, spec.heads, spec.kv_heads, spec.scale), step.masks[spec.window])
    return of.flat(found, spec.heads * dim)


def _from_latents(of: Layers, x: str, layer: int, spec: Attention, prefix: str) -> str:
    """Queries go into the latent space, and all heads read the cached rows as they are: one key, kv_lora and rope
    wide, whose first kv_lora values are the value too."""
    b, form, step, mla = of.b, of.form, of.step, of.config.mla
    assert mla is not None
    q = x
    if mla.q_lora:
        q = of.norm(of.linear(x, prefix + "q_a_proj"), prefix + "q_a_layernorm", LATENT_EPS)
    q = of.linear(q, prefix + ("q_b_proj" if mla.q_lora else "q_proj"))
    q_nope, q_rope = b.split(of.turned(form.shaped(q, spec.heads, spec.head_dim)), [mla.nope, mla.rope])
    latent, k_rope = b.split(of.linear(x, prefix + "kv_a_proj_with_mqa"), [mla.kv_lora, mla.rope])
    latent = of.turned(form.shaped(of.norm(latent, prefix + "kv_a_layernorm", LATENT_EPS), 1, mla.kv_lora))
    k_rope = form.rotate(of.turned(form.shaped(k_rope, 1, mla.rope)), step.cos, step.sin)
    to_key = b.reshape(b.values(prefix + "kv_b_proj_k.weight"), spec.heads, mla.nope, mla.kv_lora)
    to_value = b.reshape(b.values(prefix + "kv_b_proj_v.weight"), spec.heads, mla.v_dim, mla.kv_lora)
    q_rope = form.rotate(q_rope, step.cos, step.sin)
    q = b.op("Concat", b.op("MatMul", q_nope, to_key), q_rope, axis=-1)

    halves = [mla.latent - mla.latent // 2, mla.latent // 2]
    new = b.split(b.op("Concat", latent, k_rope, axis=-1), halves)
    past, present = past_names(layer), present_names(layer)
    grown = [form.grow(p, row, out) for p, row, out in zip(past, new, present, strict=True)]
    rows = b.op("Concat", *grown, axis=-1)
    value, _ = b.split(rows, [mla.kv_lora, mla.rope])
    mixed = form.attend(Heads(q, rows, value, spec.heads, 1, spec.scale), step.masks[spec.window])
    out = b.op("MatMul", mixed, b.op("Transpose", to_value, perm=[0, 2, 1]))
    return of.flat(out, spec.heads * mla.v_dim)
