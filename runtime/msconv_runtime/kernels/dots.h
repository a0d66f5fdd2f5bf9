// Products with rows of a matrix as they lie in memory, and rows turned to columns.
#pragma once
#include "vector.h"

namespace {

// y[r * width + j] = x[r * ldx] . w[j] for `R` rows of x and `N` of w.  `ahead`: what follows the rows of w, in elements.
template <int R, int N, class W>
INLINE void dots(const float* x, int64_t ldx, const W* const* w, int64_t ahead, float* y, int64_t depth,
                 int64_t width) {
  if constexpr (R * N + N + 1 > REGISTERS) {
    dots<R, N / 2>(x, ldx, w, ahead, y, depth, width);
    dots<R, N / 2>(x, ldx, w + N / 2, ahead, y + N / 2, depth, width);
    return;
  }
  vf32 s[R][N] = {};
  int64_t k = 0;
  for (; k + LANES <= depth; k += LANES) {
    vf32 v[N];
    for (int j = 0; j < N; j++) {
      if (ahead) __builtin_prefetch(w[j] + ahead + k, 0, 2);  // to the second-level cache: the first waits for few
      v[j] = load(w[j] + k);
    }
    for (int r = 0; r < R; r++) {
      vf32 u = load(x + r * ldx + k);
      for (int j = 0; j < N; j++) s[r][j] += u * v[j];
    }
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < N; j++) {
      float total = sum(s[r][j]);
      for (int64_t i = k; i < depth; i++) total += x[r * ldx + i] * single(w[j] + i);
      y[r * width + j] = total;
    }
}

template <int N, class W>
INLINE void dots_of(int64_t rows, const float* x, int64_t ldx, const W* const* w, int64_t ahead, float* y,
                    int64_t depth, int64_t width) {
  while (rows > 0) {
    int64_t tiles = (rows + 4) / 5, r = (rows + tiles - 1) / tiles;  // 8 rows: two times four
    switch (r) {
      case 1: dots<1, N>(x, ldx, w, ahead, y, depth, width); break;
      case 2: dots<2, N>(x, ldx, w, ahead, y, depth, width); break;
      case 3: dots<3, N>(x, ldx, w, ahead, y, depth, width); break;
      case 4: dots<4, N>(x, ldx, w, ahead, y, depth, width); break;
      default: dots<5, N>(x, ldx, w, ahead, y, depth, width); break;
    }
    rows -= r, x += r * ldx, y += r * width;
  }
}

constexpr int64_t PAIR = 2 * LANES;  // elements that are multiplied at a time
constexpr int64_t LINE = 64;         // bytes of a cache line

// y[r * width + j] (+)= x[r * depth] . w[j * ldw] for `R` rows of x and `N` of w, `depth` a multiple of PAIR, x placed by
// `place_pair`.  `next`: `ahead` rows of w that are read later.
template <int R, int N, class W>
INLINE void dots_in_pairs(const float* x, const W* w, int64_t ldw, const W* next, int ahead, float* y, int64_t depth,
                          int64_t width, bool add) {
  constexpr int SUMS = (R * N + LANES - 1) / LANES * LANES;
  vf32 s[SUMS] = {};
  for (int64_t k = 0; k < depth; k += PAIR) {
    vf32 a[N], b[N];
    for (int j = 0; j < N; j++) {
      if (j < ahead)
        for (int64_t i = 0; i < PAIR; i += LINE / sizeof(W)) __builtin_prefetch(next + j * ldw + k + i, 0, 2);
      load_pair(w + j * ldw + k, a[j], b[j]);
    }
    for (int r = 0; r < R; r++) {
      vf32 u = load(x + r * depth + k), v = load(x + r * depth + k + LANES);
      KEEP(u);
      KEEP(v);
      for (int j = 0; j < N; j++) s[r * N + j] += u * a[j];
      for (int j = 0; j < N; j++) s[r * N + j] += v * b[j];
    }
  }
  float found[SUMS];
  for (int i = 0; i < SUMS; i += LANES) store(found + i, sums(s + i));
  for (int r = 0; r < R; r++)
    for (int j = 0; j < N; j++) y[r * width + j] = found[r * N + j] + (add ? y[r * width + j] : 0.0f);
}

// The same for `rows` of x, at most R.
template <int R, int N, class... A>
INLINE void dots_in_pairs_of(int64_t rows, const A&... a) {
  if constexpr (R > 1)
    if (rows < R) return dots_in_pairs_of<R - 1, N>(rows, a...);
  dots_in_pairs<R, N>(a...);
}

// to[k][64] = rows[64][k] for `depth` of k: rows become columns.
template <class W>
void columns_of(const W* const* rows, int64_t depth, float* to) {
  for (int64_t j = 0; j < COLUMNS; j += LANES) {
    int64_t k = 0;
    for (; k + LANES <= depth; k += LANES) {
      const W* some[LANES];
      for (int i = 0; i < LANES; i++) some[i] = rows[j + i] + k;
      transpose(some, to + k * COLUMNS + j, COLUMNS);
    }
    for (; k < depth; k++)
      for (int i = 0; i < LANES; i++) to[k * COLUMNS + j + i] = single(rows[j + i] + k);
  }
}

}  // namespace
