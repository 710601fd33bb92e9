// SPDX-License-Identifier: Apache-2.0
// What `first` counts in: triton_kernels/locate_sentences.py.
#pragma once

namespace sentencekv {

constexpr int kGranule = 16;  // tokens; divides every block size

}  // namespace sentencekv
