// SPDX-License-Identifier: Apache-2.0
// C ABI of decode_selection: one launch for all requests and KV heads of a layer.
#include <sentencekv/decode_selection.cuh>
#include <sentencekv/host_address.hpp>

using sentencekv::DecodeSelectionArgs;

/// Returns cudaErrorInvalidValue where rank, resolve_residency or gather_misses would.
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
  int cluster = 1;
  const cudaError_t found = sentencekv::rank_cluster(a.rank, &cluster);
  if (found != cudaSuccess) return found;
  return sentencekv::launch(a.rank.group <= 4 ? sentencekv::decode_selection_kernel<4>
                                              : sentencekv::decode_selection_kernel<8>,
                            dim3(a.rank.num_heads * cluster, a.rank.num_requests),
                            sentencekv::kRankThreads, sentencekv::selection_shared_bytes(a),
                            stream, a, cluster);
}
