"""Models under DistributedDataParallel and FSDP, in one process and in two."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import vtoken
from tests.models import FAMILIES
from tests.oracle import clone

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch without torch.distributed")


def parallel(model, mesh) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def sharded(model, mesh) -> nn.Module:
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def flattened(model, mesh) -> nn.Module:
    policy = ModuleWrapPolicy({type(model.get_decoder().layers[0])})
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(model, device_id=cpu, auto_wrap_policy=policy, use_orig_params=True)


WRAPS = {"DDP": parallel, "fully_shard": sharded, "FSDP": flattened}
CASES = [
    (wrap, strategy, late) for wrap in WRAPS for strategy in ("hired", "fastv") for late in (False, True)
]


@functools.cache
def wanted(strategy: str) -> torch.Tensor:
    model = vtoken.patch(FAMILIES["llava"].build(), strategy, budget=0.4)
    return model(**FAMILIES["llava"].batch("ragged")).logits.detach()


def answer(wrap: str, strategy: str, late: bool, ranks: int) -> str:
    """'equal' if the wrapped model gives the logits of the model alone, or the sentence that refused it."""
    inputs, model = FAMILIES["llava"].batch("ragged"), FAMILIES["llava"].build()
    mesh = init_device_mesh("cpu", (ranks,))
    if not late:
        vtoken.patch(model, strategy, budget=0.4)
    outer = WRAPS[wrap](model, mesh)
    if late:
        assert vtoken.patch(outer, strategy, budget=0.4) is outer
    try:
        got = outer(**clone(inputs)).logits.detach()
    except NotImplementedError as refusal:
        return str(refusal)
    assert vtoken.report(outer).tokens_in == 48
    assert str(vtoken.report(outer)) == str(vtoken.report(model))
    vtoken.unpatch(outer)
    dense = outer(**clone(inputs)).logits.detach()
    same = torch.equal(got, wanted(strategy)) and not torch.allclose(got, dense, atol=1e-2)
    return "equal" if same else "other logits"


def work(rank: int, store: str, answers: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    said = [answer(*case, 2) for case in CASES]
    if rank == 0:
        torch.save(said, answers)
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    store = tmp_path_factory.mktemp("group") / "store"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize(("wrap", "strategy", "late"), CASES)
def test_one_process(group, wrap, strategy, late):
    said = answer(wrap, strategy, late, 1)
    if (wrap, strategy) == ("fully_shard", "fastv"):
        assert "in pieces here (FSDP, tensor parallel): use a projector strategy" in said
    else:
        assert said == "equal"


@pytest.mark.parametrize("wrap", WRAPS)
def test_the_question_is_read_where_weights_are_whole(group, wrap):
    said = answer(wrap, "farcover", False, 1)
    if wrap == "fully_shard":
        assert "in pieces here (FSDP, tensor parallel): use one that does not, such as farcover with" in said
    else:
        assert said == "equal"


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Every process holds a half of the weights: what reads them outside of their layer is refused."""
    torch.multiprocessing.spawn(work, (str(tmp_path / "store"), str(tmp_path / "said")), nprocs=2)
    for (wrap, strategy, _), said in zip(CASES, torch.load(tmp_path / "said"), strict=True):
        if strategy == "fastv" and wrap != "DDP":
            assert "in pieces here (FSDP, tensor parallel): use a projector strategy" in said
        else:
            assert said == "equal", (wrap, strategy)


def test_data_parallel():
    with pytest.raises(TypeError, match=r"use DistributedDataParallel, or one GPU\."):
        vtoken.patch(nn.DataParallel(FAMILIES["llava"].build()), "random")
