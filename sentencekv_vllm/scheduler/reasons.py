# SPDX-License-Identifier: Apache-2.0
"""Why a request decodes the way it does. Every reason is counted."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Mode of a decoding request and, where it is dense, why."""

    SPARSE = "sparse"
    SWITCHED_OFF = "switched_off"  # the request asked for it
    POLICY_FULL = "policy_full"
    SHORT_CONTEXT = "short_context"  # below min_context_tokens
    SHORT_ANSWER = "short_answer"  # the first token is the last: copies would be for nobody
    BUDGET_COVERS = "budget_covers"  # the budget covers the history: nothing to leave out
    SEGMENTING = "segmenting"  # sentence spans are not there yet
    COPYING = "copying"  # the prefill or the copy of the history was not complete
    HOST_POOL_FULL = "host_pool_full"
    NO_GAIN = "no_gain"  # shared blocks: freeing them gives less than the working set takes
    ROOM = "room"  # blocks are free, and below min_context_tokens_with_room dense steps are fine
    UNSUPPORTED_INPUT = "unsupported_input"  # prompt embeddings, streaming input
