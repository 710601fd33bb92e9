// SPDX-License-Identifier: Apache-2.0
// Largest token estimate of each sentence, from sign bits. Defined by
// sentencekv_vllm/ops/score_sentences.py; triton_kernels/score_tokens.py leaves the same.
//
// A query head's levels, six-bit integers, are six planes of bits, and a product of levels with
// sign bits is a weighted sum of counts of common ones: tensor cores count the planes of four
// query heads against sixteen tokens in three instructions, and the sign bits need no unpacking.
//
// A warp scores 128 tokens. Lane 4 r + q loads 16 consecutive tokens (granule r of the warp) with
// one 16-byte load a byte row, and receives their products with query head q of each four. What
// it needs arrives in two waves of loads: what depends on the thread alone (tables, query), and
// what those tell (bits, scales, sentence ends); the planes are made while the second is on its way.
#pragma once

#include <climits>

#include "granule.hpp"
#include "quantize_query.cuh"
#include "warp.cuh"

namespace sentencekv {

constexpr int kWarpTokens = 128;     // a granule for each four lanes
constexpr int kScoreThreads = 256;
constexpr int kScoreWarps = kScoreThreads / kWarp;
constexpr int kChunkTokens = kWarpTokens * kScoreWarps;  // `partial` has an entry for each chunk
constexpr int kSetHeads = 4;         // query heads whose planes fill the columns of kSetTiles
constexpr int kSetTiles = kSetHeads * kPlanes / 8;
constexpr int kStepBytes = 16;       // byte rows (of 8 channels) of one product
constexpr int kMaxByteRows = 32;
constexpr int kMaxWords = kMaxByteRows / 4;  // of a plane
constexpr int kMaxGroup = 8;
constexpr int kOverTokens = 4 | 8 | 16;  // bits of the lane by which the granules of a warp differ

/// S requests, H KV heads, G query heads a KV head, D head_dim, E channels, N tokens a page.
struct ScoreTokensArgs {
  const uint8_t* bits;           // [P, H, E / 8, N]
  const uint16_t* scales;        // [P, H, N] bf16 or fp16
  const void* query;             // [S, H * G, D] of `query_type`, or null: `levels` and `steps` hold it
  const float* rotation;         // [D, D] of ops.rotation for a power of two; only with a query
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
  int32_t* best;                 // [S, H, I, G] ordered floats, raised
  float* partial;                // [S, H, chunks, 2, G] written: top and sum of resident tokens
  int64_t pages_stride, ends_stride, first_stride;
  float scale;
  int32_t num_requests, num_heads, group, num_byte_rows, block_size;
  int32_t max_pages, max_sentences, max_chunks, scales_are_bf16, query_type;
  int32_t token_bits, softmax_mean;  // values of the enumerations
  int32_t granules_per_page;         // these two are filled in by the launcher
  uint32_t page_factor;              // see `reciprocal`
};

/// What the warps of a block share.
struct ScoreShared {
  uint32_t planes[kMaxGroup][kPlanes][kMaxWords];
  float units[kMaxGroup];            // the logits' scale times the query's step
  uint32_t row_masks[kMaxWords];     // of the chosen byte rows, as in the words of a plane
  int32_t chosen[kMaxByteRows], energies[kMaxByteRows];
  float merged[kScoreWarps][2][kMaxGroup];
  alignas(8) int8_t levels[kMaxGroup * kMaxByteRows * 8];  // [G, E]; where a query is rotated here,
                                                           // only if rows are chosen
};

/// Bytes k of the four words, in order, for k of 0 to 3.
__device__ inline void transpose_bytes(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
  const uint32_t low = __byte_perm(a, b, 0x5140), high = __byte_perm(a, b, 0x7362);
  const uint32_t low2 = __byte_perm(c, d, 0x5140), high2 = __byte_perm(c, d, 0x7362);
  a = __byte_perm(low, low2, 0x5410);
  b = __byte_perm(low, low2, 0x7632);
  c = __byte_perm(high, high2, 0x5410);
  d = __byte_perm(high, high2, 0x7632);
}

/// Bit `plane` of four bytes, as the low four bits.
__device__ inline uint32_t plane_of(uint32_t bytes, int plane) {
  return ((bytes >> plane & 0x01010101u) * 0x01020408u) >> 24 & 15u;
}

/// The byte rows of one product: byte i of the word that lane quarter q contributes is row
/// `first + i * stride`, so that the quarters of one load are neighbours.
struct StepRows {
  int first, stride, end;

