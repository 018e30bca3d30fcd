"""The loss against PyTorch's on float32 logits: bit for bit on CPU in float32, to rounding elsewhere."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels import DEVICES, kernels_on
from vqmoe_ds.data.batches import MASKED
from vqmoe_ds.models import loss
from vqmoe_ds.models.loss import cross_entropy

PLACES = [pytest.param("plain", id="plain"), *DEVICES]
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # of gradients; losses are float32
SHAPES = [(1, 2), (7, 37), (5, 300)]


def _on(place: str) -> tuple[str, AbstractContextManager[None]]:
    return ("cpu", nullcontext()) if place == "plain" else (place, kernels_on(place))


def _draw(tokens: int, vocabulary: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Logits, some far from zero, and targets of which every third is masked, the first never."""
    logits_TV = (5 * torch.randn(tokens, vocabulary)).to(device, dtype)
    logits_TV[:, ::5] += 30
    targets_T = torch.randint(vocabulary, (tokens,))
    targets_T[2::3] = MASKED
    return logits_TV.requires_grad_(), targets_T.to(device)


def _reference(logits_TV: Tensor, targets_T: Tensor, upstream: float = 1.0) -> tuple[Tensor, Tensor]:
    """Loss and gradient, in the logits' type, through float32."""
    logits_TV = logits_TV.detach().clone().requires_grad_()
    total = F.cross_entropy(logits_TV.float(), targets_T, ignore_index=MASKED, reduction="sum")
    mean = total / targets_T.ne(MASKED).sum().clamp_min(1)
    return mean.detach(), torch.autograd.grad(mean * upstream, logits_TV)[0]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient(shape: tuple[int, int], dtype: torch.dtype, place: str) -> None:
    device, scope = _on(place)
    logits_TV, targets_T = _draw(*shape, dtype, device)
    want, want_g = _reference(logits_TV, targets_T, upstream=-3.5)
    with scope:
        mean = cross_entropy(logits_TV, targets_T)
        (got_g,) = torch.autograd.grad(mean * -3.5, logits_TV)
    assert (mean.dtype, got_g.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(mean.detach(), want, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(got_g, want_g, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] / 10)
    assert not got_g[targets_T == MASKED].any()


def test_float32_on_cpu_is_pytorch_bit_for_bit() -> None:
    logits_TV, targets_T = _draw(7, 37, torch.float32)
    want, want_g = _reference(logits_TV, targets_T)
    before = logits_TV.detach().clone()
    mean = cross_entropy(logits_TV, targets_T)
    assert torch.equal(mean, want)
    assert torch.equal(torch.autograd.grad(mean, logits_TV)[0], want_g)
    assert torch.equal(logits_TV, before)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("pieces", ["rows", "columns"])
def test_larger_than_a_chunk_or_a_block(pieces: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "_CPU_CHUNK", 3 * 4 * 37 if pieces == "rows" else 1)  # three rows at a time; not even one
    monkeypatch.setattr(loss, "_LARGEST_BLOCK", 16)
    for dtype in (torch.float32, torch.bfloat16):
        test_loss_and_gradient((7, 37), dtype, place)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [0, 3])
def test_nothing_to_learn(tokens: int, dtype: torch.dtype, place: str) -> None:
    device, scope = _on(place)
    logits_TV = torch.randn(tokens, 9).to(device, dtype).requires_grad_()
    with scope:
        mean = cross_entropy(logits_TV, torch.full((tokens,), MASKED, device=device))
        mean.backward()
    assert mean.item() == 0
    assert logits_TV.grad.shape == (tokens, 9) and not logits_TV.grad.any()


@pytest.mark.parametrize("place", PLACES)
def test_logits_of_minus_infinity(place: str) -> None:
    """Even a whole block of them, and the first."""
    device, scope = _on(place)
    logits_TV, targets_T = _draw(2, 40, torch.bfloat16, device)
    with torch.no_grad():
        logits_TV[:, :20] = float("-inf")
    targets_T.fill_(30)
    want, want_g = _reference(logits_TV, targets_T)
    with scope, pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "_LARGEST_BLOCK", 16)
        mean = cross_entropy(logits_TV, targets_T)
        (got_g,) = torch.autograd.grad(mean, logits_TV)
    torch.testing.assert_close(mean.detach(), want)
    torch.testing.assert_close(got_g, want_g, rtol=8e-3, atol=1e-3)


@pytest.mark.parametrize("place", PLACES)
def test_missing_numbers_reach_the_loss(place: str) -> None:
    device, scope = _on(place)
    logits_TV, targets_T = _draw(3, 9, torch.bfloat16, device)
    with torch.no_grad():
        logits_TV[0, 4] = float("nan")
    with scope:
        assert cross_entropy(logits_TV, targets_T).isnan()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wrong", [9, -1, 2**40])
def test_targets_out_of_range_show(wrong: int, device: str) -> None:
    """PyTorch stops with an error; a kernel cannot, and must not read what is no logit."""
    with kernels_on(device):
        assert cross_entropy(torch.randn(3, 9, device=device), torch.tensor([1, wrong, 2], device=device)).isnan()


@pytest.mark.parametrize("place", PLACES)
def test_no_second_copy_of_the_logits(place: str) -> None:
    """The logits are all that is kept, their gradient takes their memory, and whoever needs them later is told."""
    device, scope = _on(place)
    leaf_TV, targets_T = _draw(6, 50, torch.bfloat16, device)
    logits_TV = leaf_TV * 1
    kept: list[Tensor] = []
    with scope, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        total = cross_entropy(logits_TV, targets_T)
    assert [t.data_ptr() for t in kept if t.numel() == logits_TV.numel()] == [logits_TV.data_ptr()]
    logits_TV.retain_grad()
    with scope if place == "plain" else kernels_on(place):
        total = cross_entropy(logits_TV, targets_T)
        after = logits_TV.square().sum()
        (g,) = torch.autograd.grad(total, logits_TV)
    assert g.data_ptr() == logits_TV.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        after.backward()


def test_shape_on_meta() -> None:
    """The planner: what autograd keeps of the logits on a GPU."""
    logits_TV = torch.empty(6, 50, device="meta", requires_grad=True)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        mean = cross_entropy(logits_TV, torch.empty(6, dtype=torch.int64, device="meta"))
    assert (mean.shape, mean.dtype) == ((), torch.float32)
    assert kept.count((6, 50)) == 1
