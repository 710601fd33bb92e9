# SPDX-License-Identifier: Apache-2.0
"""A start finds the model's basis, keeps it, and does without where it cannot."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from engine import MODEL, apart, make_llm  # noqa: E402

from sentencekv_vllm.ops.basis_file import BasisFileError, read_basis  # noqa: E402

TEXT = "The ferry left at six, and Ines counted the lamps behind the harbour wall again. " * 60


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache; nothing here decodes, so the C++ ops need not be built for it."""
    monkeypatch.setenv("SENTENCEKV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("SENTENCEKV_TEST_OPS", "reference")
    return tmp_path / "cache" / "bases"


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """What a first start finds and logs, and the folder of the cache that it leaves."""
    folder = tmp_path_factory.mktemp("calibrated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SENTENCEKV_CACHE_DIR", str(folder))
        patch.setenv("SENTENCEKV_TEST_OPS", "reference")
        found, lines = apart(start)
    return found, lines, folder / "bases"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*")} if folder.exists() else {}


def bases(worker):
    """Of one rank: the rank, and for each layer what does not depend on rotations."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group
    from vllm.distributed.parallel_state import get_tp_group

    pools = get_kv_transfer_group().runtime.pools
    found = [(b.key_map @ b.key_map.mT, b.center, b.bits, b.key_map) for b in pools.bases]
    return get_tp_group().rank_in_group, found


def start(settings=None, times=1, **options):
    """Start engines one after the other; bases of each rank of the last, and what was logged."""
    import logging

    lines = []

    class Lines(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    logger = logging.getLogger("sentencekv_vllm")
    logger.addHandler(Lines())
    logger.setLevel(logging.INFO)
    if options.get("tensor_parallel_size", 1) > 1:
        cores = sorted(os.sched_getaffinity(0))[:2]
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, cores))
    llm = make_llm(settings or {}, blocks=300, **options)
    return llm.collective_rpc(bases), [
        line for line in lines if "alibrat" in line or "basis" in line
    ]


def measured():
    """Start with moments kept: those of each layer, and the pieces that were run."""
    from sentencekv_vllm.vllm_glue import calibration

    kept = {}
    original = calibration.measure

    def measure(config, model, runs, *rest):
        kept["runs"] = [(list(run.ids), run.offset) for run in runs]
        kept["moments"] = found = original(config, model, runs, *rest)
        return found

    calibration.measure = measure
    llm = make_llm({}, blocks=300, dtype="float32")
    del llm
    return kept["runs"], [m.means() for m in kept["moments"]]


def same(some, others) -> bool:
    return all(
        torch.equal(a[3], b[3]) and torch.equal(a[1], b[1])
        for a, b in zip(some[0][1], others[0][1], strict=True)
    )


def is_plain(rank_bases) -> bool:
    (_, layers), *_ = rank_bases
    return all(
        torch.allclose(square, torch.eye(square.shape[-1]).expand_as(square), atol=1e-4)
        for square, *_ in layers
    )


def direct(runs):
    """The same moments from Hugging Face's forwards, one token at a time."""
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import modeling_llama

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    seen, original = [], modeling_llama.apply_rotary_pos_emb

    def rotated(*args, **kwargs):
        seen.append(original(*args, **kwargs))
        return seen[-1]

    modeling_llama.apply_rotary_pos_emb = rotated
    layers = model.config.num_hidden_layers
    sums = [[0, 0, 0] for _ in range(layers)]
    count = 0
    for ids, offset in runs:
        seen.clear()
        positions = torch.arange(len(ids))[None] + offset
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]), position_ids=positions)
        assert len(seen) == layers
        last = len(ids) // 32 * 32
        count += last - 64
        for total, (query, key) in zip(sums, seen, strict=True):
            q, k = query[0, :, 64:last].double(), key[0, :, 64:last].double()
            q = q.unflatten(0, (k.shape[0], -1))  # [H, G, T, D]
            blocks = k.unflatten(1, (-1, 32))
            apart = (blocks - blocks.mean(2, keepdim=True)).flatten(1, 2)
            total[0] += torch.einsum("htd,hte->hde", apart, apart)
            total[1] += torch.einsum("hgtd,hgte->hde", q, q) / q.shape[1]
            total[2] += k.sum(1)
    return [[part / count for part in total] for total in sums]


@pytest.mark.slow
def test_moments_are_those_of_another_implementation_of_the_model():
    runs, mine = apart(measured)
    offsets = [offset for _, offset in runs]
    assert offsets == sorted(offsets) and offsets[0] == 0 and offsets[-1] > 16384
    half = len(runs) // 2
    assert [ids for ids, _ in runs[:half]] == [ids for ids, _ in runs[half:]]
    for found, expected in zip(mine, apart(direct, runs), strict=True):
        for part, other in zip(found, expected, strict=True):
            assert float((part - other).norm() / other.norm()) < 2e-3


@pytest.mark.slow
def test_a_start_calibrates_once_and_the_next_reads_what_it_found(cache, calibrated):
    first, lines, folder = calibrated
    assert any("calibrated with" in line for line in lines)
    assert not is_plain(first)
    shutil.copytree(folder, cache)
    again, lines = apart(start)
    assert any("in the basis of" in line for line in lines)
    assert files(folder) == files(cache), "it was read, not written"
    assert same(first, again)


