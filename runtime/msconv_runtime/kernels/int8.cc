// Operations on int8 weights: activations become codes, whole numbers are multiplied, scales make floats of the sums.
// In this order, and rounded after each: y = (float(sum) * scale of the column) * scale of the row.
#include <vector>

#include "activation.h"
#include "codes.h"
#include "experts.h"
#include "halves.h"
#include "norms.h"
#include "operation.h"
#include "pool.h"
#include "vector.h"

namespace {

constexpr int64_t PART = 512;  // columns of an expert's matrix at once: long runs of memory
constexpr int64_t DEEP = 64;   // rows of it

// y = (sum * scale[column]) * t[row]
struct ByToken {
  const Codes& x;
  const float* scale;
  float* y;
  int64_t width;
  void operator()(int64_t row, int64_t column, const int32_t* sums) const {
    const f32x4 sum = __builtin_convertvector(*reinterpret_cast<const i32x4*>(sums), f32x4);
    const f32x4 scales = *reinterpret_cast<const f32x4*>(scale + column);
    *reinterpret_cast<f32x4*>(y + row * width + column) = sum * scales * x.scales[row];
  }
  void one(int64_t row, int64_t column, int32_t sum) const {
    y[row * width + column] = float(sum) * scale[column] * x.scales[row];
  }
};

// y = (sum + bias[column]) * scale[column]
struct ByInput {
  const int32_t* bias;
  const float* scale;
  float* y;
  int64_t width;
  void operator()(int64_t row, int64_t column, const int32_t* sums) const {
    for (int j = 0; j < 4; j++) one(row, column + j, sums[j]);
  }
  void one(int64_t row, int64_t column, int32_t sum) const {
    y[row * width + column] = float(int32_t(uint32_t(sum) + uint32_t(bias[column]))) * scale[column];
  }
};

void encode_tokens(const float* x, Codes& to) {
  parallel_for(to.rows, SERIAL / to.depth, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) encode_token(x + r * to.depth, to, r);
  });
}

// Of gates and ups side by side, rows `stride` apart; takes their place.
void encode_activations(float* both, int64_t stride, Codes& to) {
  parallel_for(to.rows, SERIAL / to.depth, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      swiglu(both + r * stride, both + r * stride, to.depth);
      encode_token(both + r * stride, to, r);
    }
  });
}

#ifdef MSCONV_VNNI
// Four rows of b side by side: lanes of four bytes.  Within 64 columns, 16 * a + 4 * b + c goes to 16 * b + 4 * a + c.
INLINE void pack(const int8_t* b, int64_t width, int64_t deep, int64_t columns, int8_t* to) {
  for (int64_t k = 0; k < deep; k += 4)
    for (int64_t n = 0; n < columns; n += COLUMNS) {
      const __mmask64 there = ~__mmask64(0) >> (COLUMNS - std::min(COLUMNS, columns - n));
      __m512i row[4];
      for (int64_t i = 0; i < 4; i++) {
        row[i] = _mm512_maskz_loadu_epi8(k + i < deep ? there : 0, b + (k + i) * width + n);
        __builtin_prefetch(b + (k + i + DEEP) * width + n, 0, 2);
      }
      const __m512i low = _mm512_unpacklo_epi8(row[0], row[1]), high = _mm512_unpackhi_epi8(row[0], row[1]);
      const __m512i low2 = _mm512_unpacklo_epi8(row[2], row[3]), high2 = _mm512_unpackhi_epi8(row[2], row[3]);
      int8_t* at = to + n * DEEP + k * COLUMNS;
      _mm512_store_si512(at, unsigned_of(_mm512_unpacklo_epi16(low, low2)));
      _mm512_store_si512(at + 64, unsigned_of(_mm512_unpackhi_epi16(low, low2)));
      _mm512_store_si512(at + 128, unsigned_of(_mm512_unpacklo_epi16(high, high2)));
      _mm512_store_si512(at + 192, unsigned_of(_mm512_unpackhi_epi16(high, high2)));
    }
}

