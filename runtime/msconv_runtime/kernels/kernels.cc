// The operations of the CPU's compiled graphs.  MindSpore calls them as custom operations: pointers, ranks, shapes and
// type names of all inputs, then of all outputs; a non-zero return fails the step.
//
// Shape legend: T tokens, B sequences, S positions a row of the block table, H heads, K kv heads, D head_dim.
// Activations and caches are float32; weights of products are float32 or bfloat16.
#include <vector>

#include "activation.h"
#include "attention.h"
#include "experts.h"
#include "norms.h"
#include "operation.h"
#include "pool.h"
#include "vector.h"

namespace {

constexpr int64_t BLOCK = 512;  // columns of an expert's matrix at once: long runs of memory
constexpr int64_t STEP = 32;    // rows of it

// y[n][width] = x[n] b[depth][width] for rows of x anywhere, columns [begin, end) of b, which is read in order.
template <class W>
void expert_columns(const std::vector<const float*>& x, const W* b, float* y, int64_t depth, int64_t width,
                    int64_t begin, int64_t end) {
  static thread_local Floats memory;
  const int64_t stride = padded(end - begin), ldy = padded(width), count = x.size();
  float* part = memory.reserve(STEP * stride);
  std::vector<const float*> at(count);
  for (int64_t k = 0; k < depth; k += STEP) {
    const int64_t deep = std::min(STEP, depth - k);
    for (int64_t d = 0; d < deep; d++) {
      const W* from = b + (k + d) * width + begin;
      float* to = part + d * stride;
      int64_t i = 0;
      for (; i + LANES <= end - begin; i += LANES) store(to + i, load(from + i));
      for (; i < end - begin; i++) to[i] = single(from + i);
      std::fill(to + i, to + stride, 0.0f);
    }
    for (int64_t r = 0; r < count; r++) at[r] = x[r] + k;
    for (int64_t j = 0; j < stride; j += COLUMNS)
      tiles_of(count, at.data(), 1, Even{part + j, stride}, deep, y + begin + j, ldy, k > 0);
  }
}

template <class W>
int experts(const Arguments& a) {
  const float *h = a.at<float>(0), *weights = a.at<float>(1);
  const int32_t *ids = a.at<int32_t>(2), start = *a.at<int32_t>(3);
  const W *gate_up = a.at<W>(4), *down = a.at<W>(5);
  const int64_t tokens = a.size(0, 0), hidden = a.size(0, 1), top_k = a.size(1, 1);
  const int64_t count = a.size(4, 0), ffn = a.size(5, 1), wide = padded(2 * ffn), long_ = padded(hidden);
  std::fill(a.at<float>(6), a.at<float>(6) + tokens * hidden, 0.0f);
  for (int64_t first = 0; first < tokens; first += EXPERT_TOKENS) {
    const int64_t last = std::min(tokens, first + EXPERT_TOKENS);
    const Routing routing(ids, top_k, first, last, start, count);
    const int64_t rows = routing.rows;
    if (rows == 0) continue;
    Floats memory(rows * (wide + ffn + long_));
    float *mid = memory.reserve(0), *out = mid + rows * wide, *act = out + rows * long_;
    const int64_t up_blocks = (2 * ffn + BLOCK - 1) / BLOCK, down_blocks = (hidden + BLOCK - 1) / BLOCK;
    Pool::one().run(routing.groups.size() * up_blocks, [&](int64_t i) {
      const Routing::Group& g = routing.groups[i / up_blocks];
      const int64_t n = i % up_blocks * BLOCK;
      std::vector<const float*> x;
      for (int64_t token : g.tokens) x.push_back(h + token * hidden);
      expert_columns(x, gate_up + g.expert * hidden * 2 * ffn, mid + g.row * wide, hidden, 2 * ffn, n,
                     std::min(2 * ffn, n + BLOCK));
    });
    parallel_for(rows, SERIAL / ffn, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) swiglu(mid + r * wide, act + r * ffn, ffn);
    });
    Pool::one().run(routing.groups.size() * down_blocks, [&](int64_t i) {
      const Routing::Group& g = routing.groups[i / down_blocks];
      const int64_t n = i % down_blocks * BLOCK;
      std::vector<const float*> x;
      for (size_t r = 0; r < g.tokens.size(); r++) x.push_back(act + (g.row + r) * ffn);
      expert_columns(x, down + g.expert * ffn * hidden, out + g.row * long_, ffn, hidden, n,
                     std::min(hidden, n + BLOCK));
    });
    sum_up(routing, weights, top_k, first, last, out, long_, a.at<float>(6), hidden);
  }
  return 0;
}

}  // namespace

