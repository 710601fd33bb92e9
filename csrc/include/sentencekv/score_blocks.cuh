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

#include <climits>

#include "granule.hpp"
#include "sign_planes.cuh"

namespace sentencekv {

constexpr int kWarpGranules = kWarp / 4;
constexpr int kScoreThreads = 256;
constexpr int kChunkGranules = kScoreThreads / 4;  // a chunk has as many whole pages as these hold
constexpr int kMaxDim8 = 256;                      // of the means
constexpr int kSplitPages = kChunkGranules / 3;    // of a chunk, where warps share pages

/// S requests, H KV heads, G query heads a KV head, D head_dim, W code planes, N tokens a page.
struct ScoreBlocksArgs {
  const uint8_t* codes;        // [P, H, W / 8, N]
  const uint16_t* scales;      // [P, H, N] bf16
  const int8_t* means;         // [P, H, D]
  const float* mean_scales;    // [P, H]
  const int8_t* levels;        // [S, H * G, W]
  const float* steps;          // [S, H * G]
  const int8_t* mean_levels;   // [S, H * G, D]
  const float* mean_steps;     // [S, H * G]
  const int32_t* pages;        // [S, .]
  const int32_t* num_pages;    // [S]
  const int32_t* index_kind;   // [S]
  int32_t* tops;               // [S, H, G, B] written up to num_pages
  int32_t* sums;               // [S, H, G, B] the same
  int64_t pages_stride;
  float unit;                  // ops/score_blocks.py: unit_factor
  int32_t num_requests, num_heads, group, num_byte_rows, head_dim, block_size;
  int32_t columns, max_blocks; // of `pages`; B
  int32_t token_codes;         // value of the enumeration
  int32_t granules_per_page, pages_per_chunk;  // filled in by the launcher
};

/// What the warps of a block share.
struct alignas(16) ScoreShared {
  int8_t mean_levels[kMaxGroup][kMaxDim8];  // 0 behind the last channel
  PlanesShared query;
  float units[kMaxGroup], mean_units[kMaxGroup];
  int32_t tops[kSplitPages][kMaxGroup];  // of pages that warps share
  uint32_t sums[kSplitPages][kMaxGroup];
};

/// Whether the granules of a page are neighbouring lanes of one warp.
__device__ inline bool in_one_warp(int granules) {
  return granules <= kWarpGranules && (granules & (granules - 1)) == 0;
}

__device__ inline void read_query(const ScoreBlocksArgs& a, ScoreShared& shared, int64_t head) {
  const int group = a.group, thread = threadIdx.x, words = kMaxDim8 / 4, there = a.head_dim / 4;
  const uint32_t* source = reinterpret_cast<const uint32_t*>(a.mean_levels + head * group * a.head_dim);
  uint32_t* target = reinterpret_cast<uint32_t*>(shared.mean_levels);
#pragma unroll 1
  for (int i = thread; i < kMaxGroup * words; i += kScoreThreads) {
    const int g = i / words, word = i % words;
    target[i] = g < group && word < there ? source[g * there + word] : 0;
  }
  if (thread < kMaxGroup) {
    const int64_t row = head * group + min(thread, group - 1);
    shared.units[thread] = __fmul_rn(a.unit, a.steps[row]);
    shared.mean_units[thread] = __fmul_rn(a.unit, a.mean_steps[row]);
  }
  for (int i = thread; i < kSplitPages * kMaxGroup; i += kScoreThreads) {
    shared.tops[i / kMaxGroup][i % kMaxGroup] = INT_MIN;
    shared.sums[i / kMaxGroup][i % kMaxGroup] = 0;
  }
  read_planes(shared.query, a.levels + head * group * a.num_byte_rows * 8, group, a.num_byte_rows);
  __syncthreads();
}

/// A lane's granule: 16 tokens of a page, their codes and scales, and the lane's part of its mean.
template <int kSteps, int kMeans>
struct Granule {
  int local, place;  // of its page in the chunk; of the granule in its page
  int column, page;
  bool valid;
  float mean_scale;
  uint4 scales[2];
  uint4 mean[kMeans];            // 16 channels each, a quarter of 64
  uint32_t words[kSteps][4][4];  // byte row, then four tokens each

  __device__ explicit Granule(const ScoreBlocksArgs& a) {
    const int granule = static_cast<int>(threadIdx.x) / 4;
    local = granule / a.granules_per_page;
    place = granule % a.granules_per_page;
  }

  /// Entries behind the request's own are anything; `fetch` does not use them.
  __device__ void find(const ScoreBlocksArgs& a, int s, int chunk) {
    column = chunk * a.pages_per_chunk + local;
    page = load_early(a.pages + s * a.pages_stride + min(column, a.columns - 1));
  }

