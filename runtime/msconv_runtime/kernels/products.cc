// Products of a few rows, bound by memory, and of many, bound by arithmetic.
#include "products.h"

#include <type_traits>
#include <vector>

#include "activation.h"
#include "dots.h"
#include "pool.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512BF16__)
constexpr bool ROUNDS = true;
// The products of two pairs of bfloat16, whose 32 bits are moved as those of a float.
struct Pairs {
  static constexpr int64_t COUNT = 2;
  INLINE vf32 repeated(const float* x) { return (vf32)_mm512_set1_ps(*x); }
  INLINE void add(vf32& sums, vf32 x, vf32 v) { sums = (vf32)_mm512_dpbf16_ps((__m512)sums, (__m512bh)x, (__m512bh)v); }
  // x is rounded to the nearest, of two to that with an even last bit.
  INLINE void place(const float* x, int64_t depth, float* to, int64_t step) {
    for (int64_t d = 0; d < depth; d += LANES) {
      const int64_t count = std::min(LANES, depth - d), low = std::min(LANES, 2 * count), high = 2 * count - low;
      const __m512 a = _mm512_maskz_loadu_ps(__mmask16((1u << low) - 1), x + 2 * d);
      const __m512 b = _mm512_maskz_loadu_ps(__mmask16((1u << high) - 1), x + 2 * d + low);
      float pairs[LANES];
      store(pairs, (vf32)_mm512_cvtne2ps_pbh(b, a));
      for (int64_t i = 0; i < count; i++) to[(d + i) * step] = pairs[i];
    }
  }
};
#else
constexpr bool ROUNDS = false;
typedef Values Pairs;
#endif

constexpr int64_t FEW_ROWS = 5;  // up to here a weight is multiplied as it lies in memory, once for all rows
constexpr int64_t SOME_ROWS = LANES == 4 ? 48 : 32;  // and up to here, from a cache, once for each tile of rows
constexpr int64_t SOME_DEPTH = 256;                  // if rows are so long that adding up lanes costs little
constexpr int64_t TALL = REGISTERS == 32 ? 8 : 4;    // rows of such a tile
constexpr int64_t PART = 1024;                       // of their depth: what a first-level cache keeps, 32 KB or 16
constexpr int64_t CHUNK = 16;                        // rows of w whose part a second-level cache keeps for all tiles
constexpr int64_t DEPTH = 512;    // of a packed panel: 128 KB, which a second-level cache keeps
constexpr int64_t AT_LEAST = 16;  // columns that a thread takes: as many as a vector has lanes, or a multiple

// columns(begin, end) over [0, width), by all threads where there is enough to do: `work` elements a column.
template <class F>
void share_columns(int64_t width, int64_t work, const F& columns) {
  if (width * work < 8 * SERIAL) return columns(int64_t(0), width);
  const int64_t least = std::max(int64_t(1), SERIAL / 4 / work / AT_LEAST);
  guided_for((width + AT_LEAST - 1) / AT_LEAST, least,
             [&](int64_t begin, int64_t end) { columns(begin * AT_LEAST, std::min(width, end * AT_LEAST)); });
}

template <class W>
void few_rows(const float* x, const W* w, float* y, int64_t rows, int64_t depth, int64_t width) {
  const auto columns = [&](int64_t begin, int64_t end) {
    int64_t n = begin;
    for (; n + 4 <= end; n += 4) {
      const W* some[4] = {w + n * depth, w + (n + 1) * depth, w + (n + 2) * depth, w + (n + 3) * depth};
      dots_of<4>(rows, x, depth, some, 4 * depth, y + n, depth, width);
    }
    for (; n < end; n++) {
      const W* one = w + n * depth;
      dots_of<1>(rows, x, depth, &one, 0, y + n, depth, width);
    }
  };
  share_columns(width, depth, columns);
}

