# SPDX-License-Identifier: Apache-2.0
"""Every counter and gauge, with its unit; exported as `vllm:sentencekv_<name>`."""

from __future__ import annotations

COUNTERS: dict[str, str] = {
    "hits": "Selected head-blocks that were resident, over requests, layers and KV heads.",
    "misses": "Selected head-blocks that were swapped in.",
    "warm_start_head_blocks": "Head-blocks swapped in before a request's first sparse step.",
    "swap_in_bytes": "Bytes copied from the swap pool to the working sets.",
    "swap_out_bytes": "Bytes copied from GPU blocks to the swap pool.",
    "visitors": "Requests admitted with a prompt that did not fit on the GPU.",
    "visit_bytes": "Bytes copied from the swap pool for attention of such prompts.",
    "joined_sentences": "Requests whose short sentences were joined: the swap pool has few rows.",
    "released_blocks": "GPU blocks that requests gave back, before they drew working sets.",
    "sparse_steps": "Engine steps with at least one sparse row.",
    "offload_ns": "Nanoseconds spent on copy-out and index construction.",
    "score_ns": "Nanoseconds spent scoring blocks or sentences.",
    "select_ns": "Nanoseconds spent filling the token budget.",
    "resolve_ns": "Nanoseconds spent on slot lookup.",
    "swap_ns": "Nanoseconds spent gathering missed head-blocks.",
    "attend_ns": "Nanoseconds spent in attention over the selected blocks.",
    "coverage_millionths": "Sum over sparse rows of the selected share of attention, in 1e-6.",
    "coverage_rows": "Sparse rows whose coverage is known.",
}
"""Added up over steps and tensor-parallel ranks."""

GAUGES: dict[str, str] = {
    "host_pages_used": "Host pages owned by requests; a page holds a block of every layer.",
    "host_pages_total": "Host pages of the swap pool.",
    "index_bytes": "Bytes of the index on each worker's device.",
    "sparse_requests": "Requests that are decoding sparsely.",
    "resident_blocks": "GPU blocks that the working sets hold.",
}
"""The latest value counts."""

REASON_PREFIX = "requests_"
"""`requests_<reason>`: finished requests by `scheduler.reasons.Reason`."""

SEGMENTER_PREFIX = "segmented_"
"""`segmented_<name>`: prompts by the segmenter that answered, and `spacy_failed` where the
punctuation table stood in for spaCy."""
