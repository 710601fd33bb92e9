# SPDX-License-Identifier: Apache-2.0
"""`TritonOps` against `ReferenceOps`: whole layers, step after step, nothing else read."""

from dataclasses import replace

import pytest
import torch

from sentencekv_vllm.ops.layer_ops import DecodeOutputs, ReferenceOps
from sentencekv_vllm.types import IndexKind, Reduce


def outputs(case, device):
    requests, heads = len(case.batch.pages), case.geometry.num_kv_heads
    return DecodeOutputs(
        head_tables=torch.full((requests, heads, 64), -7, dtype=torch.int32, device=device),
        hits=torch.zeros(requests, dtype=torch.int64, device=device),
        misses=torch.zeros(requests, dtype=torch.int64, device=device),
        coverage=torch.zeros(requests, device=device),
        stage_ns=torch.zeros(4, dtype=torch.int64, device=device),
    )


def decode(ops, case, batch, query, out):
    """A step of one layer."""
    ops.set_step(batch.step)
    ops.begin_step(batch)
    ops.decode_layer(case.geometry, case.pools, batch, query, out)


def content(case, tables, s, h, budget):
    """Head-blocks that a row of the head table names, in its order."""
    lo, heads = int(case.batch.history_lo[s]), case.geometry.num_kv_heads
    ids = tables[s, h, lo : lo + budget].long()
    assert bool((ids % heads == h).all())
    return case.pools.cache.cpu()[ids // heads, h].view(torch.int16)


@pytest.mark.parametrize(("head_dim", "group"), [(80, 7), (128, 4)])
def test_steps_equal_the_reference(build, kernels, workspace, head_dim, group):
    from sentencekv_vllm.triton_kernels.layer_ops import TritonOps

    rows = [
        build.row(tokens=577, retention=5.0),
        build.row(tokens=400, kind=IndexKind.CENTROID, reduce=Reduce.MEAN),
        build.row(tokens=320, kind=IndexKind.RANDOM, budget=3),
        build.row(tokens=0),
        build.row(tokens=100, budget=99),
        build.row(tokens=577, kind=IndexKind.CENTROID, ends=(30, 470, 577), budget=8),
    ]
    case = build(*rows, head_dim=head_dim, group=group, seed=head_dim)
    expected, actual = case.to("cpu"), case.to(kernels)
    expected_out, actual_out = outputs(case, "cpu"), outputs(case, kernels)
    ops = TritonOps(workspace(case, kernels))
    generator = torch.Generator().manual_seed(1)
    for step in range(5, 8):
        drift = torch.randn(case.query.shape, generator=generator).to(case.query.dtype)
        query = case.query + drift / 4
        for one, its, out in (
            (expected, ReferenceOps(), expected_out),
            (actual, ops, actual_out),
        ):
            batch = replace(one.batch, step=step)
            device = one.query.device
            its.set_step(step)
            its.begin_step(batch)
            its.decode_layer(one.geometry, one.pools, batch, query.to(device), out)
        for s, budget in enumerate(case.batch.budget_blocks.tolist()):
            for h in range(case.geometry.num_kv_heads):
                assert torch.equal(
                    content(actual, actual_out.head_tables.cpu(), s, h, budget),
                    content(expected, expected_out.head_tables, s, h, budget),
                ), (step, s, h)
        for name in ("head_tables", "hits", "misses"):
            result = getattr(actual_out, name).cpu()
            assert torch.equal(result, getattr(expected_out, name)), (step, name)
    assert int(actual_out.hits.sum()) > 0
    for name in ("kept", "page_kept"):
        assert torch.equal(getattr(actual.pools, name).cpu(), getattr(expected.pools, name)), name
    torch.testing.assert_close(
        actual_out.coverage.cpu(), expected_out.coverage, rtol=1e-4, atol=1e-5, equal_nan=True
    )
    assert int(actual_out.stage_ns.sum()) == 0


def test_a_layer_attends_to_what_the_layer_before_selected(build, kernels, workspace):
    from sentencekv_vllm.triton_kernels.layer_ops import TritonOps

    case = build(build.row(tokens=577), build.row(tokens=320, kind=IndexKind.CENTROID))
    found = []
    for ops, device in (
        (ReferenceOps(), "cpu"),
        (TritonOps(workspace(case, kernels)), kernels),
    ):
        first, second = case.to(device), case.to(device)
        second.pools.host.copy_(-first.pools.host)
        out, shared = outputs(case, device), outputs(case, device)
        ops.decode_layer(first.geometry, first.pools, first.batch, first.query, out)
        ops.reuse_selection(second.pools, second.batch, shared)
        assert torch.equal(shared.head_tables, out.head_tables)
        assert torch.equal(second.pools.page_slot, first.pools.page_slot)
        resident = second.pools.slot_page >= 0
        assert torch.equal(second.pools.cache[resident], -first.pools.cache[resident])
        torch.testing.assert_close(shared.coverage, out.coverage, equal_nan=True)
        found.append((shared.head_tables.cpu(), shared.misses.tolist(), shared.hits.tolist()))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1:] == found[1][1:]


