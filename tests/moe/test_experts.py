"""Stacked SwiGLU experts against a loop of plain autograd, and their initial weights."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vqmoe_ds.moe.experts import StackedExperts

WIDTH, HIDDEN = 16, 24
COUNTS = {
    "mixed": [5, 1, 9, 3],
    "some empty": [0, 7, 0, 4],
    "all on the first": [12, 0, 0, 0],
    "all on the last": [0, 0, 0, 12],
    "fewer rows than experts": [1, 0, 1, 0],
    "one row": [0, 0, 1, 0],
    "no rows": [0, 0, 0, 0],
    "many rows": [70, 200, 33, 129],
}


def _run(experts: StackedExperts, x_PD: Tensor, counts_E: list[int]) -> Tensor:
    return experts(x_PD, torch.tensor(counts_E).cumsum(0).int())


def _experts(dtype: torch.dtype = torch.float64) -> StackedExperts:
    return StackedExperts(WIDTH, HIDDEN, 4, std=0.3).to(dtype)


def _reference(experts: StackedExperts, x_PD: Tensor, counts_E: list[int]) -> Tensor:
    parts = []
    for e, rows in enumerate(x_PD.split(counts_E)):
        parts.append((F.silu(rows @ experts.w1[e].t()) * (rows @ experts.w3[e].t())) @ experts.w2[e].t())
    return torch.cat(parts)


def _gradients(experts: StackedExperts, x_PD: Tensor, y_PD: Tensor, direction_PD: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y_PD, [x_PD, experts.w1, experts.w2, experts.w3], direction_PD))


@pytest.mark.parametrize("case", COUNTS)
def test_output_and_gradients_equal_plain_autograd(case: str) -> None:
    experts, counts_E = _experts(), COUNTS[case]
    x_PD = torch.randn(sum(counts_E), WIDTH, dtype=torch.float64, requires_grad=True)
    direction_PD = torch.randn_like(x_PD)
    y_PD, expected_PD = _run(experts, x_PD, counts_E), _reference(experts, x_PD, counts_E)
    assert torch.allclose(y_PD, expected_PD, rtol=1e-12, atol=1e-12)
    got, want = _gradients(experts, x_PD, y_PD, direction_PD), _gradients(experts, x_PD, expected_PD, direction_PD)
    for name, a, b in zip(("x", "w1", "w2", "w3"), got, want, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12), name


@pytest.mark.parametrize("case", ["some empty", "all on the first", "no rows"])
def test_empty_experts_get_gradients_of_exact_zeros(case: str) -> None:
    """Zeros, not None and not what stood in memory: ZeRO reduces every expert's gradient on every rank."""
    experts, counts_E = _experts(torch.float32), COUNTS[case]
    for _ in range(3):  # freed blocks full of NaN: the allocator hands them out again
        trash = torch.full((4, HIDDEN, WIDTH), float("nan"))
        del trash
        experts.zero_grad()
        x_PD = torch.randn(sum(counts_E), WIDTH, requires_grad=True)
        _run(experts, x_PD, counts_E).square().sum().backward()
        for weight in (experts.w1, experts.w2, experts.w3):
            for e, count in enumerate(counts_E):
                zero = bool((weight.grad[e] == 0).all())
                assert zero == (count == 0)


def test_gradients_add_up_over_micro_batches() -> None:
    experts, counts_E = _experts(), COUNTS["mixed"]
    batches = [torch.randn(18, WIDTH, dtype=torch.float64) for _ in range(2)]
    for x_PD in batches:
        _run(experts, x_PD, counts_E).square().sum().backward()
    got = experts.w2.grad.clone()
    experts.zero_grad()
    sum(_reference(experts, x_PD, counts_E).square().sum() for x_PD in batches).backward()
    assert torch.allclose(got, experts.w2.grad, rtol=1e-12)


