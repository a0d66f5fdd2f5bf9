// The operations of the CPU's compiled graphs.  MindSpore calls them as custom operations: pointers, ranks, shapes and
// type names of all inputs, then of all outputs; a non-zero return fails the step.
//
// Shape legend: T tokens, B sequences, S positions a row of the block table, H heads, K kv heads, D head_dim.
// Activations and caches are float32; weights of products are float32 or bfloat16.
#include <cmath>
#include <vector>

#include "experts.h"
#include "norms.h"
#include "operation.h"
#include "pool.h"
#include "vector.h"

namespace {

constexpr int64_t FEW_ROWS = 10;         // up to here a weight is multiplied as it lies in memory
constexpr int64_t DEPTH = 512;           // of a packed panel: 128 KB, which a second-level cache keeps
constexpr int64_t QUERIES = 96;          // rows of queries that share one pass over keys and values
constexpr int64_t FEW_QUERIES = 8;       // up to here keys and values are read where they lie
constexpr int64_t BLOCK = 512;           // columns of an expert's matrix at once: long runs of memory
constexpr int64_t STEP = 32;             // rows of it

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

template <class W>
void few_rows(const float* x, const W* w, float* y, int64_t rows, int64_t depth, int64_t width) {
  parallel_for(width / 4, SERIAL / depth, [&](int64_t begin, int64_t end) {
    for (int64_t n = 4 * begin; n < 4 * end; n += 4) {
      const W* some[4] = {w + n * depth, w + (n + 1) * depth, w + (n + 2) * depth, w + (n + 3) * depth};
      dots_of<4>(rows, x, depth, some, 4 * depth, y + n, depth, width);
    }
  });
  for (int64_t n = width / 4 * 4; n < width; n++) {
    const W* one = w + n * depth;
    dots_of<1>(rows, x, depth, &one, 0, y + n, depth, width);
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

template <class W>
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
          for (int64_t d = 0; d < deep; d++) to[d * TILE + r] = x[(i * TILE + r) * depth + k + d];
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
        tile_of(rows - i * TILE, a, TILE, Even{packed, COLUMNS}, deep, out + i * TILE * stride, stride, k > 0);
      }
    }
    if (count < COLUMNS)
      for (int64_t t = 0; t < rows; t++) memcpy(y + t * width + n, out + t * COLUMNS, count * sizeof(float));
  });
}

template <class W>
void multiply(const float* x, const W* w, float* y, int64_t rows, int64_t depth, int64_t width) {
  rows <= FEW_ROWS ? few_rows(x, w, y, rows, depth, width) : many_rows(x, w, y, rows, depth, width);
}

// Rows of queries of one sequence and one kv head, and what they have seen so far.
struct Queries {
  int64_t rows, dim;                // dim: padded
  std::vector<const float*> q, at;  // [rows] of [dim]; [rows] of `scores`
  std::vector<int64_t> sees;        // [rows]: how many positions
  float *out, *scores, *best, *sums;  // [rows][dim], [rows][64], [rows], [rows]
};

// Scores of 64 positions to shares of them all; what was seen before shrinks where a higher score appears.
void take_shares(Queries& a, int64_t first) {
  for (int64_t r = 0; r < a.rows; r++) {
    float* s = a.scores + r * COLUMNS;
    const int64_t seen = std::clamp(a.sees[r] - first, int64_t(0), COLUMNS);
    std::fill(s + seen, s + COLUMNS, -INFINITY);
    vf32 most = load(s);
    for (int j = LANES; j < COLUMNS; j += LANES) most = most > load(s + j) ? most : load(s + j);
    float best = a.best[r];
    for (int i = 0; i < LANES; i++) best = std::max(best, most[i]);
    const float shrink = std::exp(a.best[r] - best);
    vf32 total = {};
    for (int j = 0; j < COLUMNS; j += LANES) {
      vf32 x = load(s + j);
      vf32 e = x == -INFINITY ? vf32{} : exponential(x - best);
      store(s + j, e);
      total += e;
    }
    a.best[r] = best;
    a.sums[r] = a.sums[r] * shrink + sum(total);
    if (shrink != 1.0f)
      for (int64_t i = 0; i < a.dim; i++) a.out[r * a.dim + i] *= shrink;
  }
}

