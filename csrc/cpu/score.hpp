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
#include "token_bits.hpp"
#include "touched.hpp"

namespace sentencekv::cpu {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// `scores` and `mass` of the scratch hold the touched sentences, `rows` all of the request.
struct Scored {
  Touched touched;
  float resident_mass;  // NaN: masses are unknown
};

inline float random_score(uint32_t seed, uint32_t step, uint32_t head, uint32_t sentence) {
  uint32_t x = seed * 0x9E3779B1u + step * 0x85EBCA77u + head * 0xC2B2AE3Du +
               sentence * 0x27D4EB2Fu;
  x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
  x = (x ^ (x >> 13)) * 0xC2B2AE35u;
  return static_cast<float>((x ^ (x >> 16)) / 4294967296.0);
}

// Log of the group's mean probability in `scores`, the probability itself in `mass`; returns the
// resident tokens' mass. best [G, count] and resident [G, num_resident] become logits with factor.
inline float softmax_mean(int64_t group, int64_t count, int64_t num_resident, const float* factor,
                          float* best, float* resident, float* scores, float* mass) {
  float resident_mass = 0;
  std::fill(scores, scores + count, -std::numeric_limits<float>::infinity());
  for (int64_t g = 0; g < group; ++g) {
    float* logits = best + g * count;
    float* others = resident + g * num_resident;
    float top = -std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < count; ++i) {
      logits[i] *= factor[g];
      top = std::max(top, logits[i]);
    }
    for (int64_t i = 0; i < num_resident; ++i) {
      others[i] *= factor[g];
      top = std::max(top, others[i]);
    }
    float sentences = 0, rest = 0;
#pragma omp simd reduction(+ : sentences)
    for (int64_t i = 0; i < count; ++i) sentences += fast_exp(logits[i] - top);
#pragma omp simd reduction(+ : rest)
    for (int64_t i = 0; i < num_resident; ++i) rest += fast_exp(others[i] - top);
    const float z = top + std::log(sentences + rest);
    resident_mass += rest / (sentences + rest);
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
  return resident_mass * share;
}

inline void reduce_heads(Reduce reduce, int64_t group, int64_t count, const float* factor,
                         const float* best, float* scores) {
  for (int64_t i = 0; i < count; ++i) scores[i] = factor[0] * best[i];
  for (int64_t g = 1; g < group; ++g)
    for (int64_t i = 0; i < count; ++i) {
      const float logit = factor[g] * best[g * count + i];
      scores[i] = reduce == Reduce::kMax ? std::max(scores[i], logit) : scores[i] + logit;
    }
  if (reduce == Reduce::kMean)
    for (int64_t i = 0; i < count; ++i) scores[i] /= static_cast<float>(group);
}

// query: [G, D] of this KV head.
inline Scored score(Isa isa, const Attention& attention, const Pools& pools,
                    const Request& request, int64_t head, const void* query, Scratch& scratch) {
  const int64_t group = attention.group_size, dim = pools.head_dim, n = pools.block_size;
  Scored scored{Touched(request, n), kNan};
  const int64_t count = scored.touched.count(), first = scored.touched.first;
  int64_t* rows = scratch.rows.reserve(request.num_sentences);
  request.fill_rows(rows);
  float* scores = scratch.scores.reserve(count + kLanes);
  float* mass = scratch.mass.reserve(count);
  if (request.kind == IndexKind::kRandom) {
    for (int64_t i = 0; i < count; ++i) {
      scores[i] = random_score(request.seed, static_cast<uint32_t>(request.step),
                               static_cast<uint32_t>(head), static_cast<uint32_t>(first + i));
      mass[i] = kNan;
    }
    return scored;
  }
  float factor[kMaxGroup];
  int64_t num_resident = 0;
  if (request.kind == IndexKind::kTokenBits) {
    const bool softmax = request.reduce == Reduce::kSoftmaxMean;
    with_elements(attention.query_dtype, query, [&](const auto* elements) {
      scratch.query.fill(attention.rotation, dim, pools.index_dim, group, elements);
    });
    scratch.channels.choose(scratch.query.levels.data(), group, pools.index_dim,
                            request.byte_rows);
    estimate_tokens(isa, pools, request, head, group, scored.touched, softmax, scratch);
    for (int64_t g = 0; g < group; ++g)
      factor[g] = attention.scale * scratch.query.steps.data()[g];
    if (softmax) num_resident = (request.num_pages - request.history_hi + request.history_lo) * n;
  } else {
    with_elements(attention.query_dtype, query, [&](const auto* elements) {
      score_summaries(pools, request.kind, head, group, scored.touched, rows, elements, scratch);
    });
    std::fill(factor, factor + group, attention.scale);
  }
  float* best = scratch.best.data();
  if (request.reduce == Reduce::kSoftmaxMean) {
    scored.resident_mass = softmax_mean(group, count, num_resident, factor, best,
                                        scratch.resident.data(), scores, mass);
  } else {
    reduce_heads(request.reduce, group, count, factor, best, scores);
    std::fill(mass, mass + count, kNan);
  }
  if (request.retention != 0)
    for (int64_t i = 0; i < count; ++i)
      scores[i] += request.retention * pools.kept[rows[first + i] * pools.heads + head];
  return scored;
}

}  // namespace sentencekv::cpu
