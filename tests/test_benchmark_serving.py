# SPDX-License-Identifier: Apache-2.0
"""The serving benchmark: equal settings, rows from recorded metrics, refusals, one small run."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("tokenizers", reason="the tokenizer library is not installed")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
BEFORE = """\
vllm:num_requests_running{engine="0"} 0
vllm:kv_cache_usage_perc{engine="0"} 0
vllm:num_preemptions_total{engine="0"} 1
vllm:prefix_cache_hits_total{engine="0"} 0
vllm:cache_config_info{block_size="32",num_gpu_blocks="101"} 1
"""
OURS_BEFORE = """\
vllm:sentencekv_hits_total{engine="0"} 100
vllm:sentencekv_misses_total{engine="0"} 100
vllm:sentencekv_swap_in_bytes_total{engine="0"} 0
vllm:sentencekv_swap_out_bytes_total{engine="0"} 1048576
vllm:sentencekv_released_blocks_total{engine="0"} 7
vllm:sentencekv_requests_total{engine="0",reason="sparse"} 1
vllm:sentencekv_requests_total{engine="0",reason="short_context"} 0
"""
LOADED = """\
vllm:num_requests_running{engine="0"} 5
vllm:kv_cache_usage_perc{engine="0"} 0.75
vllm:sentencekv_sparse_requests{engine="0"} 4
"""
OURS_AFTER = """\
vllm:sentencekv_hits_total{engine="0"} 190
vllm:sentencekv_misses_total{engine="0"} 110
vllm:sentencekv_swap_in_bytes_total{engine="0"} 2097152
vllm:sentencekv_swap_out_bytes_total{engine="0"} 4194304
vllm:sentencekv_released_blocks_total{engine="0"} 57
vllm:sentencekv_requests_total{engine="0",reason="sparse"} 4
vllm:sentencekv_requests_total{engine="0",reason="short_context"} 1
"""


@pytest.fixture
def serving(monkeypatch):
    """The modules of the benchmark."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import serving_engine
    import serving_model
    import serving_options
    import serving_report
    import serving_row
    import serving_watch

    return SimpleNamespace(
        engine=serving_engine,
        model=serving_model,
        options=serving_options,
        report=serving_report,
        row=serving_row,
        watch=serving_watch,
    )


def result(texts, speed=1.0):
    """What vLLM's client returns, as far as a row needs it."""
    times = {f"p{p}_{name}_ms": 10.0 / speed for p in (50, 99) for name in ("ttft", "tpot", "itl")}
    rates = {"request_throughput": speed, "output_throughput": 8 * speed}
    return times | rates | {
        "completed": 4, "failed": 0, "duration": 4 / speed, "total_token_throughput": 100 * speed,
        "generated_texts": texts,
    }  # fmt: skip


def recorded(serving, before, during, after):
    """A watch that has seen these texts, and this process."""
    texts = [before, during]
    with serving.watch.Watch(lambda: texts[0], os.getsid(0)) as watch:
        texts.pop(0)
        while not any(look.levels["vllm:num_requests_running"] for look in watch.looks):
            time.sleep(0.01)
        texts.append(after)
        texts.pop(0)
    return watch


def rows(serving):
    """A row of each side from recorded metrics; sentencekv is twice as fast."""
    model = serving.model.Model("tiny-recall", Path())
    case = serving.engine.Case(context=300, concurrency=4, requests=4, output_tokens=8)
    question = SimpleNamespace(target=" The code is 7.")
    prompts = [serving.model.Prompt([1], question)] * 4
    right, wrong = " The code is 7.</s> and so on", " The code is 8.</s>"
    made = []
    for side, speed, ours, texts in (
        ("stock", 1.0, ("", ""), [right, right, right, wrong]),
        ("sentencekv", 2.0, (OURS_BEFORE, OURS_AFTER), [right] * 4),
    ):
        watch = recorded(serving, BEFORE + ours[0], LOADED, BEFORE + ours[1])
        made.append(
            serving.row.make_row("serve", side, model, case, prompts, result(texts, speed), watch)
        )
    return made