// How many threads work from now on, the caller's included.  Never fewer than before.
extern "C" void Threads(int64_t threads) { Pool::one().grow(threads); }

// rows [T, depth] float32, weight [width, depth] -> [T, width]
OPERATION(Product) {
  const Weights weight(a, 1);
  if (!a.has(0, "float32", {ANY, ANY}) || !weight.fits(a.size(0, 1))) return WRONG_SHAPE;
  if (!a.has(2, "float32", {a.size(0, 0), weight.width})) return WRONG_SHAPE;
  multiply(a.at<float>(0), weight, a.at<float>(2), a.size(0, 0));
  return 0;
}
SHAPE(Product) { return {SIZE(0, 0), SIZE(1, 0)}; }

// table [V, width], ids [T] -> [T, width]
OPERATION(Rows) {
  if (!a.has(0, "", {ANY, ANY}) || !a.has(1, "int32", {ANY})) return WRONG_SHAPE;
  const int64_t width = a.size(0, 1);
  if (!a.has(2, "float32", {a.size(1, 0), width})) return WRONG_SHAPE;
  const bool narrow = a.is(0, "bfloat16");
  for (int64_t t = 0; t < a.size(1, 0); t++) {
    const int64_t id = a.at<int32_t>(1)[t];
    if (id < 0 || id >= a.size(0, 0)) return OUT_OF_RANGE;
    float* to = a.at<float>(2) + t * width;
    if (narrow)
      for (int64_t i = 0; i < width; i++) to[i] = single(a.at<bf16>(0) + id * width + i);
    else
      memcpy(to, a.at<float>(0) + id * width, width * sizeof(float));
  }
  return 0;
}
SHAPE(Rows) { return {SIZE(1, 0), SIZE(0, 1)}; }

// x [T, width], weight [width], eps [1] -> [T, width]
OPERATION(Norm) {
  if (!a.has(0, "float32", {ANY, ANY})) return WRONG_SHAPE;
  int64_t rows = a.size(0, 0), width = a.size(0, 1);
  if (width < 1 || !a.has(1, "float32", {width}) || !a.has(2, "float32", {1}) || !a.has(3, "float32", {rows, width}))
    return WRONG_SHAPE;
  parallel_for(rows, SERIAL / width, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      norm(a.at<float>(0) + t * width, a.at<float>(1), a.at<float>(3) + t * width, width, *a.at<float>(2));
  });
  return 0;
}
SHAPE(Norm) { return {SIZE(0, 0), SIZE(0, 1)}; }

// delta, x [T, width], weight [width], eps [1] -> norm(x + delta), x + delta
OPERATION(AddNorm) {
  if (!a.has(0, "float32", {ANY, ANY})) return WRONG_SHAPE;
  int64_t rows = a.size(0, 0), width = a.size(0, 1);
  if (width < 1 || !a.has(2, "float32", {width}) || !a.has(3, "float32", {1})) return WRONG_SHAPE;
  for (int i : {1, 4, 5})
    if (!a.has(i, "float32", {rows, width})) return WRONG_SHAPE;
  add_norm(a.at<float>(0), a.at<float>(1), a.at<float>(2), *a.at<float>(3), a.at<float>(4), a.at<float>(5), rows, width);
  return 0;
}
SHAPES(AddNorm, 2) { return {{SIZE(0, 0), SIZE(0, 1)}, {SIZE(0, 0), SIZE(0, 1)}}; }

