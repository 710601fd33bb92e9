// SPDX-License-Identifier: Apache-2.0
// The selection of requests of any kind: blocks by their masses, or sentences.
#pragma once

#include "rank_blocks.cuh"
#include "rank_sentences.cuh"

namespace sentencekv {

/// A cluster selects for KV head h of request s. Returns whether all of the history was selected.
/// After a barrier of the cluster `add_coverage`.
template <int kGroup>
__device__ inline bool rank(const RankArgs& a, const Cluster& cluster, RankShared& shared, int h,
                            int s) {
  return a.index_kind[s] == a.token_codes ? rank_blocks<kGroup>(a, cluster, shared, h, s)
                                          : rank_sentences<kGroup>(a, cluster, shared, h, s);
}

/// One thread of a cluster's first block writes the share of attention that is attended to.
__device__ inline void add_coverage(const RankArgs& a, const Cluster& cluster,
                                    const RankShared& shared, bool all, int h, int s) {
  float sum = 0.0f;
  for (int r = 0; r < cluster.size; ++r) sum += all ? 0.0f : shared.covered[r];
  a.coverage[static_cast<int64_t>(s) * a.num_heads + h] = all ? 1.0f : sum;
}

/// Grid (H * cluster, S).
template <int kGroup>
static __global__ void __launch_bounds__(kRankThreads, kGroup > 4 ? 1 : 2)
    rank_kernel(const RankArgs a) {
  const Cluster cluster = Cluster::current();
  const int h = blockIdx.x / cluster.size, s = blockIdx.y;
  RankShared& shared = *reinterpret_cast<RankShared*>(shared_of_block());
  const bool all = rank<kGroup>(a, cluster, shared, h, s);
  cluster.sync();
  if (cluster.rank == 0 && threadIdx.x == 0) add_coverage(a, cluster, shared, all, h, s);
}

}  // namespace sentencekv
