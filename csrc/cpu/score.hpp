// SPDX-License-Identifier: Apache-2.0
// ops/score_sentences.py for one request and KV head.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "args.hpp"
#include "maths.hpp"
#include "scratch.hpp"
#include "simd.hpp"
#include "summaries.hpp"
#include "touched.hpp"

namespace sentencekv::cpu {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

inline float random_score(uint32_t seed, uint32_t step, uint32_t head, uint32_t sentence) {
  uint32_t x = seed * 0x9E3779B1u + step * 0x85EBCA77u + head * 0xC2B2AE3Du +
               sentence * 0x27D4EB2Fu;
  x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
  x = (x ^ (x >> 13)) * 0xC2B2AE35u;
  return static_cast<float>((x ^ (x >> 16)) / 4294967296.0);
}

// Log of the group's mean probability in `scores`, the probability itself in `mass`. best
// [G, count] become logits.
inline void softmax_mean(int64_t group, int64_t count, float scale, float* best, float* scores,
                         float* mass) {
  std::fill(scores, scores + count, -std::numeric_limits<float>::infinity());
  for (int64_t g = 0; g < group; ++g) {
    float* logits = best + g * count;
    float top = -std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < count; ++i) {
      logits[i] *= scale;
      top = std::max(top, logits[i]);
    }
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += fast_exp(logits[i] - top);
    const float z = top + std::log(sum);
    for (int64_t i = 0; i < count; ++i) {
      logits[i] -= z;
      scores[i] = std::max(scores[i], logits[i]);
    }
  }
  std::fill(mass, mass + count, 0.0f);
  for (int64_t g = 0; g < group; ++g)
    for (int64_t i = 0; i < count; ++i) mass[i] += fast_exp(best[g * count + i] - scores[i]);
  const float share = 1.0f / static_cast<float>(group);
  for (int64_t i = 0; i < count; ++i) {
    const float mean = mass[i] * share;
    mass[i] = fast_exp(scores[i]) * mean;
    scores[i] += fast_log(mean);
  }
}

inline void reduce_heads(Reduce reduce, int64_t group, int64_t count, float scale,
                         const float* best, float* scores) {
  for (int64_t i = 0; i < count; ++i) scores[i] = scale * best[i];
  for (int64_t g = 1; g < group; ++g)
    for (int64_t i = 0; i < count; ++i) {
      const float logit = scale * best[g * count + i];
      scores[i] = reduce == Reduce::kMax ? std::max(scores[i], logit) : scores[i] + logit;
    }
  if (reduce == Reduce::kMean)
    for (int64_t i = 0; i < count; ++i) scores[i] /= static_cast<float>(group);
}

// query: [G, D] of this KV head. `scores` and `mass` of the scratch hold the touched sentences,
// `rows` all of the request.
inline Touched score(const Attention& attention, const Pools& pools, const Request& request,
                     int64_t head, const void* query, Scratch& scratch) {
  const int64_t group = attention.group_size;
  const Touched touched(request, pools.block_size);
  const int64_t count = touched.count(), first = touched.first;
  int64_t* rows = scratch.rows.reserve(request.num_sentences);
  request.fill_rows(rows);
  float* scores = scratch.scores.reserve(count + kLanes);
  float* mass = scratch.mass.reserve(count);
  std::fill(mass, mass + count, kNan);
  if (request.kind == IndexKind::kRandom) {
    for (int64_t i = 0; i < count; ++i)
      scores[i] = random_score(request.seed, static_cast<uint32_t>(request.step),
                               static_cast<uint32_t>(head), static_cast<uint32_t>(first + i));
    return touched;
  }
  with_elements(attention.query_dtype, query, [&](const auto* elements) {
    score_summaries(pools, request.kind, head, group, touched, rows, elements, scratch);
  });
  float* best = scratch.best.data();
  if (request.reduce == Reduce::kSoftmaxMean)
    softmax_mean(group, count, attention.scale, best, scores, mass);
  else
    reduce_heads(request.reduce, group, count, attention.scale, best, scores);
  if (request.retention != 0)
    for (int64_t i = 0; i < count; ++i)
      scores[i] += request.retention * pools.kept[rows[first + i] * pools.heads + head];
  return touched;
}

}  // namespace sentencekv::cpu
