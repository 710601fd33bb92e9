# SPDX-License-Identifier: Apache-2.0
"""Sparse decode attention over sentences, with KV offload, as a vLLM plugin."""

__version__ = "0.1.0"
