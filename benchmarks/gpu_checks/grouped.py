"""Check 1: what the package relies on in ``torch._grouped_mm``, and its own experts, against a loop over experts.

Legend: P rows sorted by expert, E experts, D width, H hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from vqmoe_ds.config.schema import MoEConfig
from vqmoe_ds.moe.config import LayerConfig
from vqmoe_ds.moe.layer import MoELayer
from vqmoe_ds.moe.routers import RoutingContext

from .frame import Bench, Finding, attempt, attempt_within, poisons, relative_error
from .report import MEASURED

WIDTH, HIDDEN, EXPERTS = 64, 48, 6
COUNTS = {
    "mixed": [5, 1, 130, 3, 64, 17],
    "some empty": [0, 70, 0, 4, 0, 0],
    "all on the first": [120, 0, 0, 0, 0, 0],
    "all on the last": [0, 0, 0, 0, 0, 33],
    "one row": [0, 0, 0, 1, 0, 0],
    "no rows": [0, 0, 0, 0, 0, 0],
}
LIMITS = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}
"""Limit of errors relative to the largest value: a few roundings of the type."""


def run(bench: Bench) -> Iterator[Finding]:
    """Empty experts last: should the product hang on them (pytorch/pytorch#152668), all else is known by then."""
    yield from _compared(bench, {case: counts for case, counts in COUNTS.items() if all(counts)})
    yield from attempt("refusals", lambda: _refusals(bench))
    yield from _compared(bench, {case: counts for case, counts in COUNTS.items() if not all(counts)})


def _compared(bench: Bench, cases: Mapping[str, list[int]]) -> Iterator[Finding]:
    for case, counts in cases.items():
        for dtype, limit in LIMITS.items():
            for what, errors in (("_grouped_mm", _product_errors), ("experts", _experts_errors)):
                name = f"{what}, {str(dtype).removeprefix('torch.')}, {case}"
                yield from attempt_within(name, errors, limit, bench, dtype, counts)


def _product_errors(bench: Bench, dtype: torch.dtype, counts: list[int]) -> dict[str, float]:
    x_PD = _rows(sum(counts), WIDTH, 1).to(dtype)
    w_EHD, g_PH = (
        _rows(EXPERTS * HIDDEN, WIDTH, 2).view(EXPERTS, HIDDEN, WIDTH).to(dtype),
        _rows(sum(counts), HIDDEN, 3),
    )
    ends_E = torch.tensor(counts).cumsum(0).int().to(bench.device)
    here = [t.to(bench.device, copy=True).requires_grad_() for t in (x_PD, w_EHD)]
    y_PH = torch._grouped_mm(here[0], here[1].transpose(-2, -1), offs=ends_E)
    got = [y_PH, *torch.autograd.grad(y_PH, here, g_PH.to(bench.device, dtype))]

    there = [t.double().requires_grad_() for t in (x_PD, w_EHD)]
    parts = [rows @ there[1][e].t() for e, rows in enumerate(there[0].split(counts))]
    want_PH = torch.cat(parts)
    want = [want_PH, *torch.autograd.grad(want_PH, there, g_PH.to(dtype).double())]
    return _compare(("output", "rows", "weights"), got, want, counts)


def _experts_errors(bench: Bench, dtype: torch.dtype, counts: list[int]) -> dict[str, float]:
    """Our layer with routes known ahead: rows come sorted already, so that it is the experts alone."""
    config = MoEConfig(router="hash_token", num_experts=EXPERTS, expert_hidden=HIDDEN)
    layer = MoELayer(LayerConfig(WIDTH, config))
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(dtype)
    x_PD, g_PD = _rows(sum(counts), WIDTH, 1).to(dtype), _rows(sum(counts), WIDTH, 3).to(dtype)
    weights = [t.detach().double().requires_grad_() for t in (layer.experts.w1, layer.experts.w2, layer.experts.w3)]
    layer.to(bench.device)
    ids_P = torch.arange(EXPERTS).repeat_interleave(torch.tensor(counts)).to(bench.device)
    here_PD = x_PD.to(bench.device, copy=True).requires_grad_()
    y_BSD, _, _ = layer(here_PD.unsqueeze(0), RoutingContext(ids_P.unsqueeze(1)))
    leaves = [here_PD, layer.experts.w1, layer.experts.w2, layer.experts.w3]
    got = [y_BSD.squeeze(0), *torch.autograd.grad(y_BSD, leaves, g_PD.to(bench.device).unsqueeze(0))]

    there_PD = x_PD.double().requires_grad_()
    parts = []
    for rows, w1, w2, w3 in zip(there_PD.split(counts), *weights, strict=True):
        parts.append((F.silu(rows @ w1.t()) * (rows @ w3.t())) @ w2.t())
    want_PD = torch.cat(parts)
    want = [want_PD, *torch.autograd.grad(want_PD, [there_PD, *weights], g_PD.double())]
    return _compare(("output", "rows", "w1", "w2", "w3"), got, want, counts)


def _compare(names: tuple[str, ...], got: list[Tensor], want: list[Tensor], counts: list[int]) -> dict[str, float]:
    errors = {name: relative_error(a, b) for name, a, b in zip(names, got, want, strict=True)}
    empty = [e for e, count in enumerate(counts) if not count]
    weights = [gradient for gradient in got if gradient.ndim == 3]
    # Exact zeros, not what stood in memory: ZeRO reduces every expert's gradient.
    errors["experts without rows"] = max(float(w[empty].abs().sum()) for w in weights) if empty else 0.0
    return errors


def _refusals(bench: Bench) -> Iterator[Finding]:
    """The widths that the product refuses, with its own words: the schema's checks rely on them."""
    for dtype, width in ((torch.bfloat16, 60), (torch.float16, 60), (torch.float32, 62), (torch.float64, 64)):
        x_PD = torch.randn(8, width, device=bench.device).to(dtype)
        w_EHD = torch.randn(2, HIDDEN, width, device=bench.device).to(dtype)
        ends_E = torch.tensor([3, 8], dtype=torch.int32, device=bench.device)
        try:
            torch._grouped_mm(x_PD, w_EHD.transpose(-2, -1), offs=ends_E)
            bench.synchronize()
            says = "accepted"
        except RuntimeError as error:
            if poisons(error):
                raise
            says = str(error).splitlines()[0]
        yield Finding(f"_grouped_mm, {str(dtype).removeprefix('torch.')}, width {width}", MEASURED, {"says": says})


def _rows(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
