// What the operations of experts share: tokens gathered by expert before, summed up after.
#pragma once
#include <cmath>
#include <vector>

#include "operation.h"
#include "pool.h"
#include "vector.h"

namespace {

constexpr int64_t EXPERT_TOKENS = 1024;  // at once through the experts: bounds their memory

// The choices of some tokens.  Each choice of an expert of this rank is a row; an expert's rows follow each other.
struct Routing {
  struct Group {
    int64_t expert, row;          // its first row
    std::vector<int64_t> tokens;  // of its rows
  };
  std::vector<Group> groups;
  std::vector<int64_t> row_of;  // [tokens * k]: -1 for an expert of another rank
  int64_t rows = 0;

  // ids [.., k]: those of tokens [first, last); `count` experts from `start` on are this rank's.
  Routing(const int32_t* ids, int64_t top_k, int64_t first, int64_t last, int64_t start, int64_t count)
      : row_of((last - first) * top_k, -1) {
    std::vector<std::vector<int64_t>> chosen(count);  // places in `ids`
    for (int64_t i = first * top_k; i < last * top_k; i++)
      if (const int64_t e = int64_t(ids[i]) - start; e >= 0 && e < count) chosen[e].push_back(i);
    for (int64_t e = 0; e < count; e++)
      if (!chosen[e].empty()) {
        groups.push_back({e, rows, {}});
        for (int64_t i : chosen[e]) {
          row_of[i - first * top_k] = rows++;
          groups.back().tokens.push_back(i / top_k);
        }
      }
  }
};

// y[t] += the sum of weights[t][j] times the row of choice j, for tokens [first, last); rows are `stride` apart.
INLINE void sum_up(const Routing& routing, const float* weights, int64_t top_k, int64_t first, int64_t last,
                   const float* rows, int64_t stride, float* y, int64_t width) {
  parallel_for(last - first, SERIAL / width, [&](int64_t begin, int64_t end) {
    for (int64_t t = first + begin; t < first + end; t++)
      for (int64_t j = 0; j < top_k; j++)
        if (const int64_t row = routing.row_of[(t - first) * top_k + j]; row >= 0)
          for (int64_t i = 0; i < width; i++) y[t * width + i] += weights[t * top_k + j] * rows[row * stride + i];
  });
}

}  // namespace