// sums[R][64] += rows of codes from k on, times 64 packed columns.
template <int R>
NEVER_INLINE void packed_tile(const Codes& x, const int64_t* rows, int64_t k, int64_t deep, const int8_t* packed,
                              int32_t* sums, int64_t stride) {
  const int8_t* u[R];
  UNROLLED
  for (int r = 0; r < R; r++) u[r] = x.row(rows[r]) + k;
  __m512i s[R][4];
  UNROLLED
  for (int r = 0; r < R; r++)
    UNROLLED
    for (int j = 0; j < 4; j++)
      s[r][j] = k ? _mm512_loadu_si512(sums + r * stride + j * LANES)
                  : _mm512_set1_epi32(int32_t(0u - uint32_t(x.sums[rows[r]]) * 128u));
  for (int64_t d = 0; d < deep; d += 4) {
    __m512i v[4];
    UNROLLED
    for (int j = 0; j < 4; j++) v[j] = _mm512_load_si512(packed + d * COLUMNS + j * 64);
    UNROLLED
    for (int r = 0; r < R; r++) {
      int32_t four;
      memcpy(&four, u[r] + d, 4);
      const __m512i codes = _mm512_set1_epi32(four);
      UNROLLED
      for (int j = 0; j < 4; j++) add_products(s[r][j], v[j], codes);
    }
  }
  UNROLLED
  for (int r = 0; r < R; r++)
    UNROLLED
    for (int j = 0; j < 4; j++) _mm512_storeu_si512(sums + r * stride + j * LANES, s[r][j]);
}

// Within each 64 columns, to their right places.
INLINE void straighten(int32_t* strip) {
  int32_t mixed[COLUMNS];
  memcpy(mixed, strip, sizeof(mixed));
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 4; j++) memcpy(strip + 16 * i + 4 * j, mixed + 16 * j + 4 * i, 16);
}
#else
// `GROUP` rows of b side by side, in lanes of as many bytes; zeros where there is no row or no column.
INLINE void pack(const int8_t* b, int64_t width, int64_t deep, int64_t columns, int8_t* to) {
  for (int64_t k = 0; k < deep; k += GROUP)
    for (int64_t n = 0; n < columns; n += COLUMNS) {
      int8_t row[GROUP][COLUMNS] = {};
      for (int64_t i = 0; i < std::min(GROUP, deep - k); i++) {
        const int8_t* from = b + (k + i) * width + n;
        columns - n >= COLUMNS ? memcpy(row[i], from, COLUMNS) : memcpy(row[i], from, columns - n);
        __builtin_prefetch(from + DEEP * width, 0, 2);
      }
      int8_t* at = to + n * DEEP + k * COLUMNS;
      for (int64_t j = 0; j < COLUMNS; j++)
        for (int64_t i = 0; i < GROUP; i++) at[j * GROUP + i] = row[i][j];
    }
}

// sums[R][64] += rows of codes from k on, times 64 packed columns.
template <int R>
NEVER_INLINE void packed_tile(const Codes& x, const int64_t* rows, int64_t k, int64_t deep, const int8_t* packed,
                              int32_t* sums, int64_t stride) {
  constexpr int64_t some = 4;  // vectors of sums at once
  const int8_t* u[R];
  for (int r = 0; r < R; r++) u[r] = x.row(rows[r]) + k;
  for (int64_t n = 0; n < COLUMNS; n += some * SUMS) {
    Sums s[R][some];
    UNROLLED
    for (int r = 0; r < R; r++)
      UNROLLED
      for (int j = 0; j < some; j++) {
        int32_t* from = sums + r * stride + n + j * SUMS;
        if (k == 0) std::fill(from, from + SUMS, int32_t(0u - uint32_t(ADDED) * uint32_t(x.sums[rows[r]])));
        memcpy(&s[r][j], from, sizeof(Sums));
      }
    for (int64_t d = 0; d < deep; d += GROUP) {
      Operand codes[R];
      UNROLLED
      for (int r = 0; r < R; r++) codes[r] = repeated(u[r] + d);
      UNROLLED
      for (int j = 0; j < some; j++) {
        const Operand v = weights_at(packed + d * COLUMNS + (n + j * SUMS) * GROUP);
        UNROLLED
        for (int r = 0; r < R; r++) add_products(s[r][j], v, codes[r]);
      }
    }
    UNROLLED
    for (int r = 0; r < R; r++)
      UNROLLED
      for (int j = 0; j < some; j++) memcpy(sums + r * stride + n + j * SUMS, &s[r][j], sizeof(Sums));
  }
}

INLINE void straighten(int32_t*) {}  // they are
#endif

