// SPDX-License-Identifier: Apache-2.0
// Queries mapped and rounded, once for each KV head of a request: a map is D * D floats, too much
// to be read again by every block that scores. Defined by sentencekv_vllm/ops/quantize_query.py.
//
// A block of threads has up to four query heads of a KV head. All of a map of 128 channels is
// asked for at once, so the time is that of one wait for the L2 cache and of three barriers.
#pragma once

#include "fixed_point.cuh"

namespace sentencekv {

enum QueryType : int32_t { kBfloat16, kFloat16, kFloat32 };

constexpr int kQueryThreads = 512;
constexpr int kQueryHeads = 4;       // of a block of threads
constexpr int kQueryColumns = 4;     // neighbouring channels that a thread sums
constexpr int kMeanLevels = 127;
constexpr float kScaleLimit = 1099511627776.0f;  // ops/pack_keys.py: SCALE_LIMIT

/// S requests, H KV heads, G query heads a KV head, D head_dim, W code planes.
struct QuantizeQueryArgs {
  const void* query;          // [S, H * G, D] of `query_type`
  const float* map;           // [H, D, D]: y = query @ map
  const int32_t* index_kind;  // [S]
  int8_t* levels;             // [S, H * G, W] written, like what follows
  float* steps;               // [S, H * G]
  int8_t* mean_levels;        // [S, H * G, D]
  float* mean_steps;          // [S, H * G]
  int32_t num_requests, num_heads, group, head_dim, code_width, bits, query_type;
  int32_t token_codes;        // value of the enumeration
};

struct alignas(16) QueryShared {
  float query[kMaxDim][kQueryHeads];
  float mapped[kQueryHeads][kMaxDim];
  float sums[kQueryThreads * kQueryHeads * kQueryColumns];  // [slice, head, channel]
};

__device__ inline float read_channel(const QuantizeQueryArgs& a, int64_t at) {
  if (a.query_type == kFloat32) return static_cast<const float*>(a.query)[at];
  const uint16_t half = static_cast<const uint16_t*>(a.query)[at];
  return a.query_type == kBfloat16 ? float_of(static_cast<uint32_t>(half) << 16)
                                   : half_to_float(half);
}

/// shared.mapped of `heads` query heads from row `first` on. Every thread sums four channels over a
/// slice of the rows of the map; slices are then added in order.
__device__ inline void map_queries(const QuantizeQueryArgs& a, QueryShared& shared, int h,
                                   int64_t first, int heads) {
  const int dim = a.head_dim, columns = dim / kQueryColumns, thread = threadIdx.x;
#pragma unroll 1
  for (int i = thread; i < kQueryHeads * dim; i += kQueryThreads) {
    const int g = i / dim, d = i % dim;
    shared.query[d][g] = g < heads ? read_channel(a, first * dim + i) : 0.0f;
  }
  __syncthreads();
  const int slices = kQueryThreads / columns, column = thread % columns, slice = thread / columns;
  if (slice < slices) {
    const float4* map =
        reinterpret_cast<const float4*>(a.map + static_cast<int64_t>(h) * dim * dim) + column;
    float4 sums[kQueryHeads];
#pragma unroll
    for (int g = 0; g < kQueryHeads; ++g) sums[g] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 8
    for (int d = slice; d < dim; d += slices) {
      const float4 row = map[d * columns];
#pragma unroll
      for (int g = 0; g < kQueryHeads; ++g) {
        const float x = shared.query[d][g];
        sums[g].x += x * row.x;
        sums[g].y += x * row.y;
        sums[g].z += x * row.z;
        sums[g].w += x * row.w;
      }
    }
    float4* target = reinterpret_cast<float4*>(shared.sums) + slice * kQueryHeads * columns;
#pragma unroll
    for (int g = 0; g < kQueryHeads; ++g) target[g * columns + column] = sums[g];
  }
  __syncthreads();
#pragma unroll 1
  for (int i = thread; i < heads * dim; i += kQueryThreads) {
    float sum = 0.0f;
#pragma unroll 4
    for (int other = 0; other < slices; ++other) sum += shared.sums[other * kQueryHeads * dim + i];
    shared.mapped[i / dim][i % dim] = sum;
  }
  __syncthreads();
}

/// The step of channels whose largest magnitude is `top`: 0 for what is not to be coded.
__device__ inline float step_of(float top, bool finite, int levels) {
  const float step = __fdiv_rn(top, static_cast<float>(levels));
  return finite && step < kScaleLimit ? step : 0.0f;
}

__device__ inline int level_of(float x, float inverse, int levels) {
  const float level = rintf(__fmul_rn(x, inverse));
  if (!(fabsf(level) < float_of(0x7f800000u))) return 0;  // a tiny step has no inverse
  const float limit = static_cast<float>(levels);
  return static_cast<int>(fminf(fmaxf(level, -limit), limit));
}

/// A warp rounds a mapped query and writes it as row `row`.
__device__ inline void round_query(const QuantizeQueryArgs& a, const float* mapped, int64_t row) {
  const int lane = threadIdx.x % kWarp, coded = a.code_width / a.bits;
  const int code_levels = a.bits == 1 ? 31 : 15;
  float top = 0.0f, coded_top = 0.0f;
  bool bad = false, coded_bad = false;
#pragma unroll 1
  for (int d = lane; d < a.head_dim; d += kWarp) {
    const float magnitude = fabsf(mapped[d]);
    const bool finite = magnitude < float_of(0x7f800000u);
    top = fmaxf(top, magnitude);
    bad |= !finite;
    if (d < coded) {
      coded_top = fmaxf(coded_top, magnitude);
      coded_bad |= !finite;
    }
  }
  const float mean_step = step_of(max_over(top, kWarp - 1),
                                  __ballot_sync(kAllLanes, bad) == 0, kMeanLevels);
  const float step = step_of(max_over(coded_top, kWarp - 1),
                             __ballot_sync(kAllLanes, coded_bad) == 0, code_levels);
  const float mean_inverse = mean_step > 0.0f ? __fdiv_rn(1.0f, mean_step) : 0.0f;
  const float inverse = step > 0.0f ? __fdiv_rn(1.0f, step) : 0.0f;
  int8_t* levels = a.levels + row * a.code_width;
  int8_t* mean_levels = a.mean_levels + row * a.head_dim;
#pragma unroll 1
  for (int d = lane; d < a.head_dim; d += kWarp) {
    mean_levels[d] = static_cast<int8_t>(level_of(mapped[d], mean_inverse, kMeanLevels));
    if (d >= coded) continue;
    const int level = level_of(mapped[d], inverse, code_levels);
    levels[d] = static_cast<int8_t>(a.bits == 1 ? level : 2 * level);
    if (a.bits == 2) levels[coded + d] = static_cast<int8_t>(level);
  }
  if (lane == 0) {
    a.steps[row] = step;
    a.mean_steps[row] = mean_step;
  }
}

/// Grid (query heads in fours, H, S).
[[maybe_unused]] static __global__ void __launch_bounds__(kQueryThreads)
    quantize_query_kernel(const QuantizeQueryArgs a) {
  QueryShared& shared = *reinterpret_cast<QueryShared*>(shared_of_block());
  const int h = blockIdx.y, s = blockIdx.z, warp = threadIdx.x / kWarp;
  const int done = static_cast<int>(blockIdx.x) * kQueryHeads;
  const int heads = min(a.group - done, kQueryHeads);
  if (a.index_kind[s] != a.token_codes) return;
  const int64_t first = (static_cast<int64_t>(s) * a.num_heads + h) * a.group + done;
  map_queries(a, shared, h, first, heads);
  if (warp < heads) round_query(a, shared.mapped[warp], first + warp);
}

}  // namespace sentencekv
