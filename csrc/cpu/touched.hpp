// SPDX-License-Identifier: Apache-2.0
// The sentences of a request that touch its history.
#pragma once

#include <algorithm>
#include <cstdint>

#include "args.hpp"

namespace sentencekv::cpu {

// Sentences [first, last).
struct Touched {
  int64_t first, last;

  explicit Touched(const Request& request, int64_t block_size) {
    const int32_t* ends = request.sentence_ends;
    const int32_t* stop = ends + request.num_sentences;
    first = std::upper_bound(ends, stop, request.history_lo * block_size) - ends;
    // The last one is the first that ends at or beyond the history's end.
    const int64_t end =
        std::lower_bound(ends + first, stop, request.history_hi * block_size) - ends;
    last = std::min(end + 1, request.num_sentences);
    if (request.history_hi <= request.history_lo ||
        request.sentence_start(first) >= request.history_hi * block_size)
      last = first;
  }
  int64_t count() const { return last - first; }
};

}  // namespace sentencekv::cpu
