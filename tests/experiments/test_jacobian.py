"""The averaged Jacobian against autograd through the real layer, float64 formulas and finite differences.

Legend: T tokens, D width, N experts.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tests.evaluation.routed_models import CASES, EXPERTS, WIDTH, model_of, tokens_of
from vqmoe_ds.evaluation.probe import Visit, visit_layers
from vqmoe_ds.experiments import jacobian_report
from vqmoe_ds.experiments.jacobian import MeanJacobian, gate_share, spectrum, token_jacobians
from vqmoe_ds.runtime.errors import CheckpointError, ConfigError


def _by_autograd(visit: Visit, rows_of_one: int) -> torch.Tensor:
    """One backward pass for every output feature through the public module; tokens of a layer are independent."""
    layer, width = visit.layer, visit.x_TD.shape[1]
    x_TD = visit.x_TD.clone().requires_grad_()
    y_TD = layer(x_TD.view(-1, rows_of_one, width), visit.context)[0].view_as(x_TD)
    rows = [torch.autograd.grad(y_TD[:, d].sum(), x_TD, retain_graph=True)[0] for d in range(width)]
    return torch.stack(rows, dim=1).double()


NORMED = ("topk, two", "vq", "vq, part of the code", "hash_token", "expert_choice")


@pytest.mark.parametrize(("case", "norm"), [*((case, False) for case in CASES), *((case, True) for case in NORMED)])
def test_mean_and_single_jacobians_are_those_of_the_layer(case, norm):
    model, tokens_BS = model_of(case, output_norm=norm), tokens_of()
    for visit in visit_layers(model, tokens_BS):
        want_TDD = _by_autograd(visit, tokens_BS.shape[1])
        mean = MeanJacobian(visit.layer)
        mean.add(visit)
        terms = mean.terms()
        assert torch.allclose(terms["total"], want_TDD.mean(dim=0), atol=2e-5)
        assert torch.allclose(terms["experts"] + terms["router"], terms["total"])
        assert torch.allclose(token_jacobians(visit, [0, 5, 31]), want_TDD[[0, 5, 31]], atol=1e-4)


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"input_norm": True}, "moe.input_norm=true"),
        ({"shared_experts": 2}, "moe.shared_experts=2"),
    ],
)
def test_a_model_with_other_terms_is_refused(monkeypatch, option, named):
    loaded = SimpleNamespace(config=model_of("vq", **option).config)
    monkeypatch.setattr(jacobian_report, "load_routed", lambda path, tokenizer: loaded)
    with pytest.raises(CheckpointError, match=f"other has {named}, whose derivative"):
        jacobian_report.study(["other"])


@pytest.mark.parametrize(("length", "told"), [(5, 5), (16, 16)])
def test_as_many_single_tokens_are_told_as_were_looked_at(length, told):
    rows = jacobian_report._layers(SimpleNamespace(model=model_of("topk")), tokens_of(1)[:, :length], True)
    assert {row["single_tokens"]["tokens"] for row in rows} == {told}


def test_visits_add_up_to_the_mean_of_all_tokens():
    model, tokens_BS = model_of("vq"), tokens_of(4)
    whole, parts = (MeanJacobian(model.moe_layers()[1]) for _ in range(2))
    whole.add(visit_layers(model, tokens_BS)[1])
    for start in range(4):
        parts.add(visit_layers(model, tokens_BS[start : start + 1])[1])
    assert torch.allclose(whole.terms()["total"], parts.terms()["total"], atol=1e-6)


def _expert(visit: Visit, expert: int, x_D: torch.Tensor) -> torch.Tensor:
    experts = visit.layer.experts
    w1, w2, w3 = (w[expert].double() for w in (experts.w1, experts.w2, experts.w3))
    return w2 @ (F.silu(w1 @ x_D) * (w3 @ x_D))


def _differences(function, x_D: torch.Tensor, step: float = 1e-5) -> torch.Tensor:
    moves = step * torch.eye(len(x_D), dtype=torch.float64)
    return torch.stack([(function(x_D + m) - function(x_D - m)) / (2 * step) for m in moves], dim=1)


def test_the_terms_of_top_k_are_those_of_the_papers_equation():
    """``J = sum_k S_k J_FFN + sum_k E_k sum_j S_k (delta_kj - S_j) e_j^T``, with S the softmax over the chosen."""
    visit = visit_layers(model_of("topk, two"), tokens_of())[0]
    gate_ND = visit.layer.router.gate.weight.double()
    experts_term, router_term = torch.zeros(2, WIDTH, WIDTH, dtype=torch.float64)
    for x_D, chosen in zip(visit.x_TD.double(), visit.routing.expert_ids_TR.tolist(), strict=True):
        shares = (gate_ND[chosen] @ x_D).softmax(dim=0)
        for place, k in enumerate(chosen):
            experts_term += shares[place] * _differences(lambda z, k=k: _expert(visit, k, z), x_D)
            for other, j in enumerate(chosen):
                slope = shares[place] * (float(place == other) - shares[other])
                router_term += torch.outer(_expert(visit, k, x_D), slope * gate_ND[j])
    mean = MeanJacobian(visit.layer)
    mean.add(visit)
    terms, tokens = mean.terms(), len(visit.x_TD)
    assert torch.allclose(terms["experts"], experts_term / tokens, atol=1e-5)
    assert torch.allclose(terms["router"], router_term / tokens, atol=1e-5)


@pytest.mark.parametrize("straight_through", [True, False])
def test_the_discrete_path_by_finite_differences(straight_through):
    """``y = E(q)``: exactly, q moves with ``(1 - c) x``; straight-through, with x."""
    model = model_of("vq, part of the code", top_k=0)
    model.bank.config = model.bank.config.model_copy(update={"soft_output": 0.0})
    for layer in model.moe_layers():
        layer.router.config = replace(layer.router.config, codebook=model.bank.config)
    visit, blend = visit_layers(model, tokens_of())[2], 0.3
    codes_TD = model.bank.codes_LKC[2][visit.codes_T].double()
    want = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for token, x_D in enumerate(visit.x_TD.double()):
        expert, fixed_D = int(visit.routing.expert_ids_TR[token, 0]), codes_TD[token]

        def output(z_D, expert=expert, fixed_D=fixed_D, x_D=x_D):
            moving = z_D - blend * x_D if straight_through else (1 - blend) * z_D
            return _expert(visit, expert, moving + blend * fixed_D)

        want += _differences(output, x_D) / len(visit.x_TD)
    mean = MeanJacobian(visit.layer, straight_through)
    mean.add(visit)
    assert torch.allclose(mean.terms()["total"], want, atol=1e-5)
    assert not mean.terms()["router"].any()
    assert torch.allclose(token_jacobians(visit, list(range(32)), straight_through).mean(dim=0), want, atol=1e-5)


def test_the_papers_input_has_no_discrete_jacobian_at_all_when_taken_exactly():
    model = model_of("vq, the paper's input", top_k=0)
    mean = MeanJacobian(model.moe_layers()[0], straight_through=False)
    mean.add(visit_layers(model, tokens_of())[0])
    assert not mean.terms()["total"].any()


def test_a_softmax_router_adds_one_direction_less_than_it_has_experts_and_the_gate_one_more():
    """Not N, nor N + K + 2 with codes: shares that sum to 1 cannot all rise."""
    ranks = {}
    for case in ("topk, two", "vq", "hash_token", "vq, discrete only"):
        visit = visit_layers(model_of(case), tokens_of(8))[1]
        mean = MeanJacobian(visit.layer)
        mean.add(visit)
        ranks[case] = spectrum(mean.terms()["router"])["numerical_rank"]["1e-05"]
    assert ranks == {"topk, two": EXPERTS - 1, "vq": EXPERTS, "hash_token": 0, "vq, discrete only": 0}


def test_the_share_along_the_gate_is_all_where_nothing_but_the_gate_depends_on_the_input():
    model = model_of("vq")
    for layer in model.moe_layers():
        layer.router.continuous.gate.weight.zero_()
    layer = model.moe_layers()[0]
    mean = MeanJacobian(layer)
    mean.add(visit_layers(model, tokens_of())[0])
    router_DD = mean.terms()["router"]
    assert gate_share(layer, router_DD) == pytest.approx(1)
    assert gate_share(layer, router_DD + torch.eye(WIDTH)) < 0.9
    assert gate_share(model_of("topk").moe_layers()[0], router_DD) is None


def test_a_layer_of_mixtures_has_none():
    (visit, *_) = visit_layers(model_of("softmoe"), tokens_of())
    with pytest.raises(ConfigError, match="moe.router=softmoe sends mixtures of tokens to its experts"):
        MeanJacobian(visit.layer).add(visit)


def test_a_spectrum_says_what_it_holds():
    row = spectrum(torch.diag(torch.tensor([3.0, 3.0, 1e-4, 0.0])))
    assert row["singular_values"] == pytest.approx([3, 3, 1e-4, 0])
    assert row["numerical_rank"] == {"0.01": 2, "1e-05": 3}
    assert row["frobenius_norm"] == pytest.approx(18**0.5)
    assert row["effective_rank"] == pytest.approx(2, rel=1e-3)