// Gates and ups of the same columns by the same thread, which then has both at hand.
template <class W>
void few_rows_swiglu(const float* x, const W* w, float* y, int64_t rows, int64_t depth, int64_t ffn) {
  const W* ups = w + ffn * depth;
  const auto columns = [&](int64_t begin, int64_t end) {
    static thread_local Floats memory;
    const int64_t count = end - begin;
    float *gate = memory.reserve(2 * rows * count), *up = gate + rows * count, four[FEW_ROWS * 4];
    int64_t n = begin;
    for (; n + 2 <= end; n += 2) {
      const W* some[4] = {w + n * depth, w + (n + 1) * depth, ups + n * depth, ups + (n + 1) * depth};
      dots_of<4>(rows, x, depth, some, 2 * depth, four, depth, 4);
      for (int64_t r = 0; r < rows; r++) {
        memcpy(gate + r * count + n - begin, four + r * 4, 2 * sizeof(float));
        memcpy(up + r * count + n - begin, four + r * 4 + 2, 2 * sizeof(float));
      }
    }
    if (n < end) {
      const W *one = w + n * depth, *other = ups + n * depth;
      dots_of<1>(rows, x, depth, &one, 0, gate + n - begin, depth, count);
      dots_of<1>(rows, x, depth, &other, 0, up + n - begin, depth, count);
    }
    for (int64_t r = 0; r < rows; r++) swiglu_of(gate + r * count, up + r * count, y + r * ffn + begin, count);
  };
  share_columns(ffn, 2 * depth, columns);
}

// x [rows, depth] as [parts of depth][rows][part], in the order of rows of w, up to a multiple of PAIR; then what is
// left of each row, filled up with zeros: [rows][PAIR].
template <class W>
void place(const float* x, const W* w, float* placed, int64_t rows, int64_t depth) {
  const int64_t paired = depth / PAIR * PAIR;
  parallel_for(rows, SERIAL / depth, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      for (int64_t k = 0; k < paired; k += PART) {
        const int64_t deep = std::min(PART, paired - k);
        const float* from = x + r * depth + k;
        float* to = placed + k * rows + r * deep;
        for (int64_t d = 0; d < deep; d += PAIR) place_pair(w, from + d, to + d);
      }
      float* rest = placed + paired * rows + r * PAIR;
      std::fill(std::copy(x + r * depth + paired, x + (r + 1) * depth, rest), rest + PAIR, 0.0f);
    }
  });
}

// y[r * width] += what is left of row r, as `place` gives it, times that of one row of w.
template <class W>
void add_rest(const float* rests, const W* w, float* y, int64_t rows, int64_t count, int64_t width) {
  float tail[PAIR] = {};
  for (int64_t k = 0; k < count; k++) tail[k] = single(w + k);
  for (int64_t r = 0; r < rows; r++) {
    const float* rest = rests + r * PAIR;
    y[r * width] += sum(load(rest) * load(tail) + load(rest + LANES) * load(tail + LANES));
  }
}

// Tiles of rows in the first-level cache, weights in the second for all of them while the next are fetched.
template <class W>
void some_rows(const float* x, const W* w, float* y, int64_t rows, int64_t depth, int64_t width) {
  const int64_t paired = depth / PAIR * PAIR, tiles = (rows + TALL - 1) / TALL;
  Floats memory(rows * (paired + PAIR));
  float* placed = memory.reserve(0);
  place(x, w, placed, rows, depth);
  const auto tile = [&](int64_t t, int64_t begin, int64_t end, int64_t k) {
    const int64_t first = rows * t / tiles, count = rows * (t + 1) / tiles - first, deep = std::min(PART, paired - k);
    const float* from = placed + k * rows + first * deep;
    const int ahead = tiles == 1 ? 2 : t < 2 ? 1 : 0;  // two rows of w by all tiles together
    const int64_t later = k + PART < paired ? PART : CHUNK * depth - k;  // the next part, or chunk
    for (int64_t n = begin; n < end; n += 2) {
      const W *some = w + n * depth + k, *next = some + t * depth + later;
      float* to = y + first * width + n;
      if (n + 1 < end)
        dots_in_pairs_of<TALL, 2>(count, from, some, depth, next, ahead, to, deep, width, k > 0);
      else
        dots_in_pairs_of<TALL, 1>(count, from, some, depth, next, 0, to, deep, width, k > 0);
    }
  };
  share_columns(width, depth * rows / FEW_ROWS, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; chunk += CHUNK) {
      const int64_t last = std::min(end, chunk + CHUNK);
      for (int64_t k = 0; k < paired; k += PART)
        for (int64_t t = 0; t < tiles; t++) tile(t, chunk, last, k);
      if (paired < depth)
        for (int64_t n = chunk; n < last; n++)
          add_rest(placed + paired * rows, w + n * depth + paired, y + n, rows, depth - paired, width);
    }
  });
}

