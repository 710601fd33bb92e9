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
  Scan scan{upto - value, 0};
  const int warps = blockDim.x / kWarp;
  for (int w = 0; w < warps; ++w) {
    scan.before += w < warp ? warp_totals[w] : 0;
    scan.total += warp_totals[w];
  }
  return scan;
}

}  // namespace sentencekv
