# SPDX-License-Identifier: Apache-2.0
"""The mass of every block under the current query, from codes: integers from end to end.

Logits are counted in units of 1/16 of an octave (log2), rounded down; a power of two of such a
number is an integer, too. So sums do not depend on their order, and every implementation, batch
and device ranks blocks alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import Geometry, IndexKind, LayerPools, SparseBatch
from .pack_keys import unpack_signs
from .quantize_query import QuantizedQuery, quantize_query

UNITS = 16  # an octave
UNIT_LIMIT = 2**20  # of either part of an estimate
ONE = 2**22  # the largest token of a block, in its sum
NONE = -(2**30)  # top of a block that is not there


@dataclass(frozen=True)
class BlockMasses:
    """Sums of powers of two by block, B of them from the request's first one on.

    `sums / ONE * 2 ** (tops / UNITS)` is the sum over the block's tokens of exp(logit).
    """

    tops: Tensor  # [S, H, G, B] int32: the block's largest logit, in units; NONE beyond num_pages
    sums: Tensor  # [S, H, G, B] int32: ONE to N * ONE; 0 beyond num_pages


def unit_factor(scale: float) -> float:
    """What turns a product of query and key into units, for a softmax scale."""
    return float(torch.tensor(scale * math.log2(math.e) * UNITS, dtype=torch.float32))


def exp2_units(below: Tensor) -> Tensor:
    """`ONE * 2 ** (-below / UNITS)`, rounded: a parabola within the octave (off by at most
    0.25 %), shifted by whole ones.

    Args:
        below: int32, at least 0.

    Returns:
        int32.
    """
    part = below % UNITS
    return (ONE - 176300 * part + 2847 * part * part) >> (below // UNITS).clamp(max=31)


def token_units(
    geometry: Geometry, pools: LayerPools, pages: Tensor, query: QuantizedQuery
) -> Tensor:
    """Estimated logits of the tokens of pages, in units.

    `floor(f m <mean_levels, means>) + floor(f s <levels, signs>)`, f the unit factor times the
    step of the query, m and s the scales of page and token, products taken from the left; each
    part within UNIT_LIMIT.

    Args:
        pages: [n] int64.
        query: of [H, G, D].

    Returns:
        [H, G, n, N] int32.
    """
    assert pools.codes is not None and pools.scales is not None, "the server keeps codes"
    assert pools.means is not None and pools.mean_scales is not None
    unit = unit_factor(geometry.scale)
    signs = unpack_signs(pools.codes[pages]).double()  # [n, H, N, W]; exact in any order
    dots = torch.einsum("hgw,nhtw->hgnt", query.levels.double(), signs).float()
    scales = pools.scales[pages].float().transpose(0, 1)[:, None]  # [H, 1, n, N]
    code_factor = (unit * query.step)[..., None, None] * scales
    means = pools.means[pages].double()  # [n, H, D]
    mean_dots = torch.einsum("hgd,nhd->hgn", query.mean_levels.double(), means).float()
    mean_scales = pools.mean_scales[pages].transpose(0, 1)[:, None]  # [H, 1, n]
    mean_factor = (unit * query.mean_step)[..., None] * mean_scales
    coarse, fine = _units(mean_factor * mean_dots), _units(code_factor * dots)
    return coarse[..., None] + fine


def score_blocks(
    geometry: Geometry, pools: LayerPools, batch: SparseBatch, query: Tensor
) -> BlockMasses:
    """Masses of all indexed blocks, resident ones included, of the requests that rank by codes.

    Args:
        query: [S, H * G, D]; query heads of a group are adjacent.
    """
    num_requests, width = len(batch.num_pages), batch.pages.shape[1]
    shape = (num_requests, geometry.num_kv_heads, geometry.group_size, width)
    tops = torch.full(shape, NONE, dtype=torch.int32)
    sums = torch.zeros(shape, dtype=torch.int32)
    grouped = query.unflatten(1, shape[1:3])
    for s in range(num_requests):
        if int(batch.index_kind[s]) != IndexKind.TOKEN_CODES or batch.takes_everything(s):
            continue
        assert pools.basis is not None, "the server keeps codes"
        count = int(batch.num_pages[s])
        pages = batch.pages[s, :count].long()
        quantized = quantize_query(grouped[s], pools.basis, geometry.code_width)
        units = token_units(geometry, pools, pages, quantized)
        tops[s, ..., :count] = top = units.amax(-1)
        sums[s, ..., :count] = exp2_units(top[..., None] - units).sum(-1, dtype=torch.int32)
    return BlockMasses(tops, sums)


def _units(x: Tensor) -> Tensor:
    limit = float(UNIT_LIMIT)
    return torch.floor(x).clamp(-limit, limit).to(torch.int32)
