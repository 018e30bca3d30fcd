"""Dispatch: the plan, the roads there and back, their gradients, and the all-to-all on real ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed import run_ranks
from vqmoe_ds.config.schema import CodebookConfig, CodeSource, MoEConfig
from vqmoe_ds.moe import dispatch as dispatch_module
from vqmoe_ds.moe.codebook import CodebookBank
from vqmoe_ds.moe.config import LayerConfig
from vqmoe_ds.moe.deepspeed_layer import DeepSpeedMoELayer
from vqmoe_ds.moe.dispatch import (
    DispatchPlan,
    expand_rows,
    make_plans,
    merge_rows,
    return_rows,
    send_rows,
    sort_rows,
)
from vqmoe_ds.moe.kernels.combine import PermuteRows
from vqmoe_ds.moe.routers import RoutingContext

WIDTH = 6


def _ids(layers: int = 1, tokens: int = 20, routes: int = 1, experts: int = 5, seed: int = 0) -> Tensor:
    return torch.randint(0, experts, (layers, tokens, routes), generator=torch.Generator().manual_seed(seed))


def dispatch(x_TD: Tensor, plan: DispatchPlan, group: Any = None) -> Tensor:
    """Tokens to the rows of the local experts, ``[P, D]``."""
    return send_rows(expand_rows(x_TD, plan), plan, group)


def collect(rows_PD: Tensor, plan: DispatchPlan, group: Any = None) -> Tensor:
    """The way back without the sum over a token's rows, ``[T, R, D]``."""
    rows_MD = PermuteRows.apply(return_rows(rows_PD, plan, group), plan.inverse_M, plan.order_M)
    return rows_MD.view(-1, plan.routes, rows_MD.shape[-1])


def _counts(plan: DispatchPlan) -> list[int]:
    """Rows of each local expert."""
    ends = plan.ends_E.tolist()
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize("routes", [1, 2, 3])
def test_plan_sorts_stably_and_its_inverse_undoes_it(routes: int) -> None:
    ids_LTR = _ids(3, 40, routes)
    for ids_TR, plan in zip(ids_LTR, make_plans(ids_LTR, 5), strict=True):
        flat = ids_TR.flatten().tolist()
        assert plan.order_M.tolist() == sorted(range(len(flat)), key=lambda row: flat[row])  # sorted() is stable
        assert torch.equal(plan.order_M[plan.inverse_M], torch.arange(len(flat)))
        assert torch.equal(plan.inverse_M[plan.order_M], torch.arange(len(flat)))
        assert _counts(plan) == plan.sent_counts_N.tolist() == [flat.count(e) for e in range(5)]
        assert plan.exchange is None


def test_many_experts_take_wide_sort_keys() -> None:
    experts = 2**15 + 10
    ids_LTR = torch.tensor([experts - 1, 2**15, 5, 2**15 - 1]).view(1, 4, 1)
    plan = make_plans(ids_LTR, experts)[0]
    assert plan.order_M.tolist() == [2, 3, 1, 0]
    assert sum(_counts(plan)) == 4


@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_two_paths_merge_as_if_they_were_sorted_together(tokens: int) -> None:
    """Within an expert first the rows of the first path, then those of the second, each in the order of tokens."""
    first_LTR, second_LTR = _ids(3, tokens, 2), _ids(3, tokens, 1, seed=1)
    merged = merge_rows(sort_rows(first_LTR, 5), sort_rows(second_LTR, 5))
    assert merged.routes == 3
    for layer, ids_TR in enumerate(torch.cat([first_LTR, second_LTR], dim=2)):
        flat = ids_TR.flatten().tolist()
        want = sorted(range(len(flat)), key=lambda row: (flat[row], row % 3 == 2, row))
        assert merged.order_LM[layer].tolist() == want
        assert merged.inverse_LM[layer][merged.order_LM[layer]].tolist() == list(range(len(flat)))
        assert merged.ends_LN[layer].tolist() == [sum(e <= expert for e in flat) for expert in range(5)]
        assert merged.experts_LM[layer].tolist() == flat


def _there_and_back(x_TD: Tensor, ids_TR: Tensor, plan: DispatchPlan) -> Tensor:
    """Scale each row by 1 + its expert, so that a row at the wrong place shows."""
    rows_PD = dispatch(x_TD, plan)
    factors_P = torch.repeat_interleave(torch.arange(1.0, 6.0), torch.tensor(_counts(plan)))
    return collect(rows_PD * factors_P.unsqueeze(1).to(x_TD.dtype), plan)


