// silu of gates times ups.
#pragma once
#include <cmath>

#include "vector.h"

namespace {

INLINE void swiglu_of(const float* gate, const float* up, float* y, int64_t count) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    vf32 g = load(gate + i);
    store(y + i, g / (exponential(-g) + 1.0f) * load(up + i));
  }
  for (; i < count; i++) y[i] = gate[i] / (std::exp(-gate[i]) + 1.0f) * up[i];
}

// Of a row with gates and ups side by side.
INLINE void swiglu(const float* x, float* y, int64_t width) { swiglu_of(x, x + width, y, width); }

}  // namespace
