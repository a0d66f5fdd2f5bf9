// Rows of activations as int8 codes, and their products with rows of int8 weights.  The integers are exact, and the
// same on every machine.
#pragma once
#include "bytes.h"
#include "operation.h"
#include "pool.h"
#include "vector.h"

typedef int32_t i32x4 __attribute__((vector_size(16), aligned(4)));
typedef float f32x4 __attribute__((vector_size(16), aligned(4)));

#define UNROLLED _Pragma("GCC unroll 8")  // so that sums stay in registers
#define NEVER_INLINE static __attribute__((noinline))  // a function's registers are its own

namespace {

constexpr int64_t MOST_DEPTH = 131071;  // 128 * 128 * depth is an int32
constexpr int64_t NEAR = 1 << 18;       // bytes that stay in a second-level cache
// Rows of activations at once, each with 4 of weights: so that sums stay in registers.
#ifdef MSCONV_VNNI
constexpr int64_t ROWS = 6;
#else
constexpr int64_t ROWS = REGISTERS == 32 ? 4 : 2;
#endif

constexpr int up_to(int64_t rows) { return int(rows < ROWS ? rows : ROWS); }  // never compiled for more

// `rows` of `depth` codes.  Row r begins at codes + r * stride, which is a multiple of 64; zeros fill it up.
struct Codes {
  int64_t rows, depth, stride;
  int8_t* codes;
  float* scales;  // [rows], if there is one a row
  int32_t* sums;  // [rows], of the codes

  Codes(int64_t rows, int64_t depth)
      : rows(rows), depth(depth), stride(padded(depth)), bytes_(rows * stride), floats_(rows), words_(rows) {
    codes = bytes_.reserve(0), scales = floats_.reserve(0), sums = words_.reserve(0);
  }
  const int8_t* row(int64_t r) const { return codes + r * stride; }

 private:
  Room<int8_t> bytes_;
  Room<float> floats_;
  Room<int32_t> words_;
};

// Up to 16 values, zeros behind them.
INLINE vf32 load_some(const float* x, int64_t count) {
  if (count >= LANES) return load(x);
  float some[LANES] = {};
  memcpy(some, x, count * sizeof(float));
  return load(some);
}

// To whole numbers, half to even, for |x| below 2^22: beside 1.5 * 2^23 a float has no bits for fractions.
INLINE vi32 whole(vf32 x) { return (vi32)(x + 12582912.0f) - 0x4b400000; }

INLINE vf32 clamped(vf32 x, float least, float most) {
  x = x > least ? x : all(least);  // what is no number becomes the least
  return x < most ? x : all(most);
}

// The codes of one row, as `code` makes them of 16 values before rounding; zeros up to `stride`.  Gives their sum.
template <class F>
INLINE int32_t encode(const float* x, int64_t depth, int64_t stride, int8_t* to, const F& code) {
  vi32 sums = {};
  int64_t i = 0;
  for (; i + LANES <= depth; i += LANES) {
    const vi32 c = whole(code(load(x + i)));
    sums += c;
    *reinterpret_cast<vi8*>(to + i) = __builtin_convertvector(c, vi8);
  }
  int32_t sum = 0;
  for (int j = 0; j < LANES; j++) sum += sums[j];
  const vi32 last = whole(code(load_some(x + i, depth - i)));
  for (int64_t j = 0; i + j < depth; j++) {
    to[i + j] = int8_t(last[j]);
    sum += last[j];
  }
  memset(to + depth, 0, stride - depth);
  return sum;
}

// Row r, with a scale of its own: t = max|x| / 127, codes of x / t.  If x has what is no number, so has t.
INLINE void encode_token(const float* x, Codes& to, int64_t r) {
  vi32 most = {};  // of the bits without the sign: they are ordered as the values are, and NaN is above all
  int64_t i = 0;
  for (; i < to.depth; i += LANES) {
    const vi32 bits = (vi32)load_some(x + i, to.depth - i) & 0x7fffffff;
    most = most > bits ? most : bits;
  }
  int32_t largest = 0;
  for (int j = 0; j < LANES; j++) largest = std::max(largest, most[j]);
  float t;
  memcpy(&t, &largest, 4);
  t /= 127.0f;
  to.scales[r] = t;
  int8_t* codes = to.codes + r * to.stride;
  if (t == 0.0f) {
    memset(codes, 0, to.stride);
    to.sums[r] = 0;
  } else {
    to.sums[r] = encode(x, to.depth, to.stride, codes, [t](vf32 v) { return clamped(v / t, -127.0f, 127.0f); });
  }
}

// Row r with the scale and offset of its input: codes of x / scale + offset.
INLINE void encode_input(const float* x, float scale, float offset, Codes& to, int64_t r) {
  const float inverse = 1.0f / scale;
  to.sums[r] = encode(x, to.depth, to.stride, to.codes + r * to.stride, [=](vf32 v) {
    v *= inverse;
    asm("" : "+m"(v));  // rounded here: a fused multiplication and addition would give other codes
    return clamped(v + offset, -128.0f, 127.0f);
  });
}

// sums[r][j] = x[r] . w[j] for `R` rows of codes and `N` of weights.  `ahead`: what follows the rows of w, in bytes, or 0.
#ifdef MSCONV_VNNI
constexpr int64_t SOON = 2048;  // bytes ahead of what a few rows are multiplied with; 8192 would be too far

INLINE __m512i unsigned_of(__m512i w) { return _mm512_xor_si512(w, _mm512_set1_epi8(-128)); }

// sums += products of four bytes a lane.  (GCC 12 moves every sum to another register around its own function.)
INLINE void add_products(__m512i& sums, __m512i weights, __m512i codes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(codes));
}

