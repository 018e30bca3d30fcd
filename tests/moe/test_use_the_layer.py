"""docs/use-the-layer.md is true: its programs run on two ranks, learn, and agree with each other."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.distributed import RankFailure, _free_port, run_ranks
from vqmoe_ds.moe import LayerConfig, MoEConfig, MoELayer, StateSync, clip_gradients, sync_gradients
from vqmoe_ds.moe.deepspeed_layer import DeepSpeedMoELayer
from vqmoe_ds.runtime.errors import ConfigError

PAGE = (Path(__file__).resolve().parents[2] / "docs/use-the-layer.md").read_text("utf-8")
PROGRAMS = dict(re.findall(r'^```python title="(\w+)\.py"\n(.*?)^```', PAGE, re.S | re.M))
WHOLE = {name: PROGRAMS[name].replace("EP = 2", "EP = 1") for name in ("expert_parallel", "deepspeed_zero2")}


def _run(rank: int, world: int, program: str, port: int) -> dict[str, Any]:
    """What a program printed, and what its ranks hold after it: losses ``[rank][step]`` and differences of weights."""
    dist.barrier()  # a rank that closes its connections while the other still connects ends it
    dist.destroy_process_group()
    deepspeed.comm.comm.cdb = None
    os.environ["MASTER_PORT"] = str(port)
    losses: list[float] = []
    names: dict[str, Any] = {"__name__": "__main__", "print": lambda step, loss: losses.append(loss)}
    left, dist.destroy_process_group = dist.destroy_process_group, lambda: None  # what it holds is looked at first
    exec(program, names)
    dist.destroy_process_group = left
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, losses)
    model = names["engine"].module if "engine" in names else names["model"]
    shared = [t for name, t in model.named_parameters() if ".experts." not in name]
    found = {"losses": gathered, "apart": _apart(shared), "sync": names["sync"].in_step()}
    found["buffers apart"] = _apart([b for n, b in model.named_buffers() if not n.endswith("tokens_per_expert")])
    found["steps"] = next(int(b) for name, b in model.named_buffers() if name.endswith("updates"))
    return found


def _apart(tensors: list[Tensor]) -> float:
    """The largest difference between any rank's tensors and rank 0's."""
    whole = [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors]
    mine = torch.cat([t.detach().double().flatten() for t in whole])
    first = mine.clone()
    dist.broadcast(first, 0)
    apart = (mine - first).abs().max()
    dist.all_reduce(apart, dist.ReduceOp.MAX)
    return apart.item()


@pytest.fixture(scope="module")
def two_ranks() -> dict[str, Any]:
    programs = {name: text for name, text in PROGRAMS.items() if name != "plain"}
    programs |= {f"{name} whole": text for name, text in WHOLE.items()}
    # A launch each: DeepSpeed remembers its groups, and PyTorch 2.13 may abort where FSDP2's gloo group is taken down.
    return {name: run_ranks(2, _run, text, _free_port())[0] for name, text in programs.items()}


def test_every_program_is_under_thirty_lines() -> None:
    assert list(PROGRAMS) == ["plain", "ddp", "fsdp2", "expert_parallel", "deepspeed_zero2"]
    for name, text in PROGRAMS.items():
        assert len([line for line in text.splitlines() if line.strip()]) < 30, name


def test_the_plain_program_learns() -> None:
    losses: list[float] = []
    names: dict[str, Any] = {"__name__": "__main__", "print": lambda step, loss: losses.append(loss)}
    with torch.random.fork_rng():
        exec(PROGRAMS["plain"], names)
    assert len(losses) == 20 and losses[-1] < 0.6 * losses[0]
    book = names["model"].moe.router.own_codebook
    assert book.initialized and int(book.updates) == 20


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "expert_parallel", "deepspeed_zero2"])
def test_programs_learn_and_ranks_stay_together(two_ranks: dict[str, Any], name: str) -> None:
    found = two_ranks[name]
    for losses in found["losses"]:
        assert len(losses) == 20 and losses[-1] < 0.6 * losses[0]
    assert found["losses"][0] != found["losses"][1], "both ranks saw the same tokens, so this says nothing"
    assert found["apart"] == found["buffers apart"] == 0 and found["sync"] and found["steps"] == 20


def test_losses_depend_neither_on_the_layout_nor_on_the_library(two_ranks: dict[str, Any]) -> None:
    def losses(name: str) -> Tensor:
        return torch.tensor(two_ranks[name]["losses"], dtype=torch.float64)

    assert (losses("ddp") - losses("fsdp2")).abs().max() < 1e-5
    for name in WHOLE:
        assert (losses(name) - losses(f"{name} whole")).abs().max() < 1e-5
    assert (losses("expert_parallel") - losses("deepspeed_zero2")).abs().max() < 1e-5  # they clip alike


# ------------------------------------------------------------------- gradients


def _gradients(rank: int, world: int, ep_size: int) -> dict[str, Tensor]:
    """Averaged gradients of all weights, those of all experts put together, and the norm by which they are clipped."""
    mesh = dist.init_device_mesh("cpu", (world // ep_size, ep_size), mesh_dim_names=("replicas", "experts"))
    moe = MoEConfig(router="topk", num_experts=8, expert_hidden=8, top_k=2)
    config = LayerConfig(12, moe, ep_size=ep_size, ep_rank=mesh.get_local_rank("experts"))
    model = nn.ModuleList([MoELayer(config, mesh.get_group("experts")), nn.Linear(12, 12), nn.Linear(3, 3)])
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(12))
        model[1].bias.zero_()
    x_BSD = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(rank))
    y_BSD, aux_loss, _ = model[0](model[1](x_BSD))
    (y_BSD.square().mean() + aux_loss).backward()
    sync_gradients(model, replicas=mesh.get_group("replicas"))
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    found["norm"] = clip_gradients(model, 0.01)
    for name in [name for name in found if ".experts." in name]:
        parts = [torch.empty_like(found[name]) for _ in range(ep_size)]
        dist.all_gather(parts, found[name], group=mesh.get_group("experts"))
        found[name] = torch.cat(parts)
    return found


def _all_gradients(rank: int, world: int) -> list[dict[str, Tensor]]:
    return [_gradients(rank, world, ep_size) for ep_size in (1, 2, 4)]


def test_gradients_are_those_of_the_mean_loss_whatever_the_layout() -> None:
    model = MoELayer(LayerConfig(12, MoEConfig(router="topk", num_experts=8, expert_hidden=8, top_k=2)))
    for rank in range(4):
        y_BSD, aux_loss, _ = model(torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(rank)))
        ((y_BSD.square().mean() + aux_loss) / 4).backward()
    wanted = {f"0.{name}": p.grad for name, p in model.named_parameters()}
    for layouts in run_ranks(4, _all_gradients):
        for found in layouts:
            for name, gradient in wanted.items():
                assert torch.allclose(found[name], gradient, atol=1e-7, rtol=1e-4), name
            assert not found["2.weight"].any()  # no rank used it
            whole = torch.cat([g.flatten() for name, g in found.items() if name != "norm"]).norm()
            assert torch.allclose(found["norm"], whole, rtol=1e-5)


def _norms_of_mixed_layers(rank: int, world: int) -> tuple[float, float]:
    moe = MoEConfig(router="topk", num_experts=4, expert_hidden=8)
    layers = [MoELayer(LayerConfig(12, moe)), MoELayer(LayerConfig(12, moe, ep_size=2, ep_rank=rank), dist.group.WORLD)]
    model, wanted = nn.ModuleList(layers), 0
    for name, parameter in model.named_parameters():
        parameter.grad = torch.ones_like(parameter)
        wanted += parameter.numel() * (2 if name.startswith("1.experts.") else 1)
    return clip_gradients(model, 1.0).item(), wanted**0.5


def test_layers_of_other_layouts_count_once_in_the_norm() -> None:
    for norm, wanted in run_ranks(2, _norms_of_mixed_layers):
        assert norm == pytest.approx(wanted)


CLIP = 0.05
MOE = MoEConfig(router="topk", num_experts=4, expert_hidden=8, top_k=2)


def _batch(step: int, rank: int) -> Tensor:
    return torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(10 * step + rank))


def _engine_of_own(rank: int, world: int, more: dict[str, Any]) -> tuple[dict[str, Tensor], float]:
    """Weights and the last norm of a loop of one's own on an engine at stage 0, two ranks sharing the experts."""
    torch.manual_seed(0)
    layer = DeepSpeedMoELayer(LayerConfig(12, MOE, ep_size=2, ep_rank=rank))
    optimizer = {"type": "SGD", "params": {"lr": 1.0}}
    json = {"train_batch_size": 4, "optimizer": optimizer, "gradient_clipping": CLIP, **more}
    engine = deepspeed.initialize(model=layer, config=json)[0]
    for step in range(4):
        y_BSD, aux_loss, _ = engine(_batch(step, rank).to(next(layer.parameters()).dtype))
        engine.backward(y_BSD.float().square().mean() + aux_loss)
        engine.step()
    return {name: p.detach().float() for name, p in layer.named_parameters()}, float(engine.get_global_grad_norm())


