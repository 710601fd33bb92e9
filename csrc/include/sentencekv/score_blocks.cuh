// SPDX-License-Identifier: Apache-2.0
// Top and mass of every block under the quantised queries. Defined by
// sentencekv_vllm/ops/score_blocks.py, bit for bit.
//
// A warp scores 128 tokens. Lane 4 r + q loads 16 consecutive tokens (granule r of the warp) with
// one 16-byte load a byte row, and receives their products with query head q of each four (see
// sign_planes.cuh). The mean of a page is multiplied by quarters of its channels, one a lane.
//
// What bounds it: memory. A token of 128 planes is 18 bytes and its share of a mean of 128 channels
// in blocks of 32 tokens four: 128K tokens of 8 KV heads are 24 MB, 5 us of an H200's bandwidth,
// and their some 22 instructions a query head (half of them integers, at half rate) take about as
// long. Both need many warps: pages, then codes, are two waits for memory that only other warps
// fill, so what a thread keeps is limited to what lets three blocks of threads run at once.
#pragma once

#include "scored_granule.cuh"

namespace sentencekv {

__device__ inline int32_t largest_of(const int32_t (&units)[kGranule]) {
  int32_t top = units[0];
#pragma unroll
  for (int k = 1; k < kGranule; ++k) top = max(top, units[k]);
  return top;
}

__device__ inline uint32_t mass_below(const int32_t (&units)[kGranule], int32_t top) {
  uint32_t sum = 0;
#pragma unroll
  for (int k = 0; k < kGranule; ++k) {
    sum += static_cast<uint32_t>(exp2_units(static_cast<uint32_t>(top - units[k])));
  }
  return sum;
}

/// Blocks of threads that a multiprocessor holds at once.
template <int kSets, int kSteps, int kMeans>
constexpr int kScoreBlocks = kSteps == 1 && kMeans <= 2 ? (kSets == 1 ? 3 : 2) : 1;

/// Grid (blocks, H, S); a block takes chunks as far apart as there are blocks. kSets: query heads
/// in fours; kSteps: of 128 planes; kMeans: of 64 channels.
template <int kSets, int kSteps, int kMeans>
static __global__ void __launch_bounds__(kScoreThreads, kScoreBlocks<kSets, kSteps, kMeans>)
    score_blocks_kernel(const ScoreBlocksArgs a) {
  ScoreShared& shared = *reinterpret_cast<ScoreShared*>(shared_of_block());
  const int h = blockIdx.y, s = blockIdx.z, q = threadIdx.x % 4;
  const int64_t head = static_cast<int64_t>(s) * a.num_heads + h;
  const int group = a.group, num_rows = a.num_byte_rows, granules = a.granules_per_page;
  int chunk = blockIdx.x;

  Granule<kSteps, kMeans> granule(a);
  const int32_t kind = load_early(a.index_kind + s), known_pages = load_early(a.num_pages + s);
  granule.find(a, s, chunk);
  if (kind != a.token_codes || chunk * a.pages_per_chunk >= known_pages) return;

  granule.fetch(a, h, num_rows, known_pages);  // on its way while the planes are made
  read_query(a, shared, head);
  HeadSet<kSteps> sets[kSets];
#pragma unroll
  for (int set = 0; set < kSets; ++set) sets[set].read(shared.query, set, group, num_rows);
  const bool whole = in_one_warp(granules);

  for (;;) {
    granule.transpose();
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      const int g = set * kSetHeads + q;
      int32_t units[kGranule];
      const int32_t mean = granule.mean_units(shared, set);
      granule.code_units(sets[set], shared.units[g], units);
      int32_t top = largest_of(units);
      uint32_t sum;
      const bool writes = granule.valid && granule.place == 0 && g < group;
      if (whole) {
        for (int bit = 4; bit < 4 * granules; bit *= 2) {
          top = max(top, __shfl_xor_sync(kAllLanes, top, bit));
        }
        sum = mass_below(units, top);
        for (int bit = 4; bit < 4 * granules; bit *= 2) {
          sum += __shfl_xor_sync(kAllLanes, sum, bit);
        }
      } else {
        int32_t* shared_top = &shared.tops[granule.valid ? granule.local : 0][g];
        uint32_t* shared_sum = &shared.sums[granule.valid ? granule.local : 0][g];
        if (granule.valid) atomicMax(shared_top, top);
        __syncthreads();
        top = *shared_top;
        if (granule.valid) atomicAdd(shared_sum, mass_below(units, top));
        __syncthreads();
        sum = *shared_sum;
        if (granule.valid && granule.place == 0) {  // for the next chunk
          *shared_top = INT_MIN;
          *shared_sum = 0;
        }
        __syncthreads();
      }
      if (writes) {
        const int64_t at = (head * group + g) * a.max_blocks + granule.column;
        a.tops[at] = top - kWholeBits + mean;
        a.sums[at] = static_cast<int32_t>(sum);
      }
    }
    chunk += gridDim.x;
    if (chunk * a.pages_per_chunk >= known_pages) return;
    granule.find(a, s, chunk);
    granule.fetch(a, h, num_rows, known_pages);
  }
}

}  // namespace sentencekv
