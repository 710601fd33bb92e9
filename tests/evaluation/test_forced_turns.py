# SPDX-License-Identifier: Apache-2.0
"""A chat of several turns in one request: what ends a turn does not end the request."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sentencekv_vllm.evaluation.engine import Request, VllmEngine

pytest.importorskip("vllm", reason="vLLM is not installed")

WORDS = ["<end>", "one", "two", "three", "Four.", "Five."]
END = 0


class Tokenizer:
    """A token a word."""

    eos_token_id = END

    def __call__(self, text, add_special_tokens):
        return SimpleNamespace(input_ids=[WORDS.index(word) for word in text.split()])

    def decode(self, ids, skip_special_tokens):
        return " ".join(WORDS[i] for i in ids if i != END or not skip_special_tokens)


class LLM:
    """Decodes what it is told to, then says four, ends, and talks on where it may."""

    def generate(self, prompts, parameters, use_tqdm):
        return [self._output(p) for p in parameters]

    def _output(self, parameters):
        tokens = [*parameters.extra_args["force_tokens"], 4, END, 5][: parameters.max_tokens]
        if not parameters.ignore_eos:
            tokens = tokens[: tokens.index(END) + 1]
        reply = SimpleNamespace(text="", token_ids=tokens)
        told = {"sentencekv": {"mode": "sparse"}}
        return SimpleNamespace(
            outputs=[reply], kv_transfer_params=told, num_cached_tokens=0, prompt_token_ids=[]
        )


@pytest.fixture
def engine():
    made = VllmEngine.__new__(VllmEngine)
    made._llm, made._tokenizer, made._end = LLM(), Tokenizer(), END
    return made


@pytest.mark.parametrize("forced", ("one <end> two three", "one two"))
def test_the_last_reply_follows_the_forced_turns_and_ends_where_it_ends(engine, forced):
    (completion,) = engine.complete([Request("prompt", 3, forced=forced)])
    assert completion.text == "Four."
