"""Packed codes of the torch backend against digits and scales written out in loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtoken import kernels
from vtoken.kernels.packing import width_of

from . import oracle
from .cases import DTYPES, TOLERANCE, packed_groups, seeds

common = settings(max_examples=20, deadline=None, derandomize=True)


@common
@given(seeds, st.sampled_from([2, 3, 4, 16]), st.integers(0, 41))
def test_bytes_are_numbers_of_that_base(seed, levels, n):
    codes = torch.randint(levels, (3, n), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = kernels.pack_codes(codes, levels)
    assert packed.dtype == torch.uint8 and packed.tolist() == oracle.pack(codes, levels)


def test_bits_of_a_code():
    assert [width_of(80, levels) * 8 / 80 for levels in (2, 3, 4, 16)] == [1, 1.6, 2, 4]


@common
@given(packed_groups())
def test_rows_are_read_with_their_scales(case):
    codes, step, zero, levels, centre, tokens, channels, index = case
    packed = kernels.pack_codes(codes, levels)
    got = kernels.unpack_rows(packed, step, zero, levels, centre, tokens, channels, index)
    want = oracle.unpack(codes, step, zero, centre, tokens, channels, index)
    assert got.dtype == step.dtype and got.shape == want.shape
    scale = TOLERANCE[step.dtype] * max(1.0, float(want.abs().max()) if want.numel() else 1.0)
    assert torch.allclose(got.double(), want, rtol=0, atol=scale)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_no_group_and_no_row(dtype):
    packed, step = torch.zeros(2, 3, 0, 4, dtype=torch.uint8), torch.zeros(2, 3, 0, 1, 2, dtype=dtype)
    assert kernels.unpack_rows(packed, step, None, 4, 0.0, 8, 2).shape == (2, 3, 0, 2)
    packed, step = torch.zeros(2, 3, 1, 4, dtype=torch.uint8), torch.zeros(2, 3, 1, 1, 2, dtype=dtype)
    nothing = torch.zeros(2, 0, dtype=torch.int32)
    assert kernels.unpack_rows(packed, step, None, 4, 0.0, 8, 2, nothing).shape == (2, 3, 0, 2)


def test_what_does_not_fit_is_refused():
    codes = torch.zeros(1, 1, 2, 16, dtype=torch.uint8)
    packed, step = kernels.pack_codes(codes, 4), torch.ones(1, 1, 2, 1, 4)

    def read(packed=packed, step=step, zero=None, levels=4, index=None):
        return kernels.unpack_rows(packed, step, zero, levels, 0.0, 4, 4, index)

    cases = [
        (ValueError, "2, 3, 4 or 16 levels; found 5", lambda: kernels.pack_codes(codes, 5)),
        (ValueError, "below 3; found 3", lambda: kernels.pack_codes(codes + 3, 3)),
        (ValueError, "uint8 codes", lambda: kernels.pack_codes(codes.long(), 4)),
        (ValueError, "4 x 4 codes; found", lambda: read(packed=packed[..., :3])),
        (ValueError, "4 x 4 codes; found", lambda: read(step=torch.ones(1, 1, 2, 1, 3))),
        (ValueError, "zero of the shape of step", lambda: read(zero=step[..., :2])),
        (ValueError, r"index \(1, m\)", lambda: read(index=torch.zeros(2, 3).int())),
        (IndexError, "0 to 7", lambda: read(index=torch.tensor([[8]]))),
        (ValueError, "levels; found 7", lambda: read(levels=7)),
    ]
    for error, words, call in cases:
        with pytest.raises(error, match=words):
            call()
