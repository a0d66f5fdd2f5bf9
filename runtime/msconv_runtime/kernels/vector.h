// The processor's vectors, in the compiler's own vector types: one source for AVX-512, AVX2, SSE2 and NEON, by what the
// flags of its build allow (variants.py).  Products are taken in 64 columns at a time; memory is padded to that, so
// that nothing here handles a rest.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define MSCONV_LANES 16
#elif defined(__AVX2__)
#define MSCONV_LANES 8
#else
#define MSCONV_LANES 4
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int64_t REGISTERS = 32;
#else
constexpr int64_t REGISTERS = 16;
#endif
constexpr int64_t LANES = MSCONV_LANES, COLUMNS = 64;

typedef float vf32 __attribute__((vector_size(4 * MSCONV_LANES), aligned(4)));
typedef int32_t vi32 __attribute__((vector_size(4 * MSCONV_LANES), aligned(4)));
typedef uint32_t vu32 __attribute__((vector_size(4 * MSCONV_LANES), aligned(4)));
typedef uint16_t vu16 __attribute__((vector_size(2 * MSCONV_LANES), aligned(2)));
typedef int8_t vi8 __attribute__((vector_size(MSCONV_LANES), aligned(1)));

struct bf16 {
  uint16_t bits;
};

#define INLINE static inline __attribute__((always_inline))
#define HIDDEN __attribute__((visibility("hidden")))  // from what loads the library
#ifdef __clang__
#define SHUFFLE __builtin_shufflevector
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vi32{__VA_ARGS__})
#endif

INLINE int64_t padded(int64_t n) { return (n + COLUMNS - 1) / COLUMNS * COLUMNS; }

INLINE vf32 load(const float* p) { return *reinterpret_cast<const vf32*>(p); }
INLINE vf32 load(const bf16* p) {
  vu32 wide = __builtin_convertvector(*reinterpret_cast<const vu16*>(p), vu32) << 16;
  return (vf32)wide;
}
INLINE float single(const float* p) { return *p; }
INLINE float single(const bf16* p) {
  uint32_t wide = uint32_t(p->bits) << 16;
  float f;
  memcpy(&f, &wide, 4);
  return f;
}
INLINE void store(float* p, vf32 x) { *reinterpret_cast<vf32*>(p) = x; }
INLINE vf32 all(float x) { return x - vf32{}; }  // x + 0 would be computed: it is not x for -0

INLINE float sum(vf32 x) {
#if MSCONV_LANES == 16
  x += SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15);
  x += SHUFFLE(x, x, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7);
#elif MSCONV_LANES == 8
  x += SHUFFLE(x, x, 4, 5, 6, 7, 4, 5, 6, 7);
#endif
  return (x[0] + x[2]) + (x[1] + x[3]);
}

// e^x for x <= 0 as softmax needs it (below -87: 1e-38), and up to 88.  Within 2 ulp.
INLINE vf32 exponential(vf32 x) {
  x = x < -87.0f ? all(-87.0f) : x;
  x = x > 88.0f ? all(88.0f) : x;
  vf32 scaled = x * 1.44269504088896341f;
  vf32 half = scaled < 0.0f ? all(-0.5f) : all(0.5f);
  vi32 n = __builtin_convertvector(scaled + half, vi32);
  vf32 whole = __builtin_convertvector(n, vf32);
  vf32 r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  vf32 y = all(1.9875691500e-4f);  // minimax polynomial of e^r on [-ln 2 / 2, ln 2 / 2] (Cephes, expf)
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  vi32 bits = (n + 127) << 23;
  return y * (vf32)bits;
}

#if MSCONV_LANES == 16
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif MSCONV_LANES == 8
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#define EVEN 0, 2, 4, 6
#define ODD 1, 3, 5, 7
#endif
// Interleaves row i of the first half with row i of the second.  Of the bits of an element's place, row then lane, this
// is a rotation by one: as many as a lane's number has bits exchange rows and lanes.
INLINE void interleave(const vf32* a, vf32* b) {
  constexpr int half = LANES / 2;
  for (int i = 0; i < half; i++) {
    b[2 * i] = SHUFFLE(a[i], a[i + half], LOW);
    b[2 * i + 1] = SHUFFLE(a[i], a[i + half], HIGH);
  }
}

// What was loaded stays in a register: compilers would load it again for each use.
#if defined(__x86_64__)
#define KEEP(x) asm("" : "+v"(x))
#else
#define KEEP(x) asm("" : "+w"(x))
#endif

// The sum of each of as many vectors as lanes, in their order.
INLINE vf32 sums(vf32* s) {
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) s[i] = SHUFFLE(s[i], s[i + half], LOW) + SHUFFLE(s[i], s[i + half], HIGH);
  return s[0];
}

