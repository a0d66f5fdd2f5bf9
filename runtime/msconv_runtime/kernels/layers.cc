// The halves of a layer, and all of it, as one operation each: for one request the work between nodes of a graph, and
// the waits at their ends, would cost more than the norms and heads within.
//
// Shape legend: as in kernels.cc.
#include "halves.h"
#include "products.h"

static void multiply_twice(const float* x, const Weights& gate_up, const Weights& down, float* y, int64_t rows) {
  Floats memory(rows * down.depth);
  multiply_swiglu(x, gate_up, memory.reserve(0), rows);
  multiply(memory.reserve(0), down, y, rows);
}

// x [T, depth], gate_up [2*ffn, depth], down [width, ffn] -> [T, width]
OPERATION(Mlp) {
  const MlpHalf<Weights> mlp(a, 1);
  if (!a.has(0, "float32", {ANY, ANY}) || !mlp.fits(a.size(0, 1))) return WRONG_SHAPE;
  if (!a.has(3, "float32", {a.size(0, 0), mlp.down.width})) return WRONG_SHAPE;
  mlp.run(a.at<float>(0), a.size(0, 0), a.at<float>(3));
  return 0;
}
SHAPE(Mlp) { return {SIZE(0, 0), SIZE(2, 0)}; }

// h [T, depth], qkv [(H+2K)*D, depth], bias [(H+2K)*D], or [1] for none, q_norm [D], k_norm [D], cos [T, D],
// sin [T, D], factors [H+K], eps [1], k_cache, v_cache [slots, 1, K, D], slots [T], tables [B, S], context_lens [B],
// q_lens [B], o [width, H*D] -> [T, width]: heads as of SplitHeads, of which keys and values are written to their slots
// of the caches, in place; then as Attend, times o.
OPERATION(Attention) { return run_attention<Weights>(a); }
SHAPE(Attention) { return {SIZE(0, 0), SIZE(AttentionHalf<Weights>::O, 0)}; }

// As Attention with h [T, width], then x [T, width], norm [width], gate_up [2*ffn, width], down [width, ffn],
// next_norm [width] -> h, total [T, width]: a whole layer.  The norm of x + attention goes through the MLP; h is the
// norm of the sum of all.
OPERATION(Layer) { return run_layer<Weights>(a); }
SHAPES(Layer, 2) { return {{SIZE(0, 0), SIZE(0, 1)}, {SIZE(0, 0), SIZE(0, 1)}}; }
