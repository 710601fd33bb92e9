// SPDX-License-Identifier: Apache-2.0
// C ABI of score_tokens: one launch for all requests and KV heads of a layer.
#include <sentencekv/score_tokens.cuh>

using sentencekv::ScoreTokensArgs;

/// Returns cudaErrorInvalidValue for groups above 8, more than 256 channels, or pages that are no
/// multiple of 16 tokens.
extern "C" cudaError_t sentencekv_score_tokens(const ScoreTokensArgs* args, cudaStream_t stream) {
  const ScoreTokensArgs& a = *args;
  if (a.group > sentencekv::kMaxGroup || a.num_byte_rows > sentencekv::kMaxByteRows ||
      a.block_size % sentencekv::kGranule != 0) {
    return cudaErrorInvalidValue;
  }
  const bool one_set = a.group <= sentencekv::kSetHeads;
  const bool one_step = a.num_byte_rows <= sentencekv::kStepBytes;
  const bool full = a.num_byte_rows == sentencekv::kStepBytes;
  const auto kernel = full       ? (one_set ? sentencekv::score_tokens_kernel<1, 1, true>
                                            : sentencekv::score_tokens_kernel<2, 1, true>)
                      : one_step ? (one_set ? sentencekv::score_tokens_kernel<1, 1, false>
                                            : sentencekv::score_tokens_kernel<2, 1, false>)
                                 : (one_set ? sentencekv::score_tokens_kernel<1, 2, false>
                                            : sentencekv::score_tokens_kernel<2, 2, false>);
  return sentencekv::launch(kernel, dim3(a.num_chunks, a.num_requests * a.num_heads),
                            sentencekv::kScoreThreads, sentencekv::score_shared_bytes(a), stream, a);
}