@pytest.mark.parametrize(("more", "apart"), [({}, 1e-6), ({"bf16": {"enabled": True}}, 4e-3)])
def test_an_engine_at_stage_0_clips_by_the_norm_of_one_process(more: dict[str, Any], apart: float) -> None:
    torch.manual_seed(0)
    layer = MoELayer(LayerConfig(12, MOE))
    if more:
        layer.bfloat16().float()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    for step in range(4):
        for rank in range(2):
            y_BSD, aux_loss, _ = layer(_batch(step, rank))
            ((y_BSD.square().mean() + aux_loss) / 2).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(layer.parameters(), CLIP))
        assert norm > CLIP
        optimizer.step()
        optimizer.zero_grad()
    for rank, (weights, got) in enumerate(run_ranks(2, _engine_of_own, more)):
        assert got == pytest.approx(norm, rel=max(1e-5, 10 * apart if more else 0))
        for name, weight in layer.named_parameters():
            wanted = weight.chunk(2)[rank] if name.startswith("experts.") else weight
            assert (weights[name] - wanted).abs().max() < apart, name


def _forgotten_replicas(rank: int, world: int) -> None:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "experts"))
    config = LayerConfig(12, MoEConfig(num_experts=4), ep_size=2, ep_rank=mesh.get_local_rank("experts"))
    sync_gradients(MoELayer(config, mesh.get_group("experts")))


