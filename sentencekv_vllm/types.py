# SPDX-License-Identifier: Apache-2.0
"""The frozen records that pass between the stages."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor

from .host_format import HostFormat


class IndexKind(IntEnum):
    """What a sentence is scored by."""

    TOKEN_CODES = 0  # blocks by the mass of their tokens: mean key plus coded residuals
    CENTROID = 1  # inner product with the mean key of the sentence
    RANDOM = 2  # seeded hash; the floor every method must beat
    BOUNDS = 3  # largest product that the channels' minima and maxima allow
    MEAN_STD = 4  # product with the mean key plus two standard deviations along the query

    @property
    def vectors(self) -> int:
        """Vectors that a sentence's row must hold."""
        if self in (IndexKind.BOUNDS, IndexKind.MEAN_STD):
            return 2
        return int(self is IndexKind.CENTROID)


class Reduce(IntEnum):
    """How the scores of a GQA group become one score per KV head."""

    SOFTMAX_MEAN = 0  # log of the group's mean probability
    MAX = 1  # largest logit
    MEAN = 2  # mean logit, which for centroids is the mean query's


class QueryKind(IntEnum):
    """The query that ranks."""

    CURRENT = 0  # of the token being decoded
    RUNNING_MEAN = 1  # mean over the tokens of the open sentence
    PREVIOUS = 2  # of the decode step before: known before the layer is reached


class Fate(IntEnum):
    """What becomes of the history when the prefill has ended."""

    COMPACT = 0  # the elected tokens move to the working set's blocks, the rest is dropped
    RETAIN = 1  # everything stays; summaries are of the elected tokens only
    CLUSTER = 2  # the host pages are filled anew, tokens with similar keys side by side


@dataclass(frozen=True)
class Settlement:
    """What the end of the prefill settles about the history, once.

    Where there is a window, the prompt's tokens are elected: each gets the attention that the
    last `window` tokens pay to it, pooled over its neighbours (SnapKV, arXiv 2404.14469).
    """

    fate: Fate
    window: int = 32  # tokens whose queries vote; 0: nobody does
    kernel: int = 5  # tokens that a score is pooled over, odd
    max_pool: bool = False  # the largest of them, not their mean
    unit: int | None = 1  # neighbouring tokens elected together; None: those of a sentence
    layer_group: int = 1  # consecutive layers that share the choice of the first
    factor: float = 1.0  # tokens elected, in budgets
    cluster_tokens: int = 80  # tokens a cluster, on average


@dataclass(frozen=True)
class Geometry:
    """Shapes of one worker's share of the model and of a page."""

    num_layers: int
    num_kv_heads: int
    group_size: int  # query heads per KV head
    head_dim: int
    block_size: int  # tokens
    rows_per_page: int  # sentence rows (centroid, retention flag) that come with a page
    scale: float  # softmax scale of the attention
    vectors_per_row: int = 1  # 2: with room for IndexKind.BOUNDS and MEAN_STD, or for mean values
    code_width: int = 0  # sign planes of a token's code, see `Basis`; 0: no TOKEN_CODES
    host_format: HostFormat | None = None  # of the swap pool; None: byte copies

    @property
    def num_query_heads(self) -> int:
        return self.num_kv_heads * self.group_size

    @property
    def head_block_numel(self) -> int:
        """Elements of one head-block: K and V of `block_size` tokens for one KV head."""
        return 2 * self.block_size * self.head_dim


@dataclass(frozen=True)
class Basis:
    """Where a layer's keys are coded: a linear map for keys and its counterpart for queries.

    Per KV head, `<query @ query_map, key @ key_map> = <query, key>`. The first C channels carry
    codes of `bits` bits, all of them the mean of a block: C * bits sign planes a token.
    """

    key_map: Tensor  # [H, D, D] float32
    query_map: Tensor  # [H, D, D] float32
    center: Tensor  # [H, D] float32, taken from mapped keys: the same for all of them
    bits: int  # of a code, 1 or 2


