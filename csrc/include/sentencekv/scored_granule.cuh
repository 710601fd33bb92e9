// SPDX-License-Identifier: Apache-2.0
// Sixteen tokens of a page: the four lanes of a granule load them, and have their logits.
#pragma once

#include "score_args.cuh"

namespace sentencekv {

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
      const int8_t* channels = shared.mean_levels[set * kSetHeads + g];
      const uint4* levels = reinterpret_cast<const uint4*>(channels) + q;
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

}  // namespace sentencekv
