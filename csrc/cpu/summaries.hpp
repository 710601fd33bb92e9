// SPDX-License-Identifier: Apache-2.0
// Inner products of a group's queries with the summaries of sentences, for one KV head.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "args.hpp"
#include "element.hpp"
#include "scratch.hpp"
#include "simd.hpp"
#include "touched.hpp"

namespace sentencekv::cpu {

constexpr int64_t kPrefetchRows = 8;
constexpr float kLimit = 1e30f;  // of a product; what is no number is below all others

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

// out[g, i] = <query_g, vector of sentence touched.first + i>.
inline void score_vectors(const Pools& pools, const uint16_t* vectors, int64_t head,
                          int64_t group, const Touched& touched, const int64_t* rows,
                          const float* query, float* out) {
  const int64_t dim = pools.head_dim, count = touched.count();
  auto vector = [&](int64_t i) {
    return vectors + (rows[touched.first + i] * pools.heads + head) * dim;
  };
  for (int64_t i = 0; i < count; ++i) {
    if (i + kPrefetchRows < count) {
      const uint16_t* next = vector(i + kPrefetchRows);
      for (int64_t d = 0; d < dim; d += 32) __builtin_prefetch(next + d);
    }
    const uint16_t* row = vector(i);
    int64_t g = 0;
    for (; g + 4 <= group; g += 4)
      score_row<4>(row, query + g * dim, dim, out + g * count + i, count);
    for (; g < group; ++g) score_row<1>(row, query + g * dim, dim, out + g * count + i, count);
  }
}

// scratch.best[g, sentence]: the products of ops/score_sentences.py without the softmax scale.
template <class Element>
void score_summaries(const Pools& pools, IndexKind kind, int64_t head, int64_t group,
                     const Touched& touched, const int64_t* rows, const Element* query,
                     Scratch& scratch) {
  constexpr float kStdFactor = 2;
  const int64_t size = group * pools.head_dim, products = group * touched.count();
  const bool bounds = kind == IndexKind::kBounds;
  float* plain = scratch.plain_query.reserve(size);
  for (int64_t i = 0; i < size; ++i) plain[i] = query[i];
  float* best = scratch.best.reserve(products);
  auto within_limits = [&] {
    for (int64_t i = 0; i < products; ++i)
      best[i] = best[i] == best[i] ? std::clamp(best[i], -kLimit, kLimit) : -kLimit;
  };
  if (kind == IndexKind::kCentroid) {
    score_vectors(pools, pools.centroids, head, group, touched, rows, plain, best);
    return within_limits();
  }
  float* spread_query = scratch.spread_query.reserve(size);
  for (int64_t i = 0; i < size; ++i) {
    spread_query[i] = bounds ? std::max(plain[i], 0.0f) : plain[i] * plain[i];
    if (bounds) plain[i] = std::min(plain[i], 0.0f);
  }
  float* spread = scratch.spread.reserve(products);
  score_vectors(pools, pools.centroids, head, group, touched, rows, plain, best);
  score_vectors(pools, pools.spreads, head, group, touched, rows, spread_query, spread);
  for (int64_t i = 0; i < products; ++i)
    best[i] += bounds ? spread[i] : kStdFactor * std::sqrt(spread[i]);
  within_limits();
}

}  // namespace sentencekv::cpu
