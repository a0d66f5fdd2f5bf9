// What operations share on either side of attention: norms, and heads normed and rotated.
#pragma once
#include <cmath>

#include "operation.h"
#include "pool.h"
#include "vector.h"

namespace {

// 1 / root mean square
INLINE float scale_of(const float* x, int64_t width, float eps) {
  vf32 s = {};
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) s += load(x + i) * load(x + i);
  float total = sum(s);
  for (; i < width; i++) total += x[i] * x[i];
  return 1.0f / std::sqrt(total / float(width) + eps);
}

INLINE void norm(const float* x, const float* weight, float* y, int64_t width, float eps) {
  float scale = scale_of(x, width, eps);
  for (int64_t i = 0; i < width; i++) y[i] = x[i] * scale * weight[i];
}

// x normed and rotated: y * cos + swapped halves of y * sin, whose first half is negative.
INLINE void norm_rotate(const float* x, const float* weight, const float* cos, const float* sin, float* y, int64_t dim,
                        float eps, float factor) {
  const int64_t half = dim / 2;
  const float scale = scale_of(x, dim, eps) * factor;
  int64_t i = 0;
  for (; i + LANES <= half; i += LANES) {
    const int64_t j = half + i;
    const vf32 a = load(x + i) * scale * load(weight + i), b = load(x + j) * scale * load(weight + j);
    store(y + i, a * load(cos + i) + b * load(sin + i));
    store(y + j, b * load(cos + j) + a * load(sin + j));
  }
  for (; i < half; i++) {
    const int64_t j = half + i;
    const float a = x[i] * scale * weight[i], b = x[j] * scale * weight[j];
    y[i] = a * cos[i] + b * sin[i];
    y[j] = b * cos[j] + a * sin[j];
  }
}

// total[t] = delta[t] + x[t], y[t] its norm, for rows of `width`.
INLINE void add_norm(const float* delta, const float* x, const float* weight, float eps, float* y, float* total,
                     int64_t rows, int64_t width) {
  parallel_for(rows, SERIAL / width, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      float* sum = total + t * width;
      for (int64_t i = 0; i < width; i++) sum[i] = delta[t * width + i] + x[t * width + i];
      norm(sum, weight, y + t * width, width, eps);
    }
  });
}

// Rows of heads: those of queries, of keys, and of values, which are copied.
struct Heads {
  int64_t tokens, heads, kv_heads, dim;
  const float *q_norm, *k_norm, *cos, *sin, *factors;
  float eps, *q, *k, *v;

  Heads() = default;
  // `first`: the argument q_norm; those that follow are k_norm [D], cos, sin [T, D], factors [H+K], eps [1], and
  // `last`, k [T, H, D] and v [T, 1, K, D].
  Heads(const Arguments& a, int first, int last) {
    tokens = a.size(last, 0), heads = a.size(last, 1), kv_heads = a.size(last + 1, 2), dim = a.size(last + 1, 3);
    q_norm = a.at<float>(first), k_norm = a.at<float>(first + 1), cos = a.at<float>(first + 2);
    sin = a.at<float>(first + 3), factors = a.at<float>(first + 4), eps = *a.at<float>(first + 5);
    q = a.at<float>(last), k = a.at<float>(last + 1), v = a.at<float>(last + 2);
  }
  int64_t width() const { return (heads + 2 * kv_heads) * dim; }
  static bool fit(const Arguments& a, int first, int last) {
    if (!a.has(last, "float32", {ANY, ANY, ANY}) || !a.has(last + 1, "float32", {ANY, 1, ANY, ANY})) return false;
    const int64_t tokens = a.size(last, 0), rotated = a.size(last, 1) + a.size(last + 1, 2);
    const int64_t dim = a.size(last + 1, 3);
    if (rotated < 1 || dim < 2 || dim % 2 || a.size(last, 2) != dim || a.size(last + 1, 0) != tokens) return false;
    for (int i : {first, first + 1})
      if (!a.has(i, "float32", {dim}) || !a.has(i + 2, "float32", {tokens, dim})) return false;
    return a.has(first + 4, "float32", {rotated}) && a.has(first + 5, "float32", {1}) &&
           a.has(last + 2, "float32", {tokens, 1, a.size(last + 1, 2), dim});
  }

  // qkv [T, (H+2K)*D]
  void split(const float* qkv) const {
    parallel_for(tokens, SERIAL / ((heads + kv_heads) * dim), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) {
        const float *x = qkv + t * width(), *c = cos + t * dim, *s = sin + t * dim;
        float *to_q = q + t * heads * dim, *to_k = k + t * kv_heads * dim;
        for (int64_t h = 0; h < heads + kv_heads; h++, x += dim)
          norm_rotate(x, h < heads ? q_norm : k_norm, c, s, h < heads ? to_q + h * dim : to_k + (h - heads) * dim,
                      dim, eps, factors[h]);
        memcpy(v + t * kv_heads * dim, x, kv_heads * dim * sizeof(float));
      }
    });
  }
};

// Shapes of q, k and v; `width` is that of all three together, `dim` and `rotated` the sizes of q_norm and factors.
static inline Shapes shapes_of_heads(int64_t tokens, int64_t width, int64_t dim, int64_t rotated) {
  const int64_t kv_heads = width < 0 || dim < 1 ? -1 : std::max(width / dim - rotated, int64_t(-1));
  const int64_t heads = kv_heads < 0 ? -1 : rotated - kv_heads;
  return {{tokens, heads, dim}, {tokens, 1, kv_heads, dim}, {tokens, 1, kv_heads, dim}};
}

}  // namespace