@pytest.mark.parametrize("routes", [1, 2, 3])
def test_rows_return_to_their_tokens_with_the_gradients_of_plain_indexing(routes: int) -> None:
    ids_TR = _ids(routes=routes)[0]
    plan = make_plans(ids_TR.unsqueeze(0), 5)[0]
    x_TD = torch.randn(20, WIDTH, dtype=torch.float64, requires_grad=True)
    reference_TD = x_TD.detach().clone().requires_grad_()
    y_TRD = _there_and_back(x_TD, ids_TR, plan)
    expected_TRD = reference_TD.unsqueeze(1) * (1.0 + ids_TR).unsqueeze(-1)
    assert torch.equal(y_TRD, expected_TRD)
    weights_TRD = torch.randn_like(y_TRD)
    (y_TRD * weights_TRD).sum().backward()
    (expected_TRD * weights_TRD).sum().backward()
    assert torch.allclose(x_TD.grad, reference_TD.grad, rtol=1e-13, atol=1e-13)


def test_autograd_functions_pass_gradcheck() -> None:
    plan = make_plans(_ids(tokens=7, routes=2), 5)[0]
    x_TD = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: expand_rows(x, plan), (x_TD,))
    rows_MD = torch.randn(14, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: collect(rows, plan), (rows_MD,))


def test_no_tokens_at_all() -> None:
    plan = make_plans(torch.zeros(1, 0, 2, dtype=torch.int64), 5)[0]
    assert _counts(plan) == [0] * 5
    assert collect(dispatch(torch.zeros(0, WIDTH), plan), plan).shape == (0, 2, WIDTH)


# ------------------------------------------------------------------- on real ranks

EXPERTS, TOKENS = 8, 24


def _rank_tokens(rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(50 + rank)).to(dtype)


def _routes_of(pattern: str, rank: int, layers: int, routes: int) -> Tensor:
    ids_LTR = _ids(layers, TOKENS, routes, EXPERTS, seed=rank)
    if pattern == "all to the last":
        ids_LTR = torch.full_like(ids_LTR, EXPERTS - 1)
    if pattern == "two experts":
        ids_LTR = ids_LTR % 2 * 5
    return ids_LTR


def _check_exchange(rank: int, world: int) -> int:
    """Every rank compares the exchange with what it computes from all ranks' rows by itself."""
    group, local = dist.group.WORLD, EXPERTS // world
    checked = 0
    for pattern in ("random", "all to the last", "two experts"):
        for routes in (1, 2):
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                everyone = [_routes_of(pattern, r, 2, routes) for r in range(world)]
                plans = make_plans(everyone[rank], EXPERTS, group)
                for layer, plan in enumerate(plans):
                    x_TD = _rank_tokens(rank, dtype).requires_grad_()
                    rows_PD = dispatch(x_TD, plan, group)
                    expected = []
                    for e in range(rank * local, (rank + 1) * local):  # by expert, then source rank, then token
                        for r in range(world):
                            rows = (everyone[r][layer] == e).nonzero()[:, 0]
                            expected.append(_rank_tokens(r, dtype)[rows])
                    assert torch.equal(rows_PD, torch.cat(expected)), (pattern, routes, layer)
                    held = [sum(int((ids[layer] == e).sum()) for ids in everyone) for e in range(EXPERTS)]
                    assert _counts(plan) == held[rank * local : (rank + 1) * local]
                    send, receive = plan.exchange.sizes
                    assert sum(receive) == sum(_counts(plan))
                    assert sum(send) == TOKENS * routes
                    y_TRD = collect(rows_PD, plan, group)
                    assert torch.equal(y_TRD, x_TD.unsqueeze(1).expand(-1, routes, -1))
                    if dtype is torch.float64:
                        direction = torch.randn_like(y_TRD)
                        y_TRD.backward(direction)
                        assert torch.allclose(x_TD.grad, direction.sum(1), rtol=1e-14, atol=1e-14)
                    checked += 1
    _check_layer(rank, world)
    _check_one_counts_exchange(rank, world)
    return checked


def _layer(ep_size: int, ep_rank: int, top_k: int) -> tuple[DeepSpeedMoELayer, CodebookBank]:
    moe = MoEConfig(num_experts=EXPERTS, expert_hidden=5, top_k=top_k)
    book = CodebookConfig(source=CodeSource.LAYER_STATE, num_codes=12)
    config = LayerConfig(WIDTH, moe, codebook=book, seed=1, ep_size=ep_size, ep_rank=ep_rank, shared_codebook=True)
    layer = DeepSpeedMoELayer(config)
    bank = CodebookBank(book, 1, EXPERTS, WIDTH, seed=2)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        if layer.router.continuous is not None:
            layer.router.continuous.gate.weight.normal_(generator=generator)
            layer.router.path_gate.weight.normal_(generator=generator)
            layer.router.path_gate.bias.normal_(generator=generator)
    return layer, bank


