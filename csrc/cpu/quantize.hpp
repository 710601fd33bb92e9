// SPDX-License-Identifier: Apache-2.0
// Queries of one KV head, mapped and on the integer grids of ops/quantize_query.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "apply_map.hpp"
#include "args.hpp"
#include "buffer.hpp"
#include "element.hpp"

namespace sentencekv::cpu {

constexpr float kScaleLimit = 1099511627776.0f;  // 2^40, see ops/pack_keys.py
constexpr float kMeanLevels = 127;

struct QuantizedQuery {
  Buffer<float> columns, mapped;       // [D, width]
  Buffer<int8_t> levels, mean_levels;  // [G, W], [G, D]
  Buffer<float> steps, mean_steps;     // [G]

  template <class Element>
  void fill(const Pools& pools, int64_t head, int64_t group, const Element* query) {
    const int64_t dim = pools.head_dim, planes = pools.code_width, bits = pools.code_bits;
    const int64_t width = (group + kLanes - 1) / kLanes * kLanes, channels = planes / bits;
    float* x = columns.reserve(dim * width);
    for (int64_t d = 0; d < dim; ++d)
      for (int64_t g = 0; g < width; ++g)
        x[d * width + g] = g < group ? static_cast<float>(query[g * dim + d]) : 0.0f;
    float* y = mapped.reserve(dim * width);
    apply_map(pools.query_map + head * dim * dim, dim, width, x, y);
    levels.reserve(group * planes);
    mean_levels.reserve(group * dim);
    steps.reserve(group);
    mean_steps.reserve(group);
    for (int64_t g = 0; g < group; ++g) {
      int8_t* level = levels.data() + g * planes;
      steps.data()[g] = round(y + g, channels, width, bits == 2 ? 15.0f : 31.0f, level);
      if (bits == 2)
        for (int64_t c = 0; c < channels; ++c) {
          level[channels + c] = level[c];
          level[c] = static_cast<int8_t>(2 * level[c]);
        }
      mean_steps.data()[g] =
          round(y + g, dim, width, kMeanLevels, mean_levels.data() + g * dim);
    }
  }

 private:
  // Every `stride`-th of x, on a grid of 2 * limit + 1 levels; returns its step.
  static float round(const float* x, int64_t count, int64_t stride, float limit, int8_t* out) {
    float largest = 0;
    bool numbers = true;
    for (int64_t c = 0; c < count; ++c) {
      const float magnitude = std::fabs(x[c * stride]);
      numbers &= magnitude == magnitude;
      largest = std::max(largest, magnitude);
    }
    const float step = largest / limit;
    if (!numbers || !(step < kScaleLimit) || !(step > 0)) {
      std::fill(out, out + count, static_cast<int8_t>(0));
      return 0;
    }
    const float inverse = 1 / step;
    for (int64_t c = 0; c < count; ++c)
      out[c] = static_cast<int8_t>(
          std::clamp(std::nearbyint(x[c * stride] * inverse), -limit, limit));
    return step;
  }
};

}  // namespace sentencekv::cpu
