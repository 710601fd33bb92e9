// SPDX-License-Identifier: Apache-2.0
// From logits to resident blocks in one launch: what rank_sentences, resolve_residency and
// gather_misses do in three, for one KV head of a request in one block of threads.
#pragma once

#include "rank_sentences.cuh"
#include "resolve_residency.cuh"
#include "swap_blocks.cuh"

namespace sentencekv {

static_assert(kRankThreads <= kMaxResolveThreads, "a warp has a place for its total");

struct DecodeSelectionArgs {
  RankSentencesArgs rank;
  ResolveResidencyArgs resolve;
  GatherMissesArgs gather;
};

inline size_t selection_shared_bytes(const DecodeSelectionArgs& a) {
  const size_t rank = rank_shared_bytes(a.rank), resolve = resolve_shared_bytes(a.resolve);
  return rank > resolve ? rank : resolve;
}

/// Grid (H, S).
template <int kGroup, int kPer>
static __global__ void __launch_bounds__(kRankThreads, 1)
    decode_selection_kernel(const DecodeSelectionArgs a) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const int h = blockIdx.x, s = blockIdx.y, heads = a.rank.num_heads;
  const int64_t region = static_cast<int64_t>(s) * heads + h;
  rank_sentences<kGroup, kPer>(a.rank, *reinterpret_cast<RankShared*>(shared_memory), h, s);
  __syncthreads();  // the selection
  if (threadIdx.x == 0) {  // blocks of other heads may not be done: each adds its own
    atomicAdd(&a.resolve.coverage_totals[s], a.rank.coverage[region] / heads);
  }
  const int num_missing = resolve_residency(a.resolve, shared_memory, h, s);
  __syncthreads();  // the list of misses
  gather_region(a.gather, region, num_missing);
}

}  // namespace sentencekv
