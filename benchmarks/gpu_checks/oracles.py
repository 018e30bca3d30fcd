"""Check 2: layers, routers and codebooks on the device against float64 loops and against the CPU.

The vq layer is held against ``tests/oracle.py``, every other router against the same layer in float32 on the CPU, which
``make test`` holds against ``tests/router_oracle.py``. Tokens near a tie, which rounding may send to either expert, are
left out.

Legend: T tokens, D width, N experts, K codes, C code width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from tests.oracle import OracleLayer
from vqmoe_ds.config.routers import routers
from vqmoe_ds.config.schema import CodebookConfig, CodeMap, CodeSource, MoEConfig
from vqmoe_ds.moe.codebook import CodebookBank
from vqmoe_ds.moe.config import LayerConfig
from vqmoe_ds.moe.kernels.codes import nearest_codes
from vqmoe_ds.moe.kernels.integers import count_ids
from vqmoe_ds.moe.kernels.statistics import sum_by_code
from vqmoe_ds.moe.layer import MoELayer
from vqmoe_ds.moe.routers import RoutingContext
from vqmoe_ds.moe.state_sync import StateSync

from .frame import Bench, Finding, attempt, attempt_within, relative_error, within
from .report import FAILED

WIDTH, HIDDEN, EXPERTS, TOKENS, VOCAB = 16, 24, 4, 32, 9
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}

VQ_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "discrete only": ({"top_k": 0}, {}),
    "top-1": ({"top_k": 1}, {}),
    "top-1, blended, all losses": (
        {"top_k": 1, "code_blend": 0.5, "balance_weight": 0.3, "z_loss_weight": 0.1},
        {"commitment_weight": 0.25},
    ),
    "top-2, the paper's input": ({"top_k": 2, "code_blend": 1.0}, {}),
    "more codes than experts": ({"top_k": 1}, {"num_codes": 11}),
    "low-dimensional cosine": ({"top_k": 1}, {"code_dim": 8, "distance": "cosine", "normalize_source": True}),
    "soft output": ({"top_k": 0}, {"soft_output": 2.0}),
}


def run(bench: Bench) -> Iterator[Finding]:
    for dtype, limit in LIMITS.items():
        name = str(dtype).removeprefix("torch.")
        for case, options in VQ_CASES.items():
            what = f"vq against the float64 oracle, {case}, {name}"
            yield from attempt_within(what, _vq_errors, limit, bench, dtype, *options)
        for router in routers():
            if router not in ("vq", "dense"):
                what = f"{router} against the CPU, {name}"
                yield from attempt_within(what, _router_errors, limit, bench, dtype, router)
    yield from attempt_within("search and sums of codes against float64", _code_errors, 1e-5, bench)
    yield from attempt("codebook", lambda: _codebook(bench))


# ---------------------------------------------------------------- the vq layer


def _vq_errors(bench: Bench, dtype: torch.dtype, moe: dict[str, Any], book: dict[str, Any]) -> dict[str, float]:
    layer, bank, oracle = _vq_pair(dtype, moe, book)
    x_TD = _clear_tokens(_draw((4 * TOKENS, WIDTH), 1, dtype), oracle)
    direction_TD = _draw(tuple(x_TD.shape), 2, dtype)
    layer, bank = layer.to(bench.device), bank.to(bench.device)
    here_TD = x_TD.to(bench.device, dtype, copy=True).requires_grad_()
    y_BSD, aux, _ = layer(here_TD.unsqueeze(0), RoutingContext(codebooks=bank))
    loss = (y_BSD.squeeze(0) * direction_TD.to(bench.device, dtype)).sum()
    (loss if aux is None else loss + 3 * aux).backward()
    there_TD = x_TD.double().requires_grad_()
    want_TD, want_aux = oracle.forward(there_TD)
    ((want_TD * direction_TD.double()).sum() + 3 * want_aux).backward()

    experts, router = layer.experts, cast(Any, layer.router)
    pairs = {
        "output": (y_BSD.squeeze(0), want_TD),
        "input gradient": (here_TD.grad, there_TD.grad),
        "w1": (experts.w1.grad, oracle.w1_NHD.grad),
        "w2": (experts.w2.grad, oracle.w2_NDH.grad),
        "w3": (experts.w3.grad, oracle.w3_NHD.grad),
    }
    if router.continuous is not None:
        assert oracle.router_ND is not None and oracle.gate_2D is not None
        pairs["router"] = (router.continuous.gate.weight.grad, oracle.router_ND.grad)
        pairs["gate"] = (router.path_gate.weight.grad, oracle.gate_2D.grad)
    errors = {name: _error(*pair) for name, pair in pairs.items()}
    return {**errors, "loss": abs(0.0 if aux is None else float(aux - want_aux.to(aux.device)))}


def _vq_pair(
    dtype: torch.dtype, moe: dict[str, Any], book: dict[str, Any]
) -> tuple[MoELayer, CodebookBank, OracleLayer]:
    """A layer whose weights are of ``dtype``, on the CPU, and its oracle with the same numbers."""
    config = MoEConfig(num_experts=EXPERTS, expert_hidden=HIDDEN, **moe)
    options = CodebookConfig(**{"source": CodeSource.LAYER_STATE, "normalize_source": False, **book})
    layer = MoELayer(LayerConfig(WIDTH, config, codebook=options, seed=3, shared_codebook=True))
    _redraw(layer, dtype)
    bank = CodebookBank(options, 1, EXPERTS, WIDTH, seed=5)
    parts: Any = layer.router
    router, gate, experts = parts.continuous, parts.path_gate, layer.experts
    oracle = OracleLayer(
        _leaf(experts.w1),
        _leaf(experts.w2),
        _leaf(experts.w3),
        bank.codes_LKC[0].double(),
        [k % EXPERTS for k in range(bank.num_codes)],
        router_ND=_leaf(router.gate.weight) if router else None,
        gate_2D=_leaf(gate.weight) if gate else None,
        gate_bias_2=_leaf(gate.bias) if gate else None,
        **{name: getattr(config, name) for name in ("top_k", "code_blend", "balance_weight", "z_loss_weight")},
        **{name: getattr(options, name) for name in ("commitment_weight", "soft_output", "normalize_source")},
        cosine=options.distance == "cosine",
        projection_DC=None if bank.projection_DC is None else bank.projection_DC.double(),
    )
    return layer, bank, oracle


def _clear_tokens(x_TD: Tensor, oracle: OracleLayer) -> Tensor:
    """Tokens whose experts are no matter of rounding."""
    kept = []
    for x_D in x_TD.double():
        clear = oracle.margin(x_D) > 1e-2
        if oracle.router_ND is not None:
            probs = (oracle.router_ND @ x_D).softmax(0).sort(descending=True).values
            clear = clear and float(-probs.diff()[: oracle.top_k].max()) > 1e-3
        if clear:
            kept.append(x_D)
        if len(kept) == TOKENS:
            return torch.stack(kept).to(x_TD.dtype)
    raise ValueError("too many near ties: choose another seed")


# ---------------------------------------------------------------- the other routers


def _router_errors(bench: Bench, dtype: torch.dtype, router: str) -> dict[str, float]:
    """Outputs, losses, gradients and state over two steps, on the device and on the CPU in float32."""
    config = MoEConfig(router=router, top_k=2, num_experts=EXPERTS, expert_hidden=HIDDEN, z_loss_weight=0.1)
    options = {"low_dim": 8, "decay": 0.8}
    there = MoELayer(LayerConfig(WIDTH, config, options, layer=1, seed=5, vocab_size=VOCAB, steps=20))
    _redraw(there, dtype)
    here = copy.deepcopy(there).to(bench.device)
    for parameter in there.parameters():
        parameter.data = parameter.data.float()
    errors: dict[str, float] = {}
    for step in range(2):
        x_TD, direction_TD = _draw((TOKENS, WIDTH), 10 + step, dtype), _draw((TOKENS, WIDTH), 20 + step, dtype)
        runs = [
            _one_step(layer, x_TD.to(kind), direction_TD.to(kind), step)
            for layer, kind in ((here, dtype), (there, torch.float32))
        ]
        for name, want in runs[1].items():
            errors[f"{name}, step {step + 1}"] = _error(runs[0][name], want)
    return errors


def _one_step(layer: MoELayer, x_TD: Tensor, direction_TD: Tensor, step: int) -> dict[str, Tensor | None]:
    device = layer.experts.w1.device
    generator = torch.Generator().manual_seed(step)
    rows = layer.config.moe.facts.told_rows(layer.config.options)
    ids = {
        name: torch.randint(0, high, size, generator=generator).to(device)
        for name, high, size in (
            ("expert_ids_TR", EXPERTS, (TOKENS, rows)),
            ("token_ids_T", VOCAB, (TOKENS,)),
            ("previous_T", EXPERTS, (TOKENS,)),
        )
    }
    x_TD = x_TD.to(device, copy=True).requires_grad_()
    layer.zero_grad()
    context = RoutingContext(**cast(dict[str, Any], ids), source_TD=x_TD.detach().float())
    y_BSD, aux, _ = layer(x_TD.view(2, -1, WIDTH), context)
    loss = (y_BSD.view(TOKENS, WIDTH) * direction_TD.to(device)).sum()
    (loss if aux is None else loss + aux).backward()
    found = {"output": y_BSD, "input gradient": x_TD.grad, "loss": aux}
    found |= {f"gradient of {name}": parameter.grad for name, parameter in layer.named_parameters()}
    sync = StateSync(layer)
    sync.step()
    return found | {f"state {name}": buffer.clone() for name, buffer in layer.named_buffers() if "router." in name}


# ---------------------------------------------------------------- codes


def _code_errors(bench: Bench) -> dict[str, float]:
    """Errors of search, sums and counts for several layers at once, with sizes that fill no block of a kernel."""
    layers, codes, width, tokens = (2, 17, 40, 150) if bench.small else (3, 150, 260, 5000)
    z_TC, codes_LKC = _draw((tokens, width), 1, torch.float32), _draw((layers, codes, width), 2, torch.float32)
    nearest_LT = nearest_codes(z_TC.to(bench.device), codes_LKC.to(bench.device))
    distances_LTK = torch.cdist(z_TC.double(), codes_LKC.double()).square()
    gaps_LT = distances_LTK.gather(2, nearest_LT.cpu().unsqueeze(2)).squeeze(2) - distances_LTK.amin(dim=2)
    members_LKT = nearest_LT.cpu().unsqueeze(1) == torch.arange(codes).view(1, -1, 1)
    counts_LK = count_ids(nearest_LT, codes)
    return {
        "nearest": float(gaps_LT.max() / distances_LTK.amin(dim=2).mean()),  # of a tie either may be taken
        "sums": relative_error(
            sum_by_code(z_TC.to(bench.device), nearest_LT, codes), members_LKT.double() @ z_TC.double()
        ),
        "counts": float((counts_LK.cpu() - members_LKT.sum(dim=2)).abs().max()),
    }


# ---------------------------------------------------------------- initialization and splitting


def _codebook(bench: Bench) -> Iterator[Finding]:
    """Both happen on the same tokens and codes here and there: every step's codes are compared."""
    book = CodebookConfig(
        source=CodeSource.LAYER_STATE, num_codes=16, code_map=CodeMap.BALANCED, kmeans_samples=512, overused_above=2.0
    )
    there = CodebookBank(book, 2, 8, 32, seed=1)
    here = copy.deepcopy(there).to(bench.device)
    banks, split = (there, here), False
    syncs = [StateSync(bank) for bank in banks]
    centres_GC = _draw((24, 32), 7, torch.float32) * 3
    for step in range(1, 11):  # initialization at the end of the first, splitting at that of the tenth
        generator = torch.Generator().manual_seed(step)
        crowd = torch.rand(1024, generator=generator) < (0.0 if step == 1 else 0.6)
        group_T = torch.randint(0, 24, (1024,), generator=generator).masked_fill(crowd, 0)
        z_TC = there.prepare(centres_GC[group_T] + torch.randn(1024, 32, generator=generator) * 0.3)
        for layer in range(2):
            codes_T = there.lookup(layer, z_TC)
            for bank in banks:
                bank.observe(layer, z_TC.to(bank.codes_LKC.device), codes_T.to(bank.codes_LKC.device))
        before_LKC = there.codes_LKC.clone()
        for sync in syncs:
            sync.step()
        moved = (there.codes_LKC - before_LKC).abs().amax(dim=2)
        split |= step == 10 and bool((moved > 1).any())
        if step in (1, 5, 10):
            what = {1: "initialization", 5: "five steps", 10: "splitting"}[step]
            errors = {"codes": _error(here.codes_LKC, there.codes_LKC)}
            errors["counts"] = _error(here.ema_count_LK, there.ema_count_LK)
            errors["table"] = float((here.code_map_LK.cpu() != there.code_map_LK).sum())
            yield within(f"codebook, {what}", errors, 1e-4)
    if not split:
        yield Finding("codebook, splitting", FAILED, why="no code was split, so the case says nothing")


# ---------------------------------------------------------------- small parts


def _error(got: Tensor | None, want: Tensor | None) -> float:
    """``relative_error``; no gradient is a gradient of zeros."""
    if got is None or want is None:
        other = want if got is None else got
        return 0.0 if other is None else float(other.detach().abs().max() > 0)
    return relative_error(got, want)


def _redraw(layer: nn.Module, dtype: torch.dtype) -> None:
    """Weights at which nothing is nearly linear or nearly zero; parameters of ``dtype``, as DeepSpeed casts them."""
    for seed, (name, parameter) in enumerate(layer.named_parameters()):
        if parameter.ndim > 1 or "gate" in name:
            parameter.data = _draw(tuple(parameter.shape), seed, torch.float32) * (0.5 if "experts" in name else 0.3)
        parameter.data = parameter.data.to(dtype)


def _draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().double().clone().requires_grad_()
