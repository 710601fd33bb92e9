# SPDX-License-Identifier: Apache-2.0
"""`sentencekv inspect` on the embedded model: the answer's tokens look at the needle."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from sentencekv_vllm import cli  # noqa: E402
from sentencekv_vllm.demo import MODEL, token_counter  # noqa: E402
from sentencekv_vllm.evaluation.engine import VllmEngine  # noqa: E402
from sentencekv_vllm.evaluation.recall_tasks import make_prompt  # noqa: E402
from sentencekv_vllm.inspection import inquiry  # noqa: E402

pytestmark = pytest.mark.vllm

PROMPT, BUDGET = 3000, 256  # tokens


def test_the_needle_is_among_the_sentences_selected_most(tmp_path, capsys, monkeypatch):
    """Its hits and misses are those that the response tells, too."""
    answered, summaries = [], []
    ask, complete = inquiry.ask, VllmEngine.complete

    def asked(question):
        answered.append(ask(question))
        return answered[-1]

    def completed(self, requests):
        done = complete(self, requests)
        summaries.extend(completion.summary for completion in done)
        return done

    monkeypatch.setattr(inquiry, "ask", asked)
    monkeypatch.setattr(VllmEngine, "complete", completed)
    item = make_prompt("niah_single", PROMPT, 1, token_counter(), depth=0.4)
    page = tmp_path / "page.html"
    status = cli.main(
        ["inspect", str(MODEL), "--text", item.prompt, "--budget", str(BUDGET)]
        + ["--max-tokens", "24", "--kv-cache-gib", "0.1", "--host-pool-gib", "0.1"]
        + ["--out", str(page)]
    )
    told = capsys.readouterr().out
    assert status == 0 and item.target.strip() in told

    ((answer, trace),) = answered
    (summary,) = summaries
    assert "".join(answer.sentences).strip().startswith(item.prompt[:200].strip())
    assert len(trace.lengths) == len(answer.tokens) - 1 == summary["sparse_steps"] > 5
    counted = trace.before(int(trace.lengths[-1]))  # the last step ends before it is counted
    assert (counted.num_hits, counted.num_misses) == (summary["hits"], summary["misses"])
    assert float(counted.estimate.mean()) == pytest.approx(summary["coverage"], abs=1e-3)

    # While the value is generated, which stands in the needle alone.
    first = item.target.index(item.answers[0]) - 1
    places = [len("".join(answer.tokens[:t])) for t in trace.lengths - answer.prompt_tokens]
    value = [t for t, place in enumerate(places) if 0 <= place - first < len(item.answers[0])]
    (needle,) = (i for i, text in enumerate(answer.sentences) if item.needles[0] in text)
    shares, before = (
        replace(trace, selected=trace.selected[steps]).sentence_shares(answer.ends)
        for steps in (value, range(value[0]))
    )
    assert len(value) > 2 and len(shares) > 200
    assert (shares > shares[needle]).sum() < 5 and shares[needle] > 5 * shares.mean()
    assert shares[needle] > 2 * before[needle]
    assert item.needles[0] in page.read_text(encoding="utf-8")
