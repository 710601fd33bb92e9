// SPDX-License-Identifier: Apache-2.0
// From the masses of blocks to the selected ones. Defined by sentencekv_vllm/ops/rank_blocks.py,
// bit for bit: sums are of integers, and a float is one product or one division.
//
// Blocks of a cluster take a share each of a KV head's blocks, three times over: for the largest
// top, for the sum of the weights and for the probabilities, of which the first block of the
// cluster receives keys, and selects. From the second time on masses come from the L1 cache. What
// bounds it: a dozen waits, for memory and for barriers of the cluster, of which the selection has
// half; not bytes, 256 KB a KV head at most.
#pragma once

#include <climits>

#include "head_blocks.cuh"

namespace sentencekv {

/// shared.head_tops, and memory on its way that the next steps wait for.
template <int kGroup>
__device__ inline void find_tops(const HeadBlocks<kGroup>& own, RankShared& shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int32_t top[kGroup];
#pragma unroll
  for (int g = 0; g < kGroup; ++g) top[g] = INT_MIN;
#pragma unroll 1
  for (int j = own.begin + static_cast<int>(threadIdx.x); j < own.end; j += kRankThreads) {
#pragma unroll
    for (int g = 0; g < kGroup; ++g) top[g] = max(top[g], own.tops[own.at(g, j)]);
    prefetch(own.flag(j));
  }
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    top[g] = warp_max(top[g]);
    if (lane == 0) shared.masses.tops[warp][g] = top[g];
  }
  own.cluster.sync();
  if (warp < own.group) {
    int32_t all = INT_MIN;
#pragma unroll 4
    for (int w = lane; w < kRankWarps * own.cluster.size; w += kWarp) {
      all = max(all, own.cluster.at(shared.masses.tops, w / kRankWarps)[w % kRankWarps][warp]);
    }
    all = warp_max(all);
    if (lane == 0) shared.head_tops[warp] = all;
  }
  __syncthreads();
}

/// shared.reciprocals, of the sums of weights.
template <int kGroup>
__device__ inline void sum_weights(const HeadBlocks<kGroup>& own, RankShared& shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int64_t total[kGroup];
#pragma unroll
  for (int g = 0; g < kGroup; ++g) total[g] = 0;
#pragma unroll 1
  for (int j = own.begin + static_cast<int>(threadIdx.x); j < own.end; j += kRankThreads) {
    int64_t weight[kGroup];
    own.weights(shared.head_tops, j, weight);
#pragma unroll
    for (int g = 0; g < kGroup; ++g) total[g] += weight[g];
  }
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    total[g] = warp_sum(total[g]);
    if (lane == 0) shared.masses.totals[warp][g] = static_cast<uint64_t>(total[g]);
  }
  own.cluster.sync();
  if (warp < own.group) {
    int64_t all = 0;
#pragma unroll 4
    for (int w = lane; w < kRankWarps * own.cluster.size; w += kWarp) {
      all += static_cast<int64_t>(
          own.cluster.at(shared.masses.totals, w / kRankWarps)[w % kRankWarps][warp]);
    }
    all = warp_sum(all);
    const float one = static_cast<float>(whole_probability(own.group));
    if (lane == 0) shared.reciprocals[warp] = __fdiv_rn(one, __ll2float_rn(all));
  }
  __syncthreads();
}

/// The keys of the history's blocks, in the first block of the cluster: a score's bits, which
/// order floats that are not negative. Flags are cleared.
template <int kGroup>
__device__ inline void score_history(const HeadBlocks<kGroup>& own, RankShared& shared,
                                     float retention) {
  uint32_t* keys = own.cluster.at(shared.keys, 0);
  uint32_t largest = 0, inverse_least = 0;
  int32_t outside = 0;
#pragma unroll 1
  for (int j = own.begin + static_cast<int>(threadIdx.x); j < own.end; j += kRankThreads) {
    uint8_t* flag = own.flag(j);
    const uint8_t kept = *flag;
    const int32_t probability = own.probability(shared, j);
    if (j < own.lo || j >= own.hi) {
      outside += probability;
      continue;
    }
    const float plain = __int2float_rn(probability);
    const float score = kept ? __fmul_rn(plain, retention) : plain;
    const uint32_t key = score > 0.0f ? bits_of(score) : 0;
    keys[j - own.lo] = key;
    largest = max(largest, key);
    if (key != 0) inverse_least = max(inverse_least, ~key);
    if (kept) *flag = 0;
  }
  largest = max_over(largest, kWarp - 1);
  inverse_least = max_over(inverse_least, kWarp - 1);
  outside = warp_sum(outside);
  if (threadIdx.x % kWarp == 0) {
    SelectShared* select = own.cluster.at(&shared.select, 0);
    atomicMax(&select->largest, largest);
    atomicMax(&select->inverse_least, inverse_least);
    if (outside != 0) atomicAdd(own.cluster.at(&shared.outside, 0), outside);
  }
}

/// A cluster ranks the blocks of KV head h of request s, and its first block selects.
///
/// Returns whether all of the history was selected. After a barrier of the cluster `add_coverage`.
template <int kGroup>
__device__ inline bool rank_blocks(const RankArgs& a, const Cluster& cluster, RankShared& shared,
                                   int h, int s) {
  const HeadBlocks<kGroup> own(a, cluster, h, s);
  const int thread = threadIdx.x, history = own.hi - own.lo, budget = a.budget_blocks[s];
  const bool leads = cluster.rank == 0;
  int32_t* blocks = a.blocks + own.head * a.max_selected;

  if (leads) {
    for (int k = budget + thread; k < a.max_selected; k += kRankThreads) blocks[k] = -1;
  }
  if (budget == history) {
    if (leads) {
      for (int k = thread; k < budget; k += kRankThreads) blocks[k] = own.lo + k;
    }
    return true;
  }
  if (leads && thread == 0) {
    shared.select.largest = shared.select.inverse_least = 0;
    shared.outside = shared.taken = 0;
  }
  find_tops(own, shared);
  sum_weights(own, shared);
  score_history(own, shared, a.retention[s]);
  cluster.sync();

  if (leads) {
    const Threshold threshold = find_threshold(shared.keys, history, budget, shared.select);
    write_selected(shared.keys, history, threshold, own.lo, blocks, shared.select);
    int32_t taken = 0;
#pragma unroll 1
    for (int k = thread; k < budget; k += kRankThreads) {
      const int j = blocks[k];
      *own.flag(j) = 1;
      taken += own.probability(shared, j);
    }
    taken = warp_sum(taken);
    if (thread % kWarp == 0) atomicAdd(&shared.taken, taken);
    __syncthreads();
    if (thread == 0) {
      const float whole = static_cast<float>(own.group) *
                          static_cast<float>(whole_probability(own.group));
      const float coverage = __fdiv_rn(__int2float_rn(shared.taken + shared.outside), whole);
      for (int r = 0; r < cluster.size; ++r) shared.covered[r] = r == 0 ? coverage : 0.0f;
    }
  }
  return false;
}

}  // namespace sentencekv
