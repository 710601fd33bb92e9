# SPDX-License-Identifier: Apache-2.0
"""One attention layer: stock attention for dense rows, ranked sentences for sparse rows."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor
from vllm.config import get_current_vllm_config_or_none

from ..worker.observations import Observed
from . import model_runner
from .metadata import DenseCall, SentenceKVMetadata, current_runtime
from .recorder import current_recorder
from .support import REFUSED


def refuse_window(tokens: int | None, max_model_len: int) -> None:
    """A layer of ours has every token of its past.

    Raises:
        ValueError: it has a window that a request can outgrow, and that the model's configuration
            does not tell.
    """
    if tokens is not None and tokens < max_model_len:
        raise ValueError(REFUSED["untold window"].refusal(f"{tokens} tokens"))


class SplitImpl:
    """Put before a stock implementation, which writes the KV cache and serves dense rows."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ) -> None:
        if alibi_slopes is not None:
            raise ValueError(
                "sentencekv does not support ALiBi: a swapped-in block has no position in its "
                "table. Use another attention backend for this model."
            )
        if kv_sharing_target_layer_name is not None:
            raise ValueError(
                "sentencekv does not support layers that share another layer's KV cache "
                f"(here: {kv_sharing_target_layer_name}). Use another attention backend."
            )
        config = get_current_vllm_config_or_none()
        if config is not None and config.model_config is not None:  # the worker's model is made
            model_runner.install(config)
            refuse_window(sliding_window, config.model_config.max_model_len)
        super().__init__(  # type: ignore[call-arg]  # the stock implementation's
            num_heads,
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            None,  # the window is longer than any request
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            **extra,
        )

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        return False  # the sparse rows are written unquantised

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        tensors = (query, key, value)
        recorder = current_recorder()
        if recorder is not None:
            softcap = self.logits_soft_cap or 0.0  # type: ignore[attr-defined]  # the stock one's
            recorder.attend(layer.layer_name, query, key, value, output, self.scale, softcap)  # type: ignore[attr-defined]
            return output
        if not isinstance(attn_metadata, SentenceKVMetadata):  # a stock step, or a profiling run
            return super().forward(  # type: ignore[misc]
                layer, *tensors, kv_cache, attn_metadata, output
            )
        split = attn_metadata.split
        if split.dense is not None:
            self._dense_rows(layer, tensors, kv_cache, split.dense, output)
        if split.observed is not None:
            self._observe(layer.layer_name, query, split.observed)
        if split.sparse:
            runtime = split.sparse[0].runtime
            index, geometry = runtime.layer_index[layer.layer_name], runtime.geometry
            call = next(call for call in split.sparse if index in call.plan.layers)
            rows = (-1, geometry.num_query_heads, geometry.head_dim)
            self.sparse_rows(index, query.view(rows), kv_cache, call, output.view(rows))
        return output

    def _dense_rows(
        self,
        layer: Any,
        tensors: tuple[Tensor, Tensor, Tensor],
        kv_cache: Tensor,
        dense: DenseCall,
        output: Tensor,
    ) -> None:
        visits = dense.visits
        index = -1 if visits is None else visits.layer_index[layer.layer_name]
        cache, metadata = dense.of_layer(index, kv_cache)
        super().forward(layer, *tensors, cache, metadata, output)  # type: ignore[misc]
        if visits is not None:
            visits.leave(index)

    def _observe(self, layer_name: str, query: Tensor, observed: Observed) -> None:
        runtime = current_runtime()
        assert runtime is not None, "a step without a connector has no voting tokens"
        geometry = runtime.geometry
        rows = query.view(-1, geometry.num_query_heads, geometry.head_dim)
        runtime.observations.put(runtime.layer_index[layer_name], rows, observed)

    @abstractmethod
    def sparse_rows(
        self, layer: int, query: Tensor, kv_cache: Tensor, call: Any, output: Tensor
    ) -> None:
        """Rank and attend for the sparse rows.

        Args:
            layer: index of the layer.
            query: [num_tokens, Hq, D] of the whole batch.
            kv_cache: [B, H, N, 2D] of the layer.
            call: what the platform's builder prepared.
            output: [num_tokens, Hq, D], written at the plan's tokens.
        """