  /// Who has no token reads those of a page that is there.
  __device__ void fetch(const ScoreBlocksArgs& a, int h, int num_rows, int known_pages) {
    const int q = threadIdx.x % 4, n = a.block_size;
    valid = local < a.pages_per_chunk && column < known_pages;
    const int64_t head_page = static_cast<int64_t>(valid ? page : 0) * a.num_heads + h;
    const int in_page = valid ? place * kGranule : 0;
    const uint8_t* codes = a.codes + head_page * num_rows * n + in_page;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const StepRows rows(step, q, num_rows);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int byte_row = min(rows.row(i), num_rows - 1);
        const uint4 vector = *reinterpret_cast<const uint4*>(codes + byte_row * n);
        words[step][i][0] = vector.x;
        words[step][i][1] = vector.y;
        words[step][i][2] = vector.z;
        words[step][i][3] = vector.w;
      }
    }
    const uint4* vectors = reinterpret_cast<const uint4*>(a.means + head_page * a.head_dim);
#pragma unroll
    for (int i = 0; i < kMeans; ++i) mean[i] = vectors[min(4 * i + q, a.head_dim / 16 - 1)];
    mean_scale = a.mean_scales[head_page];
    vectors = reinterpret_cast<const uint4*>(a.scales + head_page * n + in_page);
    scales[0] = vectors[0];
    scales[1] = vectors[1];
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

  __device__ float scale(int k) const {
    const uint4& half = scales[k / 8];
    const int word = k / 2 % 4;
    const uint32_t pair = word == 0 ? half.x : word == 1 ? half.y : word == 2 ? half.z : half.w;
    return float_of(k % 2 ? pair & 0xffff0000u : pair << 16);
  }

  /// Units of the page's mean for query head q of a set.
  __device__ int32_t mean_units(const ScoreShared& shared, int set) const {
    const int q = threadIdx.x % 4;
    int dots[kSetHeads];
#pragma unroll
    for (int g = 0; g < kSetHeads; ++g) {
      const uint4* levels = reinterpret_cast<const uint4*>(shared.mean_levels[set * kSetHeads + g]) + q;
      int dot = 0;
#pragma unroll
      for (int i = 0; i < kMeans; ++i) {
        const uint4 level = levels[4 * i];
        dot = __dp4a(static_cast<int>(mean[i].x), static_cast<int>(level.x), dot);
        dot = __dp4a(static_cast<int>(mean[i].y), static_cast<int>(level.y), dot);
        dot = __dp4a(static_cast<int>(mean[i].z), static_cast<int>(level.z), dot);
        dot = __dp4a(static_cast<int>(mean[i].w), static_cast<int>(level.w), dot);
      }
      dots[g] = dot;
    }
    // Each lane gives away what it does not end with: two heads, then one.
    const bool upper = q & 2, odd = q & 1;
    const int low = (upper ? dots[2] : dots[0]) +
                    __shfl_xor_sync(kAllLanes, upper ? dots[0] : dots[2], 2);
    const int high = (upper ? dots[3] : dots[1]) +
                     __shfl_xor_sync(kAllLanes, upper ? dots[1] : dots[3], 2);
    const int dot = (odd ? high : low) + __shfl_xor_sync(kAllLanes, odd ? low : high, 1);
    const float factor = __fmul_rn(shared.mean_units[set * kSetHeads + q], mean_scale);
    return floor_units(__fmul_rn(factor, __int2float_rn(dot))) - kWholeBits;
  }

  /// Units of the granule's tokens without the mean's, plus kWholeBits.
  __device__ void code_units(const HeadSet<kSteps>& heads, float unit,
                             int32_t (&units)[kGranule]) const {
#pragma unroll
    for (int k = 0; k < kGranule; k += 2) {
      uint32_t upper[kSteps], lower[kSteps];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        upper[step] = words[step][k % 4][k / 4];
        lower[step] = words[step][k % 4 + 1][k / 4];
      }
      int dots[2];
      heads.products(kWholeBits - heads.level_sum, upper, lower, dots[0], dots[1]);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float factor = __fmul_rn(unit, scale(k + j));
        units[k + j] = floor_units(__fmul_rn(factor, unbiased(dots[j])));
      }
    }
  }
};

__device__ inline int32_t largest_of(const int32_t (&units)[kGranule]) {
  int32_t top = units[0];
#pragma unroll
  for (int k = 1; k < kGranule; ++k) top = max(top, units[k]);
  return top;
}

__device__ inline uint32_t mass_below(const int32_t (&units)[kGranule], int32_t top) {
  uint32_t sum = 0;
#pragma unroll
  for (int k = 0; k < kGranule; ++k) sum += static_cast<uint32_t>(exp2_units(top - units[k]));
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
      bool writes = granule.valid && granule.place == 0 && g < group;
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
