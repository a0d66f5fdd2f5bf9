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
