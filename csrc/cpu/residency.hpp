// SPDX-License-Identifier: Apache-2.0
// ops/resolve_residency.py and ops/swap_blocks.py for one request and KV head.
#pragma once

#include <algorithm>
#include <cstdint>

#include "args.hpp"
#include "quantize_pages.hpp"
#include "scratch.hpp"

namespace sentencekv::cpu {

// Turns the selected history blocks into the head's table entries, `slot * H + h`, and lists
// in scratch.missing the positions whose slots are still to be filled.
inline Status resolve(const Pools& pools, const Request& request, int64_t head,
                      const int32_t* blocks, Scratch& scratch, int32_t* table, int64_t& misses) {
  const int64_t heads = pools.heads;
  int32_t* missing = scratch.missing.reserve(request.budget);
  misses = 0;
  for (int64_t k = 0; k < request.budget; ++k) {
    const int64_t page = request.pages[blocks[k]];
    const int64_t slot = pools.page_slot[page * heads + head];
    if (slot < 0) {
      missing[misses++] = static_cast<int32_t>(k);
      continue;
    }
    table[k] = static_cast<int32_t>(slot * heads + head);
    pools.slot_stamp[slot * heads + head] = request.step;
  }
  if (misses == 0) return Status::kOk;

  uint64_t* victims = scratch.victims.reserve(request.working_set);
  int64_t available = 0;
  for (int64_t i = 0; i < request.working_set; ++i) {
    const int64_t block = request.private_blocks[i];
    const int32_t stamp = pools.slot_stamp[block * heads + head];
    const uint64_t age = static_cast<uint32_t>(stamp) ^ 0x80000000u;  // -1 comes first
    if (stamp != request.step) victims[available++] = age << 32 | static_cast<uint64_t>(i);
  }
  if (available < misses) return Status::kWorkingSetTooSmall;
  std::partial_sort(victims, victims + misses, victims + available);
  for (int64_t m = 0; m < misses; ++m) {
    const int64_t block = request.private_blocks[static_cast<uint32_t>(victims[m])];
    const int64_t page = request.pages[blocks[missing[m]]], slot = block * heads + head;
    const int64_t former = pools.slot_page[slot];
    if (former >= 0) pools.page_slot[former * heads + head] = -1;
    pools.slot_page[slot] = static_cast<int32_t>(page);
    pools.page_slot[page * heads + head] = static_cast<int32_t>(block);
    pools.slot_stamp[slot] = request.step;
    table[missing[m]] = static_cast<int32_t>(slot);
  }
  return Status::kOk;
}

inline void swap_in(const Pools& pools, const Request& request, int64_t head,
                    const int32_t* blocks, Scratch& scratch, const int32_t* table,
                    int64_t misses) {
  const int32_t* missing = scratch.missing.data();
  for (int64_t m = 0; m < misses; ++m)
    load_page(pools, request.pages[blocks[missing[m]]], table[missing[m]] / pools.heads, head);
}

}  // namespace sentencekv::cpu
