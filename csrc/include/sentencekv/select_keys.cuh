// SPDX-License-Identifier: Apache-2.0
// The largest of many keys in shared memory, by a block of threads.
#pragma once

#include "block_scan.cuh"
#include "warp.cuh"

namespace sentencekv {

constexpr int kRankThreads = 512;
constexpr int kRankWarps = kRankThreads / kWarp;
constexpr int kBinBits = 10;
constexpr int kBins = 1 << kBinBits;  // two a thread
static_assert(kBins == 2 * kRankThreads);
constexpr int kFewKeys = 128;

struct SelectShared {
  int32_t sums[2][kRankWarps];
  int32_t bins[kBins];
  uint32_t largest, inverse_least;  // of the keys, but for 0; inverse, so that 0 is none
  int32_t bin, above, few;
  uint32_t key;
};

/// Where a selection ends: all keys above the threshold and `ties` of those at it.
struct Threshold {
  uint32_t key;
  int ties;
};

/// The `need`-th largest of the at most kFewKeys keys from `base` to `base + last`: each is compared
/// with all others.
__device__ inline Threshold threshold_of_few(const uint32_t* keys, int count, uint32_t base,
                                             uint32_t last, int need, SelectShared& shared) {
  const int thread = threadIdx.x;
  uint32_t* few = reinterpret_cast<uint32_t*>(shared.bins);
  for (int j = thread; j < count; j += kRankThreads) {
    const uint32_t key = keys[j];
    if (key != 0 && key - base <= last) few[atomicAdd(&shared.few, 1)] = key;
  }
  __syncthreads();
  const int num_few = shared.few;
  if (thread < num_few) {
    const uint32_t mine = few[thread];
    int above = 0, ties = 0;
#pragma unroll 4
    for (int i = 0; i < num_few; ++i) {
      above += few[i] > mine;
      ties += few[i] == mine;
    }
    if (above < need && need <= above + ties) {
      shared.key = mine;
      shared.above = above;
    }
  }
  __syncthreads();
  return {shared.key, need - shared.above};
}

/// The `budget`-th largest of `count` keys, of which 0 is the least and may be many.
///
/// Histograms of ever finer bins over the range that holds it, until few are left. The first is over what there is
/// between bounds of the keys that the caller has left in `shared`: scores of a request are close
/// to each other.
__device__ inline Threshold find_threshold(const uint32_t* keys, int count, int budget,
                                           SelectShared& shared) {
  const int thread = threadIdx.x;
  if (budget == 0) return {0xffffffffu, 0};
  if (shared.largest == 0) return {0, budget};
  uint32_t base = ~shared.inverse_least, last = shared.largest - base;  // the range is base to base + last
  int need = budget;
  for (;;) {
    const int shift = max(0, 32 - __clz(static_cast<int>(last)) - kBinBits);
    shared.bins[thread] = shared.bins[thread + kRankThreads] = 0;
    if (thread == 0) shared.few = 0;
    __syncthreads();
    for (int j = thread; j < count; j += kRankThreads) {
      const uint32_t offset = keys[j] - base;  // large for keys below the range
      if (keys[j] != 0 && offset <= last) atomicAdd(&shared.bins[offset >> shift], 1);
    }
    __syncthreads();
    const int bin = kBins - 1 - 2 * thread;  // threads descend
    const int first = shared.bins[bin], second = shared.bins[bin - 1];
    const Scan scan = block_scan(first + second, shared.sums[0]);
    if (scan.total < need) return {0, need - scan.total};  // of the first range, with all keys
    if (scan.before < need && need <= scan.before + first + second) {
      const bool in_first = need <= scan.before + first;
      shared.bin = in_first ? bin : bin - 1;
      shared.above = in_first ? scan.before : scan.before + first;
    }
    __syncthreads();
    need -= shared.above;
    base += static_cast<uint32_t>(shared.bin) << shift;
    if (shift == 0) return {base, need};
    last = (1u << shift) - 1;
    const int there = shared.bins[shared.bin];
    __syncthreads();  // the bins are free
    if (there <= kFewKeys) return threshold_of_few(keys, count, base, last, need, shared);
  }
}

/// Write the positions of the selected keys, ascending, plus `offset`; of ties the first.
///
/// At most 32 keys a thread. Returns the position of the last tie that is taken, if one is.
__device__ inline int write_selected(const uint32_t* keys, int count, const Threshold& threshold,
                                     int offset, int32_t* selected, SelectShared& shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int rounds = (count + kRankThreads - 1) / kRankThreads;  // a warp's keys, 32 at a time
  const int begin = warp * rounds * kWarp;
  unsigned above_mask = 0, tie_mask = 0;  // lane i keeps those of round i
  int above = 0, ties = 0;
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    const int j = begin + round * kWarp + lane;
    const uint32_t key = j < count ? keys[j] : 0;
    const unsigned all_above = __ballot_sync(kAllLanes, j < count && key > threshold.key);
    const unsigned all_ties = __ballot_sync(kAllLanes, j < count && key == threshold.key);
    above_mask = lane == round ? all_above : above_mask;
    tie_mask = lane == round ? all_ties : tie_mask;
    above += __popc(all_above);
    ties += __popc(all_ties);
  }
  __syncthreads();  // the sums may still be being read
  if (lane == 0) {
    shared.sums[0][warp] = above;
    shared.sums[1][warp] = ties;
  }
  __syncthreads();
  above = warp_sum(lane < warp ? shared.sums[0][lane] : 0);
  ties = warp_sum(lane < warp ? shared.sums[1][lane] : 0);
  const unsigned lower = (1u << lane) - 1;
  unsigned todo = __ballot_sync(kAllLanes, (above_mask | tie_mask) != 0);  // few rounds have any
  while (todo != 0) {
    const int round = __ffs(static_cast<int>(todo)) - 1;
    todo &= todo - 1;
    const unsigned all_above = __shfl_sync(kAllLanes, above_mask, round);
    const unsigned all_ties = __shfl_sync(kAllLanes, tie_mask, round);
    const bool is_tie = all_ties >> lane & 1;
    const int ties_before = ties + __popc(all_ties & lower);
    if ((all_above >> lane & 1) || (is_tie && ties_before < threshold.ties)) {
      const int j = begin + round * kWarp + lane;
      selected[above + __popc(all_above & lower) + min(ties_before, threshold.ties)] = offset + j;
      if (is_tie && ties_before + 1 == threshold.ties) shared.bin = j;
    }
    above += __popc(all_above);
    ties += __popc(all_ties);
  }
  __syncthreads();
  return shared.bin;
}

}  // namespace sentencekv
