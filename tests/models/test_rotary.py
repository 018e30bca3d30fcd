"""Rotary positions: PyTorch's operations and kernels against the plain formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels import DEVICES, kernels_on
from vqmoe_ds.config.schema import ModelConfig
from vqmoe_ds.models import rotary
from vqmoe_ds.models.rotary import rotary_tables, rotate, rotate_qkv, split_heads

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}  # the interpreter cuts bfloat16 off
SHAPES = [(1, 1, 1, 2), (2, 5, 3, 12), (2, 3, 4, 16)]  # B, S, A, H


def _formula(x_BSAH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = x_BSAH.transpose(1, 2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _draw(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """A projection ``[B, S, 3, A, H]`` and the angles, which start at the second position of a longer table."""
    batch, length, heads, width = shape
    qkv = torch.randn(batch, length, 3, heads, width).to(device, dtype).requires_grad_()
    angles = torch.arange(length + 1, device=device).unsqueeze(1) * torch.rand(width // 2, device=device)
    return qkv, angles.cos()[1:], angles.sin()[1:]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain_operations_are_the_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    qkv, cos, sin = _draw(shape, dtype)
    wide = qkv.detach().double().requires_grad_()
    q, k, v = wide.unbind(2)
    want = [_formula(q, cos.double(), sin.double()), _formula(k, cos.double(), sin.double()), v.transpose(1, 2)]
    got = rotate_qkv(qkv.flatten(2, 3), cos, sin, qkv.shape[3])
    q, k, v = qkv.unbind(2)
    apart = (*rotate(q, k, cos, sin), v.transpose(1, 2))
    g = [torch.randn_like(t) for t in got]
    gradients = [torch.autograd.grad(outputs, qkv, g)[0] for outputs in (got, apart)]
    wanted = torch.autograd.grad(want, wide, [t.double() for t in g])[0]
    tolerance = 4 * TOLERANCE[dtype]  # tables are rounded to the type as well
    for a, b in [*zip(got, want, strict=True), *zip(apart, want, strict=True), *((g, wanted) for g in gradients)]:
        assert a.dtype == dtype
        assert torch.allclose(a.double(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("apart", [False, True], ids=["one projection", "queries and keys"])
def test_kernel(shape: tuple[int, ...], dtype: torch.dtype, device: str, apart: bool) -> None:
    qkv, cos, sin = _draw(shape, dtype, device)
    with kernels_on(device):
        if apart:
            q, k, v = qkv.unbind(2)
            got = (*rotate(q, k, cos, sin), v.transpose(1, 2))
        else:
            got = rotate_qkv(qkv.flatten(2, 3), cos, sin, qkv.shape[3])
        g = [torch.randn_like(t) for t in got]  # of the layout that attention gives back
        (g_qkv,) = torch.autograd.grad(got, qkv, g)
    wide = qkv.detach().double().requires_grad_()
    q, k, v = wide.unbind(2)
    want = (_formula(q, cos.double(), sin.double()), _formula(k, cos.double(), sin.double()), v.transpose(1, 2))
    (want_g,) = torch.autograd.grad(want, wide, [t.double() for t in g])
    for a, b in zip((*got, g_qkv), (*want, want_g), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.detach().double(), b.detach(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("device", DEVICES)
def test_more_heads_than_a_block(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotary, "_BLOCK", 16)
    test_kernel((1, 2, 7, 12), torch.float32, device, apart=False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("inner", [2, 3], ids=["position innermost", "width innermost"])
def test_gradients_of_unlike_strides(inner: int, device: str) -> None:
    """Attention may give its gradients back in layouts of its own, or expanded."""
    qkv, cos, sin = _draw((2, 3, 4, 16), torch.float32, device)
    with kernels_on(device):
        q, k, v = rotate_qkv(qkv.flatten(2, 3), cos, sin, qkv.shape[3])
        g_q = torch.randn(2, 4, 3, 16, device=device).transpose(inner, 3).contiguous().transpose(inner, 3)
        g_k = torch.randn(2, 3, 4, 16, device=device).transpose(1, 2)
        g_v = torch.ones(16, device=device).expand(2, 4, 3, 16)
        (got,) = torch.autograd.grad((q, k, v), qkv, (g_q, g_k, g_v))
    same = qkv.detach().cpu().requires_grad_()
    (want,) = torch.autograd.grad(
        rotate_qkv(same.flatten(2, 3), cos.cpu(), sin.cpu(), same.shape[3]), same, [g.cpu() for g in (g_q, g_k, g_v)]
    )
    torch.testing.assert_close(got.cpu(), want)


@pytest.mark.parametrize("device", DEVICES)
def test_queries_alone_have_a_gradient(device: str) -> None:
    qkv, cos, sin = _draw((2, 3, 4, 16), torch.float32, device)
    with kernels_on(device):
        (got,) = torch.autograd.grad(rotate_qkv(qkv.flatten(2, 3), cos, sin, qkv.shape[3])[0].square().sum(), qkv)
    same = qkv.detach().cpu().requires_grad_()
    (want,) = torch.autograd.grad(
        rotate_qkv(same.flatten(2, 3), cos.cpu(), sin.cpu(), same.shape[3])[0].square().sum(), same
    )
    torch.testing.assert_close(got.cpu(), want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("apart", [False, True], ids=["one projection", "queries and keys"])
def test_fewer_key_value_heads_than_query_heads(device: str, apart: bool) -> None:
    projection = torch.randn(2, 3, 6 + 2 * 2, 16).to(device).requires_grad_()
    _, cos, sin = _draw((2, 3, 1, 16), torch.float32, device)
    with kernels_on(device):
        if apart:
            q, k, v = split_heads(projection, 2)
            got = (*rotate(q, k, cos, sin), v.transpose(1, 2))
        else:
            got = rotate_qkv(projection, cos, sin, 2)
        g = [torch.randn_like(t) for t in got]
        (g_projection,) = torch.autograd.grad(got, projection, g)
    wide = projection.detach().double().requires_grad_()
    q, k, v = wide[:, :, :6], wide[:, :, 6:8], wide[:, :, 8:]
    want = (_formula(q, cos.double(), sin.double()), _formula(k, cos.double(), sin.double()), v.transpose(1, 2))
    (want_g,) = torch.autograd.grad(want, wide, [t.double() for t in g])
    for a, b in zip((*got, g_projection), (*want, want_g), strict=True):
        torch.testing.assert_close(a.detach().double(), b.detach(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("length", [64, 4096])
@pytest.mark.parametrize("kind", ["none", "linear", "llama3", "yarn"])
def test_scaled_tables_are_those_of_transformers(kind: str, length: int) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed: pip install -r requirements-dev.txt")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = {"factor": 8.0, "original_max_position_embeddings": length}
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    parameters = {"rope_type": kind, **scaling, **more} if kind != "none" else {"rope_type": "default"}
    theirs = LlamaConfig(head_dim=32, rope_parameters=parameters | {"rope_theta": 5e4}, max_position_embeddings=512)
    cos, sin = LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.arange(512).unsqueeze(0))
    model = ModelConfig(
        rope_scaling=kind, rope_factor=8.0, rope_original_length=length, rope_theta=5e4, sequence_length=512
    )
    for got, want in zip(rotary_tables(model, 32), (cos, sin), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want[0, :, :16], rtol=0, atol=1e-4)


def test_a_scaling_without_the_context_before_it_is_refused() -> None:
    with pytest.raises(ValueError, match="model.rope_scaling=yarn goes by the context before it; set model.rope_orig"):
        ModelConfig(rope_scaling="yarn", rope_factor=2.0)