// sums[i][n] = codes of row rows[i] times columns [begin, end) of b [depth, width], in memory `stride` apart, padded.
void sum_columns(const Codes& x, const std::vector<int64_t>& rows, const int8_t* b, int64_t width, int64_t begin,
                 int64_t end, int32_t* sums, int64_t stride) {
  static thread_local Room<int8_t> memory;
  int8_t* packed = memory.reserve(DEEP * PART);
  const int64_t count = rows.size();
  for (int64_t k = 0; k < x.depth; k += DEEP) {
    const int64_t deep = std::min(DEEP, x.depth - k);
    pack(b + k * width + begin, width, deep, end - begin, packed);
    for (int64_t n = begin; n < end; n += COLUMNS)
      for (int64_t r = 0; r < count; r += ROWS) {
        const int8_t* strip = packed + (n - begin) * DEEP;
        int32_t* to = sums + r * stride + n;
        switch (count - r) {
          case 1: packed_tile<1>(x, &rows[r], k, deep, strip, to, stride); break;
          case 2: packed_tile<up_to(2)>(x, &rows[r], k, deep, strip, to, stride); break;
          case 3: packed_tile<up_to(3)>(x, &rows[r], k, deep, strip, to, stride); break;
          case 4: packed_tile<up_to(4)>(x, &rows[r], k, deep, strip, to, stride); break;
          case 5: packed_tile<up_to(5)>(x, &rows[r], k, deep, strip, to, stride); break;
          default: packed_tile<up_to(6)>(x, &rows[r], k, deep, strip, to, stride); break;
        }
      }
  }
  for (int64_t r = 0; r < count; r++)
    for (int64_t n = begin; n < end; n += COLUMNS) straighten(sums + r * stride + n);
}

// y[i][n] for rows `rows` of x and all columns of one expert's b, y's first row being `first`.
struct ExpertProduct {
  const Codes& x;
  std::vector<int64_t> rows;
  const int8_t* b;
  const float* scale;
  float* y;

  void columns(int64_t begin, int64_t end, int64_t width) const {
    const int64_t stride = padded(width);
    sum_columns(x, rows, b, width, begin, end, reinterpret_cast<int32_t*>(y), stride);
    for (size_t r = 0; r < rows.size(); r++) {
      const float t = x.scales[rows[r]];
      for (int64_t n = begin; n < end; n++) {
        int32_t sum;
        memcpy(&sum, y + r * stride + n, 4);
        y[r * stride + n] = float(sum) * scale[n] * t;
      }
    }
  }
};

// All products of a step, by parts of their columns.
void run_products(const std::vector<ExpertProduct>& products, int64_t width) {
  const int64_t parts = (width + PART - 1) / PART;
  Pool::one().run(products.size() * parts, [&](int64_t i) {
    const int64_t n = i % parts * PART;
    products[i / parts].columns(n, std::min(width, n + PART), width);
  });
}

void experts(const Arguments& a) {
  const float *h = a.at<float>(0), *weights = a.at<float>(1);
  const int32_t *ids = a.at<int32_t>(2), start = *a.at<int32_t>(3);
  const int8_t *gate_up = a.at<int8_t>(4), *down = a.at<int8_t>(6);
  const float *gate_up_scale = a.at<float>(5), *down_scale = a.at<float>(7);
  const int64_t tokens = a.size(0, 0), hidden = a.size(0, 1), top_k = a.size(1, 1);
  const int64_t count = a.size(4, 0), ffn = a.size(6, 1), wide = padded(2 * ffn), long_ = padded(hidden);
  std::fill(a.at<float>(8), a.at<float>(8) + tokens * hidden, 0.0f);
  for (int64_t first = 0; first < tokens; first += EXPERT_TOKENS) {
    const int64_t last = std::min(tokens, first + EXPERT_TOKENS);
    const Routing routing(ids, top_k, first, last, start, count);
    if (routing.rows == 0) continue;
    Codes x(last - first, hidden), act(routing.rows, ffn);
    Floats memory(routing.rows * (wide + long_));
    float *mid = memory.reserve(0), *out = mid + routing.rows * wide;
    encode_tokens(h + first * hidden, x);
    std::vector<ExpertProduct> up, back;
    for (const Routing::Group& g : routing.groups) {
      const int64_t e = g.expert;
      up.push_back({x, {}, gate_up + e * hidden * 2 * ffn, gate_up_scale + e * 2 * ffn, mid + g.row * wide});
      back.push_back({act, {}, down + e * ffn * hidden, down_scale + e * hidden, out + g.row * long_});
      for (size_t i = 0; i < g.tokens.size(); i++) {
        up.back().rows.push_back(g.tokens[i] - first);
        back.back().rows.push_back(g.row + i);
      }
    }
    run_products(up, 2 * ffn);
    encode_activations(mid, wide, act);
    run_products(back, hidden);
    sum_up(routing, weights, top_k, first, last, out, long_, a.at<float>(8), hidden);
  }
}

bool is_depth(int64_t depth) { return 1 <= depth && depth <= MOST_DEPTH; }

// Arguments `at`, codes [width, depth], and at + 1, scales [width, 1].
struct Matrix {
  static constexpr int COUNT = 2;
  int64_t width = 0, depth = 0;
  const int8_t* codes = nullptr;
  const float* scale = nullptr;

