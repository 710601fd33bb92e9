// SPDX-License-Identifier: Apache-2.0
// Sentence and resident-token estimates from the token bits of one KV head.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "args.hpp"
#include "scratch.hpp"
#include "simd.hpp"
#include "touched.hpp"

namespace sentencekv::cpu {

constexpr int64_t kChunkTokens = 1024;  // estimates of a chunk stay in the first-level cache

// scratch.best[g, sentence] and, if asked for, scratch.resident[g, token]: the estimates that a
// query head's `scale * step` turns into logits.
template <class Simd>
void estimate_tokens(const Pools& pools, const Request& request, int64_t head, int64_t group,
                     const Touched& touched, bool with_resident, Scratch& scratch) {
  const int64_t n = pools.block_size, rows = pools.index_dim / 8;
  const ChosenChannels& channels = scratch.channels;
  auto layout = PageLayout::of<Simd>(8 * channels.count, n);
  int64_t offsets[kMaxByteRows];
  for (int64_t r = 0; r < channels.count; ++r) offsets[r] = channels.rows[r] * n;
  if (channels.count < rows) layout.offsets = offsets;
  const int64_t begin = with_resident ? 0 : request.history_lo;
  const int64_t end = with_resident ? request.num_pages : request.history_hi;
  const int64_t lo = request.history_lo * n, hi = request.history_hi * n;
  const int64_t resident_stride = (request.num_pages - request.history_hi) * n + lo;
  const int64_t stripes_per_block = n / layout.stripe_tokens;
  const int64_t chunk_blocks = std::max<int64_t>(1, kChunkTokens / n), chunk = chunk_blocks * n;

  const uint8_t** stripes = scratch.stripes.reserve(chunk_blocks * stripes_per_block);
  int16_t* dots = scratch.dots.reserve(group * chunk);
  float* estimates = scratch.estimates.reserve((group + 1) * chunk + kLanes);
  float* scales = estimates + group * chunk;
  float* best = scratch.best.reserve(group * touched.count());
  float* resident = scratch.resident.reserve(group * resident_stride);
  std::fill(best, best + group * touched.count(), -std::numeric_limits<float>::infinity());
  const uint8_t* tables[kMaxGroup / kScanHeads];
  for (int64_t g = 0; g < group; g += kScanHeads)
    tables[g / kScanHeads] = scratch.tables[g / kScanHeads].fill<Simd>(
        layout, static_cast<int>(std::min<int64_t>(kScanHeads, group - g)),
        channels.levels + g * 8 * channels.count);

  auto head_page = [&](int64_t block) {
    return static_cast<int64_t>(request.pages[block]) * pools.heads + head;
  };
  int64_t sentence = touched.first, num_resident = 0;
  for (int64_t block = begin; block < end; block += chunk_blocks) {
    const int64_t blocks = std::min(chunk_blocks, end - block), tokens = blocks * n;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t page = head_page(block + b);
      for (int64_t s = 0; s < stripes_per_block; ++s)
        stripes[b * stripes_per_block + s] =
            pools.bits + page * rows * n + s * layout.stripe_tokens;
      for (int64_t t = 0; t < n; t += kLanes)
        store_floats(scales + b * n + t, load_bfloat16s(pools.scales + page * n + t));
      if (block + b + chunk_blocks < end) {
        const int64_t next = head_page(block + b + chunk_blocks);
        const int64_t runs = layout.offsets ? channels.count : 1;  // of rows that lie together
        for (int64_t r = 0; r < runs; ++r)
          for (int64_t byte = 0; byte < (layout.offsets ? n : rows * n); byte += 64)
            __builtin_prefetch(pools.bits + next * rows * n + offsets[r] + byte);
        for (int64_t t = 0; t < n; t += 32) __builtin_prefetch(pools.scales + next * n + t);
      }
    }
    for (int64_t g = 0; g < group; g += kScanHeads)
      scan<Simd>(layout, stripes, blocks * stripes_per_block,
                 static_cast<int>(std::min<int64_t>(kScanHeads, group - g)), tables[g / kScanHeads],
                 scratch.tables[g / kScanHeads].bias, dots + g * chunk, chunk);
    for (int64_t g = 0; g < group; ++g)
      for (int64_t t = 0; t < tokens; ++t)
        estimates[g * chunk + t] = static_cast<float>(dots[g * chunk + t]) * scales[t];

    const int64_t from = block * n, to = from + tokens;
    auto keep_resident = [&](int64_t first, int64_t last) {
      if (!with_resident || first >= last) return;
      for (int64_t g = 0; g < group; ++g)
        std::copy(estimates + g * chunk + first - from, estimates + g * chunk + last - from,
                  resident + g * resident_stride + num_resident);
      num_resident += last - first;
    };
    keep_resident(from, std::min(to, lo));
    keep_resident(std::max(from, hi), to);
    for (; sentence < touched.last; ++sentence) {
      const int64_t stop = std::min<int64_t>(request.sentence_ends[sentence], hi);
      const int64_t a = std::max({request.sentence_start(sentence), lo, from});
      const int64_t b = std::min(stop, to);
      if (a < b)
        for (int64_t g = 0; g < group; ++g) {
          float& value = best[g * touched.count() + sentence - touched.first];
          value = std::max(value, max_of(estimates + g * chunk + a - from, b - a));
        }
      if (stop > to) break;
    }
  }
}

inline void estimate_tokens(Isa isa, const Pools& pools, const Request& request, int64_t head,
                            int64_t group, const Touched& touched, bool with_resident,
                            Scratch& scratch) {
  const int64_t n = pools.block_size;
#if defined(__AVX512F__) && defined(__AVX512BW__)
  if (isa >= Isa::kAvx512 && PageLayout::fits<Avx512>(n))
    return estimate_tokens<Avx512>(pools, request, head, group, touched, with_resident, scratch);
#endif
#if defined(__AVX2__)
  if (isa >= Isa::kAvx2 && PageLayout::fits<Avx2>(n))
    return estimate_tokens<Avx2>(pools, request, head, group, touched, with_resident, scratch);
#endif
  estimate_tokens<Portable>(pools, request, head, group, touched, with_resident, scratch);
}

}  // namespace sentencekv::cpu
