// Matrices of float32 or bfloat16 and products with them, which operations share.
#pragma once
#include "operation.h"
#include "vector.h"

// An argument that is a matrix [width, depth]; of no depth if it is something else.
struct Weights {
  static constexpr int COUNT = 1;
  int64_t width = 0, depth = 0;
  const void* data = nullptr;
  bool is_narrow = false;  // bfloat16

  Weights(const Arguments& a, int at) {
    if (!a.has(at, "", {ANY, ANY}) || a.size(at, 1) < 1) return;
    width = a.size(at, 0), depth = a.size(at, 1), data = a.at<void>(at), is_narrow = a.is(at, "bfloat16");
  }
  bool fits(int64_t wanted) const { return depth > 0 && depth == wanted; }
};

// y [rows, width] = x [rows, depth] times rows of w
HIDDEN void multiply(const float* x, const Weights& w, float* y, int64_t rows);
// y [rows, width / 2]: silu of the first half of that, times the second
HIDDEN void multiply_swiglu(const float* x, const Weights& w, float* y, int64_t rows);