  Matrix(const Arguments& a, int at) {
    if (!a.has(at, "int8", {ANY, ANY}) || !a.has(at + 1, "float32", {a.size(at, 0), 1})) return;
    width = a.size(at, 0), depth = a.size(at, 1), codes = a.at<int8_t>(at), scale = a.at<float>(at + 1);
  }
  bool fits(int64_t wanted) const { return depth == wanted && is_depth(depth); }
};

// y [T, width] of x [T, depth], whose codes go to `to`.
void multiply_tokens(const float* x, Codes& to, const Matrix& by, float* y) {
  encode_tokens(x, to);
  multiply_codes(to, by.codes, by.width, ByToken{to, by.scale, y, by.width});
}

void multiply(const float* x, const Matrix& by, float* y, int64_t rows) {
  Codes codes(rows, by.depth);
  multiply_tokens(x, codes, by, y);
}

void multiply_twice(const float* x, const Matrix& gate_up, const Matrix& down, float* y, int64_t rows) {
  Codes in(rows, gate_up.depth), act(rows, down.depth);
  Floats memory(rows * gate_up.width);
  float* mid = memory.reserve(0);
  multiply_tokens(x, in, gate_up, mid);
  encode_activations(mid, gate_up.width, act);
  multiply_codes(act, down.codes, down.width, ByToken{act, down.scale, y, down.width});
}

}  // namespace

// x [T, depth], weight [width, depth] int8, scale [width, 1] -> [T, width]: each token's codes have a scale of their
// own.
OPERATION(ProductInt8) {
  const Matrix weight(a, 1);
  if (!a.has(0, "float32", {ANY, ANY}) || !weight.fits(a.size(0, 1))) return WRONG_SHAPE;
  if (!a.has(3, "float32", {a.size(0, 0), weight.width})) return WRONG_SHAPE;
  Codes x(a.size(0, 0), weight.depth);
  multiply_tokens(a.at<float>(0), x, weight, a.at<float>(3));
  return 0;
}
SHAPE(ProductInt8) { return {SIZE(0, 0), SIZE(1, 0)}; }

// x [T, depth], weight [width, depth] int8, deq_scale [width], quant_bias [width] int32, input_scale [1],
// input_offset [1] -> [T, width]
OPERATION(ProductInt8Static) {
  if (!a.has(0, "float32", {ANY, ANY}) || !a.has(1, "int8", {ANY, a.size(0, 1)})) return WRONG_SHAPE;
  const int64_t rows = a.size(0, 0), depth = a.size(0, 1), width = a.size(1, 0);
  if (!is_depth(depth) || !a.has(2, "float32", {width}) || !a.has(3, "int32", {width})) return WRONG_SHAPE;
  if (!a.has(4, "float32", {1}) || !a.has(5, "float32", {1}) || !a.has(6, "float32", {rows, width})) return WRONG_SHAPE;
  const float scale = *a.at<float>(4), offset = *a.at<float>(5);
  Codes x(rows, depth);
  parallel_for(rows, SERIAL / depth, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) encode_input(a.at<float>(0) + r * depth, scale, offset, x, r);
  });
  multiply_codes(x, a.at<int8_t>(1), width, ByInput{a.at<int32_t>(3), a.at<float>(2), a.at<float>(6), width});
  return 0;
}
SHAPE(ProductInt8Static) { return {SIZE(0, 0), SIZE(1, 0)}; }

// x [T, depth], gate_up [2*ffn, depth] int8, gate_up_scale [2*ffn, 1], down [width, ffn] int8, down_scale [width, 1]
// -> [T, width]: both products and what is between them, for one node of a graph costs more than its little work.
OPERATION(MlpInt8) {
  const MlpHalf<Matrix> mlp(a, 1);
  if (!a.has(0, "float32", {ANY, ANY}) || !mlp.fits(a.size(0, 1))) return WRONG_SHAPE;
  if (!a.has(5, "float32", {a.size(0, 0), mlp.down.width})) return WRONG_SHAPE;
  mlp.run(a.at<float>(0), a.size(0, 0), a.at<float>(5));
  return 0;
}
SHAPE(MlpInt8) { return {SIZE(0, 0), SIZE(3, 0)}; }