def _check_layer(rank: int, world: int) -> None:
    """Experts spread over the ranks give this rank's tokens what all experts at home give them, gradients too."""
    for top_k in (0, 1, 2):
        spread, bank = _layer(world, rank, top_k)
        spread.set_deepspeed_parallelism()
        home, _ = _layer(1, 0, top_k)
        first = rank * (EXPERTS // world)
        assert torch.equal(spread.experts.w2, home.experts.w2[first : first + EXPERTS // world])
        x_TD = _rank_tokens(rank).unsqueeze(0).requires_grad_()
        context = RoutingContext(codebooks=bank)
        y_spread, _, _ = spread(x_TD, context)
        # The same rows in the same blocks on one machine: bit-equal where a product sees equally many rows.
        everyone = [_rank_tokens(r).unsqueeze(0).requires_grad_() for r in range(world)]
        outputs = [home(x, context)[0] for x in everyone]
        assert torch.allclose(y_spread, outputs[rank], rtol=1e-5, atol=1e-6)
        y_spread.square().sum().backward()
        sum(y.square().sum() for y in outputs).backward()
        assert torch.allclose(x_TD.grad, everyone[rank].grad, rtol=1e-5, atol=1e-6)
        for name in ("w1", "w2", "w3"):
            got, want = getattr(spread.experts, name).grad, getattr(home.experts, name).grad
            assert torch.allclose(got, want[first : first + EXPERTS // world], rtol=1e-4, atol=1e-6), name
        # One row more in a product may change its last bit; the rows of this rank alone do not.
        known = RoutingContext(torch.full((TOKENS, 1), first))
        if top_k == 0:
            stay_home, _, _ = spread(x_TD, known)
            at_home, _, _ = home(x_TD, known)
            assert torch.equal(stay_home, at_home)


def _check_one_counts_exchange(rank: int, world: int) -> None:
    """However many layers are planned together: one exchange of counts and one copy of them to the host."""
    exchanges, copies = [], []
    read = dispatch_module._HostCopy._read

    def counted(self: Any) -> Any:
        copies.extend([1] if self._lists is None else [])
        return read(self)

    dispatch_module._HostCopy._read = counted
    original = dispatch_module.comm().all_to_all_single
    dispatch_module.comm().all_to_all_single = lambda *args, **kwargs: (exchanges.append(1), original(*args, **kwargs))[
        1
    ]
    try:
        plans = make_plans(_ids(6, TOKENS, 1, EXPERTS, seed=rank), EXPERTS, dist.group.WORLD)
    finally:
        dispatch_module.comm().all_to_all_single = original
    assert len(plans) == 6
    assert len(exchanges) == 1
    assert copies == []  # nobody has asked yet
    for plan in plans:
        dispatch(_rank_tokens(rank), plan, dist.group.WORLD)
    dispatch_module._HostCopy._read = read
    assert copies == [1]


def _shared_layer(rank: int, world: int) -> DeepSpeedMoELayer:
    moe = MoEConfig(router="topk", num_experts=EXPERTS, expert_hidden=5, top_k=2, shared_experts=2, shared_gate=True)
    layer = DeepSpeedMoELayer(LayerConfig(WIDTH, moe, seed=1, ep_size=world, ep_rank=rank))
    layer.set_deepspeed_parallelism()
    return layer


def _check_shared(rank: int, world: int) -> bool:
    """Shared experts run while rows travel, both ways, and give what they give before or after."""
    events: list[str] = []
    backend, original = dispatch_module.comm(), dispatch_module.comm().all_to_all_single

    class Watched:
        def __init__(self, work: Any) -> None:
            self.work = work

        def wait(self) -> None:
            events.append("arrive")
            self.work.wait()

    def watched(*args: Any, **kwargs: Any) -> Any:
        work = original(*args, **kwargs)
        events.append("depart" if kwargs.get("async_op") else "exchange")
        return Watched(work) if kwargs.get("async_op") else work

    layer = _shared_layer(rank, world)
    layer.shared.register_forward_hook(lambda *_: events.append("shared"))
    layer.shared.register_full_backward_hook(lambda *_: events.append("shared back"))
    x_TD = _rank_tokens(rank).unsqueeze(0).requires_grad_()
    backend.all_to_all_single = watched
    try:
        y_TD, aux, _ = layer(x_TD)
        (y_TD.square().sum() + aux).backward()
    finally:
        backend.all_to_all_single = original
    # Counts of rows, the rows and back; the gradient's two ways.
    assert events == [
        *("exchange", "depart", "shared", "arrive", "exchange"),
        *("exchange", "depart", "shared back", "arrive"),
    ]
    other, z_TD = _shared_layer(rank, world), x_TD.detach().clone().requires_grad_()
    shared, other.shared = other.shared, None
    w_TD = other(z_TD)[0] + shared(z_TD)
    (w_TD.square().sum() + aux.detach()).backward()
    assert torch.equal(w_TD, y_TD)
    for name, parameter in other.experts.named_parameters():
        assert torch.equal(parameter.grad, dict(layer.experts.named_parameters())[name].grad), name
    for name, parameter in shared.named_parameters():
        assert torch.equal(parameter.grad, dict(layer.shared.named_parameters())[name].grad), name
    return True


@pytest.mark.parametrize("world", [2, 4])
def test_shared_experts_run_while_rows_travel(world: int) -> None:
    assert run_ranks(world, _check_shared) == [True] * world


@pytest.mark.parametrize("world", [2, 4])
def test_exchange_between_ranks(world: int) -> None:
    assert run_ranks(world, _check_exchange) == [36] * world
