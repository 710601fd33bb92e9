// SPDX-License-Identifier: Apache-2.0
// What score_blocks reads and writes, and what the warps of its blocks of threads share.
#pragma once

#include <climits>

#include "granule.hpp"
#include "sign_planes.cuh"

namespace sentencekv {

constexpr int kWarpGranules = kWarp / 4;
constexpr int kScoreThreads = 256;
constexpr int kChunkGranules = kScoreThreads / 4;  // a chunk has as many whole pages as these hold
constexpr int kSplitPages = kChunkGranules / 3;    // of a chunk, where warps share pages

/// S requests, H KV heads, G query heads a KV head, D head_dim, W code planes, N tokens a page.
struct ScoreBlocksArgs {
  const uint8_t* codes;        // [P, H, W / 8, N]
  const uint16_t* scales;      // [P, H, N] bf16
  const int8_t* means;         // [P, H, D]
  const float* mean_scales;    // [P, H]
  const int8_t* levels;        // [S, H * G, W]
  const float* steps;          // [S, H * G]
  const int8_t* mean_levels;   // [S, H * G, D]
  const float* mean_steps;     // [S, H * G]
  const int32_t* pages;        // [S, .]
  const int32_t* num_pages;    // [S]
  const int32_t* index_kind;   // [S]
  int32_t* tops;               // [S, H, G, B] written up to num_pages
  int32_t* sums;               // [S, H, G, B] the same
  int64_t pages_stride;
  float unit;                  // ops/score_blocks.py: unit_factor
  int32_t num_requests, num_heads, group, num_byte_rows, head_dim, block_size;
  int32_t columns, max_blocks;  // of `pages`; B
  int32_t token_codes;         // value of the enumeration
  int32_t granules_per_page, pages_per_chunk;  // filled in by the launcher
};

/// What the warps of a block share.
struct alignas(16) ScoreShared {
  int8_t mean_levels[kMaxGroup][kMaxDim];  // 0 behind the last channel
  PlanesShared query;
  float units[kMaxGroup], mean_units[kMaxGroup];
  int32_t tops[kSplitPages][kMaxGroup];  // of pages that warps share
  uint32_t sums[kSplitPages][kMaxGroup];
};

/// Whether the granules of a page are neighbouring lanes of one warp.
__device__ inline bool in_one_warp(int granules) {
  return granules <= kWarpGranules && (granules & (granules - 1)) == 0;
}

__device__ inline void read_query(const ScoreBlocksArgs& a, ScoreShared& shared, int64_t head) {
  const int group = a.group, thread = threadIdx.x, words = kMaxDim / 4, there = a.head_dim / 4;
  const int8_t* levels = a.mean_levels + head * group * a.head_dim;
  const uint32_t* source = reinterpret_cast<const uint32_t*>(levels);
  uint32_t* target = reinterpret_cast<uint32_t*>(shared.mean_levels);
#pragma unroll 1
  for (int i = thread; i < kMaxGroup * words; i += kScoreThreads) {
    const int g = i / words, word = i % words;
    target[i] = g < group && word < there ? source[g * there + word] : 0;
  }
  if (thread < kMaxGroup) {
    const int64_t row = head * group + min(thread, group - 1);
    shared.units[thread] = __fmul_rn(a.unit, a.steps[row]);
    shared.mean_units[thread] = __fmul_rn(a.unit, a.mean_steps[row]);
  }
  for (int i = thread; i < kSplitPages * kMaxGroup; i += kScoreThreads) {
    shared.tops[i / kMaxGroup][i % kMaxGroup] = INT_MIN;
    shared.sums[i / kMaxGroup][i % kMaxGroup] = 0;
  }
  read_planes(shared.query, a.levels + head * group * a.num_byte_rows * 8, group, a.num_byte_rows);
  __syncthreads();
}

}  // namespace sentencekv
