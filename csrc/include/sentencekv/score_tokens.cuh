// SPDX-License-Identifier: Apache-2.0
// Largest token estimate of each sentence, from sign bits. Defined by
// sentencekv_vllm/ops/score_sentences.py; triton_kernels/score_tokens.py leaves the same.
//
// A query head's levels, six-bit integers, are six planes of bits, and a product of levels with
// sign bits is a weighted sum of counts of common ones: tensor cores count the planes of four
// query heads against sixteen tokens in three instructions, and the sign bits need no unpacking.
#pragma once

#include <climits>

#include "granule.hpp"
#include "warp.cuh"

namespace sentencekv {

constexpr int kTileTokens = 32;      // a warp scores at a time
constexpr int kChunkTokens = 1024;   // a block scores; `partial` has an entry for each chunk
constexpr int kScoreThreads = 128;
constexpr int kScoreWarps = kScoreThreads / kWarp;
constexpr int kWarpTokens = kChunkTokens / kScoreWarps;
constexpr int kPlanes = 6;
constexpr int kSetHeads = 4;         // query heads whose planes fill the columns of kSetTiles
constexpr int kSetTiles = kSetHeads * kPlanes / 8;
constexpr int kStepBytes = 16;       // byte rows (of 8 channels) of one product
constexpr int kMaxByteRows = 32;
constexpr int kMaxGroup = 8;
constexpr int kMaxPlaneWords = kMaxGroup / kSetHeads * kSetTiles * (kMaxByteRows / kStepBytes);
constexpr int kOverTokens = 4 | 8 | 16;  // bits of the lane by which the tokens of a tile differ

/// S requests, H KV heads, G query heads a KV head, E channels, N tokens a page.
struct ScoreTokensArgs {
  const uint8_t* bits;           // [P, H, E / 8, N]
  const uint16_t* scales;        // [P, H, N] bf16 or fp16
  const int8_t* levels;          // [S, H * G, E]
  const float* steps;            // [S, H * G]
  const int32_t* pages;          // [S, .]
  const int32_t* num_pages;      // [S]
  const int32_t* sentence_ends;  // [S, .]
  const int32_t* num_sentences;  // [S]
  const int32_t* first;          // [S, .] sentence that holds token c * kGranule
  const int32_t* history_lo;     // [S] blocks
  const int32_t* history_hi;     // [S]
  const int32_t* index_kind;     // [S]
  const int32_t* reduce;         // [S]
  const int32_t* byte_rows;      // [S] rows of eight channels that are read
  int32_t* best;                 // [S, H, G, I] ordered floats, raised
  float* partial;                // [S, H, chunks, 2, G] written: top and sum of resident tokens
  int64_t pages_stride, ends_stride, first_stride;
  float scale;
  int32_t num_requests, num_heads, group, num_byte_rows, block_size;
  int32_t max_sentences, max_chunks, num_chunks, scales_are_bf16;
  int32_t token_bits, softmax_mean;  // values of the enumerations
};

inline size_t score_shared_bytes(const ScoreTokensArgs& a) {
  return sizeof(float) * kScoreWarps * 2 * kMaxGroup + sizeof(int32_t) * kMaxByteRows +
         sizeof(uint32_t) * kMaxPlaneWords * kWarp + static_cast<size_t>(a.group) * a.num_byte_rows * 8;
}

__device__ inline float half_to_float(uint16_t half) {
#ifdef __CUDACC__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
#else
  const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Exponents of halves are 112 less; a product also restores subnormal ones.
  return float_of(sign | bits_of(float_of(magnitude << 13) * float_of(0x77800000u)));
#endif
}

/// Bytes k of the four words, in order, for k of 0 to 3.
__device__ inline void transpose_bytes(const uint32_t (&words)[4], uint32_t (&columns)[4]) {
  const uint32_t low = __byte_perm(words[0], words[1], 0x5140);
  const uint32_t high = __byte_perm(words[0], words[1], 0x7362);
  const uint32_t low2 = __byte_perm(words[2], words[3], 0x5140);
  const uint32_t high2 = __byte_perm(words[2], words[3], 0x7362);
  columns[0] = __byte_perm(low, low2, 0x5410);
  columns[1] = __byte_perm(low, low2, 0x7632);
  columns[2] = __byte_perm(high, high2, 0x5410);
  columns[3] = __byte_perm(high, high2, 0x7632);
}

/// Bit `plane` of four bytes, as the low four bits.
__device__ inline uint32_t plane_of(uint32_t bytes, int plane) {
  return ((bytes >> plane & 0x01010101u) * 0x01020408u) >> 24 & 15u;
}

/// ops.choose_channels: whether each byte row is among the `wanted` ones with the most energy.
__device__ inline void choose_rows(const int8_t* levels, int group, int num_rows, int wanted,
                                   int32_t* chosen, int32_t* energies) {
  const int row = threadIdx.x;
  if (row < num_rows) {
    int energy = 0;
    for (int g = 0; g < group; ++g) {
      for (int b = 0; b < 8; ++b) {
        const int level = levels[(g * num_rows + row) * 8 + b];
        energy += level * level;
      }
    }
    energies[row] = energy;
  }
  __syncthreads();
  if (row < num_rows) {
    int rank = 0;
    for (int other = 0; other < num_rows; ++other) {
      rank += energies[other] > energies[row] || (energies[other] == energies[row] && other < row);
    }
    chosen[row] = rank < wanted;
  }
  __syncthreads();
}

/// The byte rows of one product: byte i of the word that lane quarter q contributes is row
/// `first + i * stride`, so that the quarters of one load are neighbours.
template <bool kFull>
struct StepRows {
  int first, stride, end;

