# SPDX-License-Identifier: Apache-2.0
"""A page has one owner at a time, and all come back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sentencekv_vllm.scheduler.page_pool import PagePool


@given(st.integers(0, 40), st.lists(st.tuples(st.booleans(), st.integers(0, 50)), max_size=60))
def test_pages_have_one_owner_and_all_come_back(num_pages, moves):
    pool, held = PagePool(num_pages), []
    for is_take, number in moves:
        if is_take:
            free = pool.num_free
            taken = pool.take(number)
            assert (taken is None) == (number > free), "all or nothing"
            if taken is None:
                assert pool.num_free == free
            else:
                assert len(taken) == number
                held.append(taken)
        elif held:
            pool.give(held.pop(number % len(held)))
        owned = [page for pages in held for page in pages]
        assert len(set(owned)) == len(owned) == pool.num_used == num_pages - pool.num_free
        assert set(owned) <= set(range(num_pages))
    for pages in held:
        pool.give(pages)
    assert sorted(pool.take(num_pages)) == list(range(num_pages))


def test_giving_a_page_back_twice_is_an_error():
    pool = PagePool(3)
    taken = pool.take(1)
    pool.give(taken)
    with pytest.raises(AssertionError, match="twice"):
        pool.give(taken)
