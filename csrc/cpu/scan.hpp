// SPDX-License-Identifier: Apache-2.0
// <levels, signs> for every token of a page by table look-up: a fast scan as of product
// quantisation (arXiv 1704.07355) over groups of four channels.
//
// A nibble of the page names which of four channels are positive. Its table entry is the sum of
// the levels of those channels, less the group's smallest sum: 0..124, so that two entries add
// up in a byte. Over all channels, sum(entries) = (<levels, signs> + |levels|_1) / 2, exactly.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "buffer.hpp"
#include "simd.hpp"

namespace sentencekv::cpu {

constexpr int kScanHeads = 4;  // query heads that share a load of the page

// A stripe is the part of a page that fills whole vectors: all rows of 64 tokens (or of N < 64).
struct PageLayout {
  int64_t rows;           // bytes of a token that are scanned
  int64_t block_size;     // N
  int64_t stripe_tokens;  // tokens
  int64_t vectors;        // vectors a stripe
  int64_t rows_per_vector;
  int64_t vector_stride;  // bytes
  int64_t last_bytes;     // of the last vector that belong to the page

  template <class Simd>
  static PageLayout of(int64_t dim, int64_t block_size) {
    PageLayout p{};
    p.rows = dim / 8;
    p.block_size = block_size;
    p.stripe_tokens = std::min(block_size, Simd::kBytes);
    p.rows_per_vector = Simd::kBytes / p.stripe_tokens;
    p.vectors = (p.rows + p.rows_per_vector - 1) / p.rows_per_vector;
    p.vector_stride = std::max(block_size, Simd::kBytes);
    p.last_bytes = (p.rows - (p.vectors - 1) * p.rows_per_vector) * p.stripe_tokens;
    return p;
  }
  template <class Simd>
  static bool fits(int64_t block_size) {
    return block_size % Simd::kBytes == 0 || Simd::kBytes % block_size == 0;
  }
};

// Tables of up to four query heads, in the order in which a stripe is scanned.
struct ScanTables {
  Buffer<uint8_t> memory;  // [vectors, heads, 2 (low, high nibble), bytes of a vector]
  int bias[kScanHeads];    // |levels|_1

  template <class Simd>
  const uint8_t* fill(const PageLayout& layout, int heads, const int8_t* levels) {
    uint8_t* table = memory.reserve(layout.vectors * heads * 2 * Simd::kBytes);
    std::memset(table, 0, static_cast<std::size_t>(layout.vectors * heads * 2 * Simd::kBytes));
    for (int g = 0; g < heads; ++g) {
      const int8_t* level = levels + g * layout.rows * 8;
      bias[g] = 0;
      for (int64_t group = 0; group < layout.rows * 2; ++group, level += 4) {
        int sums[16] = {0};
        int magnitude = 0;
        for (int j = 0; j < 4; ++j) {
          sums[0] += level[j] < 0 ? -level[j] : 0;
          magnitude += std::abs(level[j]);
        }
        for (int j = 0; j < 4; ++j)
          for (int n = 0; n < 1 << j; ++n) sums[n | 1 << j] = sums[n] + level[j];
        bias[g] += magnitude;
        uint8_t entries[16];
        for (int n = 0; n < 16; ++n) entries[n] = static_cast<uint8_t>(sums[n]);
        const int64_t row = group / 2, vector = row / layout.rows_per_vector;
        uint8_t* lanes = table + ((vector * heads + g) * 2 + group % 2) * Simd::kBytes +
                         row % layout.rows_per_vector * layout.stripe_tokens;
        const int64_t lane_bytes = std::min(layout.stripe_tokens, Simd::kBytes);
        for (int64_t b = 0; b < lane_bytes; b += 16) std::memcpy(lanes + b, entries, 16);
      }
    }
    return table;
  }
};

// out[g][p][t] of `Stripes` stripes for `Heads` query heads.
template <class Simd, int Heads, int Stripes>
inline void scan_stripes(const PageLayout& layout, const uint8_t* const* stripes,
                         const uint8_t* table, const int* bias, int16_t* out, int64_t out_stride) {
  using Bytes = typename Simd::Bytes;
  Bytes sums[Heads][Stripes], odd[Heads][Stripes];
  for (int g = 0; g < Heads; ++g)
    for (int p = 0; p < Stripes; ++p) sums[g][p] = odd[g][p] = Simd::zero();
  auto step = [&](const Bytes* row) {
    Bytes low[Stripes], high[Stripes];
    for (int p = 0; p < Stripes; ++p) {
      low[p] = Simd::low_nibbles(row[p]);
      high[p] = Simd::high_nibbles(row[p]);
    }
    for (int g = 0; g < Heads; ++g, table += 2 * Simd::kBytes) {
      const Bytes low_table = Simd::load(table), high_table = Simd::load(table + Simd::kBytes);
      for (int p = 0; p < Stripes; ++p) {
        const Bytes pair = Simd::add_bytes(Simd::lookup(low_table, low[p]),
                                           Simd::lookup(high_table, high[p]));
        // Whole words are added, odd bytes and all: 256 times the sum of the odd bytes is
        // subtracted in the end (even_sums), which saves a mask here.
        sums[g][p] = Simd::add_words(sums[g][p], pair);
        odd[g][p] = Simd::add_words(odd[g][p], Simd::odd_bytes(pair));
      }
    }
  };
  auto finish = [&] {
    for (int g = 0; g < Heads; ++g)
      for (int p = 0; p < Stripes; ++p)
        Simd::store(out + g * out_stride + p * layout.stripe_tokens, layout.stripe_tokens,
                    Simd::even_sums(sums[g][p], odd[g][p]), odd[g][p], bias[g]);
  };
  Bytes row[Stripes];
  const int64_t last = (layout.vectors - 1) * layout.vector_stride;
  for (int64_t offset = 0; offset < last; offset += layout.vector_stride) {
    for (int p = 0; p < Stripes; ++p) row[p] = Simd::load(stripes[p] + offset);
    step(row);
  }
  for (int p = 0; p < Stripes; ++p) row[p] = Simd::load(stripes[p] + last, layout.last_bytes);
  step(row);
  finish();
}

template <class Simd, int Heads>
void scan_all(const PageLayout& layout, const uint8_t* const* stripes, int64_t count,
              const uint8_t* table, const int* bias, int16_t* out, int64_t out_stride) {
  int64_t i = 0;
  for (; i + Simd::kStripes <= count; i += Simd::kStripes)
    scan_stripes<Simd, Heads, Simd::kStripes>(
        layout, stripes + i, table, bias, out + i * layout.stripe_tokens, out_stride);
  for (; i < count; ++i)
    scan_stripes<Simd, Heads, 1>(layout, stripes + i, table, bias,
                                         out + i * layout.stripe_tokens, out_stride);
}

// Dot products of `heads` <= 4 query heads with the tokens of consecutive stripes.
template <class Simd>
void scan(const PageLayout& layout, const uint8_t* const* stripes, int64_t count, int heads,
          const uint8_t* table, const int* bias, int16_t* out, int64_t out_stride) {
  switch (heads) {
    case 1: return scan_all<Simd, 1>(layout, stripes, count, table, bias, out, out_stride);
    case 2: return scan_all<Simd, 2>(layout, stripes, count, table, bias, out, out_stride);
    case 3: return scan_all<Simd, 3>(layout, stripes, count, table, bias, out, out_stride);
    default: return scan_all<Simd, 4>(layout, stripes, count, table, bias, out, out_stride);
  }
}

}  // namespace sentencekv::cpu
