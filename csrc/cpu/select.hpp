// SPDX-License-Identifier: Apache-2.0
// ops/select_blocks.py for one request and KV head.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "args.hpp"
#include "ranking.hpp"
#include "score.hpp"

namespace sentencekv::cpu {

// Fills `blocks` with `budget` history blocks, ascending, and `coverage`.
inline Status select(const Pools& pools, const Request& request, int64_t head,
                     const Touched& touched, Scratch& scratch, int32_t* blocks, float& coverage) {
  const int64_t n = pools.block_size, lo = request.history_lo, hi = request.history_hi;
  const float* mass = scratch.mass.data();
  const int64_t words = (hi - lo + 63) / 64;
  uint64_t* taken = scratch.taken.reserve(words);
  std::fill(taken, taken + words, 0);
  const int64_t* rows = scratch.rows.data();
  if (pools.kept)
    for (int64_t i = 0; i < request.num_sentences; ++i)
      pools.kept[rows[i] * pools.heads + head] = 0;
  coverage = 0;
  Ranking ranking(scratch.scores.data(), touched.count(), scratch.winners);
  for (int64_t count = 0; count < request.budget;) {
    const int64_t i = ranking.pop();
    if (i < 0) return Status::kUntouchedBlock;
    const int64_t sentence = touched.first + i;
    const int64_t first = std::max(request.sentence_start(sentence) / n, lo);
    const int64_t last = std::min<int64_t>((request.sentence_ends[sentence] - 1) / n, hi - 1);
    for (int64_t block = first - lo; block <= last - lo && count < request.budget; ++block) {
      const uint64_t bit = uint64_t{1} << (block % 64);
      count += !(taken[block / 64] & bit);
      taken[block / 64] |= bit;
    }
    if (pools.kept) pools.kept[rows[sentence] * pools.heads + head] = 1;
    coverage += mass[i];
  }
  for (int64_t w = 0; w < words; ++w)
    for (uint64_t bits = taken[w]; bits; bits &= bits - 1)
      *blocks++ = static_cast<int32_t>(lo + w * 64 + std::countr_zero(bits));
  return Status::kOk;
}

inline void select_everything(const Request& request, int32_t* blocks, float& coverage) {
  for (int64_t block = request.history_lo; block < request.history_hi; ++block)
    *blocks++ = static_cast<int32_t>(block);
  coverage = 1;
}

}  // namespace sentencekv::cpu