// 64 positions, their keys and values copied: keys as columns, so that sums need no adding up across lanes.
void attend_copied(Queries& a, const float* const* keys, const float* const* values, int64_t dim, int64_t first,
                   float* columns, float* rows) {
  columns_of(keys, dim, columns);
  for (int64_t s = 0; s < COLUMNS; s++) memcpy(rows + s * a.dim, values[s], dim * sizeof(float));
  tiles_of(a.rows, a.q.data(), 1, Even{columns, COLUMNS}, a.dim, a.scores, COLUMNS, false);
  take_shares(a, first);
  for (int64_t d = 0; d < a.dim; d += COLUMNS)
    tiles_of(a.rows, a.at.data(), 1, Even{rows + d, a.dim}, COLUMNS, a.out + d, a.dim, true);
}

// The same for few queries, from where keys and values lie.
void attend_in_place(Queries& a, const float* const* keys, const float* const* values, int64_t first) {
  for (int64_t s = 0; s < COLUMNS; s += 4)
    dots_of<4>(a.rows, a.q[0], a.dim, keys + s, a.dim, a.scores + s, a.dim, COLUMNS);
  for (int64_t s = 0; s < COLUMNS; s++)
    for (int64_t d = 0; d < a.dim; d += LANES) __builtin_prefetch(values[s] + d);
  take_shares(a, first);
  for (int64_t d = 0; d < a.dim; d += COLUMNS)
    tiles_of(a.rows, a.at.data(), 1, Scattered{values, d}, COLUMNS, a.out + d, a.dim, true);
}

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
  if (!a.has(0, "float32", {ANY, ANY}) || !a.has(1, "", {ANY, a.size(0, 1)})) return WRONG_SHAPE;
  int64_t rows = a.size(0, 0), depth = a.size(0, 1), width = a.size(1, 0);
  if (depth < 1 || !a.has(2, "float32", {rows, width})) return WRONG_SHAPE;
  if (a.is(1, "float32"))
    multiply(a.at<float>(0), a.at<float>(1), a.at<float>(2), rows, depth, width);
  else if (a.is(1, "bfloat16"))
    multiply(a.at<float>(0), a.at<bf16>(1), a.at<float>(2), rows, depth, width);
  else
    return UNKNOWN_TYPE;
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
  if (!a.has(0, "float32", {ANY, ANY, ANY}) || !a.has(3, "int32", {ANY, ANY})) return WRONG_SHAPE;
  for (int i : {1, 2})
    if (!a.has(i, "float32", {ANY, 1, ANY, a.size(0, 2)})) return WRONG_SHAPE;
  for (int i : {4, 5})
    if (!a.has(i, "int32", {a.size(3, 0)})) return WRONG_SHAPE;
  if (!a.has(6, "float32", {a.size(0, 0), a.size(0, 1) * a.size(0, 2)})) return WRONG_SHAPE;
  const float *q = a.at<float>(0), *k_cache = a.at<float>(1), *v_cache = a.at<float>(2);
  const int32_t *tables = a.at<int32_t>(3), *contexts = a.at<int32_t>(4), *counts = a.at<int32_t>(5);
  const int64_t tokens = a.size(0, 0), heads = a.size(0, 1), dim = a.size(0, 2), wide = padded(dim);
  const int64_t slots = a.size(1, 0), kv_heads = a.size(1, 2), batch = a.size(3, 0), positions = a.size(3, 1);
  if (dim < 1 || heads < 1 || kv_heads < 1 || heads % kv_heads) return WRONG_SHAPE;
  if (a.size(2, 0) != slots || a.size(2, 2) != kv_heads) return WRONG_SHAPE;
  const int64_t group = heads / kv_heads;
  const int64_t at_once = std::max(int64_t(1), QUERIES / group);  // tokens whose heads share one pass over the cache

  struct Task {
    int64_t first, count, before;  // tokens of the step, all of one sequence, and what is cached before them
    const int32_t* table;
  };
  std::vector<Task> tasks;
  int64_t token = 0;
  for (int64_t b = 0; b < batch; token += counts[b++]) {
    const int32_t* table = tables + b * positions;
    if (counts[b] < 0 || contexts[b] < counts[b] || contexts[b] > positions) return OUT_OF_RANGE;
    for (int64_t s = 0; s < contexts[b]; s++)
      if (table[s] < 0 || table[s] >= slots) return OUT_OF_RANGE;
    for (int64_t i = 0; i < counts[b]; i += at_once)
      tasks.push_back({token + i, std::min(at_once, counts[b] - i), contexts[b] - counts[b] + i, table});
  }
  if (token != tokens) return OUT_OF_RANGE;

  // A token's heads lie side by side in the cache: a thread takes as many of them as leave work for all threads.
  const int64_t enough = 2 * Pool::one().size();
  int64_t together = kv_heads;
  while (together > 1 && int64_t(tasks.size()) * (kv_heads / together) < enough) together = (together + 1) / 2;
  const int64_t parts = (kv_heads + together - 1) / together;

  Pool::one().run(tasks.size() * parts, [&](int64_t index) {
    const Task& task = tasks[index / parts];
    const int64_t first_head = index % parts * together, heads_here = std::min(together, kv_heads - first_head);
    const int64_t most = task.count * group;
    static thread_local Floats memory;
    float* next = memory.reserve((2 * COLUMNS + 2 * together * most) * wide + most * (COLUMNS + 2 * together));
    auto take = [&next](int64_t n) { return (next += n) - n; };
    float *columns = take(wide * COLUMNS), *rows = take(COLUMNS * wide), *scores = take(most * COLUMNS);
    if (wide > dim) std::fill(columns, columns + 2 * COLUMNS * wide, 0.0f);
    std::vector<Queries> of_head(heads_here);
    for (int64_t k = 0; k < heads_here; k++) {
      Queries& some = of_head[k];
      some = {most, wide, {}, {}, {}, take(most * wide), scores, nullptr, nullptr};
      for (int64_t r = 0; r < most; r++) {
        const int64_t row = (task.first + r / group) * heads + (first_head + k) * group + r % group;
        float* one = take(wide);
        std::copy(q + row * dim, q + (row + 1) * dim, one);
        std::fill(one + dim, one + wide, 0.0f);
        some.q.push_back(one);
        some.at.push_back(scores + r * COLUMNS);
        some.sees.push_back(task.before + r / group + 1);
      }
      std::fill(some.out, some.out + most * wide, 0.0f);
    }
    for (Queries& some : of_head) {
      some.best = take(most), some.sums = take(most);
      std::fill(some.best, some.best + most, -1e30f);
      std::fill(some.sums, some.sums + most, 0.0f);
    }
    const int64_t end = task.before + task.count;
    for (int64_t first = 0; first < end; first += COLUMNS)
      for (int64_t k = 0; k < heads_here; k++) {
        const float *keys[COLUMNS], *values[COLUMNS];
        for (int64_t s = 0; s < COLUMNS; s++) {  // past the end: the last row again, which no query sees
          const int64_t slot = task.table[std::min(first + s, end - 1)];
          keys[s] = k_cache + (slot * kv_heads + first_head + k) * dim;
          values[s] = v_cache + (slot * kv_heads + first_head + k) * dim;
        }
        if (most <= FEW_QUERIES && dim == wide)
          attend_in_place(of_head[k], keys, values, first);
        else
          attend_copied(of_head[k], keys, values, dim, first, columns, rows);
      }
    for (int64_t k = 0; k < heads_here; k++)
      for (int64_t r = 0; r < most; r++) {
        const int64_t row = (task.first + r / group) * heads + (first_head + k) * group + r % group;
        for (int64_t d = 0; d < dim; d++)
          a.at<float>(6)[row * dim + d] = of_head[k].out[r * wide + d] / of_head[k].sums[r];
      }
  });
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
