// SPDX-License-Identifier: Apache-2.0
// ops/choose_channels.py for one KV head.
#pragma once

#include <algorithm>
#include <cstdint>

#include "buffer.hpp"

namespace sentencekv::cpu {

constexpr int64_t kMaxByteRows = 64;  // of 8 channels each

// The byte rows that are read, ascending, and the levels of their channels side by side.
struct ChosenChannels {
  int64_t rows[kMaxByteRows];
  int64_t count;
  const int8_t* levels;  // [G, 8 * count]
  Buffer<int8_t> packed;

  void choose(const int8_t* all, int64_t group, int64_t dim, int64_t wanted) {
    const int64_t total = dim / 8;
    count = std::min(wanted, total);
    levels = all;
    for (int64_t r = 0; r < total; ++r) rows[r] = r;
    if (count == total) return;
    int64_t energy[kMaxByteRows] = {};
    for (int64_t g = 0; g < group; ++g)
      for (int64_t d = 0; d < dim; ++d) energy[d / 8] += all[g * dim + d] * all[g * dim + d];
    std::stable_sort(rows, rows + total,
                     [&](int64_t a, int64_t b) { return energy[a] > energy[b]; });
    std::sort(rows, rows + count);
    int8_t* target = packed.reserve(group * count * 8);
    levels = target;
    for (int64_t g = 0; g < group; ++g)
      for (int64_t r = 0; r < count; ++r, target += 8)
        std::copy_n(all + g * dim + 8 * rows[r], 8, target);
  }
};

}  // namespace sentencekv::cpu
