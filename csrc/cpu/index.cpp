// SPDX-License-Identifier: Apache-2.0
// ops/index_pages.py and ops/index_sentences.py.
#include <algorithm>
#include <cmath>
#include <limits>

#include "args.hpp"
#include "buffer.hpp"
#include "element.hpp"
#include "parallel.hpp"
#include "quantize_pages.hpp"
#include "rotate.hpp"

namespace sentencekv::cpu {
namespace {

// squares[t] = |key t|^2 of keys [D, N].
void square_norms(const float* keys, int64_t dim, int64_t n, float* squares) {
  for (int64_t t = 0; t < n; t += kLanes) {
    Floats sum{};
    for (int64_t d = 0; d < dim; ++d) {
      const Floats x = load_floats(keys + d * n + t);
      sum += x * x;
    }
    store_floats(squares + t, sum);
  }
}

// rotated [E, N], squares [N] -> bits [E / 8, N] and scales [N].
void pack(const float* rotated, const float* squares, int64_t dim, int64_t n, uint8_t* bits,
          uint16_t* scales) {
  for (int64_t i = 0; i < dim / 8; ++i)
    for (int64_t t = 0; t < n; ++t) {
      uint32_t byte = 0;
      for (int64_t j = 0; j < 8; ++j)
        byte |= static_cast<uint32_t>(rotated[(8 * i + j) * n + t] >= 0) << j;
      bits[i * n + t] = static_cast<uint8_t>(byte);
    }
  for (int64_t t = 0; t < n; t += kLanes) {
    Floats l1{};
    for (int64_t d = 0; d < dim; ++d) {
      const Floats x = load_floats(rotated + d * n + t);
      l1 += x < 0 ? -x : x;
    }
    for (int64_t k = 0; k < kLanes; ++k)
      scales[t + k] = to_bfloat16(l1[k] > 0 ? squares[t + k] / l1[k] : 0.0f);
  }
}

}  // namespace

extern "C" int32_t sentencekv_cpu_hadamard_signs(const float* matrix, int64_t dim,
                                                int64_t index_dim, float* signs) {
  return hadamard_signs(matrix, dim, index_dim, signs);
}

// key_offset: [D, N], element (d, t) of K, channels first.
extern "C" void sentencekv_cpu_index_pages(const Pools* pools, const Rotation* rotation,
                                           const int32_t* block_ids, const int32_t* page_ids,
                                           int64_t count, const int32_t* key_offset) {
  const int64_t heads = pools->heads, n = pools->block_size, dim = pools->head_dim;
  const int64_t index_dim = pools->index_dim;
  parallel_for(count * heads, [&](int64_t pair) {
    static thread_local Buffer<float> keys, rotated, norms;
    const int64_t page = page_ids[pair / heads], head = pair % heads;
    const uint8_t* block = pools->cache_head(block_ids[pair / heads], head);
    store_page(*pools, block_ids[pair / heads], page, head);
    float* x = keys.reserve(dim * n);
    with_elements(pools->dtype, block, [&](const auto* elements) {
      for (int64_t i = 0; i < dim * n; ++i) x[i] = elements[key_offset[i]];
    });
    float* squares = norms.reserve(n);
    square_norms(x, dim, n, squares);  // before the rotation, which may be in place
    const float* y = rotate(*rotation, dim, index_dim, n, x, rotated.reserve(index_dim * n));
    const int64_t head_page = page * heads + head;
    pack(y, squares, index_dim, n, pools->bits + head_page * (index_dim / 8) * n,
         pools->scales + head_page * n);
    pools->page_slot[head_page] = -1;
  });
}

// key_offset: [N, D], element (t, d) of K, tokens first; others as ops/index_sentences.py.
extern "C" int32_t sentencekv_cpu_index_sentences(const Pools* pools, const int32_t* rows,
                                                  const int32_t* spans, const int32_t* span_blocks,
                                                  int64_t count, int64_t max_span_blocks,
                                                  const int32_t* key_offset, IndexKind kind) {
  if (!pools->has_vectors(kind)) return static_cast<int32_t>(Status::kNoSpreads);
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
    if (kind == IndexKind::kBounds || kind == IndexKind::kMeanStd)
      for (int64_t d = 0; d < dim; ++d) pools->spreads[row * dim + d] = to_bfloat16(spread[d]);
    pools->kept[row] = 0;
  });
  return static_cast<int32_t>(Status::kOk);
}

}  // namespace sentencekv::cpu
