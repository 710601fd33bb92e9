// SPDX-License-Identifier: Apache-2.0
// ops/select_blocks.py for one request and KV head.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <functional>
#include <limits>

#include "args.hpp"
#include "score.hpp"

namespace sentencekv::cpu {

// Orders as the score does; of equal scores the earlier sentence is the larger key.
inline uint64_t ranking_key(float score, int64_t i) {
  const uint32_t bits = std::bit_cast<uint32_t>(score + 0.0f);  // -0 and 0 are one score
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << 32 | (0xffffffffu - static_cast<uint32_t>(i));
}

inline void clear_kept(const Pools& pools, const Request& request, int64_t head) {
  for (int64_t i = 0; i < request.num_sentences; ++i)
    pools.kept[request.row(i) * pools.heads + head] = 0;
}

// Fills scratch.blocks with `budget` history blocks, ascending, and `coverage`.
inline Status select(const Pools& pools, const Request& request, int64_t head,
                     const Scored& scored, Scratch& scratch, float& coverage) {
  const int64_t n = pools.block_size, lo = request.history_lo, hi = request.history_hi;
  const float* scores = scratch.scores.data();
  const float* mass = scratch.mass.data();
  uint64_t* keys = scratch.ranking.reserve(scored.touched.count());
  int64_t candidates = 0;
  for (int64_t i = 0; i < scored.touched.count(); ++i)
    if (scores[i] > -std::numeric_limits<float>::infinity())
      keys[candidates++] = ranking_key(scores[i], i);

  const int64_t words = (hi - lo + 63) / 64;
  uint64_t* taken = scratch.taken.reserve(words);
  std::fill(taken, taken + words, 0);
  clear_kept(pools, request, head);
  coverage = scored.resident_mass;
  int64_t count = 0, sorted = 0;
  for (int64_t next = 0; count < request.budget; ++next) {
    if (next == candidates) return Status::kUntouchedBlock;
    if (next == sorted) {  // a sentence brings about a block: most often one round is enough
      sorted = std::min(candidates, 2 * sorted + request.budget);
      if (sorted < candidates)
        std::nth_element(keys + next, keys + sorted, keys + candidates, std::greater<>());
      std::sort(keys + next, keys + sorted, std::greater<>());
    }
    const int64_t i = 0xffffffffu - static_cast<uint32_t>(keys[next]);
    const int64_t sentence = scored.touched.first + i;
    const int64_t first = std::max(request.sentence_start(sentence) / n, lo);
    const int64_t last = std::min<int64_t>((request.sentence_ends[sentence] - 1) / n, hi - 1);
    for (int64_t block = first - lo; block <= last - lo && count < request.budget; ++block) {
      const uint64_t bit = uint64_t{1} << (block % 64);
      count += !(taken[block / 64] & bit);
      taken[block / 64] |= bit;
    }
    pools.kept[request.row(sentence) * pools.heads + head] = 1;
    coverage += mass[i];
  }
  int32_t* blocks = scratch.blocks.reserve(request.budget);
  for (int64_t w = 0; w < words; ++w)
    for (uint64_t bits = taken[w]; bits; bits &= bits - 1)
      *blocks++ = static_cast<int32_t>(lo + w * 64 + std::countr_zero(bits));
  return Status::kOk;
}

inline void select_everything(const Request& request, Scratch& scratch, float& coverage) {
  int32_t* blocks = scratch.blocks.reserve(request.budget);
  for (int64_t block = request.history_lo; block < request.history_hi; ++block)
    *blocks++ = static_cast<int32_t>(block);
  coverage = 1;
}

}  // namespace sentencekv::cpu
