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

struct SelectShared {
  int32_t sums[2][kRankWarps];
  int32_t bins[kBins];
  uint32_t largest, inverse_least;  // of the keys, but for 0; inverse, so that 0 is none
  int32_t bin, above;
};

/// Where a selection ends: all keys above the threshold and `ties` of those at it.
struct Threshold {
  uint32_t key;
  int ties;
};

/// The `budget`-th largest of `count` keys, of which 0 is the least and may be many.
///
/// Histograms of ever finer bins over the range that holds it. The first is over what there is
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
  }
}

/// Write the positions of the selected keys, ascending, plus `offset`; of ties the first.
///
/// Returns the position of the last tie that is taken, if one is.
__device__ inline int write_selected(const uint32_t* keys, int count, const Threshold& threshold,
                                     int offset, int32_t* selected, SelectShared& shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int chunk = (count + kRankThreads - 1) / kRankThreads * kWarp;
  const int begin = warp * chunk, end = min(begin + chunk, count);
  int above = 0, ties = 0;
  for (int first = begin; first < end; first += kWarp) {
    const uint32_t key = first + lane < end ? keys[first + lane] : 0;
    above += __popc(__ballot_sync(kAllLanes, first + lane < end && key > threshold.key));
    ties += __popc(__ballot_sync(kAllLanes, first + lane < end && key == threshold.key));
  }
  __syncthreads();  // the sums may still be being read
  if (lane == 0) {
    shared.sums[0][warp] = above;
    shared.sums[1][warp] = ties;
  }
  __syncthreads();
  above = ties = 0;
  for (int w = 0; w < warp; ++w) {
    above += shared.sums[0][w];
    ties += shared.sums[1][w];
  }
  const unsigned lower = (1u << lane) - 1;
  for (int first = begin; first < end; first += kWarp) {
    const int j = first + lane;
    const uint32_t key = j < end ? keys[j] : 0;
    const bool is_above = j < end && key > threshold.key;
    const bool is_tie = j < end && key == threshold.key;
    const unsigned all_above = __ballot_sync(kAllLanes, is_above);
    const unsigned all_ties = __ballot_sync(kAllLanes, is_tie);
    const int ties_before = ties + __popc(all_ties & lower);
    if (is_above || (is_tie && ties_before < threshold.ties)) {
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
