# SPDX-License-Identifier: Apache-2.0
"""Which cheaper indexes would find the sentences that attention looks up: a simulation.

    python -P benchmarks/index_study.py
    python -P benchmarks/index_study.py --model benchmarks/models/long-recall --long-sentences

Not the served path: Hugging Face's model runs recall questions densely with the right answer, and
its queries and keys are kept. A *lookup* is a layer, KV head and answer token for which more than
`--share` of attention (mean over the group) lands on one token of the history. Reported is the
share of lookups whose sentence is among the best K by an index that ranks with the current query
and the softmax mean over the group. PCA rotations are those of other prompts.

A second table has budgets that follow the data: the share of the attention to the history that K
sentences a KV head hold at most, and as many sentences shared out among the heads of a layer, or
among all heads, by the attention that they hold. It is what such a budget can gain with a perfect
index.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama import modeling_llama

from sentencekv_vllm.evaluation.recall_tasks import make_prompt
from sentencekv_vllm.ops.quantize_query import quantize_query
from sentencekv_vllm.ops.rotation import rotation
from sentencekv_vllm.ops.score_sentences import STD_FACTOR
from sentencekv_vllm.presets import PACKAGE

TASKS = ("niah_single", "niah_multikey", "niah_multiquery", "variable_tracking")
SINKS, RECENT = 32, 32
BEST = (4, 8)  # sentences
CALIBRATION = 3  # prompts


@dataclass(frozen=True)
class Head:
    """One KV head of a layer at one answer token."""

    key: tuple[int, int]  # layer, KV head
    query: Tensor  # [G, D]
    keys: Tensor  # [T, D], those that it attends to
    sentence: Tensor  # [T] int64: of each token of the history, -1 elsewhere

    def reduce(self, logits: Tensor) -> Tensor:
        """Token logits [G, T] -> score of each sentence: log of the group's mean probability of its
        best token."""
        inside = self.sentence >= 0
        count = int(self.sentence.max()) + 1
        best = torch.full((len(logits), count), -math.inf)
        index = self.sentence[inside].expand(len(logits), -1)
        best = best.scatter_reduce(1, index, logits[:, inside], "amax")
        return self.mean(best, logits[:, ~inside])

    def mean(self, best: Tensor, resident: Tensor) -> Tensor:
        total = torch.cat((best, resident), 1).logsumexp(1, keepdim=True)
        return (best - total).exp().mean(0).log()


Index = Callable[[Head], Tensor]


def sign_bits(head: Head, basis: Tensor, whole_norm: bool) -> Tensor:
    """Estimated logits [G, T] from the signs of the rotated keys; see docs/method.md."""
    levels, step = quantize_query(head.query, basis)
    rotated = head.keys @ basis
    norm = head.keys if whole_norm else rotated  # a random subspace stands for the whole key
    scales = norm.square().sum(1) / rotated.abs().sum(1).clamp(min=1e-9)
    signs = torch.where(rotated >= 0, 1.0, -1.0)
    return (levels.float() @ signs.T) * step[:, None] * scales * head.query.shape[1] ** -0.5


def by_bits(head: Head, channels: int) -> Tensor:
    return head.reduce(sign_bits(head, rotation(head.query.shape[1], channels), True))


def by_principal_bits(head: Head, channels: int, axes: dict[tuple[int, int], Tensor]) -> Tensor:
    basis = axes[head.key][:, :channels] @ rotation(channels)  # signs alike informative
    return head.reduce(sign_bits(head, basis, False))


def by_centroid(head: Head) -> Tensor:
    count = int(head.sentence.max()) + 1
    inside = head.sentence >= 0
    index = head.sentence[inside]
    sums = torch.zeros(count, head.keys.shape[1]).index_add(0, index, head.keys[inside])
    means = sums / torch.bincount(index, minlength=count).clamp(min=1)[:, None]
    scale = head.query.shape[1] ** -0.5
    return head.mean(head.query @ means.T * scale, head.query @ head.keys[~inside].T * scale)


def by_quantised_moments(head: Head, bits: int | None) -> Tensor:
    """`mean-std` (ops/score_sentences.py), with `bits` a channel for mean and deviation each."""
    count = int(head.sentence.max()) + 1
    inside = head.sentence >= 0
    index, keys = head.sentence[inside], head.keys[inside]
    number = torch.bincount(index, minlength=count).clamp(min=1)[:, None]
    zeros = torch.zeros(count, keys.shape[1])
    mean = zeros.index_add(0, index, keys) / number
    square = zeros.index_add(0, index, keys.square()) / number
    std = (square - mean.square()).clamp(min=0).sqrt()
    mean, std = (rounded(x, bits) for x in (mean, std))
    scale = head.query.shape[1] ** -0.5
    spread = (head.query.square() @ std.square().T).sqrt()
    logits = (head.query @ mean.T + STD_FACTOR * spread) * scale
    return head.mean(logits, head.query @ head.keys[~inside].T * scale)


def rounded(rows: Tensor, bits: int | None) -> Tensor:
    if bits is None:
        return rows
    step = rows.abs().amax(1, keepdim=True).clamp(min=1e-9) / (2 ** (bits - 1) - 1)
    return (rows / step).round() * step


def in_two_stages(head: Head, share: float) -> Tensor:
    """1-bit keys of the best `share` of the sentences by their mean keys; the others rank last."""
    coarse = by_centroid(head)
    first = coarse.topk(max(1, math.ceil(share * len(coarse)))).indices
    scores = torch.full_like(coarse, -math.inf)
    return scores.index_copy(0, first, by_bits(head, head.query.shape[1])[first])


def kept_states(model: torch.nn.Module, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Queries [Hq, T, D] and keys [H, T, D] of each layer, after the rotary embedding."""
    kept: list[tuple[Tensor, Tensor]] = []
    rotate = modeling_llama.apply_rotary_pos_emb

    def keep(*args: Tensor, **kwargs: Tensor) -> tuple[Tensor, Tensor]:
        query, key = rotate(*args, **kwargs)
        kept.append((query[0].float(), key[0].float()))
        return query, key

    modeling_llama.apply_rotary_pos_emb = keep
    try:
        with torch.inference_mode():
            model(ids[None])
    finally:
        modeling_llama.apply_rotary_pos_emb = rotate
    return kept


