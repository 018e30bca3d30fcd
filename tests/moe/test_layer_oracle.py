"""The MoE layer and the codebook against the float64 oracle: output, every gradient, losses, learning."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.oracle import OracleAdam, OracleEMA, OracleLayer, released
from vqmoe_ds.config.load import load_config
from vqmoe_ds.config.schema import CodebookConfig, CodeSource, MoEConfig
from vqmoe_ds.moe.codebook import CodebookBank
from vqmoe_ds.moe.config import LayerConfig
from vqmoe_ds.moe.layer import MoELayer
from vqmoe_ds.moe.routers import RoutingContext
from vqmoe_ds.moe.state_sync import StateSync
from vqmoe_ds.runtime.errors import ConfigError

WIDTH, HIDDEN, EXPERTS, TOKENS = 12, 10, 4, 24
# Lookups, gates and code offsets are float32 by design; where none takes part, float64 goes all the way.
FLOAT32, FLOAT64 = 2e-6, 1e-12

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "discrete only": ({"top_k": 0}, {}),
    "discrete only, blended": ({"top_k": 0, "code_blend": 0.5}, {}),
    "discrete only, the paper's input": ({"top_k": 0, "code_blend": 1.0}, {"commitment_weight": 0.25}),
    "top-1": ({"top_k": 1}, {}),
    "top-1, the paper's input": ({"top_k": 1, "code_blend": 1.0}, {"commitment_weight": 0.25}),
    "top-1, blended, all losses": (
        {"top_k": 1, "code_blend": 0.5, "balance_weight": 0.3, "z_loss_weight": 0.1},
        {"commitment_weight": 0.25},
    ),
    "top-2": ({"top_k": 2}, {}),
    "top-2, the paper's input": ({"top_k": 2, "code_blend": 1.0, "balance_weight": 0.3}, {}),
    "more codes than experts": ({"top_k": 1}, {"num_codes": 11}),
    "fewer codes than experts": ({"top_k": 0}, {"num_codes": 3}),
    "normalised": ({"top_k": 1}, {"normalize_source": True}),
    "cosine": ({"top_k": 0}, {"distance": "cosine", "num_codes": 7}),
    "low-dimensional cosine": ({"top_k": 1}, {"code_dim": 3, "distance": "cosine", "normalize_source": True}),
    "low-dimensional": ({"top_k": 0}, {"code_dim": 3, "num_codes": 6}),
    "normed output": ({"top_k": 0, "output_norm": True}, {}),
    "normed input, top-2": ({"top_k": 2, "input_norm": True}, {"normalize_source": True}),
    "both norms, blended, top-1": ({"top_k": 1, "input_norm": True, "output_norm": True, "code_blend": 0.3}, {}),
    "both norms, soft output": ({"top_k": 0, "input_norm": True, "output_norm": True}, {"soft_output": 2.0}),
    "soft output": ({"top_k": 0}, {"soft_output": 2.0}),
    "soft output, top-1, cosine": ({"top_k": 1}, {"soft_output": 0.5, "distance": "cosine", "normalize_source": True}),
}


def _build(moe: dict, book: dict, options: Any = None) -> tuple[MoELayer, CodebookBank, OracleLayer]:
    moe_config = MoEConfig(num_experts=EXPERTS, expert_hidden=HIDDEN, **moe)
    book_config = CodebookConfig(**{"source": CodeSource.LAYER_STATE, "normalize_source": False, **book})
    config = LayerConfig(WIDTH, moe_config, options, codebook=book_config, seed=3, shared_codebook=True)
    layer = MoELayer(config).double()
    bank = CodebookBank(book_config, 1, EXPERTS, WIDTH, seed=5)
    router, gate = layer.router.continuous, layer.router.path_gate
    with torch.no_grad():
        for name, parameter in layer.named_parameters():  # weights at which nothing is nearly linear or nearly zero
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * (0.5 if "experts" in name else 0.3))
            parameter.copy_(parameter.float())

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().double().clone().requires_grad_()

    oracle = OracleLayer(
        leaf(layer.experts.w1),
        leaf(layer.experts.w2),
        leaf(layer.experts.w3),
        bank.codes_LKC[0].double(),
        [k % EXPERTS for k in range(bank.num_codes)],
        router_ND=leaf(router.gate.weight) if router else None,
        gate_2D=leaf(gate.weight) if gate else None,
        gate_bias_2=leaf(gate.bias) if gate else None,
        top_k=moe_config.top_k,
        code_blend=moe_config.code_blend,
        balance_weight=moe_config.balance_weight,
        z_loss_weight=moe_config.z_loss_weight,
        commitment_weight=book_config.commitment_weight,
        soft_output=book_config.soft_output,
        normalize_source=book_config.normalize_source,
        cosine=book_config.distance == "cosine",
        projection_DC=None if bank.projection_DC is None else bank.projection_DC.double(),
        input_norm=moe_config.input_norm,
        output_norm=moe_config.output_norm,
    )
    return layer, bank, oracle


def _tokens(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, TOKENS // 2, WIDTH, generator=generator).double()


@pytest.mark.parametrize("case", CASES)
def test_output_gradients_and_losses(case: str) -> None:
    layer, bank, oracle = _build(*CASES[case])
    x_BSD = _tokens().requires_grad_()
    x_TD = x_BSD.detach().reshape(-1, WIDTH).requires_grad_()
    assert min(oracle.margin(x_D) for x_D in x_TD) > 1e-4, "a near tie: choose another seed"
    routed = {oracle.table_K[oracle.nearest(x_D)] for x_D in x_TD}
    assert len(routed) >= 3, "the case would not exercise routing"

    y_BSD, aux, _ = layer(x_BSD, RoutingContext(codebooks=bank))
    expected_TD, expected_aux = oracle.forward(x_TD)
    direction = torch.randn(y_BSD.shape, dtype=torch.float64)
    ((y_BSD * direction).sum() + 3 * aux).backward()
    ((expected_TD * direction.reshape(-1, WIDTH)).sum() + 3 * expected_aux).backward()

    moe, book = CASES[case]
    plain = moe["top_k"] == 0 and not moe.get("code_blend") and not book.get("soft_output")
    tolerance = FLOAT64 if plain else FLOAT32
    pairs = {
        "output": (y_BSD.reshape(-1, WIDTH), expected_TD),
        "input gradient": (x_BSD.grad.reshape(-1, WIDTH), x_TD.grad),
        "w1": (layer.experts.w1.grad, oracle.w1_NHD.grad),
        "w2": (layer.experts.w2.grad, oracle.w2_NDH.grad),
        "w3": (layer.experts.w3.grad, oracle.w3_NHD.grad),
    }
    if layer.router.continuous is not None:
        pairs["router"] = (layer.router.continuous.gate.weight.grad, oracle.router_ND.grad)
        pairs["gate"] = (layer.router.path_gate.weight.grad, oracle.gate_2D.grad)
        pairs["gate bias"] = (layer.router.path_gate.bias.grad, oracle.gate_bias_2.grad)
    for name, (got, want) in pairs.items():
        assert want.abs().max() > 1e-3, f"{name} is zero, so the comparison says nothing"
        error = ((got.double() - want).abs().max() / want.abs().max()).item()
        assert error < tolerance, f"{name}: {error:.2e}"
    assert aux.item() == pytest.approx(expected_aux.item(), rel=1e-6, abs=1e-9)


def _released() -> tuple[MoELayer, CodebookBank, OracleLayer]:
    """The layer of the preset, small."""
    run = load_config("released").config
    moe = run.moe.model_dump(exclude={"num_experts", "expert_hidden"})
    return _build(moe, {**run.codebook.model_dump(), "num_codes": EXPERTS}, run.router)


def test_the_released_preset_is_the_authors_layer() -> None:
    layer, bank, oracle = _released()
    gate = layer.router.continuous.gate
    gate.forward = partial(nn.Linear.forward, gate)  # in float64, for in float32 rounding alone teaches it 1e-6
    assert bank.codes_LKC.std() == pytest.approx(0.02, rel=0.3), "every embedding of the release starts so"
    bank.codes_LKC.mul_(50)
    oracle.codes_KC = bank.codes_LKC[0].double()
    x_BSD = _tokens().requires_grad_()
    x_TD = x_BSD.detach().reshape(-1, WIDTH).requires_grad_()
    assert min(oracle.margin(x_D) for x_D in x_TD) > 1e-4 and len({oracle.nearest(x_D) for x_D in x_TD}) >= 3
    y_BSD, aux, _ = layer(x_BSD, RoutingContext(codebooks=bank))
    expected_TD, commitment = released(oracle, x_TD)
    direction = torch.randn(y_BSD.shape, dtype=torch.float64)
    ((y_BSD * direction).sum() + 30 * aux).backward()
    ((expected_TD * direction.reshape(-1, WIDTH)).sum() + 30 * commitment).backward()
    pairs = {
        "output": (y_BSD.reshape(-1, WIDTH), expected_TD),
        "input gradient": (x_BSD.grad.reshape(-1, WIDTH), x_TD.grad),
        "w2": (layer.experts.w2.grad, oracle.w2_NDH.grad),
        "gate": (layer.router.path_gate.weight.grad, oracle.gate_2D.grad),
    }
    for name, (got, want) in pairs.items():
        error = ((got.double() - want).abs().max() / want.abs().max()).item()
        assert error < 5 * FLOAT32, f"{name}: {error:.2e}"  # the norm's epsilon meets 0.95 x + ... and not x + ...
    assert aux.item() == pytest.approx(commitment.item(), rel=1e-6)
    assert layer.router.continuous.gate.weight.grad.abs().max() < 1e-6, "a weight of 1 teaches the router nothing"


def test_codes_of_the_release_start_without_data_and_follow_the_models_schedule() -> None:
    layer, bank, oracle = _released()
    sync, start_KC = StateSync(bank), bank.codes_LKC[0].double()
    with pytest.raises(ConfigError, match="codebook.learning_rate=0 takes the model's rate"):
        _step(layer, bank, oracle, seed=9)
        sync.step()
    sync.skip()
    reference = OracleAdam(start_KC, 1.0)
    for step, rate in enumerate([0.004, 0.03, 0.02, 0.0, 0.01]):
        z_TC, codes_T = _step(layer, bank, oracle, seed=10 + step)
        bank.model_rate = reference.optimizer.param_groups[0]["lr"] = rate
        sync.step()
        reference.step(z_TC, codes_T)
        assert (bank.codes_LKC[0] - reference.codes_KC.detach()).abs().max() < 5e-6, step
    assert not bank.initialized and (bank.codes_LKC[0] - start_KC).abs().max() > 0.03


def test_plain_routing_by_code_is_the_expert_of_k_mod_n() -> None:
    """Without the oracle: weight of a token's expert set to zero silences exactly the tokens of its codes."""
    layer, bank, oracle = _build({"top_k": 0}, {"num_codes": 9})
    x_BSD = _tokens()
    with torch.no_grad():
        layer.experts.w2[2].zero_()
        silent_T = layer(x_BSD, RoutingContext(codebooks=bank))[0].reshape(-1, WIDTH).abs().sum(-1) == 0
    codes_T = torch.tensor([oracle.nearest(x_D) for x_D in x_BSD.reshape(-1, WIDTH)])
    assert silent_T.any()
    assert torch.equal(silent_T, codes_T % EXPERTS == 2)


