// SPDX-License-Identifier: Apache-2.0
// x @ rotation for many vectors at once: channels are rows, vectors are columns.
#pragma once

#include <cmath>
#include <cstdint>

#include "args.hpp"
#include "simd.hpp"

namespace sentencekv::cpu {

// Fills signs [D] (times 1 / sqrt(D)) and returns true if the matrix [D, E] is the first columns
// of a Sylvester-Hadamard matrix with signed rows: signs[d] * (-1)^popcount(d & c).
inline bool hadamard_signs(const float* matrix, int64_t dim, int64_t index_dim, float* signs) {
  if (dim & (dim - 1)) return false;
  for (int64_t d = 0; d < dim; ++d) {
    signs[d] = matrix[d * index_dim];
    for (int64_t c = 0; c < index_dim; ++c) {
      const bool negative = __builtin_popcountll(static_cast<uint64_t>(d & c)) & 1;
      if (matrix[d * index_dim + c] != (negative ? -signs[d] : signs[d])) return false;
    }
  }
  return true;
}

// In place, by butterflies: D log D additions instead of D^2.
inline void rotate_hadamard(const float* signs, int64_t dim, int64_t width, float* x) {
  for (int64_t d = 0; d < dim; ++d)
    for (int64_t v = 0; v < width; v += kLanes)
      store_floats(x + d * width + v, load_floats(x + d * width + v) * signs[d]);
  for (int64_t half = 1; half < dim; half *= 2)
    for (int64_t start = 0; start < dim; start += 2 * half)
      for (float *low = x + start * width, *high = low + half * width, *end = high; low < end;
           low += kLanes, high += kLanes) {
        const Floats a = load_floats(low), b = load_floats(high);
        store_floats(low, a + b);
        store_floats(high, a - b);
      }
}

inline void rotate_matrix(const float* matrix, int64_t dim, int64_t index_dim, int64_t width,
                          const float* x, float* y) {
  constexpr int64_t kRows = 8;
  for (int64_t c = 0; c < index_dim; c += kRows)
    for (int64_t v = 0; v < width; v += kLanes) {
      Floats sum[kRows] = {};
      for (int64_t d = 0; d < dim; ++d) {
        const Floats value = load_floats(x + d * width + v);
        const float* weights = matrix + d * index_dim + c;
        for (int64_t r = 0; r < kRows; ++r) sum[r] += value * weights[r];
      }
      for (int64_t r = 0; r < kRows; ++r) store_floats(y + (c + r) * width + v, sum[r]);
    }
}

// x [D, width], width a multiple of 16, is overwritten; returns the result [E, width], in x or
// in y [E, width].
inline const float* rotate(const Rotation& rotation, int64_t dim, int64_t index_dim, int64_t width,
                           float* x, float* y) {
  if (rotation.signs) {
    rotate_hadamard(rotation.signs, dim, width, x);
    return x;
  }
  rotate_matrix(rotation.matrix, dim, index_dim, width, x, y);
  return y;
}

}  // namespace sentencekv::cpu
