// SPDX-License-Identifier: Apache-2.0
// Score, select, resolve and swap in for every (request, KV head) of a layer.
#include <chrono>

#include "args.hpp"
#include "parallel.hpp"
#include "residency.hpp"
#include "scratch.hpp"
#include "select.hpp"

namespace sentencekv::cpu {
namespace {

struct HeadResult {
  int64_t stage_ns[4];
  int64_t misses;
  float coverage;
  Status status;
};

#if defined(__AVX512F__) && defined(__AVX512BW__)
Isa best_isa = Isa::kAvx512;
#elif defined(__AVX2__)
Isa best_isa = Isa::kAvx2;
#else
Isa best_isa = Isa::kPortable;
#endif
Isa isa = best_isa;

int64_t now_ns() {
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

HeadResult decode_head(const Pools& pools, const Attention& attention, const Request& request,
                       int64_t head, const void* query, int32_t* table) {
  static thread_local Scratch scratch;
  HeadResult result{};
  int64_t clock[5] = {now_ns()};
  if (request.takes_everything()) {
    clock[1] = now_ns();
    select_everything(request, scratch, result.coverage);
  } else {
    if (!pools.has_vectors(request.kind)) {
      result.status = Status::kNoSpreads;
      return result;
    }
    const Scored scored = score(isa, attention, pools, request, head, query, scratch);
    clock[1] = now_ns();
    result.status = select(pools, request, head, scored, scratch, result.coverage);
    if (result.status != Status::kOk) return result;
  }
  clock[2] = now_ns();
  result.status = resolve(pools, request, head, scratch, table, result.misses);
  if (result.status != Status::kOk) return result;
  clock[3] = now_ns();
  swap_in(pools, request, head, scratch, table, result.misses);
  clock[4] = now_ns();
  for (int i = 0; i < 4; ++i) result.stage_ns[i] = clock[i + 1] - clock[i];
  return result;
}

}  // namespace

// Lowers the instruction set of the scan, for tests; returns the one in use.
extern "C" int32_t sentencekv_cpu_limit_isa(int32_t limit) {
  isa = std::min(best_isa, static_cast<Isa>(limit));
  return static_cast<int32_t>(isa);
}

// query: [S, H * G, D]. Returns a Status; after a failure the outputs are not all written.
extern "C" int32_t sentencekv_cpu_decode_layer(const Pools* pools, const Batch* batch,
                                               const Attention* attention, const Outputs* out,
                                               const uint8_t* query) {
  static thread_local Buffer<HeadResult> buffer;
  const int64_t heads = pools->heads, pairs = batch->requests * heads;
  const int64_t query_bytes = attention->group_size * pools->head_dim *
                              (attention->query_dtype == Dtype::kFloat32 ? 4 : 2);
  HeadResult* results = buffer.reserve(pairs);
  parallel_for(pairs, [&](int64_t pair) {
    const Request request(*batch, pair / heads, attention->rows_per_page);
    results[pair] = decode_head(*pools, *attention, request, pair % heads,
                                query + pair * query_bytes,
                                out->head_tables + pair * out->table_width + request.history_lo);
  });
  int64_t stage_ns[4] = {};
  for (int64_t s = 0; s < batch->requests; ++s) {
    float coverage = 0;
    for (const HeadResult *r = results + s * heads, *end = r + heads; r < end; ++r) {
      if (r->status != Status::kOk) return static_cast<int32_t>(r->status);
      out->misses[s] += r->misses;
      out->hits[s] += batch->budget_blocks[s] - r->misses;
      coverage += r->coverage;
      for (int i = 0; i < 4; ++i) stage_ns[i] += r->stage_ns[i];
    }
    out->coverage[s] += coverage / static_cast<float>(heads);
  }
  for (int i = 0; i < 4; ++i) out->stage_ns[i] += stage_ns[i] / num_threads(pairs);
  return static_cast<int32_t>(Status::kOk);
}

}  // namespace sentencekv::cpu