def test_a_row_holds_what_was_gained_and_the_peaks(serving):
    stock, ours = rows(serving)
    assert (stock.running_peak, stock.kv_usage_peak, stock.preemptions) == (5, 0.75, 0)
    assert stock.kv_pool_tokens == 100 * 32  # one block is vLLM's null block
    assert stock.process_mib > 10
    assert (stock.right_answers, ours.right_answers) == (3, 4)
    assert stock.hit_rate is stock.swapped_in_mib is stock.released_blocks is None
    assert ours.hit_rate == 0.9
    assert (ours.swapped_in_mib, ours.swapped_out_mib, ours.released_blocks) == (2, 3, 50)
    assert (ours.sparse_requests, ours.dense_requests) == (3, 1)


def test_the_table_sets_both_sides_and_their_ratio_side_by_side(serving):
    text = serving.report.table(rows(serving))
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    table = {line[0]: line[1:] for line in cells if line}
    assert table[""] == ["stock", "sentencekv", "ratio"]
    assert table["TTFT p50, ms"] == ["10.0", "5.0", "0.50"]
    assert table["output tokens/s"] == ["8.0", "16.0", "2.00"]
    assert table["hit rate"] == ["-", "0.900", "-"]
    assert table["preemptions"] == ["0", "0", "-"]
    assert "GPU memory, peak MiB" not in table


def test_the_table_shows_medians_over_the_rounds(serving):
    stock, ours = rows(serving)
    slow, slower = (replace(ours, ttft_p50=t, hit_rate=None) for t in (20.0, 90.0))
    (block,) = serving.report.table([stock, ours, slow, slower]).split("\n\nserve: ")
    assert "|  10.0 |       20.0 |  2.00 |" in block  # of 5, 20 and 90
    assert "|     - |      0.900 |     - |" in block  # of the one that is known


