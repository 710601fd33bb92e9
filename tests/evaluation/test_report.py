# SPDX-License-Identifier: Apache-2.0
"""The report: one page that needs nothing beside it, with or without matplotlib."""

from __future__ import annotations

import dataclasses
import re
import sys

import pytest

from sentencekv_vllm.evaluation.items import Cell
from sentencekv_vllm.evaluation.kv_shape import KVShape
from sentencekv_vllm.evaluation.markdown import markdown
from sentencekv_vllm.evaluation.report import write_report
from sentencekv_vllm.evaluation.table import summarise
from sentencekv_vllm.evaluation.variant import DENSE, Variant

CELLS = [Cell("niah_single", "restated", tokens) for tokens in (4096, 8192)]
VARIANTS = [Variant(DENSE), Variant("sentencekv", 256), Variant("sentencekv", 512)]


@pytest.fixture
def records(record):
    return [
        record(seed, variant, seed % 2, cell, depth=seed / 4)
        for seed in range(4)
        for variant in VARIANTS
        for cell in CELLS
    ]


def report(folder, records):
    rows = summarise(records, CELLS, VARIANTS, KVShape(head_dim=64, block_size=32))
    said = write_report(folder, rows, records, markdown(rows, VARIANTS), "model <tiny>")
    return said, (folder / "report.html").read_text()


def test_a_report_holds_every_figure_and_refers_to_nothing_outside(tmp_path, records):
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra bench, is not installed")
    said, page = report(tmp_path, records)
    assert "with 4 figures" in said
    assert page.count("<img") == 4
    assert all(src.startswith("data:image/png;base64,") for src in re.findall('src="(.*?)"', page))
    for name in ("accuracy", "depth", "traffic", "divergence"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()


def test_figures_without_data_are_left_out(tmp_path, records):
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra bench, is not installed")
    bare = [dataclasses.replace(r, depth=None, kl=None, hits=0, misses=0) for r in records]
    said, _ = report(tmp_path, bare)
    assert "with 1 figures" in said


def test_without_matplotlib_the_tables_stay_and_the_extra_is_named(tmp_path, records, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencekv_vllm.evaluation.plots", None)
    said, page = report(tmp_path, records)
    assert "sentencekv-vllm[bench]" in said
    assert page.count("<table>") == 4
    assert "<img" not in page
    assert "model &lt;tiny&gt;" in page
    assert "<td>sentencekv @ 256<td>-<td>8<td>0.50 (0.22-0.78)" in page
