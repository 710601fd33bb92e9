# SPDX-License-Identifier: Apache-2.0
"""The life of a request under vLLM's own KV cache manager and pool, without a model: our spec,
our manager and the real ledger; prefix hits are looked up as the scheduler looks them up."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.sampling_params import SamplingParams  # noqa: E402
from vllm.utils.hashing import sha256  # noqa: E402
from vllm.v1.core.kv_cache_manager import KVCacheManager  # noqa: E402
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash  # noqa: E402
from vllm.v1.core.sched.scheduler import Scheduler  # noqa: E402
from vllm.v1.kv_cache_interface import (  # noqa: E402
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request, RequestStatus  # noqa: E402

from sentencekv_vllm.messages import DecodeOptions  # noqa: E402
from sentencekv_vllm.scheduler.ledger import Ledger  # noqa: E402
from sentencekv_vllm.scheduler.limits import Limits  # noqa: E402
from sentencekv_vllm.scheduler.page_pool import PagePool  # noqa: E402
from sentencekv_vllm.scheduler.request_state import RequestState  # noqa: E402
from sentencekv_vllm.vllm_glue import manager as glue  # noqa: E402
from sentencekv_vllm.vllm_glue.spec import SentenceKVSpec  # noqa: E402

N, BLOCKS, PROMPT = 16, 64, 20 * 16 + 5
SINKS, WORKING_SET = 1, 5
OPTIONS = DecodeOptions(
    index_kind=0, reduce=0, retention=5.0, query_kind=0, budget_blocks=3, seed=0
)


class Segmentation:
    """Sentences of eight tokens, at once."""

    def __init__(self):
        self.lengths = {}

    def submit(self, request_id, token_ids):
        self.lengths[request_id] = len(token_ids)

    def poll(self, request_id, urgent=False):
        n = self.lengths[request_id]
        return np.asarray([*range(8, n, 8), n], np.int32)

    def drop(self, request_id):
        self.lengths.pop(request_id, None)

    def split_tail(self, token_ids, final=False):
        return np.arange(8, len(token_ids), 8, dtype=np.int32)

    def is_boundary(self, token_id):
        return False


class Engine:
    """The scheduler's calls for one request at a time."""

    def __init__(self, window=None):
        shape = {"block_size": N, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
        spec = SentenceKVSpec(**shape)
        groups = [KVCacheGroupSpec(["layers.0", "layers.1"], SentenceKVSpec.merge([spec, spec]))]
        if window:
            windowed = SlidingWindowSpec(**shape, sliding_window=window)
            groups.append(KVCacheGroupSpec(["layers.2", "layers.3"], windowed))
        config = KVCacheConfig(BLOCKS, kv_cache_tensors=[], kv_cache_groups=groups)
        self.kv = KVCacheManager(
            config, max_model_len=4096, scheduler_block_size=N, hash_block_size=N
        )
        self.manager = self.kv.coordinator.single_type_managers[0]
        limits = Limits(
            block_size=N,
            sink_blocks=SINKS,
            recent_tokens=N,
            working_set_blocks=WORKING_SET,
            rows_per_page=2,
            min_context_tokens=4 * N,
            copy_blocks_per_step=1000,
            num_slots=4,
            stay_dense_when_covered=True,
            wait_for_pages=False,
        )
        self.ledger = Ledger(limits, PagePool(100), Segmentation())
        self.manager.bind(self.ledger)
        self.limit = None
        glue.reuse_up_to(self.kv, self.allowed)
        glue.cache_up_to(self.kv, self.ledger.exact_tokens)
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(N, sha256)
        connector = SimpleNamespace(supports_divergent_local_hybrid_hits=False)
        self.scheduler = SimpleNamespace(kv_cache_manager=self.kv, connector=connector)

    def allowed(self, request_id, found):
        return found if self.limit is None else min(found, self.limit)

    def add(self, name, tokens):
        request = Request(
            name, tokens, SamplingParams(max_tokens=100), None, block_hasher=self.hasher
        )
        self.ledger.add(
            RequestState(
                request_id=name,
                request=request,
                tokens=lambda a, b: np.asarray(request.all_token_ids[a:b], np.int32),
                options=OPTIONS,
            )
        )
        return request

    def look_up(self, request):
        """As `Scheduler.schedule` does: everything by position."""
        function = Scheduler._get_local_prefix_cache_hit
        extra = [None] * (len(inspect.signature(function).parameters) - 2)
        return function(self.scheduler, request, *extra)

    def prefill(self, request):
        found, num_cached, _, _ = self.look_up(request)
        self.kv.new_step_starts()
        new = request.num_tokens - num_cached
        blocks = self.kv.allocate_slots(
            request, new, num_new_computed_tokens=num_cached, new_computed_blocks=found
        )
        assert blocks is not None
        request.num_computed_tokens = request.num_tokens
        return num_cached

    def decode(self, request, tokens=1):
        for _ in range(tokens):
            request.append_output_token_ids(7)
            self.kv.new_step_starts()
            assert self.kv.allocate_slots(request, 1) is not None
            self.ledger.take_message(
                {request.request_id: request.num_computed_tokens},
                self.manager.block_id,
                {request.request_id: 1},
            )
            request.num_computed_tokens += 1

    def held(self):
        pool = self.kv.block_pool
        return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()

    def finish(self, request):
        request.status = RequestStatus.FINISHED_STOPPED
        self.kv.free(request)


@pytest.fixture
def engine():
    return Engine()


PROMPT_TOKENS = list(range(100, 100 + PROMPT))


def test_a_request_turns_sparse_moves_on_and_gives_everything_back(engine):
    request = engine.add("a", PROMPT_TOKENS)
    assert engine.prefill(request) == 0
    dense = engine.held()
    assert dense == -(-PROMPT // N)
    engine.decode(request, 2)
    # Sinks, the recent window (a block, and the one being filled) and the working set.
    assert engine.ledger.states["a"].memory.sparse
    sparse = engine.held()
    assert sparse <= SINKS + 3 + WORKING_SET < dense
    engine.decode(request, 3 * N)
    assert engine.held() <= sparse + 1, "the window moves, the request does not grow"
    engine.finish(request)
    assert engine.held() == 0 and engine.ledger.pages.num_used == 0
    assert not engine.manager._private and not engine.ledger.states


def test_a_preempted_request_gives_everything_back_and_finds_its_prompt(engine):
    request = engine.add("a", PROMPT_TOKENS)
    engine.prefill(request)
    engine.decode(request, 2)
    engine.kv.free(request)
    request.status, request.num_computed_tokens = RequestStatus.PREEMPTED, 0
    assert engine.held() == 0 and engine.ledger.pages.num_used == 0
    assert engine.prefill(request) == PROMPT // N * N, "exact blocks are found again"
    engine.decode(request, 2)
    engine.finish(request)
    assert engine.held() == 0 and not engine.ledger.states


def test_a_hit_is_cut_at_whole_blocks_below_the_limit(engine):
    first = engine.add("a", PROMPT_TOKENS)
    engine.prefill(first)
    second = engine.add("b", PROMPT_TOKENS)
    whole, num_whole, _, _ = engine.look_up(second)
    assert num_whole == PROMPT // N * N
    engine.limit = 7 * N + 3
    found, num_tokens, _, _ = engine.look_up(second)
    assert num_tokens == 7 * N
    assert found.get_block_ids()[0] == whole.get_block_ids()[0][:7]
    engine.limit = 0
    assert engine.prefill(second) == 0
    for request in (first, second):
        engine.finish(request)
    assert engine.held() == 0


def test_what_was_decoded_sparsely_is_never_found(engine):
    first = engine.add("a", PROMPT_TOKENS)
    engine.prefill(first)
    engine.decode(first, 4 * N)
    conversation = list(first.all_token_ids)
    engine.finish(first)
    second = engine.add("b", [*conversation, 9, 9, 9])
    exact = engine.look_up(second)[1]
    assert exact <= PROMPT + N, "a block of the answer was approximate"
    assert exact >= PROMPT // N * N, "the prompt's blocks are exact"


def test_a_look_up_of_another_kind_is_refused_at_start_up():
    other = SimpleNamespace(get_computed_blocks=lambda block_hashes, request: None)
    with pytest.raises(ValueError, match="get_computed_blocks.request.*found .*block_hashes"):
        glue.reuse_up_to(other, lambda *_: 0)


# Beside a windowed group: models of that kind are refused, their two hazards are mended ---------

WINDOW = 3 * N


def cached_blocks(engine, request, group):
    """Numbers of the request's blocks that a later request would find in a group."""
    pool = engine.kv.block_pool
    return [
        i
        for i, block_hash in enumerate(request.block_hashes)
        if pool.get_cached_block(block_hash, [group]) is not None
    ]


def test_no_group_caches_what_was_computed_behind_a_sparse_token():
    engine = Engine(WINDOW)
    first = engine.add("a", PROMPT_TOKENS)
    engine.prefill(first)
    engine.decode(first, 6 * N)
    exact = engine.ledger.states["a"].memory.exact_tokens
    assert exact is not None and exact < first.num_tokens - 4 * N
    windowed = cached_blocks(engine, first, group=1)
    assert windowed and max(windowed) < exact // N, "the windowed layers saw approximate states"
    assert max(cached_blocks(engine, first, group=0)) < exact // N


@pytest.mark.parametrize("limit", [15 * N, 15 * N + 3, 19 * N])
def test_a_shorter_hit_of_a_windowed_group_has_its_window(limit):
    engine = Engine(WINDOW)
    for length in (15 * N, PROMPT):  # one that ends where the hit will, and a longer one
        request = engine.add(f"a{length}", PROMPT_TOKENS[:length])
        engine.prefill(request)
        engine.finish(request)
    second = engine.add("b", PROMPT_TOKENS)
    engine.limit = limit
    found, num_tokens, _, _ = engine.look_up(second)
    assert num_tokens <= limit and num_tokens % N == 0
    assert num_tokens >= 15 * N, "the end of the shorter prompt can be reached"
    ours, windowed = found.blocks
    assert len(ours) == len(windowed) == num_tokens // N
    needed = -(-(WINDOW - 1) // N)
    assert not any(block.is_null for block in windowed[-needed:]), "a hole inside the window"
    assert not any(block.is_null for block in ours)
