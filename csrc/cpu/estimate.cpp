// SPDX-License-Identifier: Apache-2.0
// ops/estimate_unselected.py.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "args.hpp"
#include "buffer.hpp"
#include "element.hpp"
#include "maths.hpp"
#include "parallel.hpp"
#include "scratch.hpp"
#include "summaries.hpp"
#include "touched.hpp"

namespace sentencekv::cpu {
namespace {

struct EstimateScratch {
  Buffer<int64_t> rows, before;        // before[j]: missing blocks of history below block lo + j
  Buffer<float> query, key, sums;      // [G, D], [D], [D]
  Buffer<float> attended;              // [G, attended tokens]
  Buffer<float> groups, log_counts;    // [G, sentences], [sentences]
};

inline float capped(float logit, float softcap) {
  return softcap > 0 ? softcap * std::tanh(logit / softcap) : logit;
}

// logits[g, t] of the tokens that the table names.
template <class Element>
void score_attended(const Pools& pools, const Attention& attention, const int32_t* table,
                    int64_t length, const int32_t* key_offset, float softcap, const float* query,
                    float* key, float* logits) {
  const int64_t n = pools.block_size, dim = pools.head_dim;
  for (int64_t t = 0; t < length; ++t) {
    const int64_t id = table[t / n];
    const auto* elements = reinterpret_cast<const Element*>(
        pools.cache_head(id / pools.heads, id % pools.heads));
    const int32_t* offset = key_offset + t % n * dim;
    for (int64_t d = 0; d < dim; ++d) key[d] = elements[offset[d]];
    for (int64_t g = 0; g < attention.group_size; ++g) {
      Floats sum{};
      int64_t d = 0;
      for (; d + kLanes <= dim; d += kLanes)
        sum += load_floats(key + d) * load_floats(query + g * dim + d);
      float dot = lane_sum(sum);
      for (; d < dim; ++d) dot += key[d] * query[g * dim + d];
      logits[g * length + t] = capped(attention.scale * dot, softcap);
    }
  }
}

// Replaces logits by their exponentials relative to the largest, `top`; returns their sum.
inline float exponentials(float* logits, int64_t count, float top) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    logits[i] = logits[i] - top > -80.0f ? fast_exp(logits[i] - top) : 0.0f;
    sum += logits[i];
  }
  return sum;
}

}  // namespace

// query, output: [S, H * G, D] of the query's type; key_offset: [N, D], tokens first.
extern "C" void sentencekv_cpu_estimate_unselected(
    const Pools* pools, const Batch* batch, const Attention* attention, const int32_t* head_tables,
    int64_t table_width, const int32_t* seq_lens, const uint8_t* estimates,
    const int32_t* key_offset, float softcap, const uint8_t* query, uint8_t* output) {
  const int64_t heads = pools->heads, n = pools->block_size, dim = pools->head_dim;
  const int64_t group = attention->group_size, size = group * dim;
  const int64_t query_bytes = size * (attention->query_dtype == Dtype::kFloat32 ? 4 : 2);
  parallel_for(batch->requests * heads, [&](int64_t pair) {
    const int64_t s = pair / heads, head = pair % heads;
    const Request request(*batch, s, attention->rows_per_page);
    const Touched touched(request, n);
    const int64_t count = touched.count(), lo = request.history_lo, hi = request.history_hi;
    if (!estimates[s] || count <= 0) return;
    static thread_local EstimateScratch scratch;

    int64_t* before = scratch.before.reserve(hi - lo + 1);
    before[0] = 0;
    for (int64_t j = lo; j < hi; ++j) {
      const int32_t slot = pools->page_slot[request.pages[j] * heads + head];
      const bool selected = slot >= 0 && pools->slot_stamp[slot * heads + head] == request.step;
      before[j - lo + 1] = before[j - lo] + !selected;
    }
    if (!before[hi - lo]) return;
    auto below = [&](int64_t token) {  // tokens in missing blocks below this one
      token = std::clamp(token, lo * n, hi * n) - lo * n;
      const int64_t j = token / n, place = token % n;
      return n * before[j] + (place ? place * (before[j + 1] - before[j]) : 0);
    };

    float* queries = scratch.query.reserve(size);
    with_elements(attention->query_dtype, query + pair * query_bytes, [&](const auto* elements) {
      for (int64_t i = 0; i < size; ++i) queries[i] = elements[i];
    });
    int64_t* rows = scratch.rows.reserve(request.num_sentences);
    request.fill_rows(rows);
    float* groups = scratch.groups.reserve(group * count);
    score_vectors(*pools, pools->centroids, head, group, touched, rows, queries, groups);
    float* log_counts = scratch.log_counts.reserve(count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t sentence = touched.first + i;
      const int64_t tokens =
          below(request.sentence_ends[sentence]) - below(request.sentence_start(sentence));
      log_counts[i] = tokens ? std::log(static_cast<float>(tokens))
                             : -std::numeric_limits<float>::infinity();
    }

    const int64_t length = seq_lens[s];
    float* attended = scratch.attended.reserve(group * length);
    const int32_t* table = head_tables + pair * table_width;
    with_elements(pools->dtype, pools->cache, [&](const auto* elements) {
      using Element = std::remove_cvref_t<decltype(*elements)>;
      score_attended<Element>(*pools, *attention, table, length, key_offset, softcap, queries,
                              scratch.key.reserve(dim), attended);
    });

    float* sums = scratch.sums.reserve(dim);
    for (int64_t g = 0; g < group; ++g) {
      float* weights = groups + g * count;
      float* tokens = attended + g * length;
      float top = *std::max_element(tokens, tokens + length);
      for (int64_t i = 0; i < count; ++i) {
        weights[i] = capped(attention->scale * weights[i], softcap) + log_counts[i];
        top = std::max(top, weights[i]);
      }
      const float seen = exponentials(tokens, length, top);
      const float total = seen + exponentials(weights, count, top);
      std::fill(sums, sums + dim, 0.0f);
      for (int64_t i = 0; i < count; ++i) {
        const float share = weights[i] / total;
        if (share < 1e-9f) continue;
        const uint16_t* value =
            pools->spreads + (rows[touched.first + i] * heads + head) * dim;
        for (int64_t d = 0; d < dim; ++d) sums[d] += share * Bfloat16{value[d]};
      }
      const float kept = seen / total;
      with_elements(attention->query_dtype, output + pair * query_bytes, [&](auto* elements) {
        for (int64_t d = 0; d < dim; ++d) {
          auto& element = elements[g * dim + d];
          store_element(&element, kept * element + sums[d]);
        }
      });
    }
  });
}

}  // namespace sentencekv::cpu
