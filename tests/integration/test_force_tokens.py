# SPDX-License-Identifier: Apache-2.0
"""Teacher forcing: given tokens are decoded, wrong options are refused."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm import SamplingParams  # noqa: E402

from sentencekv_vllm.vllm_glue.force_tokens import ForceTokens  # noqa: E402


def parameters(tokens, max_tokens=3):
    return SamplingParams(max_tokens=max_tokens, extra_args={"force_tokens": tokens})


def test_each_step_leaves_only_its_token():
    force = ForceTokens(None, torch.device("cpu"), False).new_req_logits_processor(
        parameters([4, 0, 2])
    )
    output: list[int] = []
    for wanted in (4, 0, 2):
        probabilities = force(output, torch.randn(6)).softmax(dim=0)
        assert probabilities[wanted] == 1
        output.append(wanted)


def test_requests_without_the_option_are_left_alone():
    processor = ForceTokens(None, torch.device("cpu"), False)
    assert processor.new_req_logits_processor(SamplingParams()) is None
    ForceTokens.validate_params(SamplingParams())


@pytest.mark.parametrize("tokens", ["4", [1.5], [-1, 2, 3], [True, 1, 2]])
def test_what_is_no_list_of_token_ids_is_refused(tokens):
    with pytest.raises(ValueError, match="force_tokens is a list of token ids"):
        ForceTokens.validate_params(parameters(tokens))


def test_what_follows_is_free():
    force = ForceTokens(None, torch.device("cpu"), False).new_req_logits_processor(parameters([4]))
    logits = torch.randn(6)
    assert torch.equal(force([4], logits.clone()), logits)


def test_more_tokens_than_max_tokens_are_refused_with_the_fix():
    with pytest.raises(ValueError, match="max_tokens is 2: set it to at least 3"):
        ForceTokens.validate_params(parameters([1, 2, 3], max_tokens=2))