// Two vectors of elements that lie together: those of even places and those of odd ones where that is cheaper.
INLINE void load_pair(const float* p, vf32& a, vf32& b) { a = load(p), b = load(p + LANES); }
INLINE void load_pair(const bf16* p, vf32& even, vf32& odd) {
  vu32 both;
  memcpy(&both, p, sizeof both);
  even = (vf32)(both << 16), odd = (vf32)(both & 0xffff0000u);
}
// Two vectors of x in the order of those of w.
INLINE void place_pair(const float*, const float* x, float* to) { store(to, load(x)), store(to + LANES, load(x + LANES)); }
INLINE void place_pair(const bf16*, const float* x, float* to) {
  store(to, SHUFFLE(load(x), load(x + LANES), EVEN));
  store(to + LANES, SHUFFLE(load(x), load(x + LANES), ODD));
}

// Rows, as many as lanes, become columns: to[k * stride + i] = rows[i][k].
template <class W>
INLINE void transpose(const W* const* rows, float* to, int64_t stride) {
  vf32 a[LANES], b[LANES];
  for (int i = 0; i < LANES; i++) a[i] = load(rows[i]);
  interleave(a, b);
  if (LANES == 8) {
    interleave(b, a);
    interleave(a, b);
    for (int i = 0; i < LANES; i++) store(to + i * stride, b[i]);
    return;
  }
  interleave(b, a);
  if (LANES == 16) {
    interleave(a, b);
    interleave(b, a);
  }
  for (int i = 0; i < LANES; i++) store(to + i * stride, a[i]);
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

constexpr int64_t VECTORS = REGISTERS == 32 ? 4 : 2;  // of a row's sums at once, which stay in registers

// How a lane of sums takes what there is at one depth: the product of two values.
struct Values {
  static constexpr int64_t COUNT = 1;  // of values at one depth
  INLINE vf32 repeated(const float* x) { return all(*x); }
  INLINE void add(vf32& sums, vf32 x, vf32 v) { sums += x * v; }
  // to[d * step] for x[d]
  INLINE void place(const float* x, int64_t depth, float* to, int64_t step) {
    for (int64_t d = 0; d < depth; d++) to[d * step] = x[d];
  }
};

// c[R][64] (+)= a[R][depth] b[depth][64].  a[r][k] is at a[r] + k * step.
template <class M, int R, class B>
INLINE void tile(const float* const* a, int64_t step, B b, int64_t depth, float* c, int64_t ldc, bool add) {
  for (int64_t n = 0; n < COLUMNS; n += VECTORS * LANES, c += VECTORS * LANES) {
    vf32 s[R][VECTORS];
    for (int r = 0; r < R; r++)
      for (int j = 0; j < VECTORS; j++) s[r][j] = add ? load(c + r * ldc + j * LANES) : vf32{};
    for (int64_t k = 0; k < depth; k++) {
      vf32 v[VECTORS];
      for (int j = 0; j < VECTORS; j++) v[j] = load(b(k) + n + j * LANES);
      for (int r = 0; r < R; r++) {
        vf32 x = M::repeated(a[r] + k * step);
        for (int j = 0; j < VECTORS; j++) M::add(s[r][j], x, v[j]);
      }
    }
    for (int r = 0; r < R; r++)
      for (int j = 0; j < VECTORS; j++) store(c + r * ldc + j * LANES, s[r][j]);
  }
}

// The same for up to `TILE` rows; more are left alone.
template <class M = Values, class B>
INLINE void tile_of(int64_t rows, const float* const* a, int64_t step, B b, int64_t depth, float* c, int64_t ldc,
                    bool add) {
  switch (rows) {
    case 1: tile<M, 1>(a, step, b, depth, c, ldc, add); break;
    case 2: tile<M, 2>(a, step, b, depth, c, ldc, add); break;
    case 3: tile<M, 3>(a, step, b, depth, c, ldc, add); break;
    case 4: tile<M, 4>(a, step, b, depth, c, ldc, add); break;
    case 5: tile<M, 5>(a, step, b, depth, c, ldc, add); break;
    default: tile<M, 6>(a, step, b, depth, c, ldc, add); break;
  }
}

// Any number of rows, row r at a[r].
template <class B>
INLINE void tiles_of(int64_t rows, const float* const* a, int64_t step, B b, int64_t depth, float* c, int64_t ldc,
                     bool add) {
  for (int64_t r = 0; r < rows; r += TILE) tile_of(rows - r, a + r, step, b, depth, c + r * ldc, ldc, add);
}