  __device__ StepRows(int step, int q, int num_rows) {
    const int begin = step * kStepBytes;
    end = min(num_rows, begin + kStepBytes);
    stride = (end - begin + 3) / 4;
    first = q < stride ? begin + q : end;
  }

  __device__ int row(int i) const { return first + i * stride; }
  __device__ bool has(int i) const { return row(i) < end; }
};

/// ops.choose_channels: whether each byte row is among the `wanted` ones with the most energy.
__device__ inline void choose_rows(ScoreShared& shared, int group, int num_rows, int wanted) {
  const int row = threadIdx.x;
  if (row < num_rows) {
    int energy = 0;
#pragma unroll 1
    for (int g = 0; g < group; ++g) {
      for (int b = 0; b < 8; ++b) {
        const int level = shared.levels[(g * num_rows + row) * 8 + b];
        energy += level * level;
      }
    }
    shared.energies[row] = energy;
  }
  __syncthreads();
  if (row < num_rows) {
    const int32_t* energies = shared.energies;
    int rank = 0;
#pragma unroll 1
    for (int other = 0; other < num_rows; ++other) {
      rank += energies[other] > energies[row] || (energies[other] == energies[row] && other < row);
    }
    shared.chosen[row] = rank < wanted;
  }
  __syncthreads();
  const int word = threadIdx.x;
  if (word < kMaxWords) {
    const StepRows rows(word / 4, word % 4, num_rows);
    uint32_t mask = 0;
    for (int i = 0; i < 4; ++i) {
      if (rows.has(i) && shared.chosen[rows.row(i)]) mask |= 0xffu << 8 * i;
    }
    shared.row_masks[word] = mask;
  }
  __syncthreads();
}

/// The planes and units of all heads, from levels in memory.
__device__ inline void read_levels(const ScoreTokensArgs& a, ScoreShared& shared, int64_t head) {
  const int group = a.group, num_rows = a.num_byte_rows, words = group * num_rows * 2;
  const uint32_t* source = reinterpret_cast<const uint32_t*>(a.levels + head * group * num_rows * 8);
  uint32_t* copied = reinterpret_cast<uint32_t*>(shared.levels);
#pragma unroll 1
  for (int i = threadIdx.x; i < words; i += kScoreThreads) copied[i] = source[i];
  const int mine = threadIdx.x;
  if (mine < group) shared.units[mine] = a.scale * a.steps[head * group + mine];
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < group * kPlanes * kMaxWords; i += kScoreThreads) {
    const int word = i % kMaxWords, plane = i / kMaxWords % kPlanes, g = i / kMaxWords / kPlanes;
    const StepRows rows(word / 4, word % 4, num_rows);
    uint32_t bits = 0;
    for (int k = 0; k < 4; ++k) {
      if (!rows.has(k)) continue;
      const uint32_t* pair = copied + (g * num_rows + rows.row(k)) * 2;
      bits |= (plane_of(pair[0], plane) | plane_of(pair[1], plane) << 4) << 8 * k;
    }
    shared.planes[g][plane][word] = bits;
  }
}

/// The same from a warp's share of the queries, rotated here; warp g has head g.
template <int kPer>
__device__ inline void rotate_levels(const ScoreTokensArgs& a, ScoreShared& shared, int64_t head,
                                     bool keep_levels) {
  const int lane = threadIdx.x % kWarp, g = threadIdx.x / kWarp;
  if (g >= a.group) return;
  LaneQuery<kPer> query;
  query.read(a.query, a.query_type, head * a.group + g, a.rotation, lane);
  query.rotate(lane);
  int levels[kPer];
  const float step = query.quantize(levels);
  if (lane == 0) shared.units[g] = a.scale * step;
#pragma unroll
  for (int part = 0; part < (kPer + 3) / 4; ++part) {
    uint32_t mine = 0;  // lane 4 p + q keeps word q of plane p
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
#pragma unroll
      for (int q = 0; q < (kPer < 4 ? kPer : 4); ++q) {
        const uint32_t word = __ballot_sync(kAllLanes, levels[4 * part + q] >> p & 1);
        mine = lane == 4 * p + q ? word : mine;
      }
    }
    if (lane < 4 * kPlanes) shared.planes[g][lane / 4][4 * part + lane % 4] = mine;
  }
  if (!keep_levels) return;
