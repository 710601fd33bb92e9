// SPDX-License-Identifier: Apache-2.0
// One way to start a kernel under nvcc and under the host emulation.
#pragma once

#include <cuda_runtime.h>

namespace sentencekv {

constexpr int kWarp = 32;
constexpr size_t kMaxSharedBytes = 48 * 1024;  // a block gets no more without opting in

/// Multiprocessors of the current device.
inline cudaError_t multiprocessors(int* count) {
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

/// Start `kernel(args)`; errors of the launch itself are returned, not those of its run.
template <class Args>
cudaError_t launch(void (*kernel)(Args), dim3 grid, int threads, size_t shared_bytes,
                   [[maybe_unused]] cudaStream_t stream, const Args& args) {
  if (shared_bytes > kMaxSharedBytes) return cudaErrorInvalidValue;
  if (grid.x == 0 || grid.y == 0) return cudaSuccess;
#ifdef __CUDACC__
  kernel<<<grid, threads, shared_bytes, stream>>>(args);
  return cudaGetLastError();
#else
  host_cuda::run(grid, dim3(threads), shared_bytes, [&] { kernel(args); });
  return cudaSuccess;
#endif
}

}  // namespace sentencekv
