"""Random inputs for the kernels: shapes, dtypes, layouts, windows and masks."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# relative, of values stored in the dtype
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def tensor(seed: int, *shape: int, dtype: torch.dtype = torch.float32, layout: int = 0) -> Tensor:
    """Normal values; layout 1 is a slice of a wider tensor, layout 2 has its last two axes swapped in memory,
    3 the two before the last one, as heads and rows of attention are.
    """
    g = torch.Generator().manual_seed(seed)
    if layout == 1:
        wide = torch.randn(*shape[:-2], shape[-2] + 3, shape[-1] + 5, generator=g).to(dtype)
        return wide[..., 2 : 2 + shape[-2], 3 : 3 + shape[-1]]
    if layout == 2:
        return torch.randn(*shape[:-2], shape[-1], shape[-2], generator=g).to(dtype).mT
    if layout == 3:
        return (
            torch.randn(*shape[:-3], shape[-2], shape[-3], shape[-1], generator=g).to(dtype).transpose(-3, -2)
        )
    return torch.randn(*shape, generator=g).to(dtype)


def indices(seed: int, batch: int, n: int, m: int, low: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(low, max(n, low + 1), (batch, m), generator=g)


seeds = st.integers(0, 2**20)
dtypes = st.sampled_from(DTYPES)
layouts = st.sampled_from([0, 1, 2, 3])


@st.composite
def merges(draw, most: int = 40):
    """(x, index, into, weight): into and weight may be None, and there may be no row or no column at all."""
    seed, batch, n = draw(seeds), draw(st.integers(1, 3)), draw(st.integers(0, most))
    m = draw(st.integers(0, most)) if n else 0
    x = tensor(seed, batch, n, draw(st.integers(1, 70)), dtype=draw(dtypes), layout=draw(layouts))
    into = indices(seed + 1, batch, m, n, low=-1) if draw(st.booleans()) else None
    weight = tensor(seed + 2, batch, n) if into is not None and draw(st.booleans()) else None
    return x, indices(seed + 3, batch, n, m), into, weight


@st.composite
def heads(draw, most: int = 90, rows: int | None = None):
    """(q, k) with grouped heads; rows=None gives as many queries as keys."""
    seed, batch, kv_heads = draw(seeds), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    group, n, d = draw(st.integers(1, 3)), draw(st.integers(1, most)), draw(st.sampled_from([4, 16, 20, 33]))
    r = n if rows is None else draw(st.integers(1, rows))
    dtype, layout = draw(dtypes), draw(layouts)
    q = tensor(seed, batch, group * kv_heads, r, d, dtype=dtype, layout=layout)
    return 2 * q, tensor(seed + 1, batch, kv_heads, n, d, dtype=dtype, layout=layout)


@st.composite
def masks(draw, batch: int, rows: int, n: int):
    kind = draw(st.sampled_from(["none", "keys", "rows", "shared"]))
    if kind == "none":
        return None
    shape = {"keys": (batch, n), "rows": (batch, rows, n), "shared": (1, n)}[kind]
    return torch.rand(shape, generator=torch.Generator().manual_seed(draw(seeds))) > draw(
        st.sampled_from([0.3, 1.0])
    )


@st.composite
def bounds(draw, n: int):
    cuts = draw(st.lists(st.integers(0, n), max_size=4))
    return [0, *sorted(cuts), n]


@st.composite
def packed_groups(draw):
    """Arguments of `unpack_rows`, with the codes that are to be packed in place of the bytes."""
    seed, levels = draw(seeds), draw(st.sampled_from([2, 3, 4, 16]))
    batch, heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    tokens, channels = draw(st.sampled_from([1, 4, 6])), draw(st.sampled_from([1, 5, 8, 12]))
    blocks = draw(st.sampled_from([(1, channels), (tokens, 1), (1, 1)]))
    generator = torch.Generator().manual_seed(seed)
    shape = batch, heads, groups, tokens * channels
    codes = torch.randint(levels, shape, generator=generator, dtype=torch.uint8)
    step = tensor(seed, batch, heads, groups, *blocks, dtype=draw(dtypes))
    zero = tensor(seed + 1, *step.shape, dtype=step.dtype) if draw(st.booleans()) else None
    index = (
        indices(seed, batch, groups * tokens, draw(st.integers(1, 9))).int() if draw(st.booleans()) else None
    )
    return codes, step, zero, levels, draw(st.sampled_from([0.0, 0.5, 1.0])), tokens, channels, index