#pragma unroll
  for (int j = 0; j < kPer; ++j) {
    shared.levels[g * kWarp * kPer + LaneQuery<kPer>::channel(lane, j)] = static_cast<int8_t>(levels[j]);
  }
}

/// A lane's granule: 16 tokens of a page, their bits and scales.
template <int kSteps>
struct Granule {
  int token, column, page, first;  // the first token, its block, that one's page, its sentence
  bool valid;
  int end0, end1;                  // ends of the first two sentences
  uint4 scales[2];
  uint32_t words[kSteps][4][4];    // byte row, then four tokens each

  /// Entries behind the request's own are anything; `fetch` does not use them.
  __device__ void find(const ScoreTokensArgs& a, int s, int chunk) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int granule = chunk * (kChunkTokens / kGranule) + warp * (kWarpTokens / kGranule) + lane / 4;
    token = granule * kGranule;
    column = a.granules_per_page == 1 ? granule : __umulhi(granule, a.page_factor);
    const int there = min(column, a.max_pages - 1);
    page = load_early(a.pages + s * a.pages_stride + there);
    first = load_early(a.first + s * a.first_stride + (column == there ? granule : 0));
  }

  /// Who has no token reads those of a page that is there.
  __device__ void fetch(const ScoreTokensArgs& a, const int32_t* ends, int count, int h, int num_rows,
                        int num_tokens, const int32_t* chosen) {
    const int q = threadIdx.x % 4, n = a.block_size, last = max(count - 1, 0);
    valid = token < num_tokens;
    end0 = ends[valid ? min(first, last) : 0];
    end1 = ends[valid ? min(first + 1, last) : 0];
    const int64_t head_page = static_cast<int64_t>(valid ? page : 0) * a.num_heads + h;
    const int in_page = valid ? token - column * n : 0;
    const uint8_t* bits = a.bits + head_page * num_rows * n + in_page;
    const uint4* vectors = reinterpret_cast<const uint4*>(a.scales + head_page * n + in_page);
    scales[0] = vectors[0];
    scales[1] = vectors[1];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const StepRows rows(step, q, num_rows);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int byte_row = min(rows.row(i), num_rows - 1);
        uint4 vector = {0, 0, 0, 0};  // of a row that is not chosen, whose planes are empty
        if (chosen == nullptr || chosen[byte_row]) {
          vector = *reinterpret_cast<const uint4*>(bits + byte_row * n);
        }
        words[step][i][0] = vector.x;
        words[step][i][1] = vector.y;
        words[step][i][2] = vector.z;
        words[step][i][3] = vector.w;
      }
    }
  }

  /// From then on words[.][k][c] has the bits of token 4 c + k.
  __device__ void transpose() {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        auto& w = words[step];
        transpose_bytes(w[0][c], w[1][c], w[2][c], w[3][c]);
      }
    }
  }

  __device__ float scale(int k, bool bf16) const {
    const uint4& half = scales[k / 8];
    const int word = k / 2 % 4;
    const uint32_t pair = word == 0 ? half.x : word == 1 ? half.y : word == 2 ? half.z : half.w;
    if (bf16) return float_of(k % 2 ? pair & 0xffff0000u : pair << 16);
    return half_to_float(static_cast<uint16_t>(pair >> k % 2 * 16));
  }
};

/// What a lane needs of the query heads of one set.
///
/// Column 2 i + j of tile t is plane 2 t + j of the set's head i: lane 4 r + q gets all planes of
/// head q of the set.
template <int kSteps>
struct HeadSet {
  uint32_t planes[kSetTiles][kSteps];
  int level_sum;
  float unit;