// x [T, 2 * width] -> silu(first half) * second half
OPERATION(Swiglu) {
  if (!a.has(0, "float32", {ANY, ANY}) || a.size(0, 1) < 2 || a.size(0, 1) % 2) return WRONG_SHAPE;
  const int64_t rows = a.size(0, 0), width = a.size(0, 1) / 2;
  if (!a.has(1, "float32", {rows, width})) return WRONG_SHAPE;
  parallel_for(rows, SERIAL / width, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      swiglu(a.at<float>(0) + 2 * t * width, a.at<float>(1) + t * width, width);
  });
  return 0;
}
SHAPE(Swiglu) { return {SIZE(0, 0), SIZE(0, 1) < 0 ? -1 : SIZE(0, 1) / 2}; }

// qkv [T, (H+2K)*D], q_norm [D], k_norm [D], cos [T, D], sin [T, D], factors [H+K], eps [1]
// -> q [T, H, D], k [T, 1, K, D], both normed, rotated and times their heads' factors, v [T, 1, K, D]
OPERATION(SplitHeads) {
  if (!Heads::fit(a, 1, 7)) return WRONG_SHAPE;
  const Heads heads(a, 1, 7);
  if (!a.has(0, "float32", {heads.tokens, heads.width()})) return WRONG_SHAPE;
  heads.split(a.at<float>(0));
  return 0;
}
SHAPES(SplitHeads, 3) { return shapes_of_heads(SIZE(0, 0), SIZE(0, 1), SIZE(1, 0), SIZE(5, 0)); }

// q [T, H, D], k_cache, v_cache [slots, 1, K, D], tables [B, S], context_lens [B], q_lens [B] -> [T, H*D]: each token
// attends to its sequence's slots up to its own.
OPERATION(Attend) {
  if (!a.has(0, "float32", {ANY, ANY, ANY}) || !Cached::fit(a, 1, 3)) return WRONG_SHAPE;
  const Cached cached(a, 1, 3);
  const int64_t tokens = a.size(0, 0), heads = a.size(0, 1);
  if (cached.dim != a.size(0, 2) || heads < 1 || heads % cached.kv_heads) return WRONG_SHAPE;
  if (!a.has(6, "float32", {tokens, heads * cached.dim})) return WRONG_SHAPE;
  if (!cached.has(tokens)) return OUT_OF_RANGE;
  attend(a.at<float>(0), heads, cached, a.at<float>(6));
  return 0;
}
SHAPE(Attend) { return {SIZE(0, 0), SIZE(0, 1) < 0 || SIZE(0, 2) < 0 ? -1 : SIZE(0, 1) * SIZE(0, 2)}; }

// h [T, hidden], weights [T, k], ids [T, k] of all experts, start [1] of this rank's, gate_up [E, hidden, 2*ffn],
// down [E, ffn, hidden] -> [T, hidden]: the weighted sum of what this rank's experts make of each token.
OPERATION(Experts) {
  if (!a.has(0, "float32", {ANY, ANY}) || !a.has(5, "", {ANY, ANY, a.size(0, 1)})) return WRONG_SHAPE;
  const int64_t tokens = a.size(0, 0), hidden = a.size(0, 1), count = a.size(5, 0), ffn = a.size(5, 1);
  if (hidden < 1 || ffn < 1 || !a.has(4, "", {count, hidden, 2 * ffn})) return WRONG_SHAPE;
  if (!a.has(1, "float32", {tokens, ANY}) || !a.has(2, "int32", {tokens, a.size(1, 1)})) return WRONG_SHAPE;
  if (!a.has(3, "int32", {1}) || !a.has(6, "float32", {tokens, hidden})) return WRONG_SHAPE;
  if (a.is(4, "float32") && a.is(5, "float32")) return experts<float>(a);
  if (a.is(4, "bfloat16") && a.is(5, "bfloat16")) return experts<bf16>(a);
  return UNKNOWN_TYPE;
}
SHAPE(Experts) { return {SIZE(0, 0), SIZE(0, 1)}; }
