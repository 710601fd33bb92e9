// SPDX-License-Identifier: Apache-2.0
// C ABI of decode_selection: one launch for all requests and KV heads of a layer.
#include <sentencekv/decode_selection.cuh>
#include <sentencekv/host_address.hpp>

using sentencekv::DecodeSelectionArgs;

/// Returns cudaErrorInvalidValue where rank_sentences, resolve_residency or gather_misses would.
extern "C" cudaError_t sentencekv_decode_selection(const DecodeSelectionArgs* args,
                                                   cudaStream_t stream) {
  DecodeSelectionArgs a = *args;
  if (!sentencekv::rank_fits(a.rank) || a.resolve.num_slots < a.resolve.max_blocks ||
      !sentencekv::aligned({a.gather.host, a.gather.cache},
                           {a.gather.head_block_bytes, a.gather.cache_block_stride,
                            a.gather.cache_head_stride})) {
    return cudaErrorInvalidValue;
  }
  const cudaError_t status = sentencekv::to_device_address(&a.gather.host);
  if (status != cudaSuccess) return status;
  const bool few = a.rank.max_blocks <= sentencekv::kFewBlocks * sentencekv::kRankThreads;
  const auto kernel =
      a.rank.group <= 4
          ? (few ? sentencekv::decode_selection_kernel<4, sentencekv::kFewBlocks>
                 : sentencekv::decode_selection_kernel<4, sentencekv::kManyBlocks>)
          : (few ? sentencekv::decode_selection_kernel<8, sentencekv::kFewBlocks>
                 : sentencekv::decode_selection_kernel<8, sentencekv::kManyBlocks>);
  return sentencekv::launch(kernel, dim3(a.rank.num_heads, a.rank.num_requests),
                            sentencekv::kRankThreads, sentencekv::selection_shared_bytes(a),
                            stream, a);
}
