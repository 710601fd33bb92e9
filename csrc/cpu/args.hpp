// SPDX-License-Identifier: Apache-2.0
// What the C entry points take: raw pointers and sizes, as ops/cpu_args.py lays them out.
// Letters: P pages, B blocks, H KV heads, N tokens a block, D head_dim, W code_width, S requests.
#pragma once

#include <cstdint>

namespace sentencekv::cpu {

enum class Dtype : int64_t { kBfloat16 = 0, kFloat16 = 1, kFloat32 = 2 };
enum class HostDtype : int64_t { kCopy = 0, kInt8 = 1, kInt4 = 2, kFp8 = 3 };
enum class IndexKind : int32_t {
  kTokenCodes = 0,
  kCentroid = 1,
  kRandom = 2,
  kBounds = 3,
  kMeanStd = 4
};
enum class Reduce : int32_t { kSoftmaxMean = 0, kMax = 1, kMean = 2 };
enum class Status : int32_t { kOk = 0, kUntouchedBlock = 1, kWorkingSetTooSmall = 2, kNoIndex = 3 };

// types.LayerPools. Blocks and pages may be further apart than their heads fill.
struct Pools {
  uint8_t* cache;
  uint8_t* host;
  uint8_t* codes;        // this one and what belongs to codes: null where none are kept
  uint16_t* scales;
  int8_t* means;
  float* mean_scales;
  uint8_t* page_kept;
  const float* key_map;  // [H, D, D]
  const float* query_map;
  const float* center;   // [H, D]
  uint16_t* centroids;   // this one and `kept`: null where rows hold no vector
  uint8_t* kept;
  int32_t* page_slot;
  int32_t* slot_page;
  int32_t* slot_stamp;
  uint16_t* spreads;     // null where rows have one vector
  int64_t block_stride;  // bytes from a block of `cache` to the next
  int64_t page_stride;   // bytes from a page of `host` to the next
  int64_t heads;
  int64_t block_size;
  int64_t head_dim;
  int64_t code_width;  // sign planes of a token
  int64_t code_bits;   // of a channel
  Dtype dtype;
  HostDtype host_dtype;
  int64_t group_size;        // elements that share a step; 0 for kCopy
  int64_t host_head_bytes;   // of a head-block of `host`

  // Whether the pools have what an index of this kind is.
  bool has(IndexKind kind) const {
    switch (kind) {
      case IndexKind::kTokenCodes: return codes;
      case IndexKind::kCentroid: return centroids;
      case IndexKind::kRandom: return true;
      default: return spreads;
    }
  }
  int64_t head_block_numel() const { return 2 * block_size * head_dim; }
  int64_t head_block_bytes() const {
    return head_block_numel() * (dtype == Dtype::kFloat32 ? 4 : 2);
  }
  uint8_t* cache_head(int64_t block, int64_t head) const {
    return cache + block * block_stride + head * head_block_bytes();
  }
  uint8_t* host_head(int64_t page, int64_t head) const {
    return host + page * page_stride + head * host_head_bytes;
  }
};

// types.SparseBatch.
struct Batch {
  const int32_t* pages;  // the first four have a row per request
  const int32_t* row_pages;
  const int32_t* sentence_ends;
  const int32_t* private_blocks;
  const int32_t* num_pages;
  const int32_t* num_sentences;
  const int32_t* history_lo;
  const int32_t* history_hi;
  const int32_t* budget_blocks;
  const int32_t* index_kind;
  const int32_t* reduce;
  const float* retention;
  const int32_t* seed;
  int64_t pages_pitch;  // elements from a row to the next
  int64_t row_pages_pitch;
  int64_t sentences_pitch;
  int64_t private_pitch;
  int64_t requests;
  int64_t working_set;  // blocks
  int64_t step;
};

// What decode needs to know of the model.
struct Attention {
  Dtype query_dtype;
  int64_t group_size;  // query heads per KV head
  int64_t rows_per_page;
  float scale;
  float unit;  // of ops/score_blocks.py: logits of the scale in 1/16 of an octave
};

// types.Selection of the layer that ranked last, for the layers that share it.
struct Selected {
  int32_t* blocks;  // [S, H, max_blocks]
  float* coverage;  // [S, H]
  int64_t max_blocks;
};

// layer_ops.DecodeOutputs.
struct Outputs {
  int32_t* head_tables;
  int64_t* hits;
  int64_t* misses;
  float* coverage;
  int64_t* stage_ns;
  int64_t requests;
  int64_t heads;
  int64_t table_width;
};

// The row of a batch.
struct Request {
  const int32_t* pages;
  const int32_t* row_pages;
  const int32_t* sentence_ends;
  const int32_t* private_blocks;
  int64_t num_pages;
  int64_t num_sentences;
  int64_t history_lo;  // blocks
  int64_t history_hi;
  int64_t budget;  // blocks
  int64_t working_set;
  int64_t rows_per_page;
  IndexKind kind;
  Reduce reduce;
  float retention;
  uint32_t seed;
  int32_t step;

  Request(const Batch& batch, int64_t s, int64_t rows_per_page)
      : pages(batch.pages + s * batch.pages_pitch),
        row_pages(batch.row_pages + s * batch.row_pages_pitch),
        sentence_ends(batch.sentence_ends + s * batch.sentences_pitch),
        private_blocks(batch.private_blocks + s * batch.private_pitch),
        num_pages(batch.num_pages[s]),
        num_sentences(batch.num_sentences[s]),
        history_lo(batch.history_lo[s]),
        history_hi(batch.history_hi[s]),
        budget(batch.budget_blocks[s]),
        working_set(batch.working_set),
        rows_per_page(rows_per_page),
        kind(static_cast<IndexKind>(batch.index_kind[s])),
        reduce(static_cast<Reduce>(batch.reduce[s])),
        retention(batch.retention[s]),
        seed(static_cast<uint32_t>(batch.seed[s])),
        step(static_cast<int32_t>(batch.step)) {}

  bool takes_everything() const { return budget == history_hi - history_lo; }
  int64_t sentence_start(int64_t i) const { return i ? sentence_ends[i - 1] : 0; }
  // Row of every indexed sentence.
  void fill_rows(int64_t* rows) const {
    for (int64_t i = 0, page = 0; i < num_sentences; ++page)
      for (int64_t m = 0; m < rows_per_page && i < num_sentences; ++m)
        rows[i++] = row_pages[page] * rows_per_page + m;
  }
};

}  // namespace sentencekv::cpu