@dataclass(frozen=True)
class LayerPools:
    """The memory of one layer. All tensors are views that outlive every request.

    P pages, B vLLM blocks, H KV heads, N tokens a block, D head_dim, W code_width, M rows a page.
    What the server's policies do not read is None: codes and what belongs to them where W is 0,
    rows where they hold no vector.
    """

    cache: Tensor  # [B, H, N, 2D] vLLM's KV cache of this layer, head-major
    host: Tensor  # [P, H, N, 2D] swap pool; [P, H, head_block_bytes] uint8 in a host format
    page_slot: Tensor  # [P, H] int32: block that holds the page's head-block, or -1
    slot_page: Tensor  # [B, H] int32: page held by the block's head-block, or -1
    slot_stamp: Tensor  # [B, H] int32: step at which the slot was last selected
    codes: Tensor | None = None  # [P, H, W / 8, N] uint8: see ops.pack_keys
    scales: Tensor | None = None  # [P, H, N] bfloat16: of the tokens' codes
    means: Tensor | None = None  # [P, H, D] int8: mean key of the page, mapped
    mean_scales: Tensor | None = None  # [P, H] float32
    page_kept: Tensor | None = None  # [P, H] uint8: the page was selected at the step before
    basis: Basis | None = None
    centroids: Tensor | None = None  # [P * M, H, D] bfloat16, one row per sentence
    kept: Tensor | None = None  # [P * M, H] uint8: the sentence was selected at the step before
    spreads: Tensor | None = None  # as centroids, where a row has two vectors
    host_format: HostFormat | None = None  # None: a page is a byte copy of a block


@dataclass(frozen=True)
class SparseBatch:
    """The sparse decode rows of one step, the same for every layer.

    S requests; block j of request s holds tokens [j * N, (j + 1) * N). The history is
    blocks [history_lo, history_hi); sinks lie before it, the recent window after it.
    Sentence i spans tokens [sentence_ends[i - 1], sentence_ends[i]), from 0 for i = 0.
    """

    pages: Tensor  # [S, max_pages] int32: page of block j, for j < num_pages
    num_pages: Tensor  # [S] int32: blocks copied out and indexed, history_hi <= num_pages
    row_pages: Tensor  # [S, max_row_pages] int32: row of sentence i = row_pages[i // M] * M + i % M
    sentence_ends: Tensor  # [S, max_sentences] int32
    num_sentences: Tensor  # [S] int32: sentences whose index entries exist
    history_lo: Tensor  # [S] int32
    history_hi: Tensor  # [S] int32
    budget_blocks: Tensor  # [S] int32: head-blocks to select, <= history_hi - history_lo
    private_blocks: Tensor  # [S, R] int32: the working set of each request
    index_kind: Tensor  # [S] int32, IndexKind
    reduce: Tensor  # [S] int32, Reduce; TOKEN_CODES has its own
    retention: Tensor  # [S] float32: what the score of a sentence that was selected at the step
    # before gains; under TOKEN_CODES what a block's is multiplied by (`retention_factor`)
    seed: Tensor  # [S] int32: for IndexKind.RANDOM
    step: int  # increases by one per step; the LRU stamp
    token_codes_only: bool = False  # known on the host: every index_kind is TOKEN_CODES

    def takes_everything(self, s: int) -> bool:
        """The budget covers the history of request `s`: nothing is ranked. Waits for a device."""
        return bool(self.budget_blocks[s] == self.history_hi[s] - self.history_lo[s])


@dataclass(frozen=True)
class Selection:
    """Which history blocks each KV head attends to."""

    blocks: Tensor  # [S, H, K] int32, ascending; -1 beyond budget_blocks
    coverage: Tensor  # [S, H] float32: estimated share of the attention mass, NaN if unknown


@dataclass(frozen=True)
class Residency:
    """Where the selected head-blocks are, and what must be copied first."""

    slots: Tensor  # [S, H, K] int32: block id holding the selected head-block, or -1
    misses: Tensor  # [n, 3] int32 rows (page, KV head, block): copy before attending
