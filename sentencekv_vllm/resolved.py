# SPDX-License-Identifier: Apache-2.0
"""What a model makes of the settings: sizes in blocks, pages and bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .bounds import INT32_MAX
from .config import ConfigError, SentenceKVConfig
from .host_format import HostFormat, host_format
from .layer_budgets import layer_blocks
from .policies import SelectionPolicy
from .types import IndexKind

GIB = 2**30
MAX_BLOCK_SIZE = 256  # tokens; see ops.score_blocks


def blocks(tokens: int, block_size: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return -(-tokens // block_size)


@dataclass(frozen=True)
class ResolvedConfig:
    """The settings of one worker, for its share of one model."""

    config: SentenceKVConfig
    policy: SelectionPolicy  # the default of a request, overrides applied
    num_layers: int
    block_size: int  # tokens
    rows_per_page: int  # sentence rows that come with a page
    index_vectors: int  # that a row has room for
    code_channels: int  # of a key, that have bits; 0: no codes are kept
    code_width: int  # bits of a token's code
    observation_window: int  # last prompt tokens whose queries are kept
    sink_blocks: int
    recent_blocks: int  # full blocks that the recent window may touch
    working_set_blocks: int  # R: private blocks of a sparse request
    num_pages: int  # of the swap pool and of the index
    host_format: HostFormat | None  # None: pages are byte copies
    page_bytes: int  # one block of every layer, in the swap pool
    index_page_bytes: int  # on the device, every layer

    @property
    def budget_blocks(self) -> int:
        """History blocks that a request selects per KV head and step by default."""
        return self.history_blocks(self.policy, self.config.token_budget)

    @property
    def resident_blocks(self) -> int:
        """Most vLLM blocks that a sparse request holds in decode: one is partly filled."""
        return self.sink_blocks + self.working_set_blocks + self.recent_blocks + 1

    @property
    def smallest_budget(self) -> int:
        """Tokens; sinks, recent window and one history block."""
        return self.config.num_sink_tokens + self.config.recent_window + self.block_size

    @property
    def largest_budget(self) -> int:
        """Tokens; sinks, recent window and the whole working set."""
        history = self.working_set_blocks * self.block_size
        return self.config.num_sink_tokens + self.config.recent_window + history

    @property
    def host_pool_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    @property
    def index_bytes(self) -> int:
        return self.num_pages * self.index_page_bytes

    @property
    def histories_may_visit(self) -> bool:
        """A prompt need not fit on the GPU: pages are byte copies, so the prefill stays exact, and
        the policy does not read the whole prompt there when it has been prefilled."""
        policy = self.policy
        exact = self.host_format is None
        reads_all = policy.settlement is not None or policy.keeps_all
        return self.config.visits and exact and not reads_all

    def layer_blocks(self, policy: SelectionPolicy, budget_blocks: int) -> tuple[int, ...]:
        """A budget by layer, each within the working set; () where all layers have the same."""
        if not policy.layer_weights or not budget_blocks:
            return ()
        limit, share = self.working_set_blocks, self.config.layer_share
        return layer_blocks(policy.layer_weights, budget_blocks, limit, self.num_layers, share)

    def history_blocks(self, policy: SelectionPolicy, token_budget: int) -> int:
        """History part of a budget under a policy, in blocks, rounded up."""
        if policy.keeps_all:
            return self.working_set_blocks
        return _history_blocks(self.config, token_budget, self.block_size) if policy.selects else 0


def resolve(
    config: SentenceKVConfig,
    *,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    num_layers: int,
    dtype_size: int,
) -> ResolvedConfig:
    """Settle the sizes.

    Args:
        block_size: tokens of a vLLM block.
        num_kv_heads, num_layers: this worker's share.
        dtype_size: bytes of a KV cache element.

    Raises:
        ConfigError: the settings do not fit this model or each other.
    """
    if head_dim % 8:
        raise ConfigError(
            f"the index packs 8 bits a byte, head_dim {head_dim} is no multiple of 8: "
            "serve this model with another attention backend"
        )
    rows_per_page = max(1, block_size // config.sentence_tokens_per_row)
    head_blocks = num_layers * num_kv_heads
    policy = config.selection_policy
    if block_size > MAX_BLOCK_SIZE:
        raise ConfigError(
            f"a block's tokens are summed up in 32 bits, which hold {MAX_BLOCK_SIZE} of them, not "
            f"{block_size}: set --block-size to at most {MAX_BLOCK_SIZE}"
        )
    channels = _code_channels(config, policy, head_dim)
    width = channels * config.index_bits
    form = _host_format(config.host_kv_dtype, block_size, head_dim, dtype_size)
    head_block_bytes = 2 * block_size * head_dim * dtype_size
    page_bytes = head_blocks * (head_block_bytes if form is None else form.head_block_bytes)
    vectors = policy.vectors if config.index_vectors is None else config.index_vectors
    if not vectors:  # rows that hold nothing are never short
        rows_per_page = block_size
    # Codes, their scales, and mean, scale and flag of the page; vectors and flags of the rows.
    head_page_bytes = block_size * (width // 8 + 2) + head_dim + 5 if channels else 0
    head_page_bytes += rows_per_page * (2 * head_dim * vectors + 1) if vectors else 0
    history = _history_blocks(config, config.token_budget, block_size)
    wanted = config.working_set_tokens
    largest = history
    if policy.layer_weights and history:
        unlimited = num_layers * history
        largest = max(
            layer_blocks(policy.layer_weights, history, unlimited, num_layers, config.layer_share),
            default=history,
        )
    resolved = ResolvedConfig(
        config=config,
        policy=policy,
        num_layers=num_layers,
        block_size=block_size,
        rows_per_page=rows_per_page,
        index_vectors=vectors,
        code_channels=channels,
        code_width=width,
        observation_window=_observation_window(config, policy),
        sink_blocks=blocks(config.num_sink_tokens, block_size),
        recent_blocks=blocks(config.recent_window, block_size),
        working_set_blocks=-(-5 * largest // 4) if wanted is None else blocks(wanted, block_size),
        num_pages=int(config.host_pool_gib * GIB) // page_bytes,
        host_format=form,
        page_bytes=page_bytes,
        index_page_bytes=head_blocks * head_page_bytes,
    )
    _check_page_ids(resolved)
    if resolved.policy.selects:
        _check_budget(resolved)
        _check_host_pool(resolved)
    return resolved


def _code_channels(config: SentenceKVConfig, policy: SelectionPolicy, head_dim: int) -> int:
    reads = policy.index is IndexKind.TOKEN_CODES
    if not (reads if config.index_codes is None else config.index_codes):
        return 0
    return max(8, int(config.index_share * head_dim) // 8 * 8)


def _host_format(name: str, block_size: int, head_dim: int, dtype_size: int) -> HostFormat | None:
    try:
        return host_format(name, block_size, head_dim, dtype_size)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _observation_window(config: SentenceKVConfig, policy: SelectionPolicy) -> int:
    needed = 0 if policy.settlement is None else policy.settlement.window
    window = needed if config.observation_window is None else config.observation_window
    return max(window, int(config.warm_start))


def _history_blocks(config: SentenceKVConfig, token_budget: int, block_size: int) -> int:
    history = token_budget - config.num_sink_tokens - config.recent_window
    return blocks(max(0, history), block_size)


def _check_budget(resolved: ResolvedConfig) -> None:
    config = resolved.config
    if config.token_budget < resolved.smallest_budget:
        raise ConfigError(
            f"token_budget {config.token_budget} is below num_sink_tokens "
            f"{config.num_sink_tokens} + recent_window {config.recent_window} + one block of "
            f"{resolved.block_size}: the smallest budget is {resolved.smallest_budget}"
        )
    if resolved.working_set_blocks < resolved.budget_blocks:
        smallest = resolved.budget_blocks * resolved.block_size
        raise ConfigError(
            f"working_set_tokens {config.working_set_tokens} holds "
            f"{resolved.working_set_blocks} blocks of {resolved.block_size}, one step selects "
            f"{resolved.budget_blocks}: the smallest working set is {smallest} tokens"
        )


def _check_page_ids(resolved: ResolvedConfig) -> None:
    """Tables on the device name pages and their sentence rows by int32 numbers."""
    most = INT32_MAX // resolved.rows_per_page
    if resolved.num_pages > most:
        largest = math.floor(most * resolved.page_bytes / GIB)
        raise ConfigError(
            f"host_pool_gib {resolved.config.host_pool_gib:g} holds {resolved.num_pages} pages of "
            f"{resolved.page_bytes} bytes, the index counts {most}: the largest pool is "
            f"{largest} GiB"
        )


def _check_host_pool(resolved: ResolvedConfig) -> None:
    config = resolved.config
    needed = blocks(config.min_context_tokens, resolved.block_size)
    if resolved.num_pages < needed:
        smallest = math.ceil(100 * needed * resolved.page_bytes / GIB) / 100
        raise ConfigError(
            f"host_pool_gib {config.host_pool_gib:g} holds {resolved.num_pages} pages of "
            f"{resolved.page_bytes} bytes, but a request of min_context_tokens "
            f"{config.min_context_tokens} has {needed}: the smallest pool is {smallest:.2f} GiB"
        )
