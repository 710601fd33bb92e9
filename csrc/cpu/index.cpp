// SPDX-License-Identifier: Apache-2.0
// ops/index_pages.py and ops/index_sentences.py.
#include <algorithm>
#include <cmath>
#include <limits>

#include "args.hpp"
#include "buffer.hpp"
#include "element.hpp"
#include "parallel.hpp"
#include "quantize.hpp"
#include "quantize_pages.hpp"

namespace sentencekv::cpu {
namespace {

// Takes the mean of mapped keys z [D, N] on its grid from them; writes it and its scale.
void subtract_mean(float* z, int64_t dim, int64_t n, int8_t* mean, float* scale, float* sums) {
  float largest = 0;
  bool numbers = true;
  for (int64_t d = 0; d < dim; ++d) {
    Floats sum{};
    for (int64_t t = 0; t < n; t += kLanes) sum += load_floats(z + d * n + t);
    sums[d] = lane_sum(sum) / static_cast<float>(n);
    numbers &= sums[d] == sums[d];
    largest = std::max(largest, std::fabs(sums[d]));
  }
  *scale = largest / kMeanLevels;
  if (!numbers || !(*scale < kScaleLimit)) *scale = 0;
  const float inverse = *scale > 0 ? 1 / *scale : 0.0f;
  for (int64_t d = 0; d < dim; ++d) {
    mean[d] = static_cast<int8_t>(inverse > 0 ? std::nearbyint(sums[d] * inverse) : 0.0f);
    const float offset = static_cast<float>(mean[d]) * *scale;
    for (int64_t t = 0; t < n; t += kLanes)
      store_floats(z + d * n + t, load_floats(z + d * n + t) - offset);
  }
}

// x [C, N] -> planes [bits * C / 8, N] and scales [N]; outer [C, N] is scratch memory.
void pack(const float* x, int64_t channels, int64_t bits, int64_t n, uint8_t* planes,
          uint16_t* scales, uint8_t* outer) {
  for (int64_t t = 0; t < n; t += kLanes) {
    Floats square{}, product{};
    for (int64_t c = 0; c < channels; ++c) {
      const Floats v = load_floats(x + c * n + t);
      square += v * v;
      product += v < 0 ? -v : v;
    }
    if (bits == 2)
      for (int64_t c = 0; c < channels; ++c) {
        const Floats v = load_floats(x + c * n + t), magnitude = v < 0 ? -v : v;
        const auto wide = v * v * static_cast<float>(channels) >= square;
        product += wide ? 2 * magnitude : Floats{};
        for (int64_t k = 0; k < kLanes; ++k) outer[c * n + t + k] = wide[k] != 0;
      }
    for (int64_t k = 0; k < kLanes; ++k) {
      const float scale = product[k] > 0 ? square[k] / product[k] : 0.0f;
      scales[t + k] = to_bfloat16(scale < kScaleLimit ? scale : 0.0f);
    }
  }
  for (int64_t i = 0; i < channels / 8; ++i)
    for (int64_t t = 0; t < n; ++t) {
      uint32_t sign = 0, second = 0;
      for (int64_t j = 0; j < 8; ++j) {
        const int64_t at = (8 * i + j) * n + t;
        const uint32_t negative = x[at] < 0;
        sign |= (negative ^ 1) << j;
        if (bits == 2) second |= (negative ^ outer[at]) << j;
      }
      planes[i * n + t] = static_cast<uint8_t>(sign);
      if (bits == 2) planes[(channels / 8 + i) * n + t] = static_cast<uint8_t>(second);
    }
}

}  // namespace

// key_offset: [D, N], element (d, t) of K, channels first.
extern "C" void sentencekv_cpu_index_pages(const Pools* pools, const int32_t* block_ids,
                                           const int32_t* page_ids, int64_t count,
                                           const int32_t* key_offset) {
  const int64_t heads = pools->heads, n = pools->block_size, dim = pools->head_dim;
  const int64_t bits = pools->code_bits, width = pools->code_width;
  parallel_for(count * heads, [&](int64_t pair) {
    static thread_local Buffer<float> keys, mapped, sums;
    static thread_local Buffer<uint8_t> outer;
    const int64_t page = page_ids[pair / heads], head = pair % heads;
    const int64_t head_page = page * heads + head;
    store_page(*pools, block_ids[pair / heads], page, head);
    pools->page_slot[head_page] = -1;
    if (!pools->codes) return;
    pools->page_kept[head_page] = 0;
    const uint8_t* block = pools->cache_head(block_ids[pair / heads], head);
    float* x = keys.reserve(dim * n);
    with_elements(pools->dtype, block, [&](const auto* elements) {
      for (int64_t i = 0; i < dim * n; ++i) x[i] = elements[key_offset[i]];
    });
    float* z = mapped.reserve(dim * n);
    apply_map(pools->key_map + head * dim * dim, dim, n, x, z);
    const float* center = pools->center + head * dim;
    for (int64_t d = 0; d < dim; ++d)
      for (int64_t t = 0; t < n; t += kLanes)
        store_floats(z + d * n + t, load_floats(z + d * n + t) - center[d]);
    subtract_mean(z, dim, n, pools->means + head_page * dim, pools->mean_scales + head_page,
                  sums.reserve(dim));
    pack(z, width / bits, bits, n, pools->codes + head_page * (width / 8) * n,
         pools->scales + head_page * n, outer.reserve(dim * n));
  });
}

// key_offset: [N, D], element (t, d) of K, tokens first; others as ops/index_sentences.py.
extern "C" int32_t sentencekv_cpu_index_sentences(const Pools* pools, const int32_t* rows,
                                                  const int32_t* spans, const int32_t* span_blocks,
                                                  int64_t count, int64_t max_span_blocks,
                                                  const int32_t* key_offset, IndexKind kind) {
  const bool two = kind == IndexKind::kBounds || kind == IndexKind::kMeanStd;
  if (!pools->centroids || (two && !pools->spreads)) return static_cast<int32_t>(Status::kNoIndex);
  const int64_t heads = pools->heads, n = pools->block_size, dim = pools->head_dim;
  parallel_for(count * heads, [&](int64_t pair) {
    static thread_local Buffer<float> buffer;
    const int64_t i = pair / heads, head = pair % heads;
    const int64_t first = spans[2 * i], length = spans[2 * i + 1];
    // Calls visit(d, x) with every channel of every key.
    auto keys = [&](auto visit) {
      for (int64_t t = first; t < first + length; ++t) {
        const int64_t block = span_blocks[i * max_span_blocks + t / n];
        const int32_t* offset = key_offset + t % n * dim;
        with_elements(pools->dtype, pools->cache_head(block, head), [&](const auto* elements) {
          for (int64_t d = 0; d < dim; ++d) visit(d, static_cast<float>(elements[offset[d]]));
        });
      }
    };
    float* centroid = buffer.reserve(2 * dim);
    float* spread = centroid + dim;
    if (kind == IndexKind::kBounds) {
      std::fill(centroid, centroid + dim, std::numeric_limits<float>::infinity());
      std::fill(spread, spread + dim, -std::numeric_limits<float>::infinity());
      keys([&](int64_t d, float x) {
        centroid[d] = std::min(centroid[d], x);
        spread[d] = std::max(spread[d], x);
      });
    } else {
      std::fill(centroid, centroid + 2 * dim, 0.0f);
      keys([&](int64_t d, float x) { centroid[d] += x; });
      for (int64_t d = 0; d < dim; ++d) centroid[d] /= static_cast<float>(length);
    }
    if (kind == IndexKind::kMeanStd) {
      keys([&](int64_t d, float x) { spread[d] += (x - centroid[d]) * (x - centroid[d]); });
      for (int64_t d = 0; d < dim; ++d) spread[d] /= static_cast<float>(length);
    }
    const int64_t row = static_cast<int64_t>(rows[i]) * heads + head;
    for (int64_t d = 0; d < dim; ++d) pools->centroids[row * dim + d] = to_bfloat16(centroid[d]);
    if (two)
      for (int64_t d = 0; d < dim; ++d) pools->spreads[row * dim + d] = to_bfloat16(spread[d]);
    pools->kept[row] = 0;
  });
  return static_cast<int32_t>(Status::kOk);
}

}  // namespace sentencekv::cpu