  __device__ void read(const ScoreShared& shared, int set, int group, int num_rows, bool choosing) {
    const int row = threadIdx.x % kWarp / 4, q = threadIdx.x % 4;
    const int column_head = set * kSetHeads + row / 2, g = set * kSetHeads + q;
#pragma unroll
    for (int t = 0; t < kSetTiles; ++t) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int at = 4 * step + q;
        const uint32_t word = shared.planes[min(column_head, group - 1)][2 * t + row % 2][at];
        const uint32_t mask = choosing ? shared.row_masks[at] : 0xffffffffu;
        const bool there = StepRows(step, q, num_rows).has(0) && column_head < group;
        planes[t][step] = there ? word & mask : 0;
      }
    }
    unit = g < group ? shared.units[g] : 0.0f;
    uint32_t ones[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) ones[step] = 0xffffffffu;
    int twice, same;
    products(0, ones, ones, twice, same);
    level_sum = twice / 2;
  }

  /// `start` plus twice the products of the levels and the bits of two tokens.
  __device__ void products(int start, const uint32_t (&upper)[kSteps],
                           const uint32_t (&lower)[kSteps], int& first, int& second) const {
    first = second = start;
#pragma unroll
    for (int t = 0; t < kSetTiles; ++t) {
      int counts[4] = {0, 0, 0, 0};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        add_common_bits(counts, upper[step], lower[step], planes[t][step]);
      }
      const int low = 2 << 2 * t, high = t + 1 == kSetTiles ? -2 * low : 2 * low;  // the sign's
      first += low * counts[0] + high * counts[1];
      second += low * counts[2] + high * counts[3];
    }
  }

  /// Logits of the granule's tokens, but for the unit, which is the same for all.
  __device__ void logits(const Granule<kSteps>& granule, bool bf16, float (&values)[kGranule]) const {
#pragma unroll
    for (int k = 0; k < kGranule; k += 2) {
      uint32_t upper[kSteps], lower[kSteps];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        upper[step] = granule.words[step][k % 4][k / 4];
        lower[step] = granule.words[step][k % 4 + 1][k / 4];
      }
      int dots[2];  // signs are 2 * bit - 1
      products(-level_sum, upper, lower, dots[0], dots[1]);
      values[k] = static_cast<float>(dots[0]) * granule.scale(k, bf16);
      values[k + 1] = static_cast<float>(dots[1]) * granule.scale(k + 1, bf16);
    }
  }
};

/// Blocks of threads that a multiprocessor holds at once.
template <int kSets, int kPer, int kSteps>
constexpr int kScoreBlocks = kSteps == 2 ? 1 : kSets == 1 && kPer == 4 ? 3 : 2;

/// Grid (blocks, H, S); a block takes chunks as far apart as there are blocks. kSets: query heads
/// in fours; kPer: 32 channels each of a query, which is rotated here; 0: levels are read, of at
/// most kSteps * 128 channels.
template <int kSets, int kPer, int kSteps>
static __global__ void __launch_bounds__(kScoreThreads, kScoreBlocks<kSets, kPer, kSteps>)
    score_tokens_kernel(const ScoreTokensArgs a) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  ScoreShared& shared = *reinterpret_cast<ScoreShared*>(shared_memory);
  const int h = blockIdx.y, s = blockIdx.z;
  const int64_t head = static_cast<int64_t>(s) * a.num_heads + h;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int row = lane / 4, q = lane % 4;
  const int group = a.group, num_rows = kPer ? 4 * kPer : a.num_byte_rows, n = a.block_size;
  int chunk = blockIdx.x;

  Granule<kSteps> granule;
  const int32_t kind = load_early(a.index_kind + s), known_pages = load_early(a.num_pages + s);
  const int32_t wanted = load_early(a.byte_rows + s), reduce = load_early(a.reduce + s);
  const int32_t lo_block = load_early(a.history_lo + s), hi_block = load_early(a.history_hi + s);
  const int32_t count = load_early(a.num_sentences + s);
  granule.find(a, s, chunk);
  const int num_tokens = known_pages * n;
  if (kind != a.token_bits || chunk * kChunkTokens >= num_tokens) return;

  const int32_t* ends = a.sentence_ends + s * a.ends_stride;
  const bool choosing = wanted < num_rows;
  bool fetched = !choosing;
  if (fetched) granule.fetch(a, ends, count, h, num_rows, num_tokens, nullptr);
  if constexpr (kPer == 0) {
    read_levels(a, shared, head);
  } else {
    rotate_levels<kPer>(a, shared, head, choosing);
  }
  __syncthreads();
  if (choosing) choose_rows(shared, group, num_rows, wanted);
  HeadSet<kSteps> sets[kSets];
