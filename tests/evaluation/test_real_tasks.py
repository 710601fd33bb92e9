# SPDX-License-Identifier: Apache-2.0
"""Questions about real text: made to measure, answerable from the prompt, equal for equal seeds."""

from __future__ import annotations

import random
import re
from collections import Counter
from functools import partial

import pytest

from sentencekv_vllm.evaluation.real import prose as prose_module
from sentencekv_vllm.evaluation.real.chat import Chat
from sentencekv_vllm.evaluation.real.files import RealTextError
from sentencekv_vllm.evaluation.real.functions import functions
from sentencekv_vllm.evaluation.real.maker import Maker
from sentencekv_vllm.evaluation.real.prose import prose, split_paragraphs
from sentencekv_vllm.evaluation.real.quotes import repeat_code
from sentencekv_vllm.evaluation.real.tasks import QUESTIONS, TEXTS, Sources, real_problems

TOKENS = 1500


class Tokenizer:
    """A template like ChatML's, and a begin-of-text token that the template repeats."""

    bos_token, bos_token_id = "<s>", 1

    def __init__(self, template: bool = True, adds_bos: bool = True) -> None:
        self.chat_template = "there is one" if template else None
        self._adds_bos = adds_bos

    def __call__(self, text: str):
        ids = [self.bos_token_id] * self._adds_bos + [2] * len(text.split())
        return type("Encoding", (), {"input_ids": ids})

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize
        turns = [f"<{m['role']}>{m['content']}<end>\n" for m in messages]
        return self.bos_token + "".join(turns) + "<assistant>" * add_generation_prompt


