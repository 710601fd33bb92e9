// SPDX-License-Identifier: Apache-2.0
// The weights and probabilities of a KV head's blocks: sentencekv_vllm/ops/rank_blocks.py.
#pragma once

#include "fixed_point.cuh"
#include "rank_args.cuh"

namespace sentencekv {

constexpr uint32_t kWeightShift = 10;
constexpr int kProbabilityBits = 30;

/// A probability of 1 of one query head.
__device__ inline int32_t whole_probability(int group) {
  return 1 << (kProbabilityBits - (group > 1 ? 32 - __clz(group - 1) : 0));
}

/// The blocks of one KV head of a request, as a block of threads sees them.
///
/// kGroup: query heads a KV head at most. Loads are unconditional, of query head 0 where there
/// are fewer.
template <int kGroup>
struct HeadBlocks {
  const RankArgs& a;
  Cluster cluster;
  int h, group, lo, hi, begin, end;
  int64_t head;
  const int32_t *tops, *sums, *pages;

  __device__ HeadBlocks(const RankArgs& a, const Cluster& cluster, int h, int s)
      : a(a), cluster(cluster), h(h), group(a.group), lo(a.history_lo[s]), hi(a.history_hi[s]),
        head(static_cast<int64_t>(s) * a.num_heads + h),
        tops(a.tops + head * group * a.mass_blocks), sums(a.sums + head * group * a.mass_blocks),
        pages(a.pages + s * a.pages_stride) {
    const int count = a.num_pages[s], share = (count + cluster.size - 1) / cluster.size;
    begin = min(cluster.rank * share, count);
    end = min(begin + share, count);
  }

  __device__ int64_t at(int g, int j) const {
    return static_cast<int64_t>(g < group ? g : 0) * a.mass_blocks + j;
  }

  __device__ uint8_t* flag(int j) const {
    return a.page_kept + static_cast<int64_t>(pages[j]) * a.num_heads + h;
  }

  __device__ void weights(const int32_t* head_tops, int j, int64_t (&weight)[kGroup]) const {
    int32_t top[kGroup], sum[kGroup];
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      top[g] = tops[at(g, j)];
      sum[g] = sums[at(g, j)];
    }
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      const uint32_t below = static_cast<uint32_t>(head_tops[g < group ? g : 0] - top[g]);
      const int64_t product = static_cast<int64_t>(sum[g]) * exp2_part(below % kUnits);
      weight[g] = product >> min(kWeightShift + below / kUnits, 63u);
    }
  }

  /// In units of 1 / whole_probability, summed over the group.
  __device__ int32_t probability(const RankShared& shared, int j) const {
    int64_t weight[kGroup];
    weights(shared.head_tops, j, weight);
    int32_t sum = 0;
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      const float reciprocal = shared.reciprocals[g < group ? g : 0];
      const int32_t part = __float2int_rz(__fmul_rn(__ll2float_rn(weight[g]), reciprocal));
      sum += g < group ? part : 0;
    }
    return sum;
  }
};

}  // namespace sentencekv