// w [width, depth] of what M takes at one depth, x of as many values.
template <class M, class W>
void many_rows(const float* x, const W* w, float* y, int64_t rows, int64_t depth, int64_t width) {
  const int64_t tiles = (rows + TILE - 1) / TILE;
  Floats shared(tiles * TILE * depth);
  float* tiled = shared.reserve(0);  // [parts of depth][tiles][part][TILE]: read in order
  parallel_for(tiles, SERIAL / depth / TILE, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      for (int64_t k = 0; k < depth; k += DEPTH) {
        const int64_t deep = std::min(DEPTH, depth - k), count = std::min(TILE, rows - i * TILE);
        float* to = tiled + (k * tiles + i * deep) * TILE;
        for (int64_t r = 0; r < count; r++)
          M::place(x + ((i * TILE + r) * depth + k) * M::COUNT, deep, to + r, TILE);
      }
  });
  Pool::one().run((width + COLUMNS - 1) / COLUMNS, [&](int64_t part) {
    static thread_local Floats memory;
    const int64_t n = part * COLUMNS, count = std::min(COLUMNS, width - n);
    float* packed = memory.reserve((DEPTH + rows) * COLUMNS);
    float* out = count == COLUMNS ? y + n : packed + DEPTH * COLUMNS;
    const int64_t stride = count == COLUMNS ? width : COLUMNS;
    for (int64_t k = 0; k < depth; k += DEPTH) {
      const int64_t deep = std::min(DEPTH, depth - k);
      const W* columns[COLUMNS];  // past the last: that one again, to be left out
      for (int64_t j = 0; j < COLUMNS; j++) columns[j] = w + (n + std::min(j, count - 1)) * depth + k;
      columns_of(columns, deep, packed);
      for (int64_t i = 0; i < tiles; i++) {
        const float *from = tiled + (k * tiles + i * deep) * TILE, *a[TILE];
        for (int64_t r = 0; r < TILE; r++) a[r] = from + r;
        tile_of<M>(rows - i * TILE, a, TILE, Even{packed, COLUMNS}, deep, out + i * TILE * stride, stride, k > 0);
      }
    }
    if (count < COLUMNS)
      for (int64_t t = 0; t < rows; t++) memcpy(y + t * width + n, out + t * COLUMNS, count * sizeof(float));
  });
}

template <class W>
void multiply_by(const float* x, const W* w, float* y, int64_t rows, int64_t depth, int64_t width) {
  if constexpr (ROUNDS && std::is_same_v<W, bf16>)
    if (rows > SOME_ROWS && depth % 2 == 0)
      return many_rows<Pairs>(x, reinterpret_cast<const float*>(w), y, rows, depth / 2, width);
  if (rows <= FEW_ROWS)
    few_rows(x, w, y, rows, depth, width);
  else if (rows <= SOME_ROWS && depth >= SOME_DEPTH)
    some_rows(x, w, y, rows, depth, width);
  else
    many_rows<Values>(x, w, y, rows, depth, width);
}

}  // namespace

// Whether products of more than SOME_ROWS with bfloat16 round rows of x to it, too.
extern "C" int Rounds() { return ROUNDS; }

void multiply(const float* x, const Weights& w, float* y, int64_t rows) {
  if (w.is_narrow)
    multiply_by(x, static_cast<const bf16*>(w.data), y, rows, w.depth, w.width);
  else
    multiply_by(x, static_cast<const float*>(w.data), y, rows, w.depth, w.width);
}

void multiply_swiglu(const float* x, const Weights& w, float* y, int64_t rows) {
  const int64_t ffn = w.width / 2;
  if (rows > FEW_ROWS) {
    Floats memory(rows * w.width);
    const float* both = memory.reserve(0);
    multiply(x, w, memory.reserve(0), rows);
    parallel_for(rows, SERIAL / ffn, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) swiglu(both + r * w.width, y + r * ffn, ffn);
    });
  } else if (w.is_narrow) {
    few_rows_swiglu(x, static_cast<const bf16*>(w.data), y, rows, w.depth, ffn);
  } else {
    few_rows_swiglu(x, static_cast<const float*>(w.data), y, rows, w.depth, ffn);
  }
}
