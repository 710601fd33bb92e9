# SPDX-License-Identifier: Apache-2.0
"""Dense decode attention of others, over the same keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from gpu_layer import BLOCK
from torch import Tensor


@dataclass(frozen=True)
class DenseCache:
    """Every request's whole context, in token order: pages of BLOCK tokens follow each other."""

    query: Tensor  # [S, Hq, D]
    keys: Tensor  # [S, L, H, D]
    values: Tensor  # [S, L, H, D]
    lengths: Tensor  # [S] int32, all L
    scale: float

    @property
    def context(self) -> int:
        return self.keys.shape[1]

    @property
    def paged_keys(self) -> Tensor:  # [S * L / BLOCK, BLOCK, H, D]
        return self.keys.view(-1, BLOCK, *self.keys.shape[2:])

    @property
    def paged_values(self) -> Tensor:
        return self.values.view(-1, BLOCK, *self.values.shape[2:])

    @property
    def block_table(self) -> Tensor:  # [S, L / BLOCK] int32
        pages = len(self.keys) * self.context // BLOCK
        table = torch.arange(pages, dtype=torch.int32, device=self.keys.device)
        return table.view(len(self.keys), -1)

    @property
    def query_starts(self) -> Tensor:  # [S + 1] int32
        return torch.arange(len(self.query) + 1, dtype=torch.int32, device=self.keys.device)


def sdpa(cache: DenseCache) -> Callable[[], Tensor]:
    query, keys, values = (
        x.transpose(1, 2) for x in (cache.query[:, None], cache.keys, cache.values)
    )
    return lambda: F.scaled_dot_product_attention(
        query, keys, values, scale=cache.scale, enable_gqa=True
    ).squeeze(2)


def vllm_flash_attention(cache: DenseCache) -> Callable[[], Tensor]:
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    keys, values, table = cache.paged_keys, cache.paged_values, cache.block_table
    starts, version = cache.query_starts, get_flash_attn_version()
    return lambda: flash_attn_varlen_func(
        cache.query, keys, values, max_seqlen_q=1, cu_seqlens_q=starts,
        max_seqlen_k=cache.context, seqused_k=cache.lengths, softmax_scale=cache.scale,
        causal=True, block_table=table, fa_version=version,
    )  # fmt: skip


def flash_attention(cache: DenseCache) -> Callable[[], Tensor]:
    from flash_attn import flash_attn_with_kvcache

    return lambda: flash_attn_with_kvcache(
        cache.query[:, None], cache.keys, cache.values, cache_seqlens=cache.lengths,
        softmax_scale=cache.scale, causal=True,
    ).squeeze(1)  # fmt: skip


def vllm_unified_attention(cache: DenseCache) -> Callable[[], Tensor]:
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    keys, values, table = cache.paged_keys, cache.paged_values, cache.block_table
    starts, output = cache.query_starts, torch.empty_like(cache.query)

    def call() -> Tensor:
        unified_attention(
            cache.query, keys, values, output, cu_seqlens_q=starts, max_seqlen_q=1,
            seqused_k=cache.lengths, max_seqlen_k=cache.context, softmax_scale=cache.scale,
            causal=True, window_size=(-1, -1), block_table=table, softcap=0.0, q_descale=None,
            k_descale=None, v_descale=None,
        )  # fmt: skip
        return output

    return call


def flashinfer(cache: DenseCache) -> Callable[[], Tensor]:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    requests, num_query_heads, dim = cache.query.shape
    pages = cache.context // BLOCK
    device = cache.query.device
    indptr = torch.arange(requests + 1, dtype=torch.int32, device=device) * pages
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(256 * 2**20, dtype=torch.uint8, device=device), "NHD", use_cuda_graph=True,
        use_tensor_cores=True, paged_kv_indptr_buffer=indptr.clone(),
        paged_kv_indices_buffer=cache.block_table.flatten(),
        paged_kv_last_page_len_buffer=torch.full_like(indptr[1:], BLOCK),
    )  # fmt: skip
    wrapper.plan(
        indptr, cache.block_table.flatten(), torch.full_like(indptr[1:], BLOCK),
        num_query_heads, cache.keys.shape[2], dim, BLOCK, sm_scale=cache.scale,
        q_data_type=cache.query.dtype, kv_data_type=cache.keys.dtype,
    )  # fmt: skip
    paged = (cache.paged_keys, cache.paged_values)
    return lambda: wrapper.run(cache.query, paged)


FLASH = {  # the first that runs here stands for the rest
    "vllm FlashAttention": vllm_flash_attention,
    "flash-attn": flash_attention,
    "torch SDPA": sdpa,
}
OTHERS = {"vllm Triton unified": vllm_unified_attention, "FlashInfer": flashinfer}


def peers(cache: DenseCache) -> Iterator[tuple[str, Callable[[], Tensor] | str]]:
    """(name, call), or (name, reason) where a peer cannot run here."""
    for name, prepare in FLASH.items():
        peer = _attempt(prepare, cache)
        yield name, peer
        if not isinstance(peer, str):
            break
    for name, prepare in OTHERS.items():
        yield name, _attempt(prepare, cache)


def _attempt(
    prepare: Callable[[DenseCache], Callable[[], Tensor]], cache: DenseCache
) -> Callable[[], Tensor] | str:
    try:
        call = prepare(cache)
        call()
    except Exception as error:  # a peer that fails is reported, whatever it raises
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return call
