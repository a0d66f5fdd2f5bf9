#include "attention.h"

#include <cmath>
#include <vector>

#include "dots.h"
#include "pool.h"

namespace {

constexpr int64_t QUERIES = 96;      // rows of queries that share one pass over keys and values
constexpr int64_t FEW_QUERIES = 16;  // up to here keys and values are read where they lie
constexpr int64_t STRIP = 8;         // positions that are read at once there, while the next ones are fetched

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
void attend_copied(Queries& a, const float* const* rows, int64_t dim, int64_t first, float* columns, float* values) {
  columns_of(rows, dim, columns);
  for (int64_t s = 0; s < COLUMNS; s++) memcpy(values + s * a.dim, rows[COLUMNS + s], dim * sizeof(float));
  tiles_of(a.rows, a.q.data(), 1, Even{columns, COLUMNS}, a.dim, a.scores, COLUMNS, false);
  take_shares(a, first);
  for (int64_t d = 0; d < a.dim; d += COLUMNS)
    tiles_of(a.rows, a.at.data(), 1, Even{values + d, a.dim}, COLUMNS, a.out + d, a.dim, true);
}

void fetch(const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += LINE / sizeof(float)) __builtin_prefetch(from + i, 0, 2);
}

// The same for few queries, from where keys and values lie: all heads of some positions, which lie side by side, before
// the next.  `rows`: of the first head, those of 64 keys, of their values, and of what comes next.
void attend_in_place(std::vector<Queries>& heads, const float* const* rows, int64_t first) {
  const int64_t dim = heads[0].dim;
  auto each = [&](const float* const* some, auto&& work) {
    for (int64_t s = 0; s < COLUMNS; s += STRIP)
      for (int64_t k = 0; k < int64_t(heads.size()); k++) {
        for (int64_t i = s + STRIP; i < s + 2 * STRIP; i++) fetch(some[i] + k * dim, dim);
        work(heads[k], s, k * dim);
      }
  };
  each(rows, [&](Queries& a, int64_t s, int64_t offset) {
    const float* keys[STRIP];
    for (int64_t i = 0; i < STRIP; i++) keys[i] = rows[s + i] + offset;
    dots_of<STRIP>(a.rows, a.q[0], dim, keys, 0, a.scores + s, dim, COLUMNS);
  });
  for (Queries& a : heads) take_shares(a, first);
  each(rows + COLUMNS, [&](Queries& a, int64_t s, int64_t offset) {
    const float* shares[FEW_QUERIES];
    for (int64_t r = 0; r < a.rows; r++) shares[r] = a.at[r] + s;
    for (int64_t d = 0; d < dim; d += COLUMNS)
      tiles_of(a.rows, shares, 1, Scattered{rows + COLUMNS + s, offset + d}, STRIP, a.out + d, dim, true);
  });
}

// Tokens of the step, all of one sequence, and what is cached before them.
struct Task {
  int64_t first, count, before;
  const int32_t* table;
};

std::vector<Task> tasks_of(const Cached& cached, int64_t at_once) {
  std::vector<Task> tasks;
  int64_t token = 0;
  for (int64_t b = 0; b < cached.batch; token += cached.counts[b++])
    for (int64_t i = 0, count = cached.counts[b]; i < count; i += at_once)
      tasks.push_back({token + i, std::min(at_once, count - i), cached.contexts[b] - count + i,
                       cached.tables + b * cached.positions});
  return tasks;
}

}  // namespace

bool Cached::has(int64_t tokens) const {
  int64_t token = 0;
  for (int64_t b = 0; b < batch; token += counts[b++]) {
    if (counts[b] < 0 || contexts[b] < counts[b] || contexts[b] > positions) return false;
    for (int64_t s = 0; s < contexts[b]; s++)
      if (const int32_t slot = tables[b * positions + s]; slot < 0 || slot >= slots) return false;
  }
  return token == tokens;
}