// h [T, depth], qkv [(H+2K)*D, depth] int8, qkv_scale [(H+2K)*D, 1], then as SplitHeads after its qkv -> as SplitHeads
OPERATION(HeadsInt8) {
  const Matrix qkv(a, 1);
  if (!Heads::fit(a, 3, 9)) return WRONG_SHAPE;
  const Heads heads(a, 3, 9);
  if (!a.has(0, "float32", {heads.tokens, ANY}) || !qkv.fits(a.size(0, 1))) return WRONG_SHAPE;
  if (qkv.width != heads.width()) return WRONG_SHAPE;
  Codes x(heads.tokens, qkv.depth);
  Floats memory(heads.tokens * qkv.width);
  multiply_tokens(a.at<float>(0), x, qkv, memory.reserve(0));
  heads.split(memory.reserve(0));
  return 0;
}
SHAPES(HeadsInt8, 3) { return shapes_of_heads(SIZE(0, 0), SIZE(1, 0), SIZE(3, 0), SIZE(7, 0)); }

// mixed [T, depth], x [T, width], o [width, depth] int8, o_scale [width, 1], norm [width], gate_up [2*ffn, width] int8,
// gate_up_scale [2*ffn, 1], down [width, ffn] int8, down_scale [width, 1], next_norm [width], eps [1]
// -> h, total [T, width]: all of a layer behind its attention.  The norm of x + o(mixed) goes through the MLP; h is the
// norm of the sum of all.
OPERATION(AfterAttentionInt8) {
  const Matrix o(a, 2);
  const MlpHalf<Matrix> mlp(a, 5);
  if (!a.has(0, "float32", {ANY, ANY}) || !o.fits(a.size(0, 1)) || !mlp.fits(o.width)) return WRONG_SHAPE;
  const int64_t rows = a.size(0, 0), width = o.width;
  if (mlp.down.width != width || !a.has(4, "float32", {width}) || !a.has(9, "float32", {width})) return WRONG_SHAPE;
  if (!a.has(10, "float32", {1})) return WRONG_SHAPE;
  for (int i : {1, 11, 12})
    if (!a.has(i, "float32", {rows, width})) return WRONG_SHAPE;
  const float eps = *a.at<float>(10);
  float *h = a.at<float>(11), *total = a.at<float>(12);
  Codes mixed(rows, o.depth);
  Floats memory(rows * width);
  float* delta = memory.reserve(0);
  multiply_tokens(a.at<float>(0), mixed, o, delta);
  add_norm(delta, a.at<float>(1), a.at<float>(4), eps, h, total, rows, width);
  mlp.run(h, rows, delta);
  add_norm(delta, total, a.at<float>(9), eps, h, total, rows, width);
  return 0;
}
SHAPES(AfterAttentionInt8, 2) { return {{SIZE(0, 0), SIZE(2, 0)}, {SIZE(0, 0), SIZE(2, 0)}}; }

// As Attention and Layer, but that each matrix is int8, [width, depth], and its scales [width, 1] follow it.
OPERATION(AttentionInt8) { return run_attention<Matrix>(a); }
SHAPE(AttentionInt8) { return {SIZE(0, 0), SIZE(AttentionHalf<Matrix>::O, 0)}; }
OPERATION(LayerInt8) { return run_layer<Matrix>(a); }
SHAPES(LayerInt8, 2) { return {{SIZE(0, 0), SIZE(0, 1)}, {SIZE(0, 0), SIZE(0, 1)}}; }

// h [T, hidden], weights [T, k], ids [T, k] of all experts, start [1] of this rank's, gate_up [E, hidden, 2*ffn] int8,
// gate_up_scale [E, 1, 2*ffn], down [E, ffn, hidden] int8, down_scale [E, 1, hidden] -> [T, hidden], as of Experts.
OPERATION(ExpertsInt8) {
  if (!a.has(0, "float32", {ANY, ANY}) || !a.has(6, "int8", {ANY, ANY, a.size(0, 1)})) return WRONG_SHAPE;
  const int64_t tokens = a.size(0, 0), hidden = a.size(0, 1), count = a.size(6, 0), ffn = a.size(6, 1);
  if (!is_depth(hidden) || !is_depth(ffn) || !a.has(4, "int8", {count, hidden, 2 * ffn})) return WRONG_SHAPE;
  if (!a.has(5, "float32", {count, 1, 2 * ffn}) || !a.has(7, "float32", {count, 1, hidden})) return WRONG_SHAPE;
  if (!a.has(1, "float32", {tokens, ANY}) || !a.has(2, "int32", {tokens, a.size(1, 1)})) return WRONG_SHAPE;
  if (!a.has(3, "int32", {1}) || !a.has(8, "float32", {tokens, hidden})) return WRONG_SHAPE;
  experts(a);
  return 0;
}
SHAPE(ExpertsInt8) { return {SIZE(0, 0), SIZE(0, 1)}; }
