# SPDX-License-Identifier: Apache-2.0
"""vLLM's real scheduler with our manager, ledger and tables, and a model of what the memory holds.

The device is a table of tags: what block b holds at place i is a hash of the salt and the tokens
up to the one whose KV lies there, or, of KV computed while history was left out, a number of its
own. A step reads what a forward would read and checks every tag, so that a block, page or row of
another request, a copy that came too late, or approximate KV in the prefix cache shows at once.
"""

from __future__ import annotations

import copy
from collections import Counter, deque
from typing import Any

import numpy as np
import torch
from engine import MODEL
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from sentencekv_vllm.messages import StepReport
from sentencekv_vllm.resolved import GIB
from sentencekv_vllm.vllm_glue.connector import SentenceKVWorkerMetadata
from sentencekv_vllm.vllm_glue.request_limits import limit_request
from sentencekv_vllm.vllm_glue.setup import resolved_config
from sentencekv_vllm.vllm_glue.spec import SentenceKVSpec
from sentencekv_vllm.vllm_glue.visit_room import Capacity
from sentencekv_vllm.worker.tables import Tables

BLOCK = 16
NOTHING = -1
_bases: dict[bool, Any] = {}


def base_config(asynchronous: bool) -> Any:
    """vLLM's configuration of the embedded model, made once: it takes seconds."""
    if asynchronous not in _bases:
        init_none_hash(sha256)
        _bases[asynchronous] = EngineArgs(
            model=MODEL,
            attention_backend="sentencekv",
            max_model_len=4096,
            block_size=BLOCK,
            skip_tokenizer_init=True,
            async_scheduling=asynchronous,
            additional_config={"sentencekv": {"host_pool_gib": 0.1, "segmenter": "fixed"}},
        ).create_engine_config()
    return copy.deepcopy(_bases[asynchronous])


class Sentences:
    """Ends that follow from the tokens, of 1 to 24 tokens each; answers may be late."""

    def __init__(self) -> None:
        self.known: dict[str, np.ndarray] = {}
        self.late = False
        self.stats: Counter[str] = Counter()

    def submit(self, request_id: str, token_ids: np.ndarray) -> None:
        assert request_id not in self.known
        marks = np.flatnonzero(token_ids % 7 == 0) + 1
        filler = np.arange(24, len(token_ids) + 1, 24)
        self.known[request_id] = np.union1d(np.union1d(marks, filler), [len(token_ids)]).astype(
            np.int32
        )

    def poll(self, request_id: str, urgent: bool = False) -> np.ndarray | None:
        return None if self.late else self.known[request_id]

    def drop(self, request_id: str) -> None:
        self.known.pop(request_id, None)

    def split_tail(self, token_ids: np.ndarray, final: bool = False) -> np.ndarray:
        marks = np.flatnonzero(token_ids[:-1] % 7 == 0) + 1
        return np.union1d(marks, np.arange(24, len(token_ids), 24)).astype(np.int32)

    def is_boundary(self, token_id: int) -> bool:
        return token_id % 7 == 0

    def close(self) -> None:
        return None


class Life:
    """What the model knows of one request."""

    def __init__(self, request: Request, salt: int) -> None:
        self.request, self.salt = request, salt
        self.tokens: list[int] = list(request.all_token_ids)
        self.approximate: dict[int, int] = {}  # tags of KV computed while history was left out
        self.sparse_rows = 0
        self.cached = 0  # tokens of the prefix cache that it began with
        self._chain = [hash(("salt", salt))]
        self._hashed: list[int] = []

    def tag(self, position: int) -> int:
        if position in self.approximate:
            return self.approximate[position]
        if self._hashed != self.tokens[: len(self._hashed)]:
            self._hashed, self._chain = [], self._chain[:1]
        while len(self._hashed) <= position:
            token = self.tokens[len(self._hashed)]
            self._chain.append(hash((self._chain[-1], token)))
            self._hashed.append(token)
        return self._chain[position + 1]

    def tags(self, start: int, end: int) -> np.ndarray:
        return np.array([self.tag(p) for p in range(start, end)], np.int64)

    def restart(self) -> None:
        self.tokens = list(self.request.all_token_ids)
        self.approximate.clear()


