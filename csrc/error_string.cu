// SPDX-License-Identifier: Apache-2.0
// C ABI: the words for a status that the other functions return.
#include <cuda_runtime.h>

extern "C" const char* sentencekv_error_string(cudaError_t status) {
  return cudaGetErrorString(status);
}
