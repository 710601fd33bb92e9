// SPDX-License-Identifier: Apache-2.0
// Slot lookup with LRU. Defined by sentencekv_vllm/ops/resolve_residency.py; tensors: types.py.
#pragma once

#include <climits>
#include <cstdint>

#include "block_scan.cuh"

namespace sentencekv {

/// S requests, H KV heads, K selected head-blocks at most, R slots per request.
/// Strides are in elements; where none is named, rows are contiguous.
struct ResolveResidencyArgs {
  const int32_t* blocks;          // [S, H, K] selected history blocks, ascending
  const float* coverage;          // [S, H]
  const int32_t* pages;           // [S, .] page of each history block
  const int32_t* private_blocks;  // [S, R]
  const int32_t* budget_blocks;   // [S] at most K
  const int32_t* history_lo;      // [S] first column of the table that is written
  const int32_t* step;            // [1]; read on the device, so that a replayed graph sees it
  int32_t* page_slot;             // [P, H]
  int32_t* slot_page;             // [B, H]
  int32_t* slot_stamp;            // [B, H]
  int32_t* head_tables;           // [S, H, .] of slot * H + h
  int32_t* misses;                // [S, H, K, 3] rows (page, KV head, block), in selection order
  int32_t* miss_counts;           // [S, H] rows of `misses` that are valid
  unsigned long long* hit_totals;   // [S] added to
  unsigned long long* miss_totals;  // [S] added to
  float* coverage_totals;           // [S] added to: the mean over KV heads
  int64_t pages_stride, private_stride, table_stride, table_head_stride;
  int32_t num_requests, num_heads, max_blocks, num_slots;
};

constexpr int kMaxResolveThreads = 512;

/// Stamps are read four at a time.
__host__ __device__ inline int padded(int num_slots) { return (num_slots + 3) / 4 * 4; }

inline size_t resolve_shared_bytes(const ResolveResidencyArgs& a) {
  return sizeof(int32_t) * (padded(a.num_slots) + a.max_blocks + kMaxResolveThreads / kWarp);
}

/// One block of threads gives the selection of KV head h of request s its slots. A page and a slot
/// belong to one request, so blocks share nothing but the totals. Other threads may read the misses
/// after a barrier.
__device__ inline void resolve_residency(const ResolveResidencyArgs& a,
                                        unsigned char* shared_memory, int h, int s) {
  const int padded_slots = padded(a.num_slots);
  int32_t* stamps = reinterpret_cast<int32_t*>(shared_memory);  // [padded_slots]
  int32_t* missing = stamps + padded_slots;                     // [K] positions in the selection
  int32_t* warp_totals = missing + a.max_blocks;

  const int heads = a.num_heads;
  const int64_t region = static_cast<int64_t>(s) * heads + h;
  const int32_t* blocks = a.blocks + region * a.max_blocks;
  const int32_t* pages = a.pages + s * a.pages_stride;
  const int32_t* private_blocks = a.private_blocks + s * a.private_stride;
  int32_t* table =
      a.head_tables + s * a.table_stride + h * a.table_head_stride + a.history_lo[s];
  const int budget = a.budget_blocks[s], step = *a.step;
  const auto at = [heads, h](int row) { return static_cast<int64_t>(row) * heads + h; };

  int num_missing = 0;
  for (int first = 0; first < budget; first += blockDim.x) {
    const int k = first + static_cast<int>(threadIdx.x);
    bool miss = false;
    if (k < budget) {
      const int slot = a.page_slot[at(pages[blocks[k]])];
      miss = slot < 0;
      if (!miss) {
        a.slot_stamp[at(slot)] = step;
        table[k] = slot * heads + h;
      }
    }
    const Scan scan = block_scan(miss, warp_totals);
    if (miss) missing[num_missing + scan.before] = k;
    num_missing += scan.total;
  }
  if (threadIdx.x == 0) {
    a.miss_counts[region] = num_missing;
    atomicAdd(&a.hit_totals[s], static_cast<unsigned long long>(budget - num_missing));
    atomicAdd(&a.miss_totals[s], static_cast<unsigned long long>(num_missing));
  }
  if (num_missing == 0) return;

  // The barriers of the last scan made the stamps of the hits visible.
  for (int i = threadIdx.x; i < padded_slots; i += blockDim.x) {
    const int stamp = i < a.num_slots ? a.slot_stamp[at(private_blocks[i])] : step;
    stamps[i] = stamp == step ? INT_MAX : stamp;  // in use: never a victim
  }
  __syncthreads();
  for (int i = threadIdx.x; i < a.num_slots; i += blockDim.x) {
    const int stamp = stamps[i];
    if (stamp == INT_MAX) continue;
    // The rank by (stamp, position): a quadratic count beats a sort at a few hundred slots.
    int rank = 0;
    for (int j = 0; j < padded_slots; j += 4) {
      const int4 other = *reinterpret_cast<const int4*>(stamps + j);
      rank += other.x < stamp + (j < i);
      rank += other.y < stamp + (j + 1 < i);
      rank += other.z < stamp + (j + 2 < i);
      rank += other.w < stamp + (j + 3 < i);
    }
    if (rank >= num_missing) continue;
    const int k = missing[rank], page = pages[blocks[k]], slot = private_blocks[i];
    const int former = a.slot_page[at(slot)];
    if (former >= 0) a.page_slot[at(former)] = -1;
    a.slot_page[at(slot)] = page;
    a.page_slot[at(page)] = slot;
    a.slot_stamp[at(slot)] = step;
    table[k] = slot * heads + h;
    int32_t* row = a.misses + (region * a.max_blocks + rank) * 3;
    row[0] = page;
    row[1] = h;
    row[2] = slot;
  }
}

/// Grid (H, S).
[[maybe_unused]] static __global__ void __launch_bounds__(kMaxResolveThreads)
    resolve_residency_kernel(const ResolveResidencyArgs a) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const int h = blockIdx.x, s = blockIdx.y;
  resolve_residency(a, shared_memory, h, s);
  if (threadIdx.x == 0 && h == 0) {
    float sum = 0;
    for (int other = 0; other < a.num_heads; ++other) {
      sum += a.coverage[static_cast<int64_t>(s) * a.num_heads + other];
    }
    a.coverage_totals[s] += sum / a.num_heads;
  }
}

}  // namespace sentencekv