def _sharded_by_fsdp2(rank: int, world: int) -> None:
    model = nn.Sequential(nn.Linear(12, 12))
    fully_shard(model)
    model(torch.randn(2, 12)).sum().backward()
    with pytest.raises(ConfigError, match=r"^sync_gradients: FSDP2 .* averages gradients by itself; leave the call"):
        sync_gradients(model)


def test_gradients_that_fsdp2_averages_are_refused() -> None:
    run_ranks(2, _sharded_by_fsdp2)


def test_forgotten_replicas_are_refused() -> None:
    with pytest.raises(RankFailure, match=r"ep_size=2 times 1 replica\(s\) of the experts is not the 4 ranks"):
        run_ranks(4, _forgotten_replicas)


def _wrong_group(rank: int, world: int) -> None:
    MoELayer(LayerConfig(12, MoEConfig(num_experts=4), ep_size=2, ep_rank=1 - rank), dist.group.WORLD)


def test_a_group_in_another_order_is_refused() -> None:
    with pytest.raises(RankFailure, match=r"ep_size=2 and ep_rank=\d, but this rank is number \d of a group of 2"):
        run_ranks(2, _wrong_group)


def _one_rank_idle(rank: int, world: int) -> tuple[int, bool]:
    moe = MoEConfig(router="expert_bias", num_experts=4, top_k=1)
    layer = MoELayer(LayerConfig(12, moe))
    sync = StateSync(layer)
    for step in range(2):
        if rank == 0 or step == 0:
            layer(torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(rank + step)))
        sync.step()
    return int(layer.router.updates), sync.in_step()


def test_a_rank_that_saw_nothing_learns_from_the_others() -> None:
    assert run_ranks(2, _one_rank_idle) == [(2, True)] * 2
