// SPDX-License-Identifier: Apache-2.0
// Copies between the cache and the swap pool (pinned host memory, read and written in place).
// Defined by sentencekv_vllm/ops/swap_blocks.py.
#pragma once

#include <cstdint>

#include "block_scan.cuh"

namespace sentencekv {

constexpr int kCopyThreads = 256;
constexpr int kVectorsInFlight = 4;  // 16-byte loads a thread issues before its first store
constexpr int kPieceVectors = kWarp * kVectorsInFlight;  // what a warp moves at a time: 2 KiB
constexpr int kVectorBytes = 16;

/// Missed head-blocks, host page -> cache slot; how many there are is known on the device only.
struct GatherMissesArgs {
  const void* host;            // [P, H] head-blocks, contiguous
  void* cache;                 // [B, H] head-blocks, each contiguous
  const int32_t* misses;       // [regions, K, 3] rows (page, KV head, block)
  const int32_t* miss_counts;  // [regions]
  int64_t head_block_bytes;    // a multiple of 16, like the strides
  int64_t cache_block_stride;  // bytes
  int64_t cache_head_stride;
  int32_t num_regions;         // requests times KV heads
  int32_t max_blocks;          // K
  int32_t num_heads;
};

/// Whole pages (all KV heads), either direction.
struct CopyPagesArgs {
  const void* source;
  void* target;
  const int32_t* pairs;   // [n, 2] rows (page of source, page of target)
  int64_t page_bytes;     // a multiple of 16, like the strides
  int64_t source_stride;  // bytes from page to page
  int64_t target_stride;
  int32_t num_pairs;
};

inline __host__ __device__ int pieces_of(int64_t bytes) {
  return static_cast<int>((bytes / kVectorBytes + kPieceVectors - 1) / kPieceVectors);
}

/// One warp copies piece `piece` of the `bytes` at `source`.
__device__ inline void copy_piece(const char* source, char* target, int64_t bytes, int piece) {
  const int lane = threadIdx.x % kWarp;
  const int64_t first = static_cast<int64_t>(piece) * kPieceVectors + lane;
  const int64_t count = bytes / kVectorBytes;
  const int4* from = reinterpret_cast<const int4*>(source);
  int4* to = reinterpret_cast<int4*>(target);
  int4 vectors[kVectorsInFlight];
#pragma unroll
  for (int v = 0; v < kVectorsInFlight; ++v) {
    if (first + v * kWarp < count) vectors[v] = __ldcs(from + first + v * kWarp);
  }
#pragma unroll
  for (int v = 0; v < kVectorsInFlight; ++v) {
    if (first + v * kWarp < count) to[first + v * kWarp] = vectors[v];
  }
}

/// The first of the `count` ascending `ends` that exceeds `value`.
__device__ inline int first_above(const int32_t* ends, int count, int value) {
  int lo = 0, hi = count - 1;
  while (lo < hi) {
    const int middle = (lo + hi) / 2;
    if (ends[middle] > value) {
      hi = middle;
    } else {
      lo = middle + 1;
    }
  }
  return lo;
}

/// A warp copies piece `piece` of the head-block that a row of `misses` names.
__device__ inline void gather_piece(const GatherMissesArgs& a, const int32_t* row, int piece) {
  const int64_t page = row[0], head = row[1], block = row[2];
  copy_piece(static_cast<const char*>(a.host) + (page * a.num_heads + head) * a.head_block_bytes,
             static_cast<char*>(a.cache) + block * a.cache_block_stride +
                 head * a.cache_head_stride,
             a.head_block_bytes, piece);
}

/// Block `rank` of `size` copies its share of the misses of a region.
__device__ inline void gather_region(const GatherMissesArgs& a, int64_t region, int rank, int size) {
  const int pieces = pieces_of(a.head_block_bytes), warps = blockDim.x / kWarp;
  const int units = a.miss_counts[region] * pieces;
  const int32_t* rows = a.misses + region * a.max_blocks * 3;
  for (int unit = threadIdx.x / kWarp * size + rank; unit < units; unit += warps * size) {
    gather_piece(a, rows + unit / pieces * 3, unit % pieces);
  }
}

/// A fixed grid whose warps take the pieces of all misses in turn.
[[maybe_unused]] static __global__ void __launch_bounds__(kCopyThreads)
    gather_misses_kernel(const GatherMissesArgs a) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  int32_t* ends = reinterpret_cast<int32_t*>(shared_memory);  // [regions] running sum of counts
  int32_t* warp_totals = ends + a.num_regions;

  int total = 0;
  for (int first = 0; first < a.num_regions; first += blockDim.x) {
    const int region = first + static_cast<int>(threadIdx.x);
    const int count = region < a.num_regions ? a.miss_counts[region] : 0;
    const Scan scan = block_scan(count, warp_totals);
    if (region < a.num_regions) ends[region] = total + scan.before + count;
    total += scan.total;
  }
  __syncthreads();

  const int pieces = pieces_of(a.head_block_bytes);
  const int units = total * pieces;  // of 2 KiB: 32 bits name more than a host has
  const int stride = static_cast<int>(gridDim.x * blockDim.x) / kWarp;
  for (int unit = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) / kWarp; unit < units;
       unit += stride) {
    const int miss = unit / pieces, piece = unit % pieces;
    const int region = first_above(ends, a.num_regions, miss);
    const int rank = miss - (region > 0 ? ends[region - 1] : 0);
    const int32_t* row = a.misses + (static_cast<int64_t>(region) * a.max_blocks + rank) * 3;
    gather_piece(a, row, piece);
  }
}

[[maybe_unused]] static __global__ void __launch_bounds__(kCopyThreads)
    copy_pages_kernel(const CopyPagesArgs a) {
  const int pieces = pieces_of(a.page_bytes);
  const int64_t units = static_cast<int64_t>(a.num_pairs) * pieces;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarp);
  for (int64_t unit = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
       unit < units; unit += stride) {
    const int32_t* pair = a.pairs + unit / pieces * 2;
    copy_piece(static_cast<const char*>(a.source) + pair[0] * a.source_stride,
               static_cast<char*>(a.target) + pair[1] * a.target_stride, a.page_bytes,
               static_cast<int>(unit % pieces));
  }
}

}  // namespace sentencekv
