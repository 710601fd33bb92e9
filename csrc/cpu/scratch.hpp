// SPDX-License-Identifier: Apache-2.0
// What a thread keeps between (request, KV head) pairs: no allocation in steady state.
#pragma once

#include "buffer.hpp"
#include "quantize.hpp"
#include "scan.hpp"

namespace sentencekv::cpu {

constexpr int64_t kMaxGroup = 64;

struct Scratch {
  QuantizedQuery query;
  Buffer<float> plain_query;  // [G, D]
  Buffer<float> spread_query;  // [G, D]
  ScanTables tables[(kMaxGroup + kScanHeads - 1) / kScanHeads];
  Buffer<int64_t> rows;       // of the request's sentences
  Buffer<const uint8_t*> stripes;
  Buffer<int16_t> dots;        // [G, tokens of a chunk]
  Buffer<int32_t> units;       // [tokens of a block]
  Buffer<int32_t> tops, sums;  // [G, indexed blocks]
  Buffer<int64_t> weights;     // [indexed blocks]
  Buffer<int32_t> probabilities;
  Buffer<uint64_t> keys;       // sort keys of history blocks
  Buffer<float> best;          // [G, sentences] logits before the head's factor
  Buffer<float> spread;        // [G, sentences] what the second vector adds to them
  Buffer<float> scores, mass;  // [sentences]
  Buffer<float> winners;       // best score of each team of sentences
  Buffer<uint64_t> victims;    // sort keys
  Buffer<uint64_t> taken;      // a bit for each history block
  Buffer<int32_t> missing;     // positions in the selection
};

}  // namespace sentencekv::cpu