class World:
    """A server without a model."""

    def __init__(
        self,
        settings: dict[str, Any],
        num_blocks: int,
        num_pages: int,
        max_num_seqs: int,
        max_tokens_a_step: int,
        asynchronous: bool,
        prefix_caching: bool = True,
    ) -> None:
        config = base_config(asynchronous)
        config.scheduler_config.max_num_seqs = max_num_seqs
        config.scheduler_config.max_num_batched_tokens = max_tokens_a_step
        config.cache_config.enable_prefix_caching = prefix_caching
        config.cache_config.num_gpu_blocks = num_blocks
        config.additional_config = {"sentencekv": settings}
        page_bytes = resolved_config(config).page_bytes
        settings["host_pool_gib"] = (num_pages + 0.5) * page_bytes / GIB
        config.additional_config = {"sentencekv": settings}
        model = config.model_config
        capacity = Capacity.of(config, resolved_config(config), num_blocks - 1)
        model.max_model_len = min(4096, capacity.longest)
        self.config = config
        spec = SentenceKVSpec(
            block_size=BLOCK,
            num_kv_heads=model.get_num_kv_heads(config.parallel_config),
            head_size=model.get_head_size(),
            dtype=model.dtype,
        )
        layers = model.get_num_layers(config.parallel_config)
        cache = KVCacheConfig(
            num_blocks=num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec([str(i) for i in range(layers)], spec)],
        )
        self.scheduler = (AsyncScheduler if asynchronous else Scheduler)(
            config,
            cache,
            StructuredOutputManager(config),
            block_size=BLOCK,
            hash_block_size=BLOCK,
            log_stats=True,
        )
        side = self.scheduler.connector.scheduler
        self.sentences = Sentences()
        side.ledger.segmentation = side._service = self.sentences
        side.ledger._copying._segmentation = self.sentences
        self.side, self.ledger, self.resolved = side, side.ledger, side.resolved
        assert self.ledger.pages.num_pages == num_pages
        self.manager = side._manager
        self.pool = self.manager.block_pool
        self.num_blocks, self.lag = num_blocks, int(asynchronous)
        self.tables = Tables(
            max_num_seqs, self.resolved.working_set_blocks, BLOCK, self.resolved.rows_per_page,
            torch.device("cpu"), layers,
        )  # fmt: skip
        self.device = np.full((num_blocks, BLOCK), NOTHING, np.int64)
        self.host = np.full((num_pages, BLOCK), NOTHING, np.int64)
        self.lives: dict[str, Life] = {}
        self.ended: list[tuple[str, Life]] = []
        self.pending: deque[tuple[Any, ModelRunnerOutput]] = deque()
        self.hasher = get_request_block_hasher(BLOCK, sha256)
        self.steps, self.count, self.seen = 0, 0, Counter[str]()
        self.unique = iter(range(-2, -(10**12), -1))
        self.rng = np.random.default_rng(0)

    # What clients do --------------------------------------------------------------------------

    def add(self, prompt: list[int], max_tokens: int, salt: int, **options: Any) -> str | None:
        """A request arrives, if it can be served to its end; others are refused before that."""
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=options)
        params.update_from_generation_config({}, None)
        arriving = EngineCoreRequest("", prompt, None, params, None, 0.0, None, None, None)
        try:
            limit_request(self.config, arriving)
        except VLLMValidationError:
            self.seen["refused"] += 1
            return None
        request_id = f"r{self.count}"
        self.count += 1
        request = Request(
            request_id, prompt, params, None, block_hasher=self.hasher,
            cache_salt=str(salt) if salt else None,
        )  # fmt: skip
        self.lives[request_id] = Life(request, salt)
        self.scheduler.add_request(request)
        return request_id

    def abort(self, request_id: str) -> None:
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
        self._end(request_id)

    def _end(self, request_id: str) -> None:
        life = self.lives.pop(request_id)
        self.ended.append((request_id, life))

    # One step ---------------------------------------------------------------------------------

    def step(self) -> int:
        """Schedule and execute a step; outputs come back late under asynchronous scheduling."""
        self.steps += 1
        output = self.scheduler.schedule()
        before = {r.req_id: r.num_computed_tokens for r in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        before |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for request_id in [r.req_id for r in output.scheduled_new_reqs] + list(
            cached.resumed_req_ids
        ):
            self.lives[request_id].restart()
        for new in output.scheduled_new_reqs:
            self.lives[new.req_id].cached = new.num_computed_tokens
        self.check()
        report = self._perform(output.kv_connector_metadata.message, before)
        sampled = self._forward(output, before)
        rows = list(output.num_scheduled_tokens)
        result = ModelRunnerOutput(
            req_ids=rows,
            req_id_to_index={r: i for i, r in enumerate(rows)},
            sampled_token_ids=[sampled.get(r, []) for r in rows],
            kv_connector_output=KVConnectorOutput(
                kv_connector_worker_meta=None
                if report is None
                else SentenceKVWorkerMetadata(report)
            ),
        )
        self.pending.append((output, result))
        while len(self.pending) > self.lag or (self.pending and not rows):
            self.scheduler.update_from_output(*self.pending.popleft())
        for request_id in [r for r, life in self.lives.items() if life.request.is_finished()]:
            self._end(request_id)
        self.check()
        return output.total_num_scheduled_tokens

    def _perform(self, message: Any, before: dict[str, int]) -> StepReport | None:
        for slot in message.dropped:
            self.tables.drop(slot)
        owners = {slot: s.request_id for slot, s in self.ledger.slots.owners.items()}
        copies = []
        for update in message.updates:
            life = self.lives[owners[update.slot]]
            first = int(self.tables.pages.counts[update.slot])
            self.tables.apply(update)
            for j, (block, page) in enumerate(
                zip(update.block_ids, update.page_ids, strict=True), first
            ):
                expected = life.tags(j * BLOCK, (j + 1) * BLOCK)
                assert (self.device[block] == expected).all(), "a copy of something else"
                copies.append((page, expected))
            if update.settled is not None:
                self.seen["settled"] += 1
                for j, block in enumerate(update.settled.block_ids):
                    end = min((j + 1) * BLOCK, update.settled.num_tokens)
                    got = self.device[block][: end - j * BLOCK]
                    assert (got == life.tags(j * BLOCK, end)).all(), "votes on something else"
        for page, tags in copies:
            self.host[page] = tags
        self.seen["copied blocks"] += len(copies)
        if message.sparse is None:
            return None
        count = len(message.sparse.slots)
        ones = np.ones(count, np.int64)
        return StepReport(
            message.sparse.slots, ones, 0 * ones, np.full(count, 0.5, np.float32), message.step
        )

    def _forward(self, output: Any, before: dict[str, int]) -> dict[str, list[int]]:
        message = output.kv_connector_metadata.message
        sparse, visits = message.sparse, message.visits
        visiting = {} if visits is None else {r: i for i, r in enumerate(visits.request_ids)}
        sparse_rows = {} if sparse is None else {r: i for i, r in enumerate(sparse.request_ids)}
        sampled: dict[str, list[int]] = {}
        written: set[tuple[int, int]] = set()
        for request_id, count in output.num_scheduled_tokens.items():
            life, start = self.lives[request_id], before[request_id]
            blocks = [b.block_id for b in self.manager.req_to_blocks[request_id]]
            row = sparse_rows.get(request_id)
            for position in range(start, start + count):
                if row is not None and self._is_inexact(life, sparse, row):
                    life.approximate[position] = next(self.unique)
                place = blocks[position // BLOCK], position % BLOCK
                assert place not in written, "two requests write to one place"
                written.add(place)
                self.device[place] = life.tag(position)
        if sparse is not None:  # what is swapped in lands in the working sets
            for slot in sparse.slots.tolist():
                private = self.ledger.slots.owners[slot].memory.private
                self.device[private] = next(self.unique)
        # As in a layer: everybody's keys are written, then everybody attends. So a request may
        # share the blocks of one that computes them in the same step.
        for request_id, count in output.num_scheduled_tokens.items():
            life, start = self.lives[request_id], before[request_id]
            blocks = [b.block_id for b in self.manager.req_to_blocks[request_id]]
            end = start + count
            if request_id in sparse_rows:
                self._read_sparsely(life, sparse, sparse_rows[request_id], blocks, start)
            elif request_id in visiting:
                self._read_by_visits(life, visits, visiting[request_id], blocks, end)
            else:
                self._read(life, blocks, 0, end)
            if end == len(life.tokens):
                token = int(self.rng.integers(1, 400))
                life.tokens.append(token)
                sampled[request_id] = [token]
        return sampled

    def _is_inexact(self, life: Life, sparse: Any, row: int) -> bool:
        options = self.ledger.slots.owners[int(sparse.slots[row])].options
        history = int(sparse.history_hi[row]) - int(sparse.history_lo[row])
        covered = history <= options.smallest_budget and self.resolved.host_format is None
        return not covered or bool(life.approximate)

    def _read(self, life: Life, blocks: list[int], start: int, end: int) -> None:
        for j in range(start // BLOCK, -(-end // BLOCK)):
            stop = min((j + 1) * BLOCK, end)
            got = self.device[blocks[j]][: stop - j * BLOCK]
            assert (got == life.tags(j * BLOCK, stop)).all(), f"block {j} holds something else"

    def _read_sparsely(
        self, life: Life, sparse: Any, row: int, blocks: list[int], start: int
    ) -> None:
        lo, hi = int(sparse.history_lo[row]), int(sparse.history_hi[row])
        slot, config = int(sparse.slots[row]), self.resolved.config
        state = self.ledger.slots.owners[slot]
        options = state.options
        self.seen["sparse rows"] += 1
        life.sparse_rows += 1
        assert sparse.seq_lens[row] == start + 1
        assert sparse.tail_blocks[row] == blocks[start // BLOCK]
        assert lo * BLOCK >= config.num_sink_tokens, "sinks are attended to"
        assert start + 1 - hi * BLOCK >= config.recent_window, "so is the recent window"
        self._read(life, blocks, 0, lo * BLOCK)
        self._read(life, blocks, hi * BLOCK, start + 1)
        assert all(b == 0 for b in blocks[lo:hi]), "the history has left the GPU"
        if not options.compacts:
            self._read_pages(life, slot, lo, hi)
            indexed, ends = self.tables.indexed_sentences(slot)
            assert len(indexed) == len(set(indexed.tolist())), "two sentences share a row"
            assert ends[-1] >= hi * BLOCK, (
                f"indexed to {ends[-1]}, history to {hi * BLOCK}, {state}"
            )
            owned = set(state.memory.row_pages)
            assert {int(r) // self.resolved.rows_per_page for r in indexed} <= owned
        private = self.tables.private[slot][: len(state.memory.private)]
        assert private.tolist() == state.memory.private
        held = sum(b != 0 for b in blocks) + len(private)
        complete = len(state.memory.pages) == start // BLOCK or options.compacts
        if complete and not state.keeps_all:  # as many GPU blocks, whatever the context
            tail = -(-(config.recent_window + 24 + 2 * BLOCK) // BLOCK)
            grown = (start - life.request.num_prompt_tokens) // BLOCK if options.compacts else 0
            window = 32 // BLOCK if options.compacts else 0
            most = lo + self.resolved.working_set_blocks + tail + 2 + grown + window
            assert held <= most, f"{held} blocks held, {most} at most"

    def _read_by_visits(
        self, life: Life, visits: Any, row: int, blocks: list[int], end: int
    ) -> None:
        lo, hi = int(visits.lost_lo[row]), int(visits.lost_hi[row])
        slot, room = int(visits.slots[row]), self.ledger.limits.visit_room
        staging = self.tables.staging[slot]
        self.seen["visiting rows"] += 1
        assert visits.tail_blocks[row] == blocks[(end - 1) // BLOCK]
        assert staging.tolist() == self.ledger.slots.owners[slot].memory.staging
        assert len(staging) * room.num_layers >= room.halves * (hi - lo), "room for a layer"
        self.device[staging] = next(self.unique)
        self._read(life, blocks, 0, lo * BLOCK)
        self._read_pages(life, slot, lo, hi)
        self._read(life, blocks, hi * BLOCK, end)
        assert all(b == 0 for b in blocks[lo:hi]), "the history has left the GPU"

    def _read_pages(self, life: Life, slot: int, lo: int, hi: int) -> None:
        pages = self.tables.pages.of(slot)
        assert len(pages) >= hi
        for j in range(lo, hi):
            assert (self.host[pages[j]] == life.tags(j * BLOCK, (j + 1) * BLOCK)).all(), (
                f"page of block {j} holds something else"
            )

    # What always holds ------------------------------------------------------------------------

    def _readers(self) -> Counter[int]:
        readers: Counter[int] = Counter()
        for blocks in self.manager.req_to_blocks.values():
            readers.update({b.block_id for b in blocks if not b.is_null})
        for blocks in self.manager._private.values():
            readers.update(b.block_id for b in blocks)
        return readers

    def check(self) -> None:
        """Everything has at most one owner, and what is not owned is free."""
        ledger = self.ledger
        states = list(ledger.states.values())
        pages = [p for s in states for p in s.memory.row_pages + s.memory.reserved]
        assert len(pages) == len(set(pages)) == ledger.pages.num_used, "pages"
        assert set(pages).isdisjoint(ledger.pages._free)
        slots = [s.memory.slot for s in states if s.memory.slot >= 0]
        assert len(slots) == len(set(slots)) == len(ledger.slots.owners) == ledger.slots.num_used
        held = self._readers()
        for request_id, blocks in self.manager._private.items():
            assert all(held[b.block_id] == 1 for b in blocks), "a working set is shared"
            memory = ledger.states[request_id].memory
            assert [b.block_id for b in blocks] == (memory.staging or memory.private)
            assert all(b.ref_cnt == 1 and b.block_hash is None for b in blocks)
        deferred = {b.block_id for _, bs in self.scheduler.deferred_frees for b in bs}
        used = set(held) | deferred
        assert self.pool.get_num_free_blocks() == self.num_blocks - 1 - len(used), "blocks"
        for request_id, life in [*self.lives.items()]:
            state = ledger.states.get(request_id)
            if state is not None:
                assert state.hits <= life.sparse_rows, "counts of another request"
        assert set(ledger.states) <= set(self.lives), "a request that has ended is still booked"
        assert set(self.sentences.known) <= set(self.lives)

    def drain(self, most: int = 3000) -> None:
        """Everybody ends, one after the other if need be, and then nothing is held."""
        self.sentences.late = False
        for _ in range(most):
            if not self.lives:
                break
            self.step()
        assert not self.lives, f"{list(self.lives)} do not end"
        if self.lag:  # vLLM returns the last blocks with the next step
            assert self.add([1], 1, 0, sentencekv="off")
            while self.lives:
                self.step()
        while self.pending or self.scheduler.has_requests():
            self.step()
        self.check()
        levels = self.ledger.gauges()
        assert not self.ledger.states and not levels["host_pages_used"]
        assert not levels["sparse_requests"] and not levels["resident_blocks"]
        assert not self.sentences.known and not self.ledger._watched
        assert self.pool.get_num_free_blocks() == self.num_blocks - 1
