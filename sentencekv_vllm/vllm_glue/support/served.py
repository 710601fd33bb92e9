# SPDX-License-Identifier: Apache-2.0
"""What is served, each with the test that holds it."""

from __future__ import annotations

from .entry import Entry, Kind

T = "tests/integration"
DENSE = f"{T}/test_compatibility.py::test_inputs_without_a_fixed_prompt_of_text_stay_dense"


def _served(what: str, how: str, *tests: str) -> Entry:
    return Entry(what, Kind.SERVED, how, tests)


SERVED: tuple[Entry, ...] = (
    _served(
        "dense GQA models: Llama",
        "bit-identical to stock attention when everything is selected",
        f"{T}/test_exactness.py::test_full_attention_is_bit_identical_to_stock_attention",
    ),
    _served(
        "a sliding window that no request outgrows: Phi-4-mini",
        "a window of --max-model-len or more is full attention, in models of any type",
        f"{T}/test_hybrids.py::test_full_attention_gives_the_tokens_of_stock_attention[phi3]",
        f"{T}/test_refusals.py::test_a_window_that_no_request_outgrows_is_none",
    ),
    _served(
        "prefix caching, `n > 1`",
        "what sparse attention wrote is never found again; a second turn recomputes it",
        f"{T}/test_prefix_cache.py::test_a_second_turn_recomputes_what_sparse_attention_wrote",
        f"{T}/test_prefix_cache.py::test_several_samples_of_one_prompt",
    ),
    _served(
        "preemption",
        "a resumed request starts again as a dense one",
        f"{T}/test_preemption.py::test_preempted_and_resumed_under_full_equals_dense",
    ),
    _served(
        "prompts longer than the KV pool",
        "their history waits in the swap pool and is attended to exactly, layer by layer",
        f"{T}/test_visits.py::test_a_prompt_of_four_pools_and_more",
    ),
    _served(
        "tensor parallelism",
        "each rank holds its heads, all have one set of books",
        f"{T}/test_tensor_parallel.py"
        "::test_full_attention_on_two_ranks_is_bit_identical_to_stock_attention",
    ),
    _served(
        "the engine in a process of its own, async scheduling",
        "vLLM's defaults",
        f"{T}/test_exactness.py::test_an_engine_core_in_a_process_of_its_own_gives_the_same_bits",
    ),
    _served(
        "`vllm serve`: streams, aborts, options of one request",
        "a bad option is that client's error alone",
        f"{T}/test_serve.py::test_a_stream_says_the_same_as_an_answer_in_one_piece",
    ),
    _served(
        "CUDA graphs of vLLM's, piecewise and for decode steps",
        "steps with sparse rows replay graphs of our own",
        f"{T}/test_full_graphs.py::test_v2_takes_full_graphs_for_steps_without_sparse_rows_alone",
        f"{T}/test_step_graphs.py::test_replayed_whole_steps_equal_steps_without_graphs",
    ),
    Entry(
        "prompt embeddings, resumable (streaming-input) requests",
        Kind.DENSE,
        "no token ids, or a prompt whose end moves; reason `unsupported_input`",
        (f"{DENSE}[prompt_token_ids]", f"{DENSE}[resumable]"),
    ),
    Entry(
        "prompts with images, audio or video",
        Kind.DENSE,
        "their placeholders are no sentences, and no engine test has one; reason "
        "`unsupported_input`. Text prompts of the same model turn sparse",
        (f"{DENSE}[mm_features]",),
        examples="Qwen2.5-VL, Qwen3-VL, LLaVA",
    ),
)