// The four totals of each.
INLINE __m128i totals(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

template <int R, int N>
NEVER_INLINE void code_dots(const Codes& x, int64_t row, const int8_t* const* w, int64_t ahead, int32_t (*sums)[4]) {
  const int8_t *u[R], *from[N];
  UNROLLED
  for (int r = 0; r < R; r++) u[r] = x.row(row + r);
  for (int j = 0; j < N; j++) from[j] = w[j];
  __m512i s[R][N];
  UNROLLED
  for (int r = 0; r < R; r++)
    UNROLLED
    for (int j = 0; j < N; j++) s[r][j] = _mm512_setzero_si512();
  const int64_t depth = x.depth;
  const auto weights_at = [&](int j, int64_t k) __attribute__((always_inline)) {
    const __mmask64 there = depth - k >= 64 ? ~__mmask64(0) : ~__mmask64(0) >> (64 - (depth - k));
    return unsigned_of(_mm512_maskz_loadu_epi8(there, from[j] + k));
  };
  if constexpr (R <= 3) {  // bound by memory: one row of weights after the other, as they lie there
    UNROLLED
    for (int j = 0; j < N; j++) {
      int64_t k = 0;
      _Pragma("GCC unroll 4")
      for (; k + 64 <= depth; k += 64) {
        __builtin_prefetch(from[j] + k + SOON, 0, 2);
        const __m512i v = unsigned_of(_mm512_loadu_si512(from[j] + k));
        UNROLLED
        for (int r = 0; r < R; r++) add_products(s[r][j], v, _mm512_load_si512(u[r] + k));
      }
      if (k < depth)
        for (int r = 0; r < R; r++) add_products(s[r][j], weights_at(j, k), _mm512_load_si512(u[r] + k));
    }
  } else {
    for (int64_t k = 0; k < depth; k += 64) {
      __m512i v[N];
      UNROLLED
      for (int j = 0; j < N; j++) {
        __builtin_prefetch(from[j] + ahead + k, 0, 2);
        v[j] = weights_at(j, k);
      }
      UNROLLED
      for (int r = 0; r < R; r++) {
        const __m512i codes = _mm512_load_si512(u[r] + k);
        UNROLLED
        for (int j = 0; j < N; j++) add_products(s[r][j], v[j], codes);
      }
    }
  }
  UNROLLED
  for (int r = 0; r < R; r++) {
    const __m512i *of = s[r], none = _mm512_setzero_si512();
    const __m128i all = N == 4 ? totals(of[0], of[1 % N], of[2 % N], of[3 % N]) : totals(of[0], none, none, none);
    const __m128i off = _mm_set1_epi32(int32_t(uint32_t(x.sums[row + r]) * 128u));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(sums[r]), _mm_sub_epi32(all, off));
  }
}
#else
template <int R, int N>
NEVER_INLINE void code_dots(const Codes& x, int64_t row, const int8_t* const* w, int64_t ahead, int32_t (*sums)[4]) {
  const int8_t *u[R], *from[N];
  for (int r = 0; r < R; r++) u[r] = x.row(row + r);
  for (int j = 0; j < N; j++) from[j] = w[j];
  Sums s[R][N] = {};
  const auto add = [&](const int8_t* const* weights, int64_t ahead_of, int64_t k) __attribute__((always_inline)) {
    Operand codes[R];
    UNROLLED
    for (int r = 0; r < R; r++) codes[r] = codes_at(u[r] + k);
    UNROLLED
    for (int j = 0; j < N; j++) {
      if (ahead_of) __builtin_prefetch(weights[j] + ahead_of, 0, 2);
      const Operand v = weights_at(weights[j]);
      UNROLLED
      for (int r = 0; r < R; r++) add_products(s[r][j], v, codes[r]);
    }
  };
  int64_t k = 0;
  for (; k + AT_ONCE <= x.depth; k += AT_ONCE) {
    add(from, ahead, k);
    for (int j = 0; j < N; j++) from[j] += AT_ONCE;
  }
  if (k < x.depth) {  // codes have zeros behind them, weights have another row, or the end of memory
    int8_t rest[N][AT_ONCE] = {};
    const int8_t* some[N];
    for (int j = 0; j < N; j++) {
      memcpy(rest[j], from[j], x.depth - k);
      some[j] = rest[j];
    }
    add(some, 0, k);
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < N; j++)
      sums[r][j] = int32_t(uint32_t(total(s[r][j])) - uint32_t(ADDED) * uint32_t(x.sums[row + r]));
}
#endif

