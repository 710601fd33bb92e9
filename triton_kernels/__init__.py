# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, imported as `sentencekv_vllm.triton_kernels`."""