  __device__ StepRows(int step, int q, int num_rows) {
    const int begin = step * kStepBytes;
    end = kFull ? begin + kStepBytes : min(num_rows, begin + kStepBytes);
    stride = kFull ? kStepBytes / 4 : (end - begin + 3) / 4;
    first = q < stride ? begin + q : end;
  }

  __device__ int row(int i) const { return first + i * stride; }
  __device__ bool has(int i) const { return kFull || row(i) < end; }
};

/// Where the four tokens lie that a lane loads of a tile.
struct LaneTokens {
  int page, column;  // index into the request's pages, token in the page

  __device__ LaneTokens(int token, int block_size)
      : page(token / block_size), column(token % block_size) {}

  __device__ void advance(int block_size) {
    column += kTileTokens;
    for (; column >= block_size; ++page) column -= block_size;  // a few times; no division
  }
};

/// Sign bits and scales of four tokens.
template <int kSteps, bool kFull>
struct TileLoad {
  uint32_t words[kSteps][4];
  uint32_t scales[2];

  __device__ void read(const ScoreTokensArgs& a, const int32_t* pages, int h, int q,
                       const LaneTokens& tokens, bool valid) {
    const int n = a.block_size, num_rows = a.num_byte_rows;
    const int page = valid ? pages[tokens.page] : 0;
    const int64_t head_page = static_cast<int64_t>(page) * a.num_heads + h;
    const uint8_t* bits = a.bits + head_page * num_rows * n + tokens.column;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const StepRows<kFull> rows(step, q, num_rows);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool there = valid && rows.has(i);
        words[step][i] = there ? *reinterpret_cast<const uint32_t*>(bits + rows.row(i) * n) : 0;
      }
    }
    const uint32_t* pair =
        reinterpret_cast<const uint32_t*>(a.scales + head_page * n + tokens.column);
    scales[0] = valid ? pair[0] : 0;
    scales[1] = valid ? pair[1] : 0;
  }

  __device__ float scale(const ScoreTokensArgs& a, int k) const {
    const uint32_t both = scales[k / 2];
    if (a.scales_are_bf16) return float_of(k % 2 ? both & 0xffff0000u : both << 16);
    return half_to_float(static_cast<uint16_t>(both >> k % 2 * 16));
  }
};

/// A warp's walk through the sentences of consecutive tokens; ends are loaded a warp at a time.
struct SentenceWalk {
  const int32_t* ends;
  int count, index, window, lane_end;

  __device__ SentenceWalk(const int32_t* ends, int count, int index)
      : ends(ends), count(count), index(index) {
    load();
  }

  __device__ void load() {
    const int mine = index + static_cast<int>(threadIdx.x) % kWarp;
    window = index;
    lane_end = mine < count ? ends[mine] : INT_MAX;
  }

  __device__ int end() const { return __shfl_sync(kAllLanes, lane_end, index - window); }

  __device__ void advance() {
    if (++index - window == kWarp) load();
  }
};

