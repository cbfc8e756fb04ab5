"""The kernels as torch ops: tracing, fake tensors, choice of backend, and cost of the import."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from torch.library import opcheck

from vtoken import kernels
from vtoken.kernels import dispatch

from .cases import indices, tensor

X, INDEX, INTO, WEIGHT = tensor(0, 2, 9, 5), indices(1, 2, 9, 4), indices(2, 2, 4, 9, low=-1), tensor(3, 2, 9)
Q, K = tensor(4, 2, 4, 9, 8, layout=2), tensor(5, 2, 2, 9, 8, layout=1)
MASK, CUTS = tensor(6, 2, 9, 1)[..., 0] > 0, torch.tensor([0, 3, 6, 9])
KV = [tensor(7, 2, 2, 9, 6, layout=1), tensor(8, 2, 2, 9, 6, dtype=torch.bfloat16, layout=2)]
CALLS = {
    "gather_merge": [(X, INDEX, None, None), (tensor(0, 2, 9, 5, layout=2), INDEX, INTO, WEIGHT)],
    "gather_rows": [([X, MASK, tensor(0, 2, 9, 5, layout=2)], INDEX)],
    "attention_rows": [(Q[:, :, :3], K, 0.3, None, None), (Q, K, 0.3, MASK, "mean")],
    "received_attention": [(Q, K, 0.3, None, 4), (Q, K, 0.3, CUTS, 256)],
    "bipartite_match": [(X, 3, 1, True), (X, 0, 0, False)],
    "farthest_point": [(X, 4, None), (X, 4, torch.tensor([1, 2]))],
    "greedy_map": [(X, WEIGHT.abs(), 4)],
    "greedy_cover": [(X, WEIGHT.abs(), 4), (X, WEIGHT.abs(), 0)],
    "kv_gather": [(KV, INDEX)],
    "kv_compact_": [([t.clone() for t in KV], torch.tensor([[0, 2, 3, 8], [1, 2, 4, 5]]))],
}


@pytest.mark.parametrize("name, args", [(name, args) for name, calls in CALLS.items() for args in calls])
def test_ops_keep_torchs_contract(name, args):
    opcheck(getattr(torch.ops.vtoken, name).default, args)


def reduce_and_gather(x, keys, values, quality):
    received = kernels.received_attention(keys, values, cu_seqlens=CUTS)
    rows = kernels.attention_rows(keys[:, :, :2], values, mask=MASK, reduce="mean")
    picks = kernels.farthest_point(x, 4).sort(-1).values
    other = kernels.greedy_map(x, quality + received, 4)
    third = kernels.greedy_cover(x, 4, quality)
    merged, size = kernels.merge_weighted(x, kernels.bipartite_match(x, 3, 1))
    kept = kernels.gather_merge(x, picks, INTO, rows)
    planes = kernels.gather_rows([x, received], other)
    cache = kernels.kv_compact([values], [values.clone()], picks, inplace=False)
    moved = kernels.kv_compact([values.clone()], [values.clone()], picks, inplace=True)
    return kept, merged, size, third, *planes, *cache[0], *cache[1], *moved[0], *moved[1]


def test_torch_compile_traces_everything_in_one_graph():
    args = (X, Q, K, WEIGHT.abs())
    torch._dynamo.reset()
    compiled = torch.compile(reduce_and_gather, fullgraph=True, backend="eager")
    for got, want in zip(compiled(*args), reduce_and_gather(*args)):
        assert torch.equal(got, want)
    compiled = torch.compile(reduce_and_gather, fullgraph=True, backend="aot_eager", dynamic=True)
    for got, want in zip(compiled(*args), reduce_and_gather(*args)):
        assert torch.equal(got, want)


def test_torch_compile_keeps_gradients():
    def loss(x, q):
        rows = kernels.attention_rows(q[:, :, :1], q, reduce="mean")
        return kernels.gather_merge(x * rows[..., None], INDEX, INTO, WEIGHT).square().sum()

    torch._dynamo.reset()
    results = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x, q = X.clone().requires_grad_(), Q.clone().requires_grad_()
        call(x, q).backward()
        results.append((x.grad, q.grad))
    assert all(torch.allclose(a, b, atol=1e-5) and a.abs().sum() > 0 for a, b in zip(*results))


def test_backend_is_chosen_per_process_and_per_block():
    assert kernels.get_backend() == "auto"
    seen = []
    with kernels.backend("torch"):
        assert kernels.get_backend() == "torch"
        thread = threading.Thread(target=lambda: seen.append(kernels.get_backend()))
        thread.start()
        thread.join()
        with kernels.backend("auto"):
            assert kernels.get_backend() == "auto"
        assert kernels.get_backend() == "torch"
    assert seen == ["auto"] and kernels.get_backend() == "auto"
    kernels.set_backend("torch")
    try:
        assert kernels.get_backend() == "torch"
    finally:
        kernels.set_backend("auto")
    with pytest.raises(ValueError, match="one of auto, triton, torch"):
        kernels.set_backend("cuda")


def test_autocast_and_inference_mode_change_nothing():
    calls = [
        lambda: kernels.attention_rows(Q[:, :, :2], K),
        lambda: kernels.received_attention(Q, K),
        lambda: kernels.farthest_point(tensor(0, 1, 200, 64), 50),
        lambda: kernels.greedy_map(tensor(0, 1, 60, 64), tensor(1, 1, 60).exp(), 30),
        lambda: kernels.greedy_cover(tensor(0, 1, 60, 64), 30),
        lambda: kernels.bipartite_match(tensor(0, 1, 200, 64), 50).source,
        lambda: kernels.gather_merge(X, INDEX, INTO, WEIGHT),
        lambda: kernels.kv_compact([X[:, None].clone()], [], torch.tensor([[1, 4], [2, 8]]), inplace=True)[0][
            0
        ],
    ]
    for call in calls:
        want = call()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(call(), want)
        with torch.inference_mode():
            assert torch.equal(call(), want)


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if dispatch.triton_available():
        with kernels.backend("triton"), pytest.raises(RuntimeError, match="cpu tensor"):
            kernels.gather_merge(X, INDEX)
        with kernels.backend("triton"):  # float64 and tensors that require grad stay with torch
            assert kernels.gather_merge(X.clone().requires_grad_(), INDEX).requires_grad
            assert kernels.gather_merge(X.double(), INDEX).dtype == torch.float64
    monkeypatch.setattr(dispatch, "triton_available", lambda: False)
    with pytest.raises(RuntimeError, match="not installed"):
        kernels.set_backend("triton")
    assert torch.equal(kernels.gather_merge(X, INDEX), X.gather(1, INDEX[..., None].expand(2, 4, 5)))


def test_importing_and_using_the_torch_backend_leaves_triton_alone():
    code = (
        "import sys, torch; sys.modules['triton'] = None; import vtoken.kernels as k; "
        "k.farthest_point(torch.randn(1, 9, 4), 3); k.set_backend('torch'); "
        "assert not [m for m in sys.modules if m.startswith('vtoken.kernels.triton')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
