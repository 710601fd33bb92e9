// SPDX-License-Identifier: Apache-2.0
// What the rankings of blocks and of sentences share: tensors, and memory of a block of threads.
#pragma once

#include "cluster.cuh"
#include "select_keys.cuh"

namespace sentencekv {

constexpr int kRankGroup = 8;      // query heads a KV head at most
constexpr int kRankBlocks = 8192;  // of a request at most
constexpr int kRankCluster = 8;

/// S requests, H KV heads, G query heads a KV head, B blocks, I sentences, N tokens and M rows a
/// page, K selected blocks. What no request of the server reads may be null: what belongs to
/// blocks, or `best` and `kept` where rows hold no vector.
struct RankArgs {
  const int32_t* tops;           // [S, H, G, B] of requests of TOKEN_CODES, as are the next three
  const int32_t* sums;           // [S, H, G, B]
  const int32_t* pages;          // [S, .]
  uint8_t* page_kept;            // [P, H] selected at the last step; written
  int32_t* best;                 // [S, H, I, G] ordered logits; emptied
  const int32_t* row_pages;      // [S, .]
  uint8_t* kept;                 // [P * M, H] selected at the last step; written
  const int32_t* sentence_ends;  // [S, .]
  const int32_t* num_sentences;  // [S]
  const int32_t* first;          // [S, .] sentence that holds token c * kGranule
  const int32_t* reduce;         // [S]
  const int32_t* seeds;          // [S]
  const int32_t* step;           // [1]
  float* scores;                 // [S, H, I] written up to num_sentences
  float* mass;                   // [S, H, I] the same
  const int32_t* num_pages;      // [S]
  const int32_t* history_lo;     // [S] blocks
  const int32_t* history_hi;     // [S]
  const int32_t* budget_blocks;  // [S]
  const int32_t* index_kind;     // [S]
  const float* retention;        // [S]
  int32_t* blocks;               // [S, H, K] written: ascending, then -1
  float* coverage;               // [S, H] written
  int64_t pages_stride, row_pages_stride, ends_stride, first_stride;
  int32_t num_requests, num_heads, group, block_size, rows_per_page;
  int32_t max_sentences, max_selected, max_blocks;  // I, K, of the longest request
  int32_t mass_blocks;                              // B
  int32_t token_codes, random, softmax_mean, max_of_group;  // values of the enumerations
};

/// What a block of threads shares, and from `keys` on a key for each block of the longest request.
struct alignas(16) RankShared {
  union {
    float merged[kRankWarps][2][kRankGroup];  // of each warp: top and sum of each query head
    struct {
      int32_t tops[kRankWarps][kRankGroup];   // of each warp: largest of each query head
      uint64_t totals[kRankWarps][kRankGroup];
    } masses;
  };
  float log_totals[kRankGroup];  // of sentences
  int32_t head_tops[kRankGroup];  // of blocks, like the next two
  float reciprocals[kRankGroup];
  int32_t outside, taken;       // probability around the history, and of its selected blocks
  float covered[kRankCluster];  // of each block of the cluster, in the first
  int32_t end_code, end_sentence;
  SelectShared select;
  uint32_t keys[1];
};

static_assert(kRankBlocks <= kWarp * kRankThreads, "write_selected");

inline bool rank_fits(const RankArgs& a) {
  return a.group <= kRankGroup && a.max_blocks <= kRankBlocks;
}

inline size_t rank_shared_bytes(const RankArgs& a) {
  return sizeof(RankShared) + sizeof(uint32_t) * a.max_blocks;
}

/// Blocks of threads that rank one KV head of a request.
inline cudaError_t rank_cluster(const RankArgs& a, int* count) {
  return blocks_per_unit(a.num_heads * a.num_requests, kRankCluster, count);
}

}  // namespace sentencekv
