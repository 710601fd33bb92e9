// SPDX-License-Identifier: Apache-2.0
// From logits to resident blocks in one launch: what rank, resolve_residency and
// gather_misses do in three, for one KV head of a request in one cluster of blocks of threads.
#pragma once

#include "rank.cuh"
#include "resolve_residency.cuh"
#include "swap_blocks.cuh"

namespace sentencekv {

static_assert(kRankThreads <= kMaxResolveThreads, "a warp has a place for its total");

struct DecodeSelectionArgs {
  RankArgs rank;
  ResolveResidencyArgs resolve;
  GatherMissesArgs gather;
};

/// Residency needs the place of the keys only when these are no longer read.
inline size_t selection_shared_bytes(const DecodeSelectionArgs& a) {
  const size_t rank = rank_shared_bytes(a.rank);
  const size_t resolve = sizeof(RankShared) + resolve_shared_bytes(a.resolve);
  return rank > resolve ? rank : resolve;
}

/// Grid (H * cluster, S).
template <int kGroup>
static __global__ void __launch_bounds__(kRankThreads, kGroup > 4 ? 1 : 2)
    decode_selection_kernel(const DecodeSelectionArgs a) {
  const Cluster cluster = Cluster::current();
  const int h = blockIdx.x / cluster.size, s = blockIdx.y, heads = a.rank.num_heads;
  const int64_t region = static_cast<int64_t>(s) * heads + h;
  const bool leads = cluster.rank == 0;
  RankShared& shared = *reinterpret_cast<RankShared*>(shared_of_block());
  const bool all = sentencekv::rank<kGroup>(a.rank, cluster, shared, h, s);
  if (leads) {
    __syncthreads();  // the selection
    resolve_residency(a.resolve, reinterpret_cast<unsigned char*>(&shared + 1), h, s);
  }
  cluster.sync();  // misses and coverage
  if (leads && threadIdx.x == 0) {  // blocks of other heads may not be done: each adds its own
    add_coverage(a.rank, cluster, shared, all, h, s);
    atomicAdd(&a.resolve.coverage_totals[s], a.rank.coverage[region] / heads);
  }
  gather_region(a.gather, region, cluster.rank, cluster.size);
}

}  // namespace sentencekv