def count(text: str) -> int:
    """Words and marks, as a tokenizer that does not merge across spaces has it."""
    return len(re.findall(r"\w+|[^\w\s]", text))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A book of sentences with words of their own, and a module of functions."""
    folder = tmp_path_factory.mktemp("sources")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randrange(4, 9))) for _ in range(600)]

    def sentence() -> str:
        return " ".join(rng.choices(words, k=12)).capitalize() + "."

    paragraphs = [" ".join(sentence() for _ in range(rng.randrange(3, 7))) for _ in range(300)]
    (folder / "book.txt").write_text("\n\n".join(paragraphs))
    sources = [
        f"def work_{i}(given, other):\n"
        + "".join(f"    {rng.choice(words)}_{i} = given + {n} * other\n" for n in range(8))
        + "    return given"
        for i in range(120)
    ]
    (folder / "module.py").write_text("import os\n\n\n" + "\n\n\n".join(sources) + "\n")
    return str(folder)


@pytest.fixture(scope="module")
def make(folders):
    def made(task: str, seed: int = 0, tokens: int = TOKENS, template: bool = True):
        maker = Maker(
            Chat(Tokenizer(template)),
            tokens,
            count,
            partial(prose, folders),
            partial(functions, folders),
        )
        return QUESTIONS[task](random.Random(f"{task}/{seed}"), maker)

    return made


@pytest.mark.parametrize("task", QUESTIONS)
@pytest.mark.parametrize("template", (True, False))
def test_a_question_fills_its_length_and_its_prompt_holds_the_answer(make, task, template):
    item = make(task, template=template)
    assert 0.8 * TOKENS < 1 + count(item.prompt) <= TOKENS
    assert item.references and all(wanted in item.prompt for wanted in item.references)
    assert item.metric(" ".join(item.references), item.references) == 1
    assert item.metric("I do not know.", item.references) == 0


@pytest.mark.parametrize("task", QUESTIONS)
def test_equal_seeds_ask_equal_questions(make, task):
    first, again, other = make(task), make(task), make(task, seed=1)
    assert (first.prompt, first.references) == (again.prompt, again.references)
    assert first.prompt != other.prompt


@pytest.mark.parametrize("task", ("real/niah_single", "real/niah_multikey"))
def test_a_needle_stands_once_and_at_its_depth(make, task):
    depths = []
    for seed in range(12):
        item = make(task, seed)
        (number,) = item.references
        assert item.prompt.count(number) == 1
        assert item.prompt.count("One of the special magic numbers for") in (1, 8)
        depths.append(item.depth)
    assert min(depths) < 0.35 and max(depths) > 0.65


def test_keys_of_needles_differ_and_the_asked_ones_are_planted(make):
    item = make("real/niah_multiquery")
    found = re.findall(r"magic numbers for (\S+) is: (\d+)\.", item.prompt)
    assert len({key for key, _ in found}) == 8
    asked = item.prompt.partition("What are all the special magic numbers for ")[2]
    answers = dict(found)
    keys = [key for key in answers if key in asked]
    assert sorted(answers[key] for key in keys) == sorted(item.references)


def test_variables_are_those_of_the_asked_chain_in_the_order_of_its_hops(make):
    item = make("real/variable_tracking")
    given = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", item.prompt))
    value = re.search(r"assigned the value (\d+)", item.prompt)[1]

    def root(name: str) -> str:
        return root(given[name]) if given[name] in given else given[name]

    assert {name for name in given if root(name) == value} == set(item.references)
    assert len(given) == 2 * len(item.references)


@pytest.mark.parametrize("task", ("real/common_words", "real/frequent_words"))
def test_wanted_words_are_more_frequent_than_all_others(make, task):
    item = make(task)
    document = item.prompt.partition("\nQuestion:")[0]
    words = Counter(re.findall(r"\b[a-z]{4,9}\b", document.split(". ", 2)[-1]))
    wanted = {word: words.pop(word) for word in item.references}
    assert min(wanted.values()) > max(words.values())


def test_a_function_is_quoted_from_its_file(make, folders):
    item = make("real/repeat_code")
    with open(f"{folders}/module.py", encoding="utf-8") as file:
        text = file.read()
    first = item.prompt.rpartition("```python\n")[2]
    assert first.startswith("def work_") and first.endswith(":\n")
    assert first + item.target in text
    assert item.metric(item.target, item.references) == 1
    assert count(item.target) <= item.max_tokens


def test_two_turns_are_two_requests_and_a_session_is_one(make):
    turns = make("real/multi_turn")
    assert turns.next_head.startswith("<end>\n<user>Quote the paragraph")
    assert (turns.forced, turns.target) == ("", "")
    session = make("real/multi_turn_session")
    assert session.next_head == ""
    assert session.forced.count("<end>\n<user>Quote the paragraph") == 2
    first_answer = session.forced.partition("<end>")[0]
    start = session.prompt.rpartition("<assistant>")[2]
    assert f"{start}{first_answer}" in session.prompt
    last = session.forced.rpartition("<assistant>")[2]
    assert f"{last}{session.target}" in session.prompt


def test_a_conversation_is_what_the_template_makes_of_it():
    tokenizer = Tokenizer()
    chat = Chat(tokenizer)
    turns = [("user", "One?"), ("assistant", "1."), ("user", "Two?")]
    whole = tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in turns], False, True
    )
    assert "<s>" + chat.open("One?") + "1." + chat.go_on("Two?") == whole


def test_a_template_keeps_the_begin_of_text_token_that_nobody_else_writes():
    assert Chat(Tokenizer(adds_bos=True)).open("x") == "<user>x<end>\n<assistant>"
    assert Chat(Tokenizer(adds_bos=False)).open("x") == "<s><user>x<end>\n<assistant>"


def test_prose_is_without_markup_code_and_repetition(tmp_path):
    said = "The :class:`~a.Thing` of ``x`` has *many* [uses](url) that fill eighty characters here."
    wanted = "The a.Thing of x has many uses that fill eighty characters here."
    (tmp_path / "a.rst").write_text(
        "A long heading over the paragraphs which has as many characters as a paragraph\n"
        + "=" * 78
        + f"\n\n{said}  Twice\nover lines.\n\n    code = of(a, block) # {'x' * 80}\n\n"
        f"{said}  Twice\nover lines.\n\n* {'an item of a list ' * 6}\n\n"
        f"Look at this example of a block of code that follows {'and ' * 10}on::\n\n"
    )
    (tmp_path / "b.md").write_text(f"```\n{'fenced words ' * 10}\n```\n\nToo short.\n")
    assert prose(str(tmp_path)) == ((wanted, "Twice over lines."),)
    assert list(split_paragraphs("x" * 79)) == []


def test_without_manuals_docstrings_are_prose_enough(monkeypatch, tmp_path):
    monkeypatch.setattr(prose_module, "MANUALS", str(tmp_path))
    found = prose.__wrapped__(None)
    assert sum(len(sentence) for paragraph in found for sentence in paragraph) > 300_000


def test_methods_are_no_functions_of_a_file(tmp_path):
    body = "".join(f"    line_{i} = {i} * 1000000\n" for i in range(14))
    inner = "".join(f"    {line}\n" for line in f"def inner():\n{body}".splitlines())
    (tmp_path / "a.py").write_text(f"@wrap\ndef outer():\n{body}\nclass C:\n{inner}")
    (tmp_path / "broken.py").write_text("def nothing(:\n")
    (found,) = functions(str(tmp_path))
    assert found.name == "outer"
    assert found.source == f"def outer():\n{body}".rstrip()


@pytest.mark.parametrize(
    "read,match",
    [
        (lambda empty: prose(f"{empty}/absent"), "absent is no folder: name one that holds .txt"),
        (lambda empty: prose(str(empty)), "holds no paragraph of 80 characters"),
        (lambda empty: functions(str(empty)), "holds no Python function of 250 to 1200"),
    ],
)
def test_a_folder_without_what_is_needed_is_named(tmp_path, read, match):
    with pytest.raises(RealTextError, match=match):
        read(tmp_path)


def test_a_text_that_is_too_short_and_a_prompt_that_is_too_short_are_named(make, tmp_path):
    with pytest.raises(RealTextError, match="tokens too short for a prompt of 100000"):
        make("real/niah_single", tokens=100_000)
    with pytest.raises(RealTextError, match="ask for longer contexts"):
        make("real/niah_single", tokens=60)
    with pytest.raises(RealTextError, match="no function fits"):
        make("real/repeat_code", tokens=90)


def test_long_texts_are_stretches_of_prose_and_of_code(folders):
    sources = Sources("no model is asked", folders, folders)
    cells = real_problems(sources, TEXTS, [900], 2, first_seed=7)
    for problems in cells:
        first, second = (problem.make(count) for problem in problems)
        assert [problem.seed for problem in problems] == [7, 8]
        assert 0.8 * 900 < 1 + count(first.prompt) <= 900
        assert count(first.continuation) >= 256
        assert first.prompt != second.prompt
    assert "given +" in first.continuation


def test_what_is_measured_is_named_by_its_texts(folders, tmp_path):
    here = Sources("a", folders, folders)
    assert here.digest() == Sources("b", folders, folders).digest()
    (tmp_path / "a.txt").write_text("Words of another text that has its eighty characters. " * 3)
    assert here.digest() != Sources("a", str(tmp_path), folders).digest()


def test_repeat_code_asks_for_functions_with_lines_to_look_for(folders):
    maker = Maker(Chat(Tokenizer()), TOKENS, count, lambda: [], partial(functions, folders))
    assert len(repeat_code(random.Random(1), maker).references) == 6
