# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels against their definitions: compiled for the host, and on a GPU.

Both run the same source; the host version needs g++ only (see csrc/host_cuda).
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sentencekv_vllm.ops.cuda import Launcher
from sentencekv_vllm.ops.custom_ops import launcher
from sentencekv_vllm.ops.resolve_residency import resolve_residency
from sentencekv_vllm.ops.swap_blocks import swap_in
from sentencekv_vllm.types import LayerPools, Residency, Selection, SparseBatch

UNTOUCHED = -7  # what buffers hold where nothing may be written


IN_HOST_MEMORY = {"gather_misses": (0,), "copy_pages": (0,), "copy_page_runs": (0, 2)}


class GpuLauncher:
    """A launcher for CPU tensors that runs on the GPU: there, and back in place."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*tensors: Tensor) -> None:
            stays = IN_HOST_MEMORY.get(name, ())
            moved = [x.pin_memory() if i in stays else x.cuda() for i, x in enumerate(tensors)]
            getattr(launcher(), name)(*moved)
            torch.cuda.synchronize()
            for before, after in zip(tensors, moved, strict=True):
                before.copy_(after)

        return call


@pytest.fixture(params=["host", pytest.param("gpu", marks=pytest.mark.gpu)])
def cuda(request: pytest.FixtureRequest) -> Launcher | GpuLauncher:
    return request.getfixturevalue("host_kernels") if request.param == "host" else GpuLauncher()


@dataclass
class World:
    """One layer's pools and a batch, with room for every request's pages and slots."""

    pools: LayerPools
    batch: SparseBatch

    def copy(self) -> World:
        pools = {k: v.clone() for k, v in vars(self.pools).items() if v is not None}
        return World(LayerPools(**pools), self.batch)


def make_world(requests: int, heads: int, history: int, slots: int, numel: int, seed: int) -> World:
    """Requests with `history` pages and `slots` slots each, scattered over shuffled pools."""
    g = torch.Generator().manual_seed(seed)
    num_pages, num_blocks = requests * history + 3, requests * slots + 2
    page_ids = torch.randperm(num_pages, generator=g, dtype=torch.int32)
    block_ids = torch.randperm(num_blocks, generator=g, dtype=torch.int32)
    unused = torch.zeros(0)
    pools = LayerPools(
        cache=torch.full((num_blocks, heads, 1, numel), float("nan")),
        host=torch.randn(num_pages, heads, 1, numel, generator=g),
        page_slot=torch.full((num_pages, heads), -1, dtype=torch.int32),
        slot_page=torch.full((num_blocks, heads), -1, dtype=torch.int32),
        slot_stamp=torch.full((num_blocks, heads), -1, dtype=torch.int32),
    )  # fmt: skip
    lo = torch.randint(0, 3, (requests,), generator=g, dtype=torch.int32)
    batch = SparseBatch(
        pages=page_ids[: requests * history].view(requests, history).contiguous(),
        num_pages=torch.full((requests,), history, dtype=torch.int32),
        row_pages=unused, sentence_ends=unused, num_sentences=unused,
        history_lo=lo,
        history_hi=torch.full((requests,), history, dtype=torch.int32),
        budget_blocks=torch.zeros(requests, dtype=torch.int32),
        private_blocks=block_ids[: requests * slots].view(requests, slots).contiguous(),
        index_kind=unused, reduce=unused, retention=unused, seed=unused, step=0,
    )  # fmt: skip
    return World(pools, batch)


def select(world: World, k_max: int, locality: float, g: torch.Generator) -> Selection:
    """Random ascending blocks; a share `locality` of the draws is from the first few blocks."""
    batch = world.batch
    requests, heads = len(batch.pages), world.pools.page_slot.shape[1]
    blocks = torch.full((requests, heads, k_max), -1, dtype=torch.int32)
    for s in range(requests):
        lo, hi, budget = (int(t[s]) for t in (batch.history_lo, batch.history_hi,
                                              batch.budget_blocks))  # fmt: skip
        for h in range(heads):
            weight = torch.ones(hi - lo) * (1 - locality)
            weight[: budget + 2] += 10 * locality
            chosen = torch.multinomial(weight, budget, generator=g) + lo if budget else []
            blocks[s, h, :budget] = torch.as_tensor(chosen, dtype=torch.int32).sort().values
    return Selection(blocks, torch.rand(requests, heads, generator=g))


@dataclass
class Buffers:
    """What the kernel writes beside the pools."""

    head_tables: Tensor
    misses: Tensor
    miss_counts: Tensor
    hit_totals: Tensor
    miss_totals: Tensor
    coverage_totals: Tensor


def make_buffers(selection: Selection, width: int) -> Buffers:
    requests, heads, k_max = selection.blocks.shape
    return Buffers(
        torch.full((requests, heads, width), UNTOUCHED, dtype=torch.int32),
        torch.full((requests, heads, k_max, 3), UNTOUCHED, dtype=torch.int32),
        torch.full((requests, heads), UNTOUCHED, dtype=torch.int32),
        torch.zeros(requests, dtype=torch.int64),
        torch.zeros(requests, dtype=torch.int64),
        torch.ones(requests),
    )


def resolve(cuda: Launcher | GpuLauncher, world: World, selection: Selection, out: Buffers) -> None:
    batch, pools = world.batch, world.pools
    cuda.resolve_residency(
        selection.blocks, selection.coverage, batch.pages, batch.private_blocks,
        batch.budget_blocks, batch.history_lo, torch.tensor([batch.step], dtype=torch.int32),
        pools.page_slot, pools.slot_page, pools.slot_stamp, *vars(out).values(),
    )  # fmt: skip


def expected_table(batch: SparseBatch, residency: Residency, width: int) -> Tensor:
    requests, heads, _ = residency.slots.shape
    table = torch.full((requests, heads, width), UNTOUCHED, dtype=torch.int32)
    head = torch.arange(heads, dtype=torch.int32).unsqueeze(1)
    for s in range(requests):
        lo, budget = int(batch.history_lo[s]), int(batch.budget_blocks[s])
        table[s, :, lo : lo + budget] = residency.slots[s, :, :budget] * heads + head
    return table


SHAPES = [  # requests, heads, history, slots, budgets
    pytest.param(1, 1, 9, 1, [1], id="one-slot"),
    pytest.param(1, 3, 20, 7, [7], id="budget-is-the-working-set"),
    pytest.param(3, 2, 70, 33, [33, 0, 5], id="an-empty-request"),
    pytest.param(2, 5, 150, 101, [64, 65], id="odd-everything"),
    pytest.param(1, 1, 700, 601, [530], id="more-slots-than-threads"),
]


@pytest.mark.parametrize(("requests", "heads", "history", "slots", "budgets"), SHAPES)
@pytest.mark.parametrize("locality", [0.0, 0.9])
def test_many_steps_of_lru_equal_the_definition(
    cuda, requests, heads, history, slots, budgets, locality
) -> None:
    mine = make_world(requests, heads, history, slots, numel=4, seed=len(budgets))
    mine.batch.budget_blocks.copy_(torch.tensor(budgets))
    reference = mine.copy()
    g = torch.Generator().manual_seed(5)
    steps = 3 if slots > 200 else 12
    missed = 0
    for step in range(steps):
        batch = replace(mine.batch, step=step * 3)
        mine.batch = reference.batch = batch
        selection = select(mine, max(budgets), locality, g)
        residency = resolve_residency(reference.pools, batch, selection)
        out = make_buffers(selection, width=history + 4)
        resolve(cuda, mine, selection, out)

        for name in ("page_slot", "slot_page", "slot_stamp"):
            assert torch.equal(getattr(mine.pools, name), getattr(reference.pools, name)), name
        assert torch.equal(out.head_tables, expected_table(batch, residency, history + 4))
        rows = [
            out.misses[s, h, : out.miss_counts[s, h]] for s in range(requests) for h in range(heads)
        ]
        assert torch.equal(torch.cat(rows), residency.misses)
        unused = torch.arange(max(budgets)) >= out.miss_counts[..., None]
        assert bool((out.misses[unused] == UNTOUCHED).all())
        assert torch.equal(out.miss_totals, out.miss_counts.sum(1, dtype=torch.int64))
        assert torch.equal(out.hit_totals + out.miss_totals, batch.budget_blocks.long() * heads)
        torch.testing.assert_close(out.coverage_totals, 1 + selection.coverage.mean(1))
        missed += len(residency.misses)
    if locality and slots > max(budgets) > 1:
        assert missed < steps * heads * sum(budgets), "the run has hits as well as misses"


def test_rows_of_the_inputs_and_tables_may_lie_apart(cuda) -> None:
    world = make_world(3, 2, 30, 9, 4, seed=3)
    world.batch.budget_blocks.copy_(torch.tensor([9, 4, 0]))
    selection = select(world, 9, 0.0, torch.Generator().manual_seed(4))
    plain, apart = make_buffers(selection, 34), make_buffers(selection, 34)
    apart.head_tables = torch.full((3, 4, 40), UNTOUCHED, dtype=torch.int32)[:, :2, :34]
    other = world.copy()
    batch = world.batch
    wide = [F.pad(x, (0, 5), value=10**6) for x in (batch.pages, batch.private_blocks)]
    other.batch = replace(batch, pages=wide[0][:, :-5], private_blocks=wide[1][:, :-5])
    resolve(cuda, world, selection, plain)
    resolve(cuda, other, selection, apart)
    for name in vars(plain):
        assert torch.equal(getattr(plain, name), getattr(apart, name)), name


@pytest.mark.parametrize("numel", [4, 124, 512, 2048, 2052], ids=lambda n: f"{4 * n}B")
def test_gathered_head_blocks_equal_the_definition_and_nothing_else_is_written(cuda, numel) -> None:
    world = make_world(3, 5, 40, 21, numel, seed=7)
    world.batch.budget_blocks.copy_(torch.tensor([21, 0, 9]))
    reference = world.copy()
    g = torch.Generator().manual_seed(8)
    for step in range(3):
        world.batch = replace(world.batch, step=step)
        selection = select(world, 21, 0.5, g)
        out = make_buffers(selection, 44)
        resolve(cuda, world, selection, out)
        cuda.gather_misses(world.pools.host, world.pools.cache, out.misses, out.miss_counts)
        swap_in(
            reference.pools,
            torch.cat([out.misses[s, h, : out.miss_counts[s, h]] for s in range(3)
                       for h in range(5)]),
        )  # fmt: skip
        assert torch.equal(  # as bytes: the untouched rest is NaN
            world.pools.cache.view(torch.int32), reference.pools.cache.view(torch.int32)
        )


def test_misses_of_many_regions_are_all_found(cuda) -> None:
    regions, k = 600, 3
    counts = torch.randint(0, k + 1, (regions, 1), dtype=torch.int32)
    host, cache = torch.randn(regions * k, 1, 1, 4), torch.zeros(regions * k, 1, 1, 4)
    page = torch.arange(regions * k, dtype=torch.int32).view(regions, 1, k)
    misses = torch.stack((page, torch.zeros_like(page), page.flip(0)), -1)
    cuda.gather_misses(host, cache, misses, counts)
    expected = torch.zeros_like(cache)
    listed = torch.arange(k) < counts[..., None]
    expected[misses[listed][:, 2].long()] = host[misses[listed][:, 0].long()]
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("name", ["copy_pages", "copy_page_runs"])
@pytest.mark.parametrize("pairs", [[], [(4, 1)], [(0, 3), (1, 4), (2, 5), (6, 0), (5, 1)]])
def test_listed_pages_are_copied_and_no_others(cuda, name, pairs) -> None:
    source = torch.randn(7, 3, 5, 4)
    target = torch.full((8, 3, 5, 4), float("nan"))
    expected = target.clone()
    for a, b in pairs:
        expected[b] = source[a]
    getattr(cuda, name)(source, target, torch.tensor(pairs, dtype=torch.int32).view(-1, 2))
    assert torch.equal(target.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("name", ["copy_pages", "copy_page_runs"])
def test_pages_and_head_blocks_may_lie_apart(cuda, name) -> None:
    wide = torch.full((6, 4, 5, 8), float("nan"))
    cache = wide[:, :3]  # as where several layers share a block's memory
    pages = torch.randn(4, 3, 5, 8)
    pairs = torch.tensor([(0, 1), (1, 2), (3, 5)], dtype=torch.int32)
    getattr(cuda, name)(pages, cache, pairs)
    assert torch.equal(cache[[1, 2, 5]], pages[[0, 1, 3]])
    misses = torch.tensor([(2, 1, 3)], dtype=torch.int32).view(1, 1, 1, 3)
    cuda.gather_misses(pages, cache, misses, torch.ones(1, 1, dtype=torch.int32))
    assert torch.equal(cache[3, 1], pages[2, 1])
    assert bool(wide[:, 3].isnan().all() and wide[[0, 4]].isnan().all())


def test_a_working_set_below_the_selection_is_refused(cuda) -> None:
    world = make_world(1, 1, 9, 2, 4, seed=1)
    selection = Selection(torch.zeros(1, 1, 3, dtype=torch.int32), torch.zeros(1, 1))
    with pytest.raises(AssertionError, match="needs at least 3"):
        resolve(cuda, world, selection, make_buffers(selection, 9))


def test_a_head_block_of_odd_size_is_refused_by_the_launcher(cuda) -> None:
    world = make_world(1, 1, 9, 2, numel=3, seed=1)  # 12 bytes
    misses = torch.zeros(1, 1, 2, 3, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="gather_misses could not be launched: invalid"):
        cuda.gather_misses(world.pools.host, world.pools.cache, misses, misses[..., 0, 0] + 1)


@pytest.mark.usefixtures("host_ops")
class TestCustomOps:
    """The torch ops say what they write."""

    @pytest.mark.parametrize("name", ["copy_pages", "copy_page_runs"])
    def test_page_copies(self, name) -> None:
        pairs = torch.tensor([(0, 1)], dtype=torch.int32)
        arguments = (torch.randn(2, 1, 1, 4), torch.zeros(2, 1, 1, 4), pairs)
        torch.library.opcheck(getattr(torch.ops.sentencekv, name).default, arguments)

    def test_gather_misses(self) -> None:
        misses = torch.tensor([(0, 0, 1)], dtype=torch.int32).view(1, 1, 1, 3)
        arguments = (torch.randn(2, 1, 1, 4), torch.zeros(2, 1, 1, 4), misses,
                     torch.ones(1, 1, dtype=torch.int32))  # fmt: skip
        torch.library.opcheck(torch.ops.sentencekv.gather_misses.default, arguments)

    def test_resolve_residency(self) -> None:
        world = make_world(2, 3, 20, 5, 4, seed=1)
        world.batch.budget_blocks.fill_(5)
        selection = select(world, 5, 0.0, torch.Generator().manual_seed(2))
        op = torch.ops.sentencekv.resolve_residency.default
        calls = []
        ops = SimpleNamespace(resolve_residency=lambda *arguments: calls.append(arguments))
        resolve(ops, world, selection, make_buffers(selection, 24))
        torch.library.opcheck(op, calls[0])

    def test_a_compiled_caller_sees_the_copy_before_it_reads(self) -> None:
        def swap_then_sum(host, cache, misses, counts):
            before = cache.sum()
            torch.ops.sentencekv.gather_misses(host, cache, misses, counts)
            return cache.sum() - before

        misses = torch.tensor([(0, 0, 1)], dtype=torch.int32).view(1, 1, 1, 3)
        compiled = torch.compile(swap_then_sum, backend="aot_eager", fullgraph=True)
        result = compiled(torch.ones(2, 1, 1, 4), torch.zeros(2, 1, 1, 4), misses,
                          torch.ones(1, 1, dtype=torch.int32))  # fmt: skip
        assert result == 4


def test_the_emulation_notices_a_barrier_that_some_threads_miss(
    host_kernels, host_command, tmp_path
) -> None:
    source = tmp_path / "divergent.cpp"
    source.write_text(
        "#include <sentencekv/launch.hpp>\n"
        "struct None {};\n"
        "__global__ void kernel(None) { if (threadIdx.x < 3) __syncthreads(); }\n"
        "int main() { return sentencekv::launch(kernel, dim3(1), 32, 0, nullptr, None{}); }\n"
    )
    command = [a for a in host_command([source], tmp_path / "divergent") if a != "-shared"]
    subprocess.run(command, check=True)
    done = subprocess.run([tmp_path / "divergent"], capture_output=True, text=True)
    assert done.returncode == -signal.SIGABRT
    assert "a barrier was not reached by every thread" in done.stderr