void Cached::write(const float* keys, const float* values, const int32_t* to, int64_t tokens) const {
  // Heads are divided, not tokens: of two that name one slot the later one stays.
  parallel_for(kv_heads, SERIAL / dim / std::max(int64_t(1), tokens), [&](int64_t begin, int64_t end) {
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t head = begin; head < end; head++) {
        const int64_t from = (t * kv_heads + head) * dim, at = (int64_t(to[t]) * kv_heads + head) * dim;
        memcpy(k + at, keys + from, dim * sizeof(float));
        memcpy(v + at, values + from, dim * sizeof(float));
      }
  });
}

void attend(const float* q, int64_t heads, const Cached& cached, float* out) {
  const int64_t dim = cached.dim, wide = padded(dim), kv_heads = cached.kv_heads, group = heads / kv_heads;
  const float *k_cache = cached.k, *v_cache = cached.v;
  // tokens whose heads share one pass over the cache
  const std::vector<Task> tasks = tasks_of(cached, std::max(int64_t(1), QUERIES / group));

  // A token's heads lie side by side in the cache: a thread takes as many of them as leave work for all threads.
  const int64_t enough = 2 * Pool::one().size();
  int64_t together = kv_heads;
  while (together > 1 && int64_t(tasks.size()) * (kv_heads / together) < enough) together = (together + 1) / 2;
  const int64_t parts = (kv_heads + together - 1) / together;

  Pool::one().run(tasks.size() * parts, [&](int64_t index) {
    const Task& task = tasks[index / parts];
    const int64_t first_head = index % parts * together, heads_here = std::min(together, kv_heads - first_head);
    const int64_t most = task.count * group;
    const bool in_place = most <= FEW_QUERIES && dim == wide;
    static thread_local Floats memory;
    float* next = memory.reserve((2 * COLUMNS + 2 * together * most) * wide + together * most * (COLUMNS + 2));
    auto take = [&next](int64_t n) { return (next += n) - n; };
    float *columns = take(wide * COLUMNS), *copied = take(COLUMNS * wide);
    if (wide > dim) std::fill(columns, columns + 2 * COLUMNS * wide, 0.0f);
    std::vector<Queries> of_head(heads_here);
    for (int64_t k = 0; k < heads_here; k++) {
      Queries& some = of_head[k];
      some = {most, wide, {}, {}, {}, take(most * wide), take(most * COLUMNS), nullptr, nullptr};
      for (int64_t r = 0; r < most; r++) {
        const int64_t row = (task.first + r / group) * heads + (first_head + k) * group + r % group;
        float* one = take(wide);
        std::copy(q + row * dim, q + (row + 1) * dim, one);
        std::fill(one + dim, one + wide, 0.0f);
        some.q.push_back(one);
        some.at.push_back(some.scores + r * COLUMNS);
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
    for (int64_t first = 0; first < end; first += COLUMNS) {
      const float* rows[2 * COLUMNS + STRIP];
      for (int64_t i = 0; i < 2 * COLUMNS + STRIP; i++) {
        const int64_t s = first + i % COLUMNS + i / (2 * COLUMNS) * COLUMNS;
        const int64_t slot = task.table[std::min(s, end - 1)];  // past the end: the last row again, which no query sees
        rows[i] = (i / COLUMNS == 1 ? v_cache : k_cache) + (slot * kv_heads + first_head) * dim;
      }
      if (in_place) {
        attend_in_place(of_head, rows, first);
        continue;
      }
      for (int64_t k = 0; k < heads_here; k++) {
        attend_copied(of_head[k], rows, dim, first, columns, copied);
        for (const float*& row : rows) row += dim;
      }
    }
    for (int64_t k = 0; k < heads_here; k++)
      for (int64_t r = 0; r < most; r++) {
        const int64_t row = (task.first + r / group) * heads + (first_head + k) * group + r % group;
        for (int64_t d = 0; d < dim; d++)
          out[row * dim + d] = of_head[k].out[r * wide + d] / of_head[k].sums[r];
      }
  });
}
