// SPDX-License-Identifier: Apache-2.0
// The best sentences, one after the other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "buffer.hpp"
#include "simd.hpp"

namespace sentencekv::cpu {

// Sentences in descending score, of equal scores the earlier one first. A budget holds few
// sentences, so the scores stay where they are and only each team of 16 knows its best.
class Ranking {
 public:
  Ranking(float* scores, int64_t count, Buffer<float>& winners)
      : scores_(scores), teams_((count + kLanes - 1) / kLanes) {
    winners_ = winners.reserve(teams_ + kLanes);
    std::fill(scores + count, scores + teams_ * kLanes, kLowest);
    for (int64_t team = 0; team < teams_; ++team) update(team);
  }

  // The next sentence, whose score is forgotten, or -1 if none is above -inf.
  int64_t pop() {
    const float best = max_of(winners_, teams_);
    if (best == kLowest) return -1;
    const int64_t team = std::find(winners_, winners_ + teams_, best) - winners_;
    float* score = std::find(scores_ + team * kLanes, scores_ + (team + 1) * kLanes, best);
    *score = kLowest;
    update(team);
    return score - scores_;
  }

 private:
  static constexpr float kLowest = -std::numeric_limits<float>::infinity();

  void update(int64_t team) { winners_[team] = max_of(scores_ + team * kLanes, kLanes); }

  float* scores_;
  float* winners_;
  int64_t teams_;
};

}  // namespace sentencekv::cpu