#pragma unroll
  for (int set = 0; set < kSets; ++set) sets[set].read(shared, set, group, num_rows, choosing);

  for (;; fetched = false) {
    if (!fetched) {
      granule.fetch(a, ends, count, h, num_rows, num_tokens, choosing ? shared.chosen : nullptr);
    }
    const int begin = chunk * kChunkTokens, end = min(begin + kChunkTokens, num_tokens);
    const bool edge = reduce == a.softmax_mean && (begin < lo_block * n || end > hi_block * n);
    if (begin + warp * kWarpTokens < num_tokens) {
      granule.transpose();
      // Tokens of the granule from here on: 0 to 15, and bit k of a mask.
      const int lo = lo_block * n - granule.token, hi = hi_block * n - granule.token;
      const uint32_t members =
          granule.valid ? bits_between(max(lo, 0), min(hi, kGranule)) : 0;  // of the history
#pragma unroll
      for (int set = 0; set < kSets; ++set) {
        const int g = set * kSetHeads + q;
        const float unit = sets[set].unit;
        float values[kGranule];
        sets[set].logits(granule, a.scales_are_bf16, values);
        if (g < group && members) {
          // The four lanes of a granule raise neighbours, which is one access to the L2 cache.
          uint32_t left = members;
          int sentence_end = granule.end0, next_end = granule.end1;
          for (int i = granule.first; i < count; ++i) {
            const uint32_t own = left & bits_between(0, min(sentence_end - granule.token, kGranule));
            if (own) {
              float largest = minus_infinity();
#pragma unroll
              for (int k = 0; k < kGranule; ++k) {
                largest = own >> k & 1 ? fmaxf(largest, values[k]) : largest;
              }
              // A product with the unit, which is not negative, rounds alike in either order.
              atomicMax(a.best + ((head * a.max_sentences + i) * group + g), to_ordered(unit * largest));
            }
            left ^= own;
            if (left == 0) break;
            sentence_end = next_end;
            next_end = ends[min(i + 2, count - 1)];
          }
        }
        if (edge) {
          LogSum resident = LogSum::none();
          const uint32_t outside = granule.valid ? 0xffffu & ~members : 0;
          if (outside) {
#pragma unroll
            for (int k = 0; k < kGranule; ++k) {
              values[k] = outside >> k & 1 ? unit * values[k] : minus_infinity();
              resident.top = fmaxf(resident.top, values[k]);
            }
#pragma unroll
            for (int k = 0; k < kGranule; ++k) resident.total += expf(values[k] - resident.top);
          }
          resident.merge_over(kOverTokens);
          if (row == 0) {
            shared.merged[warp][0][g] = resident.top;
            shared.merged[warp][1][g] = resident.total;
          }
        }
      }
    }

    if (edge) __syncthreads();
    const int g = threadIdx.x;
    if (g < group) {
      LogSum sum = LogSum::none();
      const int warps = edge ? (end - begin + kWarpTokens - 1) / kWarpTokens : 0;
#pragma unroll 1
      for (int w = 0; w < warps; ++w) {
        sum.merge({shared.merged[w][0][g], shared.merged[w][1][g]});
      }
      float* target = a.partial + (head * a.max_chunks + chunk) * 2 * group + g;
      target[0] = sum.top;
      target[group] = sum.total;
    }
    chunk += gridDim.x;
    if (chunk * kChunkTokens >= num_tokens) return;
    if (edge) __syncthreads();
    granule.find(a, s, chunk);
  }
}

}  // namespace sentencekv
