# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser: from a file, by slider, mouse and menus."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install playwright"
)
sys.path.insert(0, str(Path(__file__).parent))

from random_trace import random_trace  # noqa: E402

from sentencekv_vllm.inspection.page import render  # noqa: E402

STEPS, LAYERS, HEADS = 6, 3, 2
COLOURS = (
    "Array.from(document.querySelectorAll('#prompt span'),"
    " span => getComputedStyle(span).backgroundColor)"
)


@pytest.fixture(scope="module")
def browser():
    installed = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    with api.sync_playwright() as playwright:
        try:
            # A container's root has no sandbox; the page is our own.
            found = playwright.chromium.launch(
                executable_path=installed, args=["--no-sandbox"] if installed else []
            )
        except api.Error as error:
            pytest.skip(f"no browser: playwright install chromium ({str(error).splitlines()[0]})")
        yield found
        found.close()


@pytest.fixture
def opened(browser, tmp_path):
    """A function that opens a page; it fails where a script has failed or something was loaded."""
    page, wrong = browser.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text))
    page.on("request", lambda r: r.url.startswith("file:") or wrong.append(r.url))

    def at(answer, trace):
        file = tmp_path / "page.html"
        file.write_text(render(answer, trace), encoding="utf-8")
        page.goto(file.as_uri())
        return page

    yield at
    page.close()
    assert wrong == []


@pytest.fixture
def made():
    return random_trace(prompt=900, steps=STEPS, layers=LAYERS, heads=HEADS, width=3)


def part(trace, **kept):
    """The record of some steps, layers or heads."""
    index = tuple(kept.get(name, slice(None)) for name in ("steps", "layers", "heads"))
    return type(trace)(**{**vars(trace), "selected": trace.selected[index]})


def shares(page) -> dict[int, str]:
    """Of the sentences listed as selected most, by number."""
    found = {}
    for text in page.locator("#most button").all_inner_texts():
        share, _, rest = text.partition(" %")
        found[int(rest.split()[1])] = share
    return found


def expected(answer, trace, listed) -> dict[int, str]:
    found = trace.sentence_shares(answer.ends)
    assert sorted(found)[-len(listed) :] == pytest.approx(sorted(found[i] for i in listed))
    return {i: f"{100 * found[i]:.1f}" for i in listed}


def test_the_slider_changes_colours_facts_and_the_current_token(opened, made):
    page = opened(*made)
    before, facts = page.evaluate(COLOURS), page.inner_text("#facts")
    assert len(before) == len(made[0].sentences) and len(set(before)) > 2
    page.focus("#slider")
    page.keyboard.press("ArrowRight")
    after = page.evaluate(COLOURS)
    assert after != before and page.inner_text("#facts") != facts
    assert page.inner_text("#answer [aria-current]") == " word2"
    assert page.get_attribute("#slider", "aria-valuetext") == f'3 of {STEPS + 1}: " word2"'
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(COLOURS) == before


def test_shares_of_every_view_are_those_of_a_count_in_python(opened, made):
    answer, trace = made
    page = opened(answer, trace)
    page.locator("#answer button").nth(3).click()  # the third step
    listed = shares(page)
    assert listed == expected(answer, part(trace, steps=slice(2, 3)), listed)
    page.check("[value=until]")
    listed = shares(page)
    assert listed == expected(answer, part(trace, steps=slice(0, 3)), listed)
    page.check("[value=all]")
    listed = shares(page)
    assert listed == expected(answer, trace, listed)
    page.select_option("#layer", label="4")
    listed = shares(page)
    assert listed == expected(answer, part(trace, layers=slice(1, 2)), listed)
    page.select_option("#head", label="1")
    one = part(trace, layers=slice(1, 2), heads=slice(1, 2))
    listed = shares(page)
    assert listed == expected(answer, one, listed)
    assert f"{one.num_hits} found on the device, {one.num_misses} copied" in page.inner_text(
        "#facts"
    )


def test_a_sentence_tells_its_layers_and_heads(opened, made):
    answer, trace = made
    page = opened(answer, trace)
    page.check("[value=all]")
    number = max(range(len(answer.ends)), key=trace.sentence_shares(answer.ends).__getitem__)
    page.locator("#prompt span").nth(number).click()
    share = trace.sentence_shares(answer.ends)[number]
    assert page.inner_text("#share") == f"{100 * share:.1f} %"
    first = (answer.ends[number - 1] if number else 0) // 32
    blocks = range(first, (answer.ends[number] - 1) // 32 + 1)
    by_head = np.isin(trace.blocks, blocks).any(-1).mean(0)  # [L, H]
    cells = [c.get_attribute("title") for c in page.locator("#sentence td").all()]
    assert [cell.rpartition(": ")[2] for cell in cells] == [
        f"{100 * p:.1f} % of the steps" for p in by_head.ravel()
    ]
    assert page.locator("#prompt .chosen").count() == 1
    assert page.locator("#sentence .times i").count() == STEPS


def test_what_was_not_recorded_is_said(opened, made):
    page = opened(*made)
    assert page.inner_text("#bounded").startswith("2 later steps were not recorded")
    first = page.locator("#answer button").first
    assert first.is_disabled() and "no sparse step" in first.get_attribute("title")


def test_the_slider_answers_at_once_on_a_prompt_of_32k_tokens(opened):
    page = opened(*random_trace(prompt=32768, steps=64, layers=24, heads=4, width=12))
    assert page.locator("#prompt span").count() > 2000
    page.check("[value=until]")
    took = page.evaluate(
        "() => { const start = performance.now(); for (let t = 10; t < 20; t++) go(t);"
        " document.body.offsetHeight; return (performance.now() - start) / 10; }"
    )
    assert took < 1000, "milliseconds a step, on a busy machine"
