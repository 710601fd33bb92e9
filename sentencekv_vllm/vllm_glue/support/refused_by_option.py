# SPDX-License-Identifier: Apache-2.0
"""Options, versions and requests that are refused."""

from __future__ import annotations

from .entry import Entry, Kind

REFUSALS = "tests/integration/test_refusals.py"
START = f"{REFUSALS}::test_each_refusal_names_what_and_the_way_out"

BY_OPTION: dict[str, Entry] = {
    "connector": Entry(
        "a KV connector of your own",
        Kind.AT_START,
        "vLLM has one connector and the backend moves its blocks through it",
        (f"{START}[connector]", f"{REFUSALS}::test_vllms_own_options_are_refused[a connector]"),
        "remove --kv-transfer-config",
    ),
    "KV offloading": Entry(
        "--kv-offloading-size",
        Kind.AT_START,
        "it claims vLLM's one KV connector",
        (f"{START}[KV offloading]",),
        "remove it; the swap pool is sized by host_pool_gib",
    ),
    "HiSparse": Entry(
        "vLLM's HiSparse (attention_config.hisparse_config)",
        Kind.AT_START,
        "it would manage the blocks that this backend manages",
        (f"{START}[HiSparse]",),
        "remove hisparse_config",
    ),
    "speculative": Entry(
        "speculative decoding",
        Kind.AT_START,
        "a sparse row decodes one token a step",
        (f"{START}[speculative]",),
        "remove --speculative-config",
    ),
    "pipeline": Entry(
        "pipeline parallelism",
        Kind.AT_START,
        "there is one plan and one set of books for all ranks",
        (f"{START}[pipeline]",),
        "set --pipeline-parallel-size 1 and use --tensor-parallel-size",
    ),
    "DCP": Entry(
        "decode context parallelism",
        Kind.AT_START,
        "every rank ranks the whole history",
        (f"{START}[DCP]",),
        "set --decode-context-parallel-size 1",
    ),
    "PCP": Entry(
        "prefill context parallelism",
        Kind.AT_START,
        "every rank copies out the whole prompt",
        (f"{START}[PCP]",),
        "set --prefill-context-parallel-size 1",
    ),
    "microbatches": Entry(
        "microbatches (--enable-dbo, --ubatch-size)",
        Kind.AT_START,
        "a step has one plan for its sparse rows",
        (f"{START}[microbatches]",),
        "remove them",
    ),
    "fault tolerance": Entry(
        "--enable-fault-tolerance",
        Kind.AT_START,
        "the ranks' reports of a failed step would be added to those of the next one",
        (f"{START}[fault tolerance]",),
        "remove it",
    ),
    "Rust front end": Entry(
        "vLLM's Rust front end",
        Kind.AT_START,
        "it skips the checks of requests, so a prompt that can never fit would wait for ever and a "
        "bad option would go unnoticed",
        (f"{START}[Rust front end]",),
        "unset VLLM_USE_RUST_FRONTEND",
    ),
    "fp8 KV": Entry(
        "a quantised KV cache",
        Kind.AT_START,
        "index and attention read keys in the model's dtype",
        (f"{START}[fp8 KV]",),
        "set --kv-cache-dtype auto",
    ),
    "KV dtype": Entry(
        "a KV cache of another dtype than the model's",
        Kind.AT_START,
        "queries and keys are read in one dtype",
        (f"{START}[KV dtype]",),
        "set --kv-cache-dtype auto",
    ),
    "partial prefix hits": Entry(
        "prefix hits of parts of a block (--prefix-match-unit)",
        Kind.AT_START,
        "vLLM's V2 runner writes such a block before it tells what to copy out of it",
        (f"{START}[partial prefix hits]",),
        "remove --prefix-match-unit",
    ),
    "sleep mode": Entry(
        "sleep mode",
        Kind.AT_START,
        "it discards the KV cache under the swap pool",
        (f"{START}[sleep mode]",),
        "remove --enable-sleep-mode",
    ),
    "platform": Entry(
        "platforms other than CPU and CUDA",
        Kind.AT_START,
        "there are no kernels for them",
        (f"{START}[platform]",),
        "use another attention backend",
    ),
    "one group for windows": Entry(
        "--disable-hybrid-kv-cache-manager for a model with sliding windows",
        Kind.AT_START,
        "windowed layers would be in the group whose history is freed",
        (f"{START}[one group for windows]",),
        "remove it",
    ),
    "some layers": Entry(
        "backend_per_kind with this backend for some layers",
        Kind.AT_START,
        "two managers would free one request's blocks",
        (f"{REFUSALS}::test_vllms_own_options_are_refused[some layers only]",),
        "set --attention-backend sentencekv and remove backend_per_kind",
    ),
    "version": Entry(
        "other versions of vLLM",
        Kind.AT_START,
        "vLLM declares the interfaces used here experimental",
        (f"{REFUSALS}::test_other_versions_of_vllm_need_the_users_word",),
        "install a version from the first table, or set allow_untested_vllm",
    ),
    "full graphs": Entry(
        "cudagraph_mode FULL for batches of any kind",
        Kind.BY_CACHE,
        "a graph of vLLM's holds stock attention alone",
        ("tests/integration/test_full_graphs.py::test_full_graphs_of_mixed_batches_are_refused",),
        "set FULL_AND_PIECEWISE, FULL_DECODE_ONLY or PIECEWISE",
    ),
    "request option": Entry(
        "a wrong `sentencekv_*` option of a request",
        Kind.BY_REQUEST,
        "nothing is guessed",
        ("tests/integration/test_serve.py::test_a_bad_option_is_that_clients_error_alone",),
        "the answer says the rule and the value",
    ),
    "prompt size": Entry(
        "a prompt that neither the KV pool nor the swap pool can hold",
        Kind.BY_REQUEST,
        "vLLM's queue would wait for ever",
        (f"{REFUSALS}::test_prompts_that_never_fit_are_refused_with_the_numbers",),
        "the answer says how many tokens fit",
    ),
}
