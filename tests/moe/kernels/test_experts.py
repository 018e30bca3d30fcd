"""The compiled experts against float64 autograd, however rows and threads are cut."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vqmoe_ds.moe.experts import StackedExperts
from vqmoe_ds.moe.kernels.build import why_no_kernel
from vqmoe_ds.moe.kernels.experts import CompiledExperts, supports

needs_kernel = pytest.mark.skipif(why_no_kernel() is not None, reason=str(why_no_kernel()))

SHAPES = {  # D, H, rows of each expert
    "one word of each": (16, 16, [1, 2, 3]),
    "every tail of rows": (32, 48, list(range(1, 40))),
    "panels that are not full": (48, 80, [17, 0, 33]),
    "several panels": (144, 272, [65, 7]),
    "half a vector of words in bfloat16": (48, 48, [700, 64, 1, 129]),
    "several groups of rows": (64, 32, [200, 64, 63, 129]),
    "one expert has all": (32, 64, [0, 1000, 0]),
    "no rows": (32, 32, [0, 0]),
}
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2}


def _draw(width: int, hidden: int, counts_E: list[int], dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(1)
    experts, rows = len(counts_E), sum(counts_E)
    shapes = [(rows, width), (experts, hidden, width), (experts, width, hidden), (experts, hidden, width)]
    scales = [1, width**-0.5, hidden**-0.5, width**-0.5]
    tensors = [(torch.randn(shape) * scale).to(dtype) for shape, scale in zip(shapes, scales, strict=True)]
    return [*tensors, torch.randn(rows, width).to(dtype)]


def _run(tensors: list[Tensor], counts_E: list[int]) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in tensors[:4]]
    y_PD = CompiledExperts.apply(*leaves, counts_E)
    return [y_PD.detach(), *torch.autograd.grad(y_PD, leaves, tensors[4])]


def _expected(tensors: list[Tensor], counts_E: list[int]) -> list[Tensor]:
    x_PD, w1, w2, w3 = leaves = [t.double().requires_grad_() for t in tensors[:4]]
    parts = [(F.silu(rows @ w1[e].t()) * (rows @ w3[e].t())) @ w2[e].t() for e, rows in enumerate(x_PD.split(counts_E))]
    y_PD = torch.cat(parts)
    return [y_PD.detach(), *torch.autograd.grad(y_PD, leaves, tensors[4].double())]


@needs_kernel
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients(shape: str, dtype: torch.dtype) -> None:
    width, hidden, counts_E = SHAPES[shape]
    tensors = _draw(width, hidden, counts_E, dtype)
    for name, got, want in zip(
        ("y", "x", "w1", "w2", "w3"), _run(tensors, counts_E), _expected(tensors, counts_E), strict=True
    ):
        assert got.dtype == dtype
        if got.numel():
            error = (got.double() - want).abs().max() / want.abs().max().clamp_min(1e-30)
            assert error < TOLERANCE[dtype], f"{name}: {error:.1e}"


def _on_threads() -> None:
    """Bit for bit the same, although experts with many rows are cut in other places."""
    for dtype in TOLERANCE:
        for width, hidden, counts_E in [*SHAPES.values(), (32, 320, [3, 2000, 0, 400])]:
            tensors = _draw(width, hidden, counts_E, dtype)
            answers = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                answers.append(_run(tensors, counts_E))
                assert torch.get_num_threads() == threads
            for other in answers[1:]:
                assert all(torch.equal(a, b) for a, b in zip(answers[0], other, strict=True))


@needs_kernel
def test_threads_do_not_change_a_bit() -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(_on_threads).result(timeout=200)


@needs_kernel
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_infinite_and_missing_numbers_reach_the_loss(dtype: torch.dtype) -> None:
    """A run that diverges must show a loss that is not finite, not a number from a saturated exponential."""
    for bad in (float("nan"), float("inf")):
        tensors = _draw(32, 32, [4, 4], dtype)
        tensors[0][1, 3] = bad
        y_PD = _run(tensors, [4, 4])[0]
        assert not y_PD[1].isfinite().all()
        assert y_PD[4:].isfinite().all(), "another expert's rows"


@needs_kernel
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_large_gates_saturate(dtype: torch.dtype) -> None:
    gate_up = torch.zeros(2, 16, 16)
    gate_up[0] = torch.eye(16)
    gate_up[1, :, 0] = 1
    x_PD = torch.zeros(2, 16)
    x_PD[:, 0] = 1
    x_PD[0, 1:], x_PD[1, 1:] = 200.0, -200.0
    tensors = [x_PD, gate_up[:1], torch.eye(16)[None], gate_up[1:]]
    y_PD = CompiledExperts.apply(*(t.to(dtype) for t in tensors), [2])
    assert torch.equal(y_PD[0, 1:].float(), torch.full((15,), 200.0))
    assert y_PD[1, 1:].abs().max() < 1e-30


@needs_kernel
def test_inference_equals_training() -> None:
    tensors = _draw(32, 48, [5, 70], torch.float32)
    trained = _run(tensors, [5, 70])[0]
    with torch.no_grad():
        assert torch.equal(CompiledExperts.apply(*tensors[:4], [5, 70]), trained)


@needs_kernel
def test_where_it_does_not_apply() -> None:
    assert supports(torch.float32, 32, 48)
    assert not supports(torch.float32, 32, 40)
    assert not supports(torch.float32, 24, 48)
    assert not supports(torch.float64, 32, 48)
    from torch.utils.flop_counter import FlopCounterMode

    experts, x_PD = StackedExperts(32, 48, 2), torch.randn(4, 32)
    with FlopCounterMode(display=False) as counter:
        experts(x_PD, torch.tensor([1, 4]))
    assert counter.get_total_flops() > 0


BAD_COUNTS = [[1, 2], [1, 2, 3, 1], [1, 2, 2], [1, 2, 99], [7, -2, 1], []]


@pytest.mark.parametrize("counts_E", BAD_COUNTS, ids=str)
def test_rows_of_no_expert_are_refused_before_any_address(counts_E: list[int]) -> None:
    tensors = _draw(16, 16, [1, 2, 3], torch.float32)
    with pytest.raises(IndexError, match="6 rows were given to 3 experts"):
        CompiledExperts.apply(*tensors[:4], counts_E)
    ends_E = torch.tensor(counts_E + [0] * (3 - len(counts_E))).cumsum(0)
    with pytest.raises(IndexError, match="6 rows were given to"):
        StackedExperts(24, 24, 3)(torch.zeros(6, 24), ends_E)


@pytest.mark.parametrize(
    "harm", ["narrow rows", "w2 of fewer experts", "w3 of another width", "another type", "15 wide"]
)
def test_tensors_that_do_not_belong_together_are_refused(harm: str) -> None:
    x, w1, w2, w3, _ = _draw(16, 16, [1, 2, 3], torch.float32)
    x, w1, w2, w3 = {
        "narrow rows": (x[:, :15], w1, w2, w3),
        "w2 of fewer experts": (x, w1, w2[:2], w3),
        "w3 of another width": (x, w1, w2, w3[:, :8]),
        "another type": (x, w1, w2.bfloat16(), w3),
        "15 wide": (x[:, :15], w1[..., :15], w2[:, :15], w3[..., :15]),
    }[harm]
    with pytest.raises(ValueError, match="do not fit each other or the kernel"):
        CompiledExperts.apply(x, w1, w2, w3, [1, 2, 3])
