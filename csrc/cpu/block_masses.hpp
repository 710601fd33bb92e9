// SPDX-License-Identifier: Apache-2.0
// ops/score_blocks.py for one request and KV head.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "args.hpp"
#include "fixed_point.hpp"
#include "scratch.hpp"
#include "simd.hpp"

namespace sentencekv::cpu {

constexpr int64_t kChunkTokens = 1024;  // products of a chunk stay in the first-level cache

// Top and sum of a block: products [N] of its tokens, their factors, and the units of its mean.
inline void block_mass(const int16_t* dots, const uint16_t* scales, float factor, int64_t n,
                       int32_t mean_units, int32_t* units, int32_t& top, int32_t& sum) {
  int32_t largest = kNone, total = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t t = 0; t < n; ++t) {
    const float scale = std::bit_cast<float>(static_cast<uint32_t>(scales[t]) << 16);
    units[t] = floor_units((factor * scale) * static_cast<float>(dots[t]));
    largest = units[t] > largest ? units[t] : largest;
  }
#pragma omp simd reduction(+ : total)
  for (int64_t t = 0; t < n; ++t) total += exp2_units(largest - units[t]);
  top = largest + mean_units;
  sum = total;
}

// scratch.tops[g, block] and scratch.sums[g, block] of all indexed blocks.
template <class Simd>
void block_masses(const Pools& pools, const Attention& attention, const Request& request,
                  int64_t head, Scratch& scratch) {
  const int64_t n = pools.block_size, rows = pools.code_width / 8, dim = pools.head_dim;
  const int64_t group = attention.group_size, count = request.num_pages;
  const auto layout = PageLayout::of<Simd>(pools.code_width, n);
  const int64_t stripes_per_block = n / layout.stripe_tokens;
  const int64_t chunk_blocks = std::max<int64_t>(1, kChunkTokens / n), chunk = chunk_blocks * n;

  const uint8_t** stripes = scratch.stripes.reserve(chunk_blocks * stripes_per_block);
  int16_t* dots = scratch.dots.reserve(group * chunk);
  int32_t* units = scratch.units.reserve(n);
  int32_t* tops = scratch.tops.reserve(group * count);
  int32_t* sums = scratch.sums.reserve(group * count);
  QuantizedQuery& query = scratch.query;
  const uint8_t* tables[kMaxGroup / kScanHeads];
  for (int64_t g = 0; g < group; g += kScanHeads)
    tables[g / kScanHeads] = scratch.tables[g / kScanHeads].fill<Simd>(
        layout, static_cast<int>(std::min<int64_t>(kScanHeads, group - g)),
        query.levels.data() + g * pools.code_width);

  auto head_page = [&](int64_t block) {
    return static_cast<int64_t>(request.pages[block]) * pools.heads + head;
  };
  for (int64_t block = 0; block < count; block += chunk_blocks) {
    const int64_t blocks = std::min(chunk_blocks, count - block);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t page = head_page(block + b);
      for (int64_t s = 0; s < stripes_per_block; ++s)
        stripes[b * stripes_per_block + s] =
            pools.codes + page * rows * n + s * layout.stripe_tokens;
      if (block + b + chunk_blocks < count) {
        const int64_t next = head_page(block + b + chunk_blocks);
        for (int64_t byte = 0; byte < rows * n; byte += 64)
          __builtin_prefetch(pools.codes + next * rows * n + byte);
        for (int64_t t = 0; t < n; t += 32) __builtin_prefetch(pools.scales + next * n + t);
        for (int64_t d = 0; d < dim; d += 64) __builtin_prefetch(pools.means + next * dim + d);
        __builtin_prefetch(pools.mean_scales + next);
      }
    }
    for (int64_t g = 0; g < group; g += kScanHeads)
      scan<Simd>(layout, stripes, blocks * stripes_per_block,
                 static_cast<int>(std::min<int64_t>(kScanHeads, group - g)), tables[g / kScanHeads],
                 scratch.tables[g / kScanHeads].bias, dots + g * chunk, chunk);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t page = head_page(block + b);
      for (int64_t g = 0; g < group; ++g) {
        const int32_t product =
            byte_product(query.mean_levels.data() + g * dim, pools.means + page * dim, dim);
        const float mean_factor =
            (attention.unit * query.mean_steps.data()[g]) * pools.mean_scales[page];
        const int32_t mean_units = floor_units(mean_factor * static_cast<float>(product));
        block_mass(dots + g * chunk + b * n, pools.scales + page * n,
                   attention.unit * query.steps.data()[g], n, mean_units, units,
                   tops[g * count + block + b], sums[g * count + block + b]);
      }
    }
  }
}

inline void block_masses(Isa isa, const Pools& pools, const Attention& attention,
                         const Request& request, int64_t head, Scratch& scratch) {
  const int64_t n = pools.block_size;
#if defined(__AVX512F__) && defined(__AVX512BW__)
  if (isa >= Isa::kAvx512 && PageLayout::fits<Avx512>(n))
    return block_masses<Avx512>(pools, attention, request, head, scratch);
#endif
#if defined(__AVX2__)
  if (isa >= Isa::kAvx2 && PageLayout::fits<Avx2>(n))
    return block_masses<Avx2>(pools, attention, request, head, scratch);
#endif
  block_masses<Portable>(pools, attention, request, head, scratch);
}

}  // namespace sentencekv::cpu