/// Grid (chunks, S * H). kSets: query heads in fours; kSteps: channels in 128s; kFull: all of them.
template <int kSets, int kSteps, bool kFull>
static __global__ void __launch_bounds__(kScoreThreads, kFull && kSets == 1 ? 8 : 4)
    score_tokens_kernel(const ScoreTokensArgs a) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  float* merged = reinterpret_cast<float*>(shared_memory);  // [warps, 2, kMaxGroup]
  int32_t* chosen = reinterpret_cast<int32_t*>(merged + kScoreWarps * 2 * kMaxGroup);
  uint32_t* plane_words = reinterpret_cast<uint32_t*>(chosen + kMaxByteRows);  // [., lanes]
  int8_t* levels = reinterpret_cast<int8_t*>(plane_words + kMaxPlaneWords * kWarp);  // [G, E]

  const int s = blockIdx.y / a.num_heads, h = blockIdx.y % a.num_heads;
  const int num_tokens = a.num_pages[s] * a.block_size;
  const int chunk_begin = blockIdx.x * kChunkTokens;
  if (a.index_kind[s] != a.token_bits || chunk_begin >= num_tokens) return;
  const int64_t head = static_cast<int64_t>(s) * a.num_heads + h;
  const int group = a.group, num_rows = a.num_byte_rows;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int row = lane / 4, q = lane % 4;
  const int32_t* pages = a.pages + s * a.pages_stride;

  const int warp_begin = chunk_begin + warp * kWarpTokens;
  const int warp_end = min(warp_begin + kWarpTokens, num_tokens);
  LaneTokens tokens(warp_begin + 4 * row, a.block_size);
  TileLoad<kSteps, kFull> tile;  // on its way while the planes are made
  tile.read(a, pages, h, q, tokens, warp_begin + 4 * row < num_tokens);

  const uint32_t* level_words = reinterpret_cast<const uint32_t*>(a.levels + head * group * num_rows * 8);
#pragma unroll 1
  for (int i = threadIdx.x; i < group * num_rows * 2; i += kScoreThreads) {
    reinterpret_cast<uint32_t*>(levels)[i] = level_words[i];
  }
  if (threadIdx.x < kMaxByteRows) chosen[threadIdx.x] = 1;
  __syncthreads();
  if (a.byte_rows[s] < num_rows) {
    choose_rows(levels, group, num_rows, a.byte_rows[s], chosen, reinterpret_cast<int32_t*>(merged));
  }

  // Column 2 i + j of tile t is plane 2 t + j of the set's head i: a lane receives all planes of
  // one. A warp makes some of the words, and all warps use all.
#pragma unroll 1
  for (int word = warp; word < kSets * kSetTiles * kSteps; word += kScoreWarps) {
    const int step = word % kSteps, t = word / kSteps % kSetTiles, set = word / kSteps / kSetTiles;
    const StepRows<kFull> rows(step, q, num_rows);
    const int column_head = set * kSetHeads + row / 2, plane = 2 * t + row % 2;
    const int8_t* column = levels + (column_head < group ? column_head : 0) * num_rows * 8;
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int source = rows.has(i) ? rows.row(i) : 0;
      const bool there = rows.has(i) && column_head < group && chosen[source];
      const uint32_t* pair = reinterpret_cast<const uint32_t*>(column + source * 8);
      const uint32_t low = there ? pair[0] : 0, high = there ? pair[1] : 0;
      bits |= (plane_of(low, plane) | plane_of(high, plane) << 4) << 8 * i;
    }
    plane_words[word * kWarp + lane] = bits;
  }
  __syncthreads();
  uint32_t planes[kSets][kSetTiles][kSteps];
  int level_sum[kSets];
  float unit[kSets];
#pragma unroll
  for (int set = 0; set < kSets; ++set) {
#pragma unroll
    for (int t = 0; t < kSetTiles; ++t) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int word = (set * kSetTiles + t) * kSteps + step;
        planes[set][t][step] = plane_words[word * kWarp + lane];
      }
    }
    const int mine = set * kSetHeads + q;
    unit[set] = mine < group ? a.scale * a.steps[head * group + mine] : 0.0f;
  }

  /// Products of levels and bits for rows `row` and `row + 8` of the tiles' tokens.
  const auto products = [&](int set, const uint32_t (&upper)[kSteps], const uint32_t (&lower)[kSteps],
                            int& first_row, int& second_row) {
    first_row = second_row = 0;
#pragma unroll
    for (int t = 0; t < kSetTiles; ++t) {
      int counts[4] = {0, 0, 0, 0};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        add_common_bits(counts, upper[step], lower[step], planes[set][t][step]);
      }
      const int low = 1 << 2 * t, high = t + 1 == kSetTiles ? -2 * low : 2 * low;  // the sign's
      first_row += low * counts[0] + high * counts[1];
      second_row += low * counts[2] + high * counts[3];
    }
  };

  uint32_t ones[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) ones[step] = 0xffffffffu;
