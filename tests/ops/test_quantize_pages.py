# SPDX-License-Identifier: Apache-2.0
"""Pages of lower precision: how far what comes back may lie from what was stored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sentencekv_vllm import host_format as formats
from sentencekv_vllm.host_format import HostDtype, HostFormat, host_format
from sentencekv_vllm.ops.quantize_pages import dequantize_pages, quantize_pages

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NAMES = ("int8", "int4", "fp8")
HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


def format_of(name: str, dtype: torch.dtype, head_dim: int = 64, block: int = 16) -> HostFormat:
    form = host_format(name, block, head_dim, dtype.itemsize)
    assert form is not None
    return form


def stored_and_restored(content: torch.Tensor, form: HostFormat) -> torch.Tensor:
    pages = quantize_pages(content, form)
    assert pages.shape[-1] == form.head_block_bytes and pages.dtype == torch.uint8
    restored = dequantize_pages(pages, form, content.dtype)
    assert restored.dtype == content.dtype
    return restored.unflatten(-1, content.shape[-2:])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 2**31), scale=st.integers(-12, 9), offset=st.integers(-40, 40))
def test_the_error_of_every_element_has_its_bound(name, dtype, seed, scale, offset):
    form = format_of(name, dtype)
    generator = torch.Generator().manual_seed(seed)
    content = (torch.randn(2, 16, 128, generator=generator) + offset) * 2.0**scale
    content = content.to(dtype)
    restored = stored_and_restored(content, form)
    groups = content.float().flatten(-2).unflatten(-1, (-1, form.group_size))
    back = restored.float().flatten(-2).unflatten(-1, (-1, form.group_size))
    rounding = HALF_ULP[dtype] * groups.abs().amax(-1, keepdim=True) * 1.01
    if dtype is torch.float16:
        rounding = rounding + 2.0**-25  # half of the smallest subnormal
    if name == "fp8":
        # Three bits of mantissa, and multiples of 2^-9 of a step below the normal numbers.
        largest = groups.abs().amax(-1, keepdim=True)
        bound = torch.maximum(groups.abs() * 2.0**-4, largest * 2.0**-17 * 1.001) + rounding
    else:
        # Half a step; a step is at most 2^-7 more than the span needs.
        span = groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)
        bound = span / (2**form.dtype.code_bits - 1) * (1 + 2.0**-7) / 2 * 1.001 + rounding
    assert bool(((back - groups).abs() <= bound).all())


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.14159, 40000.0, 6e-5])
def test_integers_keep_constant_groups_and_the_smallest_element_exactly(name, dtype, value):
    form = format_of(name, dtype)
    content = torch.full((1, 16, 128), value).to(dtype)
    assert torch.equal(stored_and_restored(content, form), content)
    content[0, 3, 7] = value + 1
    restored = stored_and_restored(content, form)
    assert torch.equal(restored[content == content.min()], content[content == content.min()])


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_keeps_what_it_can_represent(dtype):
    form = format_of("fp8", dtype)
    mantissas = 1 + torch.arange(8) / 8
    exact = torch.cat([sign * mantissas * 2.0**e for e in range(-6, 2) for sign in (1, -1)])
    content = exact.repeat(16)[: 16 * 128].view(1, 16, 128).to(dtype)
    assert torch.equal(stored_and_restored(content, form), content)


@pytest.mark.parametrize("name", NAMES)
def test_a_group_ignores_its_neighbours(name):
    form = format_of(name, torch.bfloat16)
    content = torch.randn(1, 16, 128).bfloat16()
    louder = content.clone()
    louder[0, 5, 64:] *= 1000  # V of token 5 is a group of its own
    before, after = (stored_and_restored(x, form) for x in (content, louder))
    differs = (before != after).nonzero()
    assert bool((differs[:, 1] == 5).all()) and bool((differs[:, 2] >= 64).all())


@pytest.mark.parametrize("name", NAMES)
def test_what_was_stored_once_is_stored_alike_again(name):
    """A page that comes back and goes out again does not drift."""
    form = format_of(name, torch.float32)
    once = stored_and_restored(torch.randn(4, 16, 128), form)
    twice = stored_and_restored(once, form)
    torch.testing.assert_close(twice, once, rtol=0, atol=float(once.abs().max()) * 2.0**-4)
    if name == "fp8":
        assert torch.equal(twice, once)


@pytest.mark.parametrize(
    ("name", "head_dim", "per_element"),
    [("int8", 128, 1 + 4 / 64), ("int8", 96, 1 + 4 / 32), ("int4", 128, 0.5 + 4 / 64),
     ("fp8", 64, 1 + 2 / 64)],
)  # fmt: skip
def test_bytes_of_an_element(name, head_dim, per_element):
    form = format_of(name, torch.bfloat16, head_dim, block=32)
    assert form.head_block_bytes == 2 * 32 * head_dim * per_element


def test_auto_is_no_format():
    assert host_format("auto", 16, 8, 2) is None


def test_a_head_dim_without_groups_is_refused():
    with pytest.raises(ValueError, match="head_dim 80 is no multiple of 32.*'auto'"):
        host_format("int4", 16, 80, 2)


def test_fp8_is_refused_where_torch_lacks_it(monkeypatch):
    class Torch:
        __version__ = "1.0"

    monkeypatch.setattr(formats, "torch", Torch)
    with pytest.raises(ValueError, match="torch 1.0 lacks.*'int8'"):
        host_format("fp8", 16, 64, 2)
    assert host_format("int8", 16, 64, 2) is not None


def test_the_numbers_of_the_formats_are_those_of_the_c_code():
    assert {d.name: int(d) for d in HostDtype} == {"INT8": 1, "INT4": 2, "FP8": 3}