// finish(row, column, sums) for each row of x and N columns of the result, which are N rows of w.
template <int N, class F>
INLINE void code_tiles(const Codes& x, int64_t first, int64_t rows, const int8_t* w, int64_t column, const F& finish) {
  const int8_t* some[4];
  for (int j = 0; j < 4; j++) some[j] = w + (column + std::min(j, N - 1)) * x.depth;
  const int64_t ahead = N == 4 && first == 0 ? 4 * x.depth : 0;
  int32_t sums[ROWS][4];
  switch (rows) {
    case 1: code_dots<1, N>(x, first, some, ahead, sums); break;
    case 2: code_dots<up_to(2), N>(x, first, some, ahead, sums); break;
    case 3: code_dots<up_to(3), N>(x, first, some, ahead, sums); break;
    case 4: code_dots<up_to(4), N>(x, first, some, ahead, sums); break;
    case 5: code_dots<up_to(5), N>(x, first, some, ahead, sums); break;
    default: code_dots<up_to(6), N>(x, first, some, ahead, sums); break;
  }
  for (int64_t r = 0; r < rows; r++) finish(first + r, column, sums[r]);
}

// finish(row, column, sums) with sums[4] for each row of x and each four columns of the result; the last ones come
// alone, in sums[0], by finish.one.  Either x or a part of w stays near while it meets the other.
template <class F>
void multiply_codes(const Codes& x, const int8_t* w, int64_t width, const F& finish) {
  const bool has_few = x.rows * x.stride <= NEAR;
  const int64_t tiles = (x.rows + ROWS - 1) / ROWS, each = tiles ? (x.rows + tiles - 1) / tiles : 1;
  const int64_t part = has_few ? 1 : std::max(int64_t(1), NEAR / (4 * x.depth));
  const auto columns = [&](int64_t begin, int64_t end) {
    for (int64_t from = begin; from < end; from += part)
      for (int64_t r = 0; r < x.rows; r += each)
        for (int64_t n = from; n < std::min(end, from + part); n++)
          code_tiles<4>(x, r, std::min(each, x.rows - r), w, 4 * n, finish);
  };
  const int64_t least = std::max(int64_t(1), SERIAL / x.depth);
  has_few ? guided_for(width / 4, least, columns) : parallel_for(width / 4, least, columns);
  const auto one = [&](int64_t row, int64_t column, const int32_t* sums) { finish.one(row, column, sums[0]); };
  for (int64_t n = width / 4 * 4; n < width; n++)
    for (int64_t r = 0; r < x.rows; r += each) code_tiles<1>(x, r, std::min(each, x.rows - r), w, n, one);
}

}  // namespace
