// Sixteen lanes in the compiler's own vector types: AVX-512, AVX2 and NEON from one source, built with
// -march=native.  Products are taken in 64 columns at a time; memory is padded to that, so that nothing here
// handles a rest.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

typedef float f32x16 __attribute__((vector_size(64), aligned(4)));
typedef int32_t i32x16 __attribute__((vector_size(64), aligned(4)));
typedef uint32_t u32x16 __attribute__((vector_size(64), aligned(4)));
typedef uint16_t u16x16 __attribute__((vector_size(32), aligned(2)));

struct bf16 {
  uint16_t bits;
};

constexpr int64_t LANES = 16, COLUMNS = 64;
#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define SHUFFLE __builtin_shufflevector
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, i32x16{__VA_ARGS__})
#endif

INLINE int64_t padded(int64_t n) { return (n + COLUMNS - 1) / COLUMNS * COLUMNS; }

INLINE f32x16 load(const float* p) { return *reinterpret_cast<const f32x16*>(p); }
INLINE f32x16 load(const bf16* p) {
  u32x16 wide = __builtin_convertvector(*reinterpret_cast<const u16x16*>(p), u32x16) << 16;
  return (f32x16)wide;
}
INLINE float single(const float* p) { return *p; }
INLINE float single(const bf16* p) {
  uint32_t wide = uint32_t(p->bits) << 16;
  float f;
  memcpy(&f, &wide, 4);
  return f;
}
INLINE void store(float* p, f32x16 x) { *reinterpret_cast<f32x16*>(p) = x; }
INLINE f32x16 all(float x) { return x - f32x16{}; }  // x + 0 would be computed: it is not x for -0

INLINE float sum(f32x16 x) {
  f32x16 y = x + SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15);
  y += SHUFFLE(y, y, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7);
  return (y[0] + y[2]) + (y[1] + y[3]);
}

// e^x for x <= 0 as softmax needs it (below -87: 1e-38), and up to 88.  Within 2 ulp.
INLINE f32x16 exponential(f32x16 x) {
  x = x < -87.0f ? all(-87.0f) : x;
  x = x > 88.0f ? all(88.0f) : x;
  f32x16 scaled = x * 1.44269504088896341f;
  f32x16 half = scaled < 0.0f ? all(-0.5f) : all(0.5f);
  i32x16 n = __builtin_convertvector(scaled + half, i32x16);
  f32x16 whole = __builtin_convertvector(n, f32x16);
  f32x16 r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  f32x16 y = all(1.9875691500e-4f);  // minimax polynomial of e^r on [-ln 2 / 2, ln 2 / 2] (Cephes, expf)
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  i32x16 bits = (n + 127) << 23;
  return y * (f32x16)bits;
}

// Interleaves row i with row i + 8.  Of the 8 bits of an element's place, row then lane, this is a rotation by one:
// four of them exchange rows and lanes.
INLINE void interleave(const f32x16* a, f32x16* b) {
  for (int i = 0; i < 8; i++) {
    b[2 * i] = SHUFFLE(a[i], a[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    b[2 * i + 1] = SHUFFLE(a[i], a[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
}

// 16 rows become 16 columns: to[k * stride + i] = rows[i][k].
template <class W>
INLINE void transpose(const W* const* rows, float* to, int64_t stride) {
  f32x16 a[16], b[16];
  for (int i = 0; i < 16; i++) a[i] = load(rows[i]);
  interleave(a, b);
  interleave(b, a);
  interleave(a, b);
  interleave(b, a);
  for (int i = 0; i < 16; i++) store(to + i * stride, a[i]);
}

constexpr int64_t TILE = 6;  // rows

// Where the rows of a matrix are: at a distance, or anywhere.
struct Even {
  const float* first;
  int64_t distance;
  const float* operator()(int64_t k) const { return first + k * distance; }
};
struct Scattered {
  const float* const* rows;
  int64_t offset;
  const float* operator()(int64_t k) const { return rows[k] + offset; }
};

// c[R][64] (+)= a[R][depth] b[depth][64]: 4 * R sums stay in registers.  a[r][k] is at a[r] + k * step.
template <int R, class B>
INLINE void tile(const float* const* a, int64_t step, B b, int64_t depth, float* c, int64_t ldc, bool add) {
  f32x16 s[R][4];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < 4; j++) s[r][j] = add ? load(c + r * ldc + j * LANES) : f32x16{};
  for (int64_t k = 0; k < depth; k++) {
    f32x16 v[4];
    for (int j = 0; j < 4; j++) v[j] = load(b(k) + j * LANES);
    for (int r = 0; r < R; r++) {
      f32x16 x = all(a[r][k * step]);
      for (int j = 0; j < 4; j++) s[r][j] += x * v[j];
    }
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < 4; j++) store(c + r * ldc + j * LANES, s[r][j]);
}

// The same for up to `TILE` rows; more are left alone.
template <class B>
INLINE void tile_of(int64_t rows, const float* const* a, int64_t step, B b, int64_t depth, float* c, int64_t ldc,
                    bool add) {
  switch (rows) {
    case 1: tile<1>(a, step, b, depth, c, ldc, add); break;
    case 2: tile<2>(a, step, b, depth, c, ldc, add); break;
    case 3: tile<3>(a, step, b, depth, c, ldc, add); break;
    case 4: tile<4>(a, step, b, depth, c, ldc, add); break;
    case 5: tile<5>(a, step, b, depth, c, ldc, add); break;
    default: tile<6>(a, step, b, depth, c, ldc, add); break;
  }
}

// Any number of rows, row r at a[r].
template <class B>
INLINE void tiles_of(int64_t rows, const float* const* a, int64_t step, B b, int64_t depth, float* c, int64_t ldc,
                     bool add) {
  for (int64_t r = 0; r < rows; r += TILE) tile_of(rows - r, a + r, step, b, depth, c + r * ldc, ldc, add);
}
