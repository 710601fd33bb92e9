// SPDX-License-Identifier: Apache-2.0
// x @ matrix for many vectors at once: channels are rows, vectors are columns.
#pragma once

#include <cstdint>

#include "simd.hpp"

namespace sentencekv::cpu {

// y[c, v] = sum over d of matrix[d, c] * x[d, v]; matrix [dim, dim], x and y [dim, width], width a
// multiple of 16, dim one of 8.
inline void apply_map(const float* matrix, int64_t dim, int64_t width, const float* x, float* y) {
#ifdef __AVX512F__
  constexpr int64_t kRows = 8;  // sums that the registers hold
#else
  constexpr int64_t kRows = 4;
#endif
  for (int64_t c = 0; c < dim; c += kRows)
    for (int64_t v = 0; v < width; v += kLanes) {
      Floats sum[kRows] = {};
      for (int64_t d = 0; d < dim; ++d) {
        const Floats value = load_floats(x + d * width + v);
        const float* weights = matrix + d * dim + c;
        for (int64_t r = 0; r < kRows; ++r) sum[r] += value * weights[r];
      }
      for (int64_t r = 0; r < kRows; ++r) store_floats(y + (c + r) * width + v, sum[r]);
    }
}

}  // namespace sentencekv::cpu