def test_requests_do_not_see_each_other(build, kernels, workspace):
    """A request selects the same alone, and in a wider batch of padded rows."""
    from sentencekv_vllm.triton_kernels.layer_ops import TritonOps

    case = build(build.row(tokens=300), build.row(tokens=577), build.row(tokens=0))
    together, out = case.to(kernels), outputs(case, kernels)
    decode(TritonOps(workspace(case, kernels)), together, together.batch, together.query, out)
    alone, single = case.to(kernels), outputs(case, kernels)
    only = {
        name: getattr(alone.batch, name)[1:2]
        for name, value in vars(alone.batch).items()
        if isinstance(value, torch.Tensor)
    }
    batch = replace(alone.batch, **only)
    decode(TritonOps(workspace(case, kernels)), alone, batch, alone.query[1:2], single)
    assert torch.equal(single.head_tables[0], out.head_tables[1])


@pytest.mark.parametrize(
    ("kind", "server"),
    [
        (IndexKind.TOKEN_CODES, {"vectors": 0}),
        (IndexKind.CENTROID, {"vectors": 1, "codes": False}),
        (IndexKind.RANDOM, {"vectors": 0, "codes": False}),
    ],
)
def test_a_server_keeps_what_its_policies_read(build, kernels, workspace, kind, server):
    from sentencekv_vllm.triton_kernels.layer_ops import TritonOps

    case = build(*(build.row(tokens=tokens, kind=kind) for tokens in (300, 577)), **server)
    only = kind == IndexKind.TOKEN_CODES
    if only:
        case.batch.num_sentences.zero_()
    tables = []
    for ops, device in (
        (ReferenceOps(), "cpu"),
        (TritonOps(workspace(case, kernels)), kernels),
    ):
        one, out = case.to(device), outputs(case, device)
        decode(ops, one, replace(one.batch, token_codes_only=only), one.query, out)
        tables.append((out.head_tables.cpu(), out.misses.cpu()))
        torch.testing.assert_close(
            out.coverage.isnan().cpu(), torch.full((2,), kind == IndexKind.RANDOM)
        )
    assert all(torch.equal(a, b) for a, b in zip(*tables, strict=True))


@pytest.mark.gpu
def test_a_captured_graph_replays_new_steps(build, kernels, workspace):
    from sentencekv_vllm.triton_kernels.layer_ops import TritonOps

    case = build(build.row(retention=5.0), build.row(tokens=300, kind=IndexKind.RANDOM))
    expected, actual = case.to("cpu"), case.to(kernels)
    expected_out, actual_out = outputs(case, "cpu"), outputs(case, kernels)
    ops = TritonOps(workspace(case, kernels))
    query = actual.query.clone()

    def layer():
        ops.begin_step(actual.batch)
        ops.decode_layer(actual.geometry, actual.pools, actual.batch, query, actual_out)

    warm = case.to(kernels)  # compiles on tables of its own
    decode(ops, warm, warm.batch, query, outputs(case, kernels))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer()
    for step in range(5, 9):
        drift = torch.randn(case.query.shape).to(case.query.dtype)
        query.copy_(case.query + drift / 4)
        ops.set_step(step)
        graph.replay()
        ReferenceOps().decode_layer(
            expected.geometry,
            expected.pools,
            replace(expected.batch, step=step),
            query.cpu(),
            expected_out,
        )
        assert torch.equal(actual_out.head_tables.cpu(), expected_out.head_tables)
        assert torch.equal(actual_out.misses.cpu(), expected_out.misses)


@pytest.mark.parametrize(
    ("changes", "max_pages", "message"),
    [
        ({}, 65536, "set the block size to 32"),
        ({"block_size": 24}, 10, "not 24 and 64"),
        ({"head_dim": 72}, 10, "not 16 and 72"),
        ({"head_dim": 512}, 10, "not 16 and 512"),
    ],
)
def test_shapes_beyond_the_kernels_are_refused(build, changes, max_pages, message):
    from sentencekv_vllm.triton_kernels.workspace import Workspace

    geometry = replace(build(build.row(tokens=64)).geometry, **changes)
    with pytest.raises(ValueError, match=message):
        Workspace.allocate(geometry, 1, max_pages, 10, 16, torch.device("cpu"))