def test_rows_that_do_not_lie_in_one_piece() -> None:
    experts, counts_E = _experts(), COUNTS["mixed"]
    wide = torch.randn(WIDTH, 18, dtype=torch.float64)
    direction = torch.randn(WIDTH, 18, dtype=torch.float64)
    x_PD = wide.t().requires_grad_()
    y_PD, expected_PD = _run(experts, x_PD, counts_E), _reference(experts, x_PD, counts_E)
    got, want = (_gradients(experts, x_PD, y, direction.t()) for y in (y_PD, expected_PD))
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", ["mixed", "some empty", "many rows"])
def test_bfloat16_is_as_good_as_bfloat16_allows(case: str) -> None:
    experts, counts_E = _experts(torch.bfloat16), COUNTS[case]
    exact = _experts()
    exact.load_state_dict({name: weight.double() for name, weight in experts.state_dict().items()})
    x_PD = torch.randn(sum(counts_E), WIDTH).bfloat16().requires_grad_()
    direction_PD = torch.randn(sum(counts_E), WIDTH).bfloat16()
    x_exact_PD = x_PD.detach().double().requires_grad_()
    y_PD, y_exact_PD = _run(experts, x_PD, counts_E), _reference(exact, x_exact_PD, counts_E)
    assert y_PD.dtype == torch.bfloat16
    got = [y_PD, *_gradients(experts, x_PD, y_PD, direction_PD)]
    want = [y_exact_PD, *_gradients(exact, x_exact_PD, y_exact_PD, direction_PD.double())]
    for name, a, b in zip(("y", "x", "w1", "w2", "w3"), got, want, strict=True):
        assert a.dtype == torch.bfloat16
        error = ((a.double() - b).norm() / b.norm()).item()
        assert error < 1e-2, f"{name}: {error:.1e}"


def test_no_gradient_where_none_is_wanted() -> None:
    """Frozen experts, and a first layer whose input needs no gradient."""
    experts, counts_E = _experts(), COUNTS["mixed"]
    x_PD = torch.randn(18, WIDTH, dtype=torch.float64)
    _run(experts, x_PD, counts_E).sum().backward()
    assert experts.w1.grad is not None
    frozen = _experts().requires_grad_(False)
    x_PD.requires_grad_()
    _run(frozen, x_PD, counts_E).sum().backward()
    assert x_PD.grad.abs().sum() > 0 and frozen.w1.grad is None


def _on_threads() -> dict[str, float]:
    errors = {}
    for case, counts_E in COUNTS.items():
        experts = _experts(torch.float32)
        x_PD = torch.randn(sum(counts_E), WIDTH, requires_grad=True)
        direction_PD = torch.randn(sum(counts_E), WIDTH)
        answers = []
        for threads in (1, 3, 3):
            torch.set_num_threads(threads)
            y_PD = _run(experts, x_PD, counts_E)
            answers.append([y_PD, *_gradients(experts, x_PD, y_PD, direction_PD)])
            assert torch.get_num_threads() == threads
        alone, shared, again = answers
        assert all(torch.equal(a, b) for a, b in zip(shared, again, strict=True)), case
        errors[case] = max((a - b).abs().max().item() if a.numel() else 0 for a, b in zip(alone, shared, strict=True))
    return errors


def test_more_threads_compute_the_same() -> None:
    """In a process of its own, so that this one can be forked; a fresh one, for libraries may have started threads here
    (SentencePiece does), and a forked child that wants threads waits for them for ever."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        errors = pool.submit(_on_threads).result(timeout=200)
    for case, error in errors.items():
        assert error < 1e-4, case


def test_initial_weights_follow_seed_layer_and_global_id() -> None:
    whole = StackedExperts(WIDTH, HIDDEN, 8, 0, layer=2, seed=5)
    half = StackedExperts(WIDTH, HIDDEN, 4, 4, layer=2, seed=5)
    for name in ("w1", "w2", "w3"):
        assert torch.equal(getattr(whole, name)[4:], getattr(half, name))
    others = [
        StackedExperts(WIDTH, HIDDEN, 8, 0, layer=3, seed=5),
        StackedExperts(WIDTH, HIDDEN, 8, 0, layer=2, seed=6),
    ]
    drawn = [tensor for experts in (whole, *others) for tensor in (*experts.w1, *experts.w3)]
    assert len({round(tensor.sum().item(), 6) for tensor in drawn}) == len(drawn), "two experts share weights"


def test_initial_scale() -> None:
    experts = StackedExperts(64, 128, 8, std=0.1, out_scale=0.25)
    assert experts.w1.std().item() == pytest.approx(0.1, rel=0.02)
    assert experts.w3.std().item() == pytest.approx(0.1, rel=0.02)
    assert experts.w2.std().item() == pytest.approx(0.025, rel=0.02)