LEARNING = {
    "euclidean": {},
    "more codes than experts": {"num_codes": 11},
    "cosine": {"distance": "cosine"},
    "low-dimensional": {"code_dim": 3, "normalize_source": True},
}


def _learning_layer(book: dict) -> tuple[MoELayer, CodebookBank, OracleLayer, StateSync]:
    never_placed = {"init_step": 1000, "dead_below": 0.0}
    layer, bank, oracle = _build({"top_k": 0}, {**never_placed, **book})
    return layer, bank, oracle, StateSync(bank)


def _step(layer: MoELayer, bank: CodebookBank, oracle: OracleLayer, seed: int) -> tuple[Tensor, list[int]]:
    """One training forward; the source vectors and codes the oracle sees, with the codes of this moment."""
    x_BSD = _tokens(seed)
    oracle.codes_KC = bank.codes_LKC[0].double()
    layer(x_BSD, RoutingContext(codebooks=bank))
    flat = x_BSD.reshape(-1, WIDTH)
    assert min(oracle.margin(x_D) for x_D in flat) > 1e-5
    return torch.stack([oracle.source(x_D) for x_D in flat]), [oracle.nearest(x_D) for x_D in flat]


@pytest.mark.parametrize("case", LEARNING)
def test_moving_average_learning(case: str) -> None:
    decays = {"decay": 0.6, "decay_final": 0.9, "decay_steps": 4}
    layer, bank, oracle, sync = _learning_layer({"learning": "ema", **decays, **LEARNING[case]})
    start_KC = bank.codes_LKC[0].double()
    reference = OracleEMA(start_KC.clone(), start_KC.clone(), torch.ones(len(start_KC), dtype=torch.float64))
    for step in range(6):
        z_TC, codes_T = _step(layer, bank, oracle, seed=10 + step)
        sync.step()
        reference.step(z_TC, codes_T, decay=0.6 + 0.3 * min(1.0, step / 4))
        wanted_KC = reference.codes_KC
        if oracle.cosine:
            wanted_KC = wanted_KC / wanted_KC.norm(dim=-1, keepdim=True)
        assert (bank.codes_LKC[0] - wanted_KC).abs().max() < 2e-6
        assert (bank.ema_count_LK[0] - reference.counts_K).abs().max() < 1e-5
    assert (bank.codes_LKC[0] - start_KC).abs().max() > 0.05


