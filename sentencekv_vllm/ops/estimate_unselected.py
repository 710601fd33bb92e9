# SPDX-License-Identifier: Apache-2.0
"""What attention left out of the history, estimated group by group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..types import Geometry, LayerPools, SparseBatch
from .token_layout import TokenLayout


@dataclass(frozen=True)
class Attended:
    """What a layer's attention has read."""

    head_tables: Tensor  # [S, H, W] int32 of head-block ids `b * H + h`
    seq_lens: Tensor  # [S] int32: tokens
    layout: TokenLayout  # of a head-block
    lse: Tensor | None  # [S, H * G] float32, of the logits; None where the op does not tell
    softcap: float = 0.0  # logits are softcap * tanh(logit / softcap); 0: as they are


def capped(logits: Tensor, softcap: float) -> Tensor:
    return softcap * (logits / softcap).tanh() if softcap else logits


def attended_lse(geometry: Geometry, cache: Tensor, query: Tensor, attended: Attended) -> Tensor:
    """Log-sum-exp of the logits of the attended tokens, [S, H * G] float32.

    Args:
        cache: [B, H, N, 2D].
        query: [S, H * G, D].
    """
    requests, heads, width = attended.head_tables.shape
    blocks = attended.head_tables.long() // heads
    head = torch.arange(heads, device=cache.device)[:, None]
    used = cache.flatten(2)[blocks, head]  # [S, H, W, N * 2D]
    keys = used[..., attended.layout.keys].flatten(2, 3).float()  # [S, H, W * N, D]
    grouped = query.float().view(requests, heads, geometry.group_size, -1)
    logits = capped(geometry.scale * grouped @ keys.mT, attended.softcap)
    token = torch.arange(width * geometry.block_size, device=cache.device)
    behind = token >= attended.seq_lens[:, None, None, None]
    return logits.masked_fill(behind, float("-inf")).logsumexp(-1).flatten(1)


def unattended_tokens(
    geometry: Geometry, pools: LayerPools, batch: SparseBatch, step: int | Tensor
) -> Tensor:
    """How many tokens of each sentence lie in history blocks that the KV head left out.

    A block is attended to where its slot has been selected in this step.

    Returns:
        [S, max_sentences, H] int64.
    """
    n, device = geometry.block_size, batch.pages.device
    block = torch.arange(batch.pages.shape[1], device=device)
    history = (block >= batch.history_lo[:, None]) & (block < batch.history_hi[:, None])
    slots = pools.page_slot[batch.pages.long().where(history, 0)].long()  # [S, P, H]
    heads = torch.arange(slots.shape[-1], device=device)
    selected = (slots >= 0) & (pools.slot_stamp[slots.clamp(min=0), heads] == step)
    missing = pad((history[..., None] & ~selected).long(), (0, 0, 0, 1))
    before = missing.cumsum(1) - missing  # missing blocks below block j

    def below(tokens: Tensor) -> Tensor:
        """[S, I, H]: tokens in missing blocks below token t."""
        tokens = tokens.clamp(0, len(block) * n)[..., None].expand(-1, -1, len(heads))
        blocks, places = tokens // n, tokens % n
        return n * before.gather(1, blocks) + places * missing.gather(1, blocks)

    ends = batch.sentence_ends.long()
    counts = below(ends) - below(pad(ends, (1, -1)))
    known = torch.arange(ends.shape[1], device=device) < batch.num_sentences[:, None]
    return counts.where(known[..., None], 0)


def estimate_unselected(
    geometry: Geometry,
    pools: LayerPools,
    batch: SparseBatch,
    step: int | Tensor,
    estimates: Tensor,
    query: Tensor,
    attended: Attended,
    output: Tensor,
) -> None:
    """Merge an estimate of the history tokens left out into a layer's attention output.

    The t tokens of a sentence in blocks that the KV head left out count as t times a token with
    the sentence's mean key and mean value (RetroInfer, arXiv 2505.02922): logit `scale * <q,
    mean key> + log t`. It is exact where a sentence's tokens are equal; otherwise the sentence's
    true weight is larger, for exp is convex. History tokens of no sealed sentence stay left out.

    Fixed shapes, nothing waits for the device. It gathers both vectors of every sentence.

    Args:
        pools: `centroids` and `spreads` hold mean keys and values; `page_slot`, `slot_stamp` and
            `cache` are as `decode_layer` has left them.
        step: of `slot_stamp`.
        estimates: [S] bool: rows that want it; the others keep their output.
        query: [S, H * G, D], the query of the attention.
        attended: what the output was computed from.
        output: [S, H * G, D], changed in place.
    """
    centroids, spreads = pools.centroids, pools.spreads
    assert centroids is not None and spreads is not None, "index_vectors is 2"
    lse = attended.lse
    if lse is None:
        lse = attended_lse(geometry, pools.cache, query, attended)
    requests, heads, m = len(query), geometry.num_kv_heads, geometry.rows_per_page
    counts = unattended_tokens(geometry, pools, batch, step)
    sentence = torch.arange(counts.shape[1], device=counts.device)
    left_out = counts > 0  # [S, I, H]
    # What a table holds behind a request's last sentence is stale.
    row_pages = batch.row_pages.long()[:, sentence // m].where(left_out.any(2), 0)
    rows = row_pages * m + sentence % m

    def gathered(vectors: Tensor) -> Tensor:
        """[S, H, I, D], zero where nothing is left out: what lies there may be NaN."""
        return vectors[rows].where(left_out[..., None], 0).transpose(1, 2).float()

    grouped = query.float().view(requests, heads, geometry.group_size, -1)
    logits = capped(
        geometry.scale * grouped @ gathered(centroids).mT, attended.softcap
    )  # [S, H, G, I]
    logits = logits + counts.float().log().transpose(1, 2)[:, :, None]
    lse = lse.view(requests, heads, geometry.group_size, 1)
    total = lse.logaddexp(logits.logsumexp(-1, keepdim=True))
    shares = (logits - total).exp()
    before = output.view_as(grouped)
    merged = (lse - total).exp() * before.float() + shares @ gathered(spreads)
    before.copy_(merged.to(output.dtype).where(estimates[:, None, None, None], before))