def lookups(
    states: list[tuple[Tensor, Tensor]], sentence: Tensor, answer: range, share: float
) -> Iterator[tuple[Head, int]]:
    """Heads that look something up, and the sentence that holds it."""
    for layer, (queries, keys) in enumerate(states):
        grouped = queries.unflatten(0, (len(keys), -1))
        for h, t in ((h, t) for h in range(len(keys)) for t in answer):
            seen = keys[h, : t + 1]
            logits = grouped[h, :, t] @ seen.T * seen.shape[1] ** -0.5
            weights = logits.softmax(1).mean(0)
            weights[sentence[: t + 1] < 0] = 0
            if float(weights.max()) > share:
                where = int(sentence[int(weights.argmax())])
                yield Head((layer, h), grouped[h, :, t], seen, sentence[: t + 1]), where


def held(states: list[tuple[Tensor, Tensor]], sentence: Tensor, token: int) -> Tensor:
    """[layers, KV heads, sentences]: attention of a token, mean over the group, by sentence."""
    inside = sentence[: token + 1] >= 0
    index = sentence[: token + 1][inside]
    rows = []
    for queries, keys in states:
        seen = keys[:, : token + 1]
        grouped = queries[:, token].unflatten(0, (len(keys), -1))
        weights = (grouped @ seen.mT * seen.shape[2] ** -0.5).softmax(2).mean(1)[:, inside]
        rows.append(torch.zeros(len(keys), int(index.max()) + 1).index_add(1, index, weights))
    return torch.stack(rows)


def captured(attention: Tensor, k: int) -> list[float]:
    """Share of the history's attention: K a head, as many over a layer's heads, over all heads."""
    layers, heads, _ = attention.shape
    best = (
        attention.topk(k, dim=2).values.sum(),
        attention.flatten(1).topk(k * heads, dim=1).values.sum(),
        attention.flatten().topk(k * heads * layers).values.sum(),
    )
    return [float(x / attention.sum()) for x in best]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, default=PACKAGE / "assets" / "tiny-recall")
    add("--long-sentences", action="store_true")
    add("--tokens", type=int, default=2048)
    add("--items", type=int, default=6, help="of each task")
    add("--share", type=float, default=0.3)
    return parser.parse_args()


