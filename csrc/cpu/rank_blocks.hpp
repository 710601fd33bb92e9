// SPDX-License-Identifier: Apache-2.0
// ops/rank_blocks.py for one request and KV head.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "args.hpp"
#include "fixed_point.hpp"
#include "scratch.hpp"

namespace sentencekv::cpu {

constexpr int kWeightShift = 10;
constexpr int kProbabilityBits = 30;

inline int probability_shift(int64_t group) {
  return kProbabilityBits - std::bit_width(static_cast<uint64_t>(group - 1));
}

// scratch.probabilities[block], summed over the group's heads.
inline void block_probabilities(int64_t group, int64_t count, Scratch& scratch) {
  int64_t* weights = scratch.weights.reserve(count);
  int32_t* probabilities = scratch.probabilities.reserve(count);
  std::fill(probabilities, probabilities + count, 0);
  const auto one = static_cast<float>(1 << probability_shift(group));
  for (int64_t g = 0; g < group; ++g) {
    const int32_t* tops = scratch.tops.data() + g * count;
    const int32_t* sums = scratch.sums.data() + g * count;
    const int32_t largest = *std::max_element(tops, tops + count);
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t below = largest - tops[i];
      const int64_t product = static_cast<int64_t>(sums[i]) * exp2_units(below & (kUnits - 1));
      weights[i] = product >> std::min(kWeightShift + (below >> 4), 63);
      total += weights[i];
    }
    const float reciprocal = one / static_cast<float>(total);
    for (int64_t i = 0; i < count; ++i)
      probabilities[i] += static_cast<int32_t>(static_cast<float>(weights[i]) * reciprocal);
  }
}

// Fills `blocks` with the `budget` best history blocks, ascending, and `coverage`.
inline void rank_blocks(const Pools& pools, const Request& request, int64_t head, int64_t group,
                        Scratch& scratch, int32_t* blocks, float& coverage) {
  const int64_t lo = request.history_lo, hi = request.history_hi, budget = request.budget;
  block_probabilities(group, request.num_pages, scratch);
  const int32_t* probabilities = scratch.probabilities.data();
  auto kept = [&](int64_t block) -> uint8_t& {
    return pools.page_kept[static_cast<int64_t>(request.pages[block]) * pools.heads + head];
  };
  // The score's bits above the block's complement: a key of its own for each block, of equal
  // scores the earlier block's is larger.
  uint64_t* keys = scratch.keys.reserve(hi - lo);
  int64_t taken = 0;
  for (int64_t block = 0; block < request.num_pages; ++block) {
    const int32_t probability = probabilities[block];
    if (block < lo || block >= hi) {
      taken += probability;
      continue;
    }
    float score = static_cast<float>(probability);
    if (kept(block)) score = score * request.retention;
    kept(block) = 0;
    keys[block - lo] = static_cast<uint64_t>(std::bit_cast<uint32_t>(score)) << 32 |
                       (0xffffffffu - static_cast<uint32_t>(block));
  }
  std::nth_element(keys, keys + budget, keys + (hi - lo), std::greater<>());
  for (int64_t k = 0; k < budget; ++k)
    blocks[k] = static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(keys[k]));
  std::sort(blocks, blocks + budget);
  for (int64_t k = 0; k < budget; ++k) {
    kept(blocks[k]) = 1;
    taken += probabilities[blocks[k]];
  }
  coverage = static_cast<float>(taken) /
             (static_cast<float>(group) * static_cast<float>(1 << probability_shift(group)));
}

}  // namespace sentencekv::cpu
