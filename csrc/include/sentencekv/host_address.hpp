// SPDX-License-Identifier: Apache-2.0
// What a launcher checks before kernels reach for host memory.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "swap_blocks.cuh"

namespace sentencekv {

/// Whether pointers and sizes are multiples of a vector.
inline bool aligned(std::initializer_list<const void*> pointers, std::initializer_list<int64_t> sizes) {
  bool result = true;
  for (const void* p : pointers) {
    result &= reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0;
  }
  for (const int64_t size : sizes) result &= size % kVectorBytes == 0;
  return result;
}

/// The address under which kernels reach device or pinned host memory.
template <class Pointer>
cudaError_t to_device_address(Pointer* pointer) {
  cudaPointerAttributes attributes;
  const cudaError_t status = cudaPointerGetAttributes(&attributes, *pointer);
  if (status != cudaSuccess) return status;
  if (attributes.type == cudaMemoryTypeUnregistered) return cudaErrorHostMemoryNotRegistered;
  *pointer = attributes.devicePointer;
  return cudaSuccess;
}

}  // namespace sentencekv
