// The halves of a layer, and all of it, whatever its matrices are.  A kind of matrix M is made from M::COUNT arguments;
// multiply(x, M, y, rows) is its product, multiply_twice(x, gate_up, down, y, rows) an MLP of two.
//
// Shape legend: as in kernels.cc.
#pragma once
#include "attention.h"
#include "norms.h"
#include "operation.h"

namespace {

// Arguments from `at` on: gate_up [2*ffn, depth], down [width, ffn].
template <class M>
struct MlpHalf {
  const M gate_up, down;

  MlpHalf(const Arguments& a, int at) : gate_up(a, at), down(a, at + M::COUNT) {}
  bool fits(int64_t depth) const {
    return gate_up.fits(depth) && gate_up.width % 2 == 0 && down.fits(gate_up.width / 2);
  }
  void run(const float* x, int64_t rows, float* y) const { multiply_twice(x, gate_up, down, y, rows); }
};

// Arguments from 0 on, as of the operation Attention.
template <class M>
struct AttentionHalf {
  enum { H, QKV, BIAS = QKV + M::COUNT, Q_NORM, K_NORM, COS, SIN, FACTORS, EPS, K_CACHE, V_CACHE, SLOTS, TABLES, CONTEXTS,
         COUNTS, O, END = O + M::COUNT };
  const M qkv, o;
  const Arguments& a;

  explicit AttentionHalf(const Arguments& a) : qkv(a, QKV), o(a, O), a(a) {}
  int64_t tokens() const { return a.size(H, 0); }

  Failure check() const {
    if (!a.has(H, "float32", {ANY, ANY}) || !Cached::fit(a, K_CACHE, TABLES)) return WRONG_SHAPE;
    const int64_t rows = tokens(), dim = a.size(K_CACHE, 3), kv_heads = a.size(K_CACHE, 2);
    if (!a.has(FACTORS, "float32", {ANY}) || !a.has(EPS, "float32", {1})) return WRONG_SHAPE;
    const int64_t heads = a.size(FACTORS, 0) - kv_heads;
    if (dim % 2 || heads < 1 || heads % kv_heads || !qkv.fits(a.size(H, 1)) || !o.fits(heads * dim)) return WRONG_SHAPE;
    if (qkv.width != (heads + 2 * kv_heads) * dim) return WRONG_SHAPE;
    if (!a.has(BIAS, "float32", {qkv.width}) && !a.has(BIAS, "float32", {1})) return WRONG_SHAPE;
    for (int i : {Q_NORM, K_NORM})
      if (!a.has(i, "float32", {dim}) || !a.has(i + 2, "float32", {rows, dim})) return WRONG_SHAPE;
    if (!a.has(SLOTS, "int32", {rows})) return WRONG_SHAPE;
    for (int64_t t = 0; t < rows; t++)
      if (const int32_t slot = a.at<int32_t>(SLOTS)[t]; slot < 0 || slot >= a.size(K_CACHE, 0)) return OUT_OF_RANGE;
    return Cached(a, K_CACHE, TABLES).has(rows) ? NONE : OUT_OF_RANGE;
  }

  // y [T, o.width]
  void run(float* y) const {
    const Cached cached(a, K_CACHE, TABLES);
    const int64_t rows = tokens(), dim = cached.dim, kv_heads = cached.kv_heads;
    const int64_t heads = a.size(FACTORS, 0) - kv_heads;
    Floats memory(rows * (qkv.width * 2 + heads * dim));
    float *both = memory.reserve(0), *q = both + rows * qkv.width, *k = q + rows * heads * dim;
    float *v = k + rows * kv_heads * dim, *mixed = v + rows * kv_heads * dim;
    multiply(a.at<float>(H), qkv, both, rows);
    if (a.size(BIAS, 0) == qkv.width) add_bias(both, a.at<float>(BIAS), rows, qkv.width);
    Heads split;
    split.tokens = rows, split.heads = heads, split.kv_heads = kv_heads, split.dim = dim;
    split.q_norm = a.at<float>(Q_NORM), split.k_norm = a.at<float>(K_NORM), split.cos = a.at<float>(COS);
    split.sin = a.at<float>(SIN), split.factors = a.at<float>(FACTORS), split.eps = *a.at<float>(EPS);
    split.q = q, split.k = k, split.v = v;
    split.split(both);
    cached.write(k, v, a.at<int32_t>(SLOTS), rows);
    attend(q, heads, cached, mixed);
    multiply(mixed, o, y, rows);
  }

  static void add_bias(float* x, const float* bias, int64_t rows, int64_t width) {
    parallel_for(rows, SERIAL / width, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++)
        for (int64_t i = 0; i < width; i++) x[r * width + i] += bias[i];
    });
  }
};

template <class M>
int run_attention(const Arguments& a) {
  typedef AttentionHalf<M> Half;
  const Half attention(a);
  if (const Failure failure = attention.check()) return failure;
  if (!a.has(Half::END, "float32", {attention.tokens(), attention.o.width})) return WRONG_SHAPE;
  attention.run(a.at<float>(Half::END));
  return 0;
}

// As Attention with h [T, width], then x [T, width], norm [width], gate_up, down, next_norm [width] -> h, total.
template <class M>
int run_layer(const Arguments& a) {
  typedef AttentionHalf<M> Half;
  enum { X = Half::END, NORM, GATE_UP, NEXT_NORM = GATE_UP + 2 * M::COUNT, HIDDEN_OUT, TOTAL };
  const Half attention(a);
  if (const Failure failure = attention.check()) return failure;
  const int64_t rows = attention.tokens(), width = a.size(0, 1);
  const MlpHalf<M> mlp(a, GATE_UP);
  if (attention.o.width != width || !mlp.fits(width) || mlp.down.width != width) return WRONG_SHAPE;
  for (int i : {int(NORM), int(NEXT_NORM)})
    if (!a.has(i, "float32", {width})) return WRONG_SHAPE;
  for (int i : {int(X), int(HIDDEN_OUT), int(TOTAL)})
    if (!a.has(i, "float32", {rows, width})) return WRONG_SHAPE;
  const float eps = *a.at<float>(Half::EPS);
  float *h = a.at<float>(HIDDEN_OUT), *total = a.at<float>(TOTAL);
  Floats memory(rows * width);
  float* delta = memory.reserve(0);
  attention.run(delta);
  add_norm(delta, a.at<float>(X), a.at<float>(NORM), eps, h, total, rows, width);
  mlp.run(h, rows, delta);
  add_norm(delta, total, a.at<float>(NEXT_NORM), eps, h, total, rows, width);
  return 0;
}

}  // namespace
