// SPDX-License-Identifier: Apache-2.0
// C ABI of quantize_query: one launch for all requests and KV heads of a layer.
#include <sentencekv/quantize_query.cuh>

using sentencekv::QuantizeQueryArgs;

/// Returns cudaErrorInvalidValue for head dims that are no multiple of 16 up to 256, and for code
/// widths that the bits do not divide or that name more channels than there are.
extern "C" cudaError_t sentencekv_quantize_query(const QuantizeQueryArgs* args,
                                                 cudaStream_t stream) {
  const QuantizeQueryArgs& a = *args;
  if (a.head_dim % 16 != 0 || a.head_dim > sentencekv::kMaxDim || a.bits < 1 || a.bits > 2 ||
      a.code_width % a.bits != 0 || a.code_width / a.bits > a.head_dim) {
    return cudaErrorInvalidValue;
  }
  const int sets = (a.group + sentencekv::kQueryHeads - 1) / sentencekv::kQueryHeads;
  return sentencekv::launch(sentencekv::quantize_query_kernel,
                            dim3(sets, a.num_heads, a.num_requests), sentencekv::kQueryThreads,
                            sizeof(sentencekv::QueryShared), stream, a);
}