def main() -> None:
    options = parse()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    ends = {i for i in range(len(tokenizer)) if set(tokenizer.decode([i])) & set(".?!\n")}
    begin = tokenizer.bos_token_id

    def prepared(task: str, seed: int, split: str) -> tuple[Tensor, Tensor, range]:
        item = make_prompt(
            task, options.tokens - 1, seed, lambda s: len(encode(s)),
            long_sentences=options.long_sentences, split=split,
        )  # fmt: skip
        prompt, target = [begin, *encode(item.prompt)], encode(item.target)
        sealed = torch.tensor([token in ends for token in prompt]).cumsum(0)
        sentence = torch.full((len(prompt) + len(target),), -1)
        history = slice(SINKS, len(prompt) - RECENT)
        number = sealed - torch.tensor([token in ends for token in prompt]).long()
        sentence[history] = number[history] - number[SINKS]
        return torch.tensor(prompt + target), sentence, range(len(prompt), len(sentence) - 1)

    squares: dict[tuple[int, int], Tensor] = defaultdict(lambda: torch.zeros(()))
    for seed in range(CALIBRATION):
        ids, _, _ = prepared(TASKS[seed % len(TASKS)], seed, "train")
        for layer, (_, keys) in enumerate(kept_states(model, ids)):
            for h, seen in enumerate(keys):
                squares[layer, h] = squares[layer, h] + seen.T @ seen
    axes = {key: torch.linalg.eigh(s).eigenvectors.flip(1) for key, s in squares.items()}

    dim = model.config.head_dim
    indexes: dict[str, Index] = {f"1-bit, all {dim} channels": partial(by_bits, channels=dim)}
    for channels in (dim // 2, dim // 4):
        indexes[f"1-bit, {channels} random channels"] = partial(by_bits, channels=channels)
        principal = partial(by_principal_bits, channels=channels, axes=axes)
        indexes[f"1-bit, {channels} principal channels"] = principal
    indexes["mean keys"] = by_centroid
    indexes["mean and deviation"] = partial(by_quantised_moments, bits=None)
    indexes["mean and deviation, 4 bits each"] = partial(by_quantised_moments, bits=4)
    for share in (0.1, 0.3, 0.5):
        indexes[f"1-bit of the best {share:.0%} by mean keys"] = partial(in_two_stages, share=share)

    found: dict[str, list[int]] = {name: [0] * len(BEST) for name in indexes}
    shares: dict[int, list[list[float]]] = {k: [] for k in BEST}
    total = sentences = 0
    for task in TASKS:
        for seed in range(100, 100 + options.items):
            ids, sentence, answer = prepared(task, seed, "test")
            states = kept_states(model, ids)
            for token in answer:
                attention = held(states, sentence, token)
                for k, rows in shares.items():
                    rows.append(captured(attention, k))
            for head, where in lookups(states, sentence, answer, options.share):
                total, sentences = total + 1, sentences + int(sentence.max()) + 1
                for name, index in indexes.items():
                    scores = index(head)
                    rank = int((scores > scores[where]).sum())
                    found[name] = [n + (rank < k) for n, k in zip(found[name], BEST, strict=True)]
    print(f"{options.model.name}: {total} lookups, {sentences / total:.0f} sentences each\n")
    print("| index | " + " | ".join(f"among the best {k}" for k in BEST) + " |")
    print("|---" * (1 + len(BEST)) + "|")
    for name, counts in found.items():
        print(f"| {name} | " + " | ".join(f"{n / total:.3f}" for n in counts) + " |")
    print("\n| sentences a head | K each | shared in a layer | shared by all |\n|---|---|---|---|")
    for k, rows in shares.items():
        means = torch.tensor(rows).mean(0).tolist()
        print(f"| {k} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")


if __name__ == "__main__":
    main()