def test_every_written_row_says_where_it_comes_from(serving, tmp_path):
    stem = tmp_path / "new" / "serving"
    serving.report.write(stem, rows(serving), serving.report.provenance())
    records = json.loads(stem.with_suffix(".json").read_text())
    with stem.with_suffix(".csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    for record in (*records, *lines):
        assert all(record[name] for name in ("commit", "date", "device", "command", "vllm"))
    assert [line["side"] for line in lines] == ["stock", "sentencekv"]
    assert records[0]["hit_rate"] is None and float(lines[1]["hit_rate"]) == 0.9


@pytest.mark.parametrize("model", ["tiny-recall", "llama-3.1-8b"])
def test_both_sides_get_the_same_engine_but_for_the_backend(serving, tmp_path, model):
    model = serving.model.Model(model, tmp_path)
    setup = serving.engine.Setup(32, 2, 2048, True, {"token_budget": 512})
    cases = [serving.engine.Case(4096, n, n, 100) for n in (1, 8)]
    stock, ours = (
        serving.engine.engine_options(model, setup, cases, s) for s in ("stock", "sentencekv")
    )
    assert ours.pop("attention_backend") == "sentencekv"
    settings = ours.pop("additional_config")["sentencekv"]
    assert stock == ours
    blocks = stock["kv_cache_memory_bytes"] // (32 * model.token_bytes)
    assert blocks == 2 * -(-4196 // 32) + 1
    assert settings["token_budget"] == 512
    assert settings["host_pool_gib"] * 2**30 >= 8 * 4196 * model.token_bytes
    arguments = serving.engine.serve_arguments(stock)
    assert arguments[arguments.index("--max-num-seqs") + 1] == "8"
    assert "--enforce-eager" in arguments and "True" not in arguments


def test_a_token_of_llama_8b_weighs_128_kib(serving, tmp_path):
    assert serving.model.Model("llama-3.1-8b", tmp_path).token_bytes == 128 << 10


def test_made_up_prompts_have_sentences_that_a_segmenter_finds(serving, tmp_path):
    from tokenizers import Tokenizer

    from sentencekv_vllm.segmentation.lengths import SentenceLengths
    from sentencekv_vllm.segmentation.punctuation import PunctuationSegmenter
    from sentencekv_vllm.segmentation.vocabulary import Vocabulary

    model = serving.model.Model("llama-4l", tmp_path)
    ids = model.prompt(2000, seed=3).ids
    tokenizer = Tokenizer.from_file(str(model.folder / "tokenizer.json"))
    segmenter = PunctuationSegmenter(SentenceLengths(4, 64), Vocabulary.from_tokenizer(tokenizer))
    ends = [i + 1 for i, token in enumerate(ids[:-1]) if token == serving.model.END_OF_SENTENCE]
    assert len(ends) > 40
    assert set(ends) <= set(segmenter.split(np.array(ids, np.int32)).tolist())


def test_prompts_share_no_first_block_so_that_the_prefix_cache_does_not_help(serving, tmp_path):
    for name in ("llama-4l", "tiny-recall"):
        model = serving.model.Model(name, tmp_path)
        if name == "tiny-recall":
            pytest.importorskip("vllm", reason="vLLM is not installed")
        starts = {tuple(model.prompt(600, seed).ids[:32]) for seed in range(6)}
        assert len(starts) == 6


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--modes", "serve,batch"], "--modes batch: it is neither serve nor offline"),
        (["--dense-requests", "0.5"], "give 1 or more"),
        (["--output-tokens", "1"], "--output-tokens 1: give 2 or more"),
        (["--rounds", "0"], "--rounds 0: give 1 or more"),
        (["--contexts", "0"], "give numbers from 1 on"),
        (["--settings", "budget"], "invalid loads value"),
        pytest.param(
            ["--model", "llama-3.1-8b"],
            "needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_a_wrong_argument_is_named(serving, capsys, arguments, complaint):
    with pytest.raises(SystemExit) as end:
        serving.options.parse("", arguments)
    assert end.value.code == 2 and complaint in capsys.readouterr().err


def test_options_replace_the_defaults_of_the_form(serving):
    options = serving.options.parse("", ["--small", "--concurrency", "3", "--requests", "2"])
    (case,) = serving.options.cases(options)
    assert (case.context, case.concurrency, case.requests) == (8192, 3, 6)


def test_a_load_that_the_host_cannot_hold_is_named_and_left_out(serving, tmp_path, capsys):
    model = serving.model.Model("llama-3.1-8b", tmp_path)
    options = serving.options.parse(
        "", ["--small", "--contexts", "8192,131072", "--host-gib", "20"]
    )
    loads = serving.options.fitting(options, model)
    assert [(c.context, c.concurrency) for c in loads] == [(8192, 2), (8192, 6)]
    assert "left out: 2 x 131072 tokens, 2 at a time: it needs a swap pool of 40.1 GiB" in (
        capsys.readouterr().err
    )
    options.host_gib = 0.1
    with pytest.raises(ValueError, match="no load is left"):
        serving.options.fitting(options, model)
    options.contexts = [300_000]
    with pytest.raises(ValueError, match="takes 262144 tokens, not 300384"):
        serving.options.fitting(options, model)


def test_an_unknown_model_is_refused(serving, tmp_path):
    with pytest.raises(ValueError, match="no model '.*nowhere'.*nothing is downloaded"):
        serving.model.Model(str(tmp_path / "nowhere"), tmp_path)


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.vllm
def test_a_small_load_on_both_servers(tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    command = [sys.executable, BENCHMARKS / "serving.py", "--small", "--modes", "serve"]
    command += [
        "--no-answers",
        "--model",
        "tiny-recall",
        "--contexts",
        "1500",
        "--concurrency",
        "4",
    ]
    # Long enough for several looks at the metrics, which are taken every 0.2 s.
    command += ["--output-tokens", "400", "--out", tmp_path / "rows"]
    command += ["--settings", '{"token_budget": 256, "min_context_tokens": 512}']
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    stock, ours = json.loads((tmp_path / "rows.json").read_text())
    assert (stock["side"], ours["side"]) == ("stock", "sentencekv")
    for row in (stock, ours):
        assert (row["completed"], row["failed"], row["right_answers"]) == (4, 0, 4)
        assert row["ttft_p50"] > row["itl_p50"] > 0 and row["process_mib"] > 100
        assert row["prefix_hit_tokens"] == 0
    assert stock["kv_pool_tokens"] == ours["kv_pool_tokens"]
    assert stock["running_peak"] <= 2 < ours["running_peak"]
    assert ours["sparse_requests"] == 4 and ours["dense_requests"] == 0
    assert ours["released_blocks"] > 0 and ours["swapped_out_mib"] > 0
