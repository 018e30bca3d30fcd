"""Layers that share their experts out over ranks: copies, files, and what would mix the experts of two ranks."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from tests.distributed import run_ranks
from vqmoe_ds.moe import LayerConfig, MoEConfig, MoELayer
from vqmoe_ds.runtime.errors import ConfigError

WIDTH = 16


class _Block(nn.Module):
    def __init__(self, ep_size: int = 2, router: str = "topk") -> None:
        super().__init__()
        moe = MoEConfig(router=router, num_experts=4, expert_hidden=16)
        place = {"ep_size": ep_size, "ep_rank": dist.get_rank() % ep_size}
        self.norm = nn.RMSNorm(WIDTH)
        self.moe = MoELayer(LayerConfig(WIDTH, moe, **place), dist.group.WORLD if ep_size == 2 else None)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.moe(self.norm(x_BSD))[0]


def _batch(rank: int) -> Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(rank))


def _sentence(call: Callable[[], Any]) -> str:
    """What a call is refused with; empty where it is not."""
    try:
        call()
    except ConfigError as error:
        return str(error)
    return ""


# ------------------------------------------------------------------- copies


def _copies(rank: int) -> dict[str, Any]:
    model, x_BSD = _Block(router="vq").eval(), _batch(rank)
    wanted = model(x_BSD)
    file = io.BytesIO()
    torch.save(model, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    unbound = _sentence(lambda: loaded(x_BSD))
    loaded.moe.bind(model.moe.ep_group)
    twins = {"deepcopy": copy.deepcopy(model), "average": AveragedModel(model), "file": loaded}
    found: dict[str, Any] = {name: torch.equal(twin(x_BSD), wanted) for name, twin in twins.items()}
    apart = twins["deepcopy"].moe.experts.w1.data_ptr() != model.moe.experts.w1.data_ptr()
    return found | {"unbound": unbound, "apart": apart, "bound": model.moe.ep_group is not None}


# ------------------------------------------------------------------- what wraps a model


def _ignoring(model: nn.Module) -> nn.Module:
    names = [name for name, _ in model.named_parameters() if ".experts." in name]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return DistributedDataParallel(model)


def _sharded(*parts: str) -> Callable[[nn.Module], nn.Module]:
    def wrap(model: nn.Module) -> nn.Module:
        for part in parts:
            fully_shard(model.get_submodule(part))
        return model

    return wrap


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "ddp ignoring experts": _ignoring,
    "fsdp2": _sharded(""),
    "fsdp2 of layers": _sharded("moe", ""),
    "fsdp2 of experts": _sharded("moe.experts", ""),
    "fsdp2 of others": _sharded("norm"),
}


def _wrapped(rank: int, ep_size: int) -> dict[str, str]:
    return {
        name: _sentence(lambda wrap=wrap: wrap(_Block(ep_size))(_batch(rank)).sum().backward())
        for name, wrap in WRAPPERS.items()
    }


# ------------------------------------------------------------------- state dicts


def _states(rank: int) -> dict[str, str]:
    model = _Block()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    files: list[Any] = [None, None]
    dist.all_gather_object(files, file.getvalue())
    mine, other = (torch.load(io.BytesIO(files[place])) for place in (rank, 1 - rank))
    whole = copy.deepcopy(mine)
    for name in [name for name in whole if ".experts." in name]:
        whole[name] = torch.cat([torch.load(io.BytesIO(file))[name] for file in files])
    cut = _Block(1).state_dict()
    for name in [name for name in cut if ".experts." in name]:
        cut[name] = cut[name].chunk(2)[rank]
    cases: dict[str, tuple[nn.Module, Any]] = {
        "mine": (model, mine),
        "other": (model, other),
        "other as a dict": (model, dict(other)),
        "put together": (_Block(1), whole),
        "cut": (model, cut),
    }
    return {name: _sentence(lambda m=m, s=s: m.load_state_dict(s)) for name, (m, s) in cases.items()}


def _all(rank: int, world: int) -> dict[str, Any]:
    # FSDP2 last: PyTorch 2.13 may abort where its gloo group is taken down.
    return {"copies": _copies(rank), "states": _states(rank), "apart": _wrapped(rank, 2), "whole": _wrapped(rank, 1)}


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return run_ranks(2, _all)


def test_copies_share_the_process_group_and_files_do_without(two_ranks: list[dict[str, Any]]) -> None:
    for found in two_ranks:
        unbound = found["copies"].pop("unbound")
        assert "has no process group" in unbound and "call bind(group)" in unbound
        assert found["copies"] == dict.fromkeys(["deepcopy", "average", "file", "apart", "bound"], True)


@pytest.mark.parametrize("name", WRAPPERS)
def test_nothing_mixes_the_experts_of_two_ranks(two_ranks: list[dict[str, Any]], name: str) -> None:
    harmless, wrapper = name.endswith(("ignoring experts", "of others")), "Data" if name == "ddp" else "fully_shard"
    for found in two_ranks:
        sentence = found["apart"][name]
        assert not sentence if harmless else wrapper in sentence and "call vqmoe_ds.moe.sync_gradients" in sentence
        assert not found["whole"][name]


def test_a_rank_loads_its_own_experts(two_ranks: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(two_ranks):
        sentence = found["states"].pop("other")
        other, mine = ("2 to 3", "0 to 1") if rank == 0 else ("0 to 1", "2 to 3")
        assert f"moe.experts: the state has the experts {other}, and this rank holds {mine}" in sentence
        assert f"ep_size=2 and ep_rank={rank}" in sentence
        assert set(found["states"].values()) == {""}, found["states"]
