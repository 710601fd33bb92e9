// SPDX-License-Identifier: Apache-2.0
// Inner products of a group's queries with the sentence centroids of one KV head.
#pragma once

#include <cstdint>

#include "args.hpp"
#include "element.hpp"
#include "simd.hpp"
#include "touched.hpp"

namespace sentencekv::cpu {

constexpr int64_t kPrefetchRows = 8;

template <int Heads>
inline void score_row(const uint16_t* row, const float* query, int64_t dim, float* best,
                      int64_t stride) {
  Floats sums[Heads] = {};
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    const Floats values = load_bfloat16s(row + d);
    for (int g = 0; g < Heads; ++g) sums[g] += values * load_floats(query + g * dim + d);
  }
  for (int g = 0; g < Heads; ++g) {
    float sum = lane_sum(sums[g]);
    for (int64_t k = d; k < dim; ++k) sum += Bfloat16{row[k]} * query[g * dim + k];
    best[g * stride] = sum;
  }
}

// best[g, i] = <query_g, centroid of sentence touched.first + i>.
inline void score_centroids(const Pools& pools, int64_t head, int64_t group,
                            const Touched& touched, const int64_t* rows,
                            const float* query, float* best) {
  const int64_t dim = pools.head_dim, count = touched.count();
  auto centroid = [&](int64_t i) {
    return pools.centroids + (rows[touched.first + i] * pools.heads + head) * dim;
  };
  for (int64_t i = 0; i < count; ++i) {
    if (i + kPrefetchRows < count) {
      const uint16_t* next = centroid(i + kPrefetchRows);
      for (int64_t d = 0; d < dim; d += 32) __builtin_prefetch(next + d);
    }
    const uint16_t* row = centroid(i);
    int64_t g = 0;
    for (; g + 4 <= group; g += 4)
      score_row<4>(row, query + g * dim, dim, best + g * count + i, count);
    for (; g < group; ++g) score_row<1>(row, query + g * dim, dim, best + g * count + i, count);
  }
}

}  // namespace sentencekv::cpu
