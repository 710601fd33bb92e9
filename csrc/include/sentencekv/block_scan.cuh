// SPDX-License-Identifier: Apache-2.0
// Prefix sum over the threads of a block.
#pragma once

#include "launch.hpp"

namespace sentencekv {

struct Scan {
  int before;  // sum over the threads before this one
  int total;   // sum over the block
};

/// Every thread of the block calls it; blockDim.x is a multiple of a warp.
/// `warp_totals`: shared, one entry per warp.
__device__ inline Scan block_scan(int value, int* warp_totals) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int upto = value;
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, upto, distance);
    if (lane >= distance) upto += other;
  }
  __syncthreads();  // the call before this one may still be reading
  if (lane == kWarp - 1) warp_totals[warp] = upto;
  __syncthreads();
  const int warps = blockDim.x / kWarp;
  const int mine = lane < warps ? warp_totals[lane] : 0;
  int warps_upto = mine;
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, warps_upto, distance);
    if (lane >= distance) warps_upto += other;
  }
  return {__shfl_sync(0xffffffffu, warps_upto - mine, warp) + upto - value,
          __shfl_sync(0xffffffffu, warps_upto, warps - 1)};
}

}  // namespace sentencekv
