// SPDX-License-Identifier: Apache-2.0
// Queries of one KV head: as floats, and rotated on the 6-bit grid of ops/quantize_query.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "buffer.hpp"
#include "element.hpp"
#include "rotate.hpp"

namespace sentencekv::cpu {

constexpr float kQueryLevels = 31;

struct QuantizedQuery {
  Buffer<float> columns, rotated;  // [D, width], [E, width]
  Buffer<int8_t> levels;           // [G, E]
  Buffer<float> steps;             // [G]

  template <class Element>
  void fill(const Rotation& rotation, int64_t dim, int64_t index_dim, int64_t group,
            const Element* query) {
    const int64_t width = (group + kLanes - 1) / kLanes * kLanes;
    float* x = columns.reserve(dim * width);
    for (int64_t d = 0; d < dim; ++d)
      for (int64_t g = 0; g < width; ++g)
        x[d * width + g] = g < group ? static_cast<float>(query[g * dim + d]) : 0.0f;
    const float* y = rotate(rotation, dim, index_dim, width, x, rotated.reserve(index_dim * width));
    int8_t* level = levels.reserve(group * index_dim);
    float* step = steps.reserve(group);
    for (int64_t g = 0; g < group; ++g) {
      float largest = 0;
      for (int64_t d = 0; d < index_dim; ++d)
        largest = std::max(largest, std::fabs(y[d * width + g]));
      step[g] = largest / kQueryLevels;
      const float inverse = step[g] > 0 ? 1 / step[g] : 0.0f;
      for (int64_t d = 0; d < index_dim; ++d)
        level[g * index_dim + d] = static_cast<int8_t>(std::nearbyint(y[d * width + g] * inverse));
    }
  }
};

}  // namespace sentencekv::cpu