#pragma unroll
  for (int set = 0; set < kSets; ++set) {
    int same;
    products(set, ones, ones, level_sum[set], same);
  }

  const int lo = a.history_lo[s] * a.block_size, hi = a.history_hi[s] * a.block_size;
  const bool softmax = a.reduce[s] == a.softmax_mean;
  int32_t* best = a.best + head * group * a.max_sentences;
  LogSum resident[kSets];
  float largest[kSets];
#pragma unroll
  for (int set = 0; set < kSets; ++set) {
    resident[set] = LogSum::none();
    largest[set] = minus_infinity();
  }

  if (warp_begin < num_tokens) {
    SentenceWalk walk(a.sentence_ends + s * a.ends_stride, a.num_sentences[s],
                      (a.first + s * a.first_stride)[warp_begin / kGranule]);
    for (int begin = warp_begin; begin < warp_end; begin += kTileTokens) {
      const int token = begin + 4 * row;  // the first of the lane's four
      uint32_t columns[kSteps][4];
      float scales[4];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) transpose_bytes(tile.words[step], columns[step]);
#pragma unroll
      for (int k = 0; k < 4; ++k) scales[k] = tile.scale(a, k);
      tokens.advance(a.block_size);
      tile.read(a, pages, h, q, tokens, token + kTileTokens < warp_end);
      float logits[kSets][4];
#pragma unroll
      for (int set = 0; set < kSets; ++set) {
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          uint32_t upper[kSteps], lower[kSteps];
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
            upper[step] = columns[step][2 * pair];
            lower[step] = columns[step][2 * pair + 1];
          }
          int dots[2];
          products(set, upper, lower, dots[0], dots[1]);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int k = 2 * pair + j;
            // Signs are 2 * bit - 1.
            logits[set][k] = unit[set] * (static_cast<float>(2 * dots[j] - level_sum[set]) * scales[k]);
          }
        }
      }

      const int tile_end = min(begin + kTileTokens, num_tokens);
      for (int position = begin; position < tile_end;) {
        const bool known = walk.index < walk.count;
        const int end = walk.end(), stop = min(end, tile_end);
        const int from = max(position, lo), to = known ? min(stop, hi) : 0;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const bool member = token + k >= from && token + k < to;
#pragma unroll
          for (int set = 0; set < kSets; ++set) {
            largest[set] = member ? fmaxf(largest[set], logits[set][k]) : largest[set];
          }
        }
        const bool leaves = known && (end <= tile_end || tile_end == warp_end);
        if (leaves) {
#pragma unroll
          for (int set = 0; set < kSets; ++set) {
            const float value = max_over(largest[set], kOverTokens);
            const int g = set * kSetHeads + q;
            if (row == 0 && g < group && value > minus_infinity()) {
              atomicMax(best + static_cast<int64_t>(g) * a.max_sentences + walk.index, to_ordered(value));
            }
            largest[set] = minus_infinity();
          }
        }
        position = stop;
        if (known && end <= tile_end) walk.advance();
      }

      if (softmax && (begin < lo || begin + kTileTokens > hi)) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (token + k < num_tokens && (token + k < lo || token + k >= hi)) {
#pragma unroll
            for (int set = 0; set < kSets; ++set) resident[set].add(logits[set][k]);
          }
        }
      }
    }
  }

  float* totals = a.partial + (head * a.max_chunks + blockIdx.x) * 2 * group;
  if (!softmax || (chunk_begin >= lo && min(chunk_begin + kChunkTokens, num_tokens) <= hi)) {
    if (warp == 0 && lane < group) {
      totals[lane] = minus_infinity();
      totals[group + lane] = 0.0f;
    }
    return;
  }
  __syncthreads();  // `merged` may hold energies
#pragma unroll
  for (int set = 0; set < kSets; ++set) {
    resident[set].merge_over(kOverTokens);
    const int g = set * kSetHeads + q;
    if (row == 0) {
      merged[(warp * 2 + 0) * kMaxGroup + g] = resident[set].top;
      merged[(warp * 2 + 1) * kMaxGroup + g] = resident[set].total;
    }
  }
  __syncthreads();
  const int g = threadIdx.x;
  if (g < group) {
    LogSum sum = LogSum::none();
    for (int w = 0; w < kScoreWarps; ++w) {
      sum.merge({merged[(w * 2 + 0) * kMaxGroup + g], merged[(w * 2 + 1) * kMaxGroup + g]});
    }
    totals[g] = sum.top;
    totals[group + g] = sum.total;
  }
}

}  // namespace sentencekv
