// SPDX-License-Identifier: Apache-2.0
// C ABI of the copies between the cache and the swap pool.
//
// Kernels read and write host memory through its device address. They return
// cudaErrorInvalidValue where a pointer, size or stride is not a multiple of 16 bytes, and
// cudaErrorHostMemoryNotRegistered where host memory is not pinned.
#include <vector>

#include <sentencekv/host_address.hpp>
#include <sentencekv/swap_blocks.cuh>

using sentencekv::aligned;
using sentencekv::CopyPagesArgs;
using sentencekv::GatherMissesArgs;
using sentencekv::to_device_address;

namespace {

/// One block per multiprocessor holds more loads in flight than the bus can carry.
template <class Args>
cudaError_t launch_copy(void (*kernel)(Args), size_t shared_bytes, cudaStream_t stream,
                        const Args& args) {
  int grid = 0;
  const cudaError_t status = sentencekv::multiprocessors(&grid);
  if (status != cudaSuccess) return status;
  return sentencekv::launch(kernel, dim3(grid), sentencekv::kCopyThreads, shared_bytes, stream,
                            args);
}

struct Runs {  // copies of one batch; kept between calls, so that a steady state allocates nothing
  std::vector<const void*> sources;
  std::vector<void*> targets;
  std::vector<size_t> sizes;
};

}  // namespace

/// Copies every listed miss. No host synchronisation; may be captured.
/// Also cudaErrorInvalidValue where there are more than some 12000 regions.
extern "C" cudaError_t sentencekv_gather_misses(const GatherMissesArgs* args,
                                                cudaStream_t stream) {
  GatherMissesArgs a = *args;
  if (!aligned({a.host, a.cache},
               {a.head_block_bytes, a.cache_block_stride, a.cache_head_stride})) {
    return cudaErrorInvalidValue;
  }
  const cudaError_t status = to_device_address(&a.host);
  if (status != cudaSuccess) return status;
  const size_t shared_bytes =
      sizeof(int32_t) * (a.num_regions + sentencekv::kCopyThreads / sentencekv::kWarp);
  return launch_copy(sentencekv::gather_misses_kernel, shared_bytes, stream, a);
}

/// Copies whole pages; the list is in device memory. May be captured.
extern "C" cudaError_t sentencekv_copy_pages(const CopyPagesArgs* args, cudaStream_t stream) {
  CopyPagesArgs a = *args;
  if (!aligned({a.source, a.target}, {a.page_bytes, a.source_stride, a.target_stride})) {
    return cudaErrorInvalidValue;
  }
  cudaError_t status = to_device_address(&a.source);
  if (status == cudaSuccess) status = to_device_address(&a.target);
  if (status != cudaSuccess) return status;
  return launch_copy(sentencekv::copy_pages_kernel, 0, stream, a);
}

/// The same through the copy engines, which leave the multiprocessors alone; the list is in host
/// memory and is not needed after the call. Neighbours that stay neighbours are one copy.
extern "C" cudaError_t sentencekv_copy_page_runs(const CopyPagesArgs* args, cudaStream_t stream) {
  const CopyPagesArgs& a = *args;
  static thread_local Runs runs;
  runs.sources.clear();
  runs.targets.clear();
  runs.sizes.clear();
  const bool dense = a.source_stride == a.page_bytes && a.target_stride == a.page_bytes;
  for (int i = 0; i < a.num_pairs; ++i) {
    const int32_t* pair = a.pairs + int64_t{2} * i;
    if (dense && i > 0 && pair[0] == pair[-2] + 1 && pair[1] == pair[-1] + 1) {
      runs.sizes.back() += a.page_bytes;
      continue;
    }
    runs.sources.push_back(static_cast<const char*>(a.source) + pair[0] * a.source_stride);
    runs.targets.push_back(static_cast<char*>(a.target) + pair[1] * a.target_stride);
    runs.sizes.push_back(a.page_bytes);
  }
#if defined(CUDART_VERSION) && CUDART_VERSION >= 13000
  if (!runs.sizes.empty() && stream != nullptr) {  // the legacy stream takes no batches
    cudaMemcpyAttributes attributes = {};
    attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
    attributes.flags = cudaMemcpyFlagPreferOverlapWithCompute;
    size_t first = 0;
    return cudaMemcpyBatchAsync(runs.targets.data(), runs.sources.data(), runs.sizes.data(),
                                runs.sizes.size(), &attributes, &first, 1, stream);
  }
#endif
  for (size_t i = 0; i < runs.sizes.size(); ++i) {
    const cudaError_t status = cudaMemcpyAsync(runs.targets[i], runs.sources[i], runs.sizes[i],
                                               cudaMemcpyDefault, stream);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}
