# SPDX-License-Identifier: Apache-2.0
"""One question to a model, answered in an engine of this process while its choices are noted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ConfigError, SentenceKVConfig
from ..evaluation.engine import Request, VllmEngine
from ..evaluation.real.chat import chat_of
from ..segmentation import SentenceLengths, Vocabulary
from ..segmentation.punctuation import PunctuationSegmenter
from .error import InspectError
from .page import Answer
from .pieces import pieces
from .recorder import recording
from .trace import Trace

SPARE_TOKENS = 64  # of the longest request: what a tokenizer adds


@dataclass(frozen=True)
class Inquiry:
    """What is asked, and how it is served."""

    model: str  # folder or name
    text: str
    question: str = ""  # asked below the text in the model's chat template; "": the text is all
    max_tokens: int = 64  # of the answer
    budget: int = 512  # tokens read a step
    policy: str = "sentencekv"
    block_size: int = 32  # tokens
    dtype: str = "auto"
    kv_cache_gib: float = 1.0
    host_pool_gib: float = 1.0

    @property
    def settings(self) -> dict[str, Any]:
        """Of the backend."""
        return {
            "policy": self.policy,
            "token_budget": self.budget,
            "min_context_tokens": 1,
            "host_pool_gib": self.host_pool_gib,
            "segmenter": "punctuation",
            "cuda_graphs": False,  # a replayed step does not call what is watched
        }


def ask(inquiry: Inquiry) -> tuple[Answer, Trace]:
    """Start an engine, ask, and note; half a minute and more.

    Raises:
        ConfigError: a setting breaks a rule.
        InspectError: no step has selected anything.
    """
    config = SentenceKVConfig.from_dict(inquiry.settings)
    least = config.num_sink_tokens + config.recent_window + inquiry.block_size
    if inquiry.budget < least:
        raise ConfigError(
            f"--budget {inquiry.budget} is below num_sink_tokens {config.num_sink_tokens} + "
            f"recent_window {config.recent_window} + one block of {inquiry.block_size}: the "
            f"smallest is {least}"
        )
    chat = chat_of(inquiry.model)
    prompt = inquiry.text
    if inquiry.question:
        prompt = chat.open(f"{inquiry.text}\n\n{inquiry.question}")
    engine = VllmEngine(
        inquiry.model,
        inquiry.settings,
        block_size=inquiry.block_size,
        max_prompt_tokens=chat.count(prompt) + SPARE_TOKENS,
        max_requests=1,
        kv_cache_bytes=int(inquiry.kv_cache_gib * 2**30),
        max_output_tokens=inquiry.max_tokens,
        dtype=inquiry.dtype,
    )
    with recording(engine.runtime) as recorder:
        (done,) = engine.complete([Request(prompt, inquiry.max_tokens)])
    # The engine schedules a step before it knows that the last one has ended the answer.
    trace = recorder.trace().before(len(done.prompt_ids) + done.output_tokens)
    if not len(trace.lengths):
        raise InspectError(
            f"nothing was selected: policy {inquiry.policy!r} must rank while it decodes, the "
            f"prompt of {len(done.prompt_ids)} tokens must be longer than --budget "
            f"{inquiry.budget}, and the answer, of {done.output_tokens} tokens, than one (mode: "
            f"{done.summary['mode']}): lower --budget, or give a longer text"
        )
    vocabulary = Vocabulary.from_tokenizer(engine.tokenizer)
    ids = np.array(done.prompt_ids, np.int32)
    lengths = SentenceLengths(config.min_sentence_tokens, config.max_sentence_tokens)
    ends = PunctuationSegmenter(lengths, vocabulary).split(ids)
    output = np.array(done.output_ids, np.int32)
    answer = Answer(
        model=Path(inquiry.model).name if Path(inquiry.model).is_dir() else inquiry.model,
        policy=inquiry.policy,
        budget=inquiry.budget,
        question=inquiry.question,
        sentences=pieces(vocabulary, ids, ends.tolist()),
        ends=ends,
        tokens=pieces(vocabulary, output, range(1, len(output) + 1)),
    )
    return answer, trace
