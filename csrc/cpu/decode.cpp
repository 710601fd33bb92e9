// SPDX-License-Identifier: Apache-2.0
// Score, select, resolve and swap in for every (request, KV head) of a layer.
#include <chrono>

#include "args.hpp"
#include "block_masses.hpp"
#include "parallel.hpp"
#include "rank_blocks.hpp"
#include "residency.hpp"
#include "scratch.hpp"
#include "select.hpp"

namespace sentencekv::cpu {
namespace {

struct HeadResult {
  int64_t stage_ns[4];
  int64_t misses;
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

// Calls rank(request, pair, scratch, blocks, coverage, scored), which leaves the selection of a
// (request, KV head) in blocks and coverage and in `scored` the time when it had scored; resolves
// and swaps in; adds up the outputs. Returns a Status; after a failure they are not all written.
template <class Rank>
int32_t decode(const Pools& pools, const Batch& batch, int64_t rows_per_page,
               const Selected& selected, const Outputs& out, Rank rank) {
  static thread_local Buffer<HeadResult> buffer;
  const int64_t heads = pools.heads, pairs = batch.requests * heads;
  HeadResult* results = buffer.reserve(pairs);
  parallel_for(pairs, [&](int64_t pair) {
    static thread_local Scratch scratch;
    const int64_t head = pair % heads;
    const Request request(batch, pair / heads, rows_per_page);
    int32_t* blocks = selected.blocks + pair * selected.max_blocks;
    int32_t* table = out.head_tables + pair * out.table_width + request.history_lo;
    HeadResult& result = results[pair] = {};
    if (request.budget > selected.max_blocks) {
      result.status = Status::kWorkingSetTooSmall;
      return;
    }
    int64_t clock[5] = {now_ns()};
    result.status = rank(request, pair, scratch, blocks, selected.coverage[pair], clock[1]);
    if (result.status != Status::kOk) return;
    clock[2] = now_ns();
    result.status = resolve(pools, request, head, blocks, scratch, table, result.misses);
    if (result.status != Status::kOk) return;
    clock[3] = now_ns();
    swap_in(pools, request, head, blocks, scratch, table, result.misses);
    clock[4] = now_ns();
    for (int i = 0; i < 4; ++i) result.stage_ns[i] = clock[i + 1] - clock[i];
  });
  int64_t stage_ns[4] = {};
  for (int64_t s = 0; s < batch.requests; ++s) {
    float coverage = 0;
    for (int64_t pair = s * heads; pair < (s + 1) * heads; ++pair) {
      const HeadResult& result = results[pair];
      if (result.status != Status::kOk) return static_cast<int32_t>(result.status);
      out.misses[s] += result.misses;
      out.hits[s] += batch.budget_blocks[s] - result.misses;
      coverage += selected.coverage[pair];
      for (int i = 0; i < 4; ++i) stage_ns[i] += result.stage_ns[i];
    }
    out.coverage[s] += coverage / static_cast<float>(heads);
  }
  for (int i = 0; i < 4; ++i) out.stage_ns[i] += stage_ns[i] / num_threads(pairs);
  return static_cast<int32_t>(Status::kOk);
}

}  // namespace

// Lowers the instruction set of the scan, for tests; returns the one in use.
extern "C" int32_t sentencekv_cpu_limit_isa(int32_t limit) {
  isa = std::min(best_isa, static_cast<Isa>(limit));
  return static_cast<int32_t>(isa);
}

// query: [S, H * G, D]. Returns a Status, as does the other entry.
extern "C" int32_t sentencekv_cpu_decode_layer(const Pools* pools, const Batch* batch,
                                               const Attention* attention,
                                               const Selected* selected, const Outputs* out,
                                               const uint8_t* query) {
  const int64_t heads = pools->heads;
  const int64_t query_bytes = attention->group_size * pools->head_dim *
                              (attention->query_dtype == Dtype::kFloat32 ? 4 : 2);
  auto rank = [&](const Request& request, int64_t pair, Scratch& scratch, int32_t* blocks,
                  float& coverage, int64_t& scored_ns) {
    if (request.takes_everything()) {
      scored_ns = now_ns();
      select_everything(request, blocks, coverage);
      return Status::kOk;
    }
    if (!pools->has(request.kind)) return Status::kNoIndex;
    const int64_t head = pair % heads, group = attention->group_size;
    const uint8_t* queries = query + pair * query_bytes;
    if (request.kind == IndexKind::kTokenCodes) {
      with_elements(attention->query_dtype, queries, [&](const auto* elements) {
        scratch.query.fill(*pools, head, group, elements);
      });
      block_masses(isa, *pools, *attention, request, head, scratch);
      scored_ns = now_ns();
      rank_blocks(*pools, request, head, group, scratch, blocks, coverage);
      return Status::kOk;
    }
    const Touched touched = score(*attention, *pools, request, head, queries, scratch);
    scored_ns = now_ns();
    return select(*pools, request, head, touched, scratch, blocks, coverage);
  };
  return decode(*pools, *batch, attention->rows_per_page, *selected, *out, rank);
}

// The blocks that the last layer selected, in this one.
extern "C" int32_t sentencekv_cpu_reuse_selection(const Pools* pools, const Batch* batch,
                                                  const Selected* selected, const Outputs* out) {
  auto rank = [](const Request&, int64_t, Scratch&, int32_t*, float&, int64_t& scored_ns) {
    scored_ns = now_ns();
    return Status::kOk;
  };
  return decode(*pools, *batch, 1, *selected, *out, rank);
}

}  // namespace sentencekv::cpu
