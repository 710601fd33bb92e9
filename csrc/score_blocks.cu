// SPDX-License-Identifier: Apache-2.0
// C ABI of score_blocks: one launch for all requests and KV heads of a layer.
#include <sentencekv/score_blocks.cuh>

#include <algorithm>

using sentencekv::ScoreBlocksArgs;

namespace {

struct ScoreKernel {
  void (*start)(ScoreBlocksArgs);
  int blocks;  // that a multiprocessor holds
};

template <int kSets, int kSteps, int kMeans>
constexpr ScoreKernel kKernel = {sentencekv::score_blocks_kernel<kSets, kSteps, kMeans>,
                                 sentencekv::kScoreBlocks<kSets, kSteps, kMeans>};

template <int kSets>
ScoreKernel kernel_of(const ScoreBlocksArgs& a) {
  const bool one_step = a.num_byte_rows <= sentencekv::kStepBytes;
  if (a.head_dim <= 128) return one_step ? kKernel<kSets, 1, 2> : kKernel<kSets, 2, 2>;
  return one_step ? kKernel<kSets, 1, 4> : kKernel<kSets, 2, 4>;
}

}  // namespace

/// Returns cudaErrorInvalidValue for groups above 8, no or more than 256 planes, head dims that are
/// no multiple of 16 up to 256, and pages that are no multiple of 16 tokens up to 1024.
extern "C" cudaError_t sentencekv_score_blocks(const ScoreBlocksArgs* args, cudaStream_t stream) {
  ScoreBlocksArgs a = *args;
  a.granules_per_page = a.block_size / sentencekv::kGranule;
  if (a.group > sentencekv::kMaxGroup || a.num_byte_rows < 1 ||
      a.num_byte_rows > sentencekv::kMaxByteRows || a.head_dim % 16 != 0 ||
      a.head_dim > sentencekv::kMaxDim || a.block_size % sentencekv::kGranule != 0 ||
      a.granules_per_page > sentencekv::kChunkGranules) {
    return cudaErrorInvalidValue;
  }
  if (a.columns == 0) return cudaSuccess;
  a.pages_per_chunk = sentencekv::kChunkGranules / a.granules_per_page;
  const ScoreKernel kernel = a.group <= sentencekv::kSetHeads ? kernel_of<1>(a) : kernel_of<2>(a);
  const int chunks = (a.columns + a.pages_per_chunk - 1) / a.pages_per_chunk;
  int multiprocessors = 0;
  const cudaError_t status = sentencekv::multiprocessors(&multiprocessors);
  if (status != cudaSuccess) return status;
  // A block's queries cost as much as a chunk: rather than queue, blocks take several chunks.
  const int at_once = kernel.blocks * multiprocessors / std::max(1, a.num_heads * a.num_requests);
  const int blocks = std::min(chunks, std::max(1, at_once));
  return sentencekv::launch(kernel.start, dim3(blocks, a.num_heads, a.num_requests),
                            sentencekv::kScoreThreads, sizeof(sentencekv::ScoreShared), stream, a);
}