@pytest.mark.slow
def test_files_that_are_of_no_use_are_made_anew_and_the_same(cache, calibrated):
    first, _, folder = calibrated
    ((name, good),) = files(folder).items()
    cache.mkdir(parents=True)
    (cache / name).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(BasisFileError):
        read_basis(cache / name)
    anew, lines = apart(start)
    assert any("damaged" in line for line in lines)
    assert files(cache) == {name: good}
    assert same(first, anew)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings, options, reason",
    [
        ({}, {"load_format": "dummy"}, "made up"),
        ({"calibration": False}, {}, "calibration is false"),
        ({}, {"max_num_batched_tokens": 64, "max_model_len": 64}, "at least 512 must"),
    ],
)
def test_where_it_cannot_run_the_basis_is_fixed_and_the_log_says_why(
    cache, settings, options, reason
):
    found, lines = apart(start, settings, **options)
    assert is_plain(found)
    assert len([line for line in lines if "no basis is calibrated" in line]) == 1
    assert any(reason in line for line in lines)
    assert not files(cache)


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_costs_nothing(tmp_path, monkeypatch):
    """Its stand-in is in the folder for temporary files."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("SENTENCEKV_CACHE_DIR", str(tmp_path / "file" / "cache"))
    found, _ = apart(start)
    assert not is_plain(found)
    assert list(tmp_path.glob("sentencekv_vllm-*/bases/*.basis"))


@pytest.mark.slow
@pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="vLLM binds each rank to a core of its own"
)
def test_each_rank_finds_what_one_rank_finds_for_its_heads(cache):
    ((_, whole),), _ = apart(start, dtype="float32")
    ranks, _ = apart(start, dtype="float32", tensor_parallel_size=2, timeout_s=500)
    assert len(files(cache)) == 3
    assert [rank for rank, _ in ranks] == [0, 1]
    for rank, layers in ranks:
        for mine, all_heads in zip(layers, whole, strict=True):
            other = all_heads[0][rank : rank + 1]
            assert float((mine[0] - other).norm() / other.norm()) < 1e-2


@pytest.mark.slow
def test_the_users_text_replaces_ours_and_stays(cache, calibrated, tmp_path):
    shutil.copytree(calibrated[2], cache)
    ((name, ours),) = files(cache).items()
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    told = apart(command, [MODEL, "--text", str(text), "--block-size", "32", "--tokens", "1500"])
    assert told == 0
    ((same_name, users),) = files(cache).items()
    assert same_name == name and users != ours
    assert read_basis(cache / name).is_users
    _, lines = apart(start)
    assert any("in the basis of" in line for line in lines)
    assert files(cache) == {name: users}


def command(arguments):
    from sentencekv_vllm.calibrate import main

    return main(arguments)


@pytest.mark.parametrize(
    "content, arguments, told",
    [
        (TEXT, ["--tokens", "100"], "--tokens must be at least 512, got 100"),
        ("short", [], "at least 512 tokens"),
        (None, [], "must name a file that can be read"),
        (TEXT, ["--engine", "[1]"], "must be a JSON object"),
        (b"\xff\xfe\x00", [], "must be in UTF-8"),
    ],
)
def test_a_command_line_that_breaks_a_rule_is_refused(tmp_path, capsys, content, arguments, told):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert command([MODEL, "--text", str(path), *arguments]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "module", ["vllm.v1.worker.gpu.model_runner", "vllm.v1.worker.gpu_model_runner"]
)
def test_both_runners_can_be_wrapped_and_hand_out_their_model(module):
    import importlib
    import inspect

    from sentencekv_vllm.vllm_glue.model_runner import PARAMETERS

    runner = importlib.import_module(module).GPUModelRunner
    assert tuple(inspect.signature(runner.initialize_kv_cache).parameters) == PARAMETERS
    assert tuple(inspect.signature(runner.get_model).parameters) == ("self",)


@pytest.mark.parametrize("window", [None, 40, 256])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_plain_attention_is_causal_softmax(softcap, window):
    from sentencekv_vllm.vllm_glue.recorder import attend_causally

    generator = torch.Generator().manual_seed(0)
    query = torch.randn(300, 4, 16, generator=generator)
    key, value = torch.randn(2, 300, 2, 16, generator=generator)
    found = attend_causally(query, key, value, 0.3, softcap, window)
    for token in (0, 1, 255, 256, 299):
        first = 0 if window is None else max(0, token - window + 1)
        for head in range(4):
            logits = 0.3 * key[first : token + 1, head // 2] @ query[token, head]
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            expected = logits.softmax(0) @ value[first : token + 1, head // 2]
            torch.testing.assert_close(found[token, head], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "tokens, longest, positions", [(2400, 8192, 32768), (3000, 512, 8192), (900, 2048, 600)]
)
def test_a_text_is_run_twice_in_equal_parts_over_all_positions(tokens, longest, positions):
    from sentencekv_vllm.vllm_glue.calibration_text import PIECE, pieces

    runs = pieces(range(tokens), longest, positions)
    half = len(runs) // 2
    for part in (runs[:half], runs[half:]):
        assert [i for run in part for i in run.ids] == list(range(tokens))
    assert all(len(run.ids) <= min(longest, PIECE, positions) for run in runs)
    assert runs[0].offset == 0
    assert all(run.offset + len(run.ids) <= positions for run in runs)
    if positions > 4 * PIECE:
        assert runs[half].offset > 0.4 * positions