@pytest.mark.parametrize("case", ["euclidean", "more codes than experts", "low-dimensional"])
def test_gradient_learning(case: str) -> None:
    layer, bank, oracle, sync = _learning_layer({"learning": "gradient", "learning_rate": 0.02, **LEARNING[case]})
    start_KC = bank.codes_LKC[0].double()
    reference = OracleAdam(start_KC, 0.02)
    for step in range(8):
        z_TC, codes_T = _step(layer, bank, oracle, seed=10 + step)
        sync.step()
        reference.step(z_TC, codes_T)
        assert (bank.codes_LKC[0] - reference.codes_KC.detach()).abs().max() < 5e-6
    assert (bank.codes_LKC[0] - start_KC).abs().max() > 0.05


def test_two_micro_batches_learn_like_one() -> None:
    layer, bank, oracle, sync = _learning_layer({"learning": "ema", "decay": 0.5, "decay_steps": 0})
    start_KC = bank.codes_LKC[0].double()
    reference = OracleEMA(start_KC.clone(), start_KC.clone(), torch.ones(len(start_KC), dtype=torch.float64))
    (z_one, codes_one), (z_two, codes_two) = (_step(layer, bank, oracle, seed) for seed in (10, 11))
    sync.step()
    reference.step(torch.cat([z_one, z_two]), codes_one + codes_two, decay=bank.config.decay_final)
    assert (bank.codes_LKC[0] - reference.codes_KC).abs().max() < 2e-6


def test_evaluation_and_skipped_steps_leave_no_statistics() -> None:
    layer, bank, _, sync = _learning_layer({"learning": "ema"})
    before = bank.codes_LKC.clone()
    bank.eval()
    layer.eval()
    layer(_tokens(), RoutingContext(codebooks=bank))
    assert bank.pending.abs().sum() == 0 and layer.tokens_per_expert.sum() == 0
    bank.train()
    layer.train()
    layer(_tokens(), RoutingContext(codebooks=bank))
    assert bank.pending[..., -1].sum() == TOKENS == layer.tokens_per_expert.sum()
    sync.skip()
    assert bank.pending.abs().sum() == 0
    assert torch.equal(bank.codes_LKC, before)
