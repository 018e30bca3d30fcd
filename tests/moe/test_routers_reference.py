"""Every router beside vq against float64 loops: outputs, losses and gradients of its layer, and its state step by step.

``tests/router_oracle.py`` is the reference; the vq router has ``tests/oracle.py`` and test_layer_oracle.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import router_oracle as oracle
from vqmoe_ds.config.routers import routers
from vqmoe_ds.config.schema import CodebookConfig, MoEConfig
from vqmoe_ds.moe.config import LayerConfig
from vqmoe_ds.moe.layer import MoELayer
from vqmoe_ds.moe.routers import RoutingContext
from vqmoe_ds.moe.routers.adaptive_clustering import FeatureScaling, feature_weights
from vqmoe_ds.moe.routers.stablemoe import StableMoERouter
from vqmoe_ds.moe.sources import EmbeddingSource
from vqmoe_ds.moe.state_sync import StateSync

WIDTH, EXPERTS, SEQUENCE, SEQUENCES, VOCAB, SEED = 12, 6, 10, 3, 9, 5
TOKENS = SEQUENCE * SEQUENCES

Reference = Callable[[dict[str, Tensor], Tensor], tuple[oracle.Rows, Tensor]]
Outputs = Callable[[dict[str, Tensor], tuple[Tensor, Tensor, Tensor], Tensor], tuple[list[Tensor], Tensor]]


def _layer(router: str, top_k: int, layer: int = 1, steps: int = 100, sequence: int = 0, **options: Any) -> MoELayer:
    moe = {"router": router, "top_k": top_k, "num_experts": EXPERTS, "expert_hidden": 8}
    losses = {"balance_weight": 0.3, "z_loss_weight": 0.2}
    numbers = {"layer": layer, "seed": SEED, "vocab_size": VOCAB, "steps": steps, "sequence_length": sequence}
    made = MoELayer(LayerConfig(WIDTH, MoEConfig(**moe, **losses), options, **numbers))
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return made


def _states(seed: int = 0, tokens: int = TOKENS) -> Tensor:
    spread_D = torch.linspace(0.2, 2.0, WIDTH)
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed)) * spread_D


def _ids(high: int, seed: int = 0) -> Tensor:
    return torch.randint(0, high, (TOKENS,), generator=torch.Generator().manual_seed(50 + seed))


def _compare(layer: MoELayer, reference: Reference, known: RoutingContext | None = None) -> None:
    def outputs(
        weights: dict[str, Tensor], experts: tuple[Tensor, Tensor, Tensor], x_TD: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        rows, aux = reference(weights, x_TD)
        zero_D = torch.zeros(WIDTH, dtype=torch.float64)
        each = zip(rows, x_TD, strict=True)
        return [sum((w * oracle.expert(*experts, e, x_D) for e, w in row), zero_D) for row, x_D in each], aux

    _compare_outputs(layer, outputs, known)


def _compare_outputs(layer: MoELayer, outputs: Outputs, known: RoutingContext | None = None) -> None:
    x_TD = _states()
    here_TD, there_TD = x_TD.clone().requires_grad_(), x_TD.double().requires_grad_()
    probe_TD = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(3))
    y_BSD, aux, _ = layer(here_TD.view(SEQUENCES, SEQUENCE, WIDTH), known)
    loss = (y_BSD.view(TOKENS, WIDTH) * probe_TD).sum()
    (loss if aux is None else loss + aux).backward()

    weights = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    experts = weights["experts.w1"], weights["experts.w2"], weights["experts.w3"]
    named = {name.removeprefix("router."): w for name, w in weights.items()}
    want, want_aux = outputs(named, experts, there_TD)
    want_TD = torch.stack(want)
    ((want_TD * probe_TD).sum() + want_aux).backward()

    assert torch.allclose(y_BSD.view(TOKENS, WIDTH).double(), want_TD, atol=1e-5)
    assert (0.0 if aux is None else aux.item()) == pytest.approx(want_aux.item(), abs=1e-5)
    assert torch.allclose(here_TD.grad.double(), there_TD.grad, atol=2e-4)
    for name, parameter in layer.named_parameters():
        want = weights[name].grad
        got = parameter.grad.double()
        assert torch.allclose(got, torch.zeros_like(got) if want is None else want, atol=2e-4), name


@pytest.mark.parametrize("over", ["auto", "chosen", "all"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_topk(top_k: int, over: str) -> None:
    over_all = over == "all" or (over == "auto" and top_k == 1)

    def reference(weights: dict[str, Tensor], x_TD: Tensor) -> tuple[oracle.Rows, Tensor]:
        scores = oracle.linear_scores(x_TD, weights["gate.weight"])
        rows = oracle.softmax_rows(scores, top_k, over_all)
        return rows, oracle.auxiliary(scores, rows, 0.3, 0.2)

    _compare(_layer("topk", top_k, softmax_over=over), reference)


@pytest.mark.parametrize("top_k", [1, 2])
def test_topk_context(top_k: int) -> None:
    embedded_TD = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(6))
    mixed = [s_D for part_SD in embedded_TD.double().split(SEQUENCE) for s_D in oracle.context_source(part_SD, 3, 0.5)]
    book = CodebookConfig(source="context", context_window=3, context_decay=0.5)
    source = EmbeddingSource(book, VOCAB, WIDTH, SEQUENCE)
    ids_BS = torch.zeros(SEQUENCES, SEQUENCE, dtype=torch.int64)
    source_TD = source(ids_BS, embedded_TD.view(SEQUENCES, SEQUENCE, WIDTH)).flatten(0, 1)

    def reference(weights: dict[str, Tensor], x_TD: Tensor) -> tuple[oracle.Rows, Tensor]:
        scores = oracle.linear_scores(torch.stack(mixed), weights["gate.weight"])
        rows = oracle.softmax_rows(scores, top_k, over_all=top_k == 1)
        return rows, oracle.auxiliary(scores, rows, 0.3, 0.2)

    _compare(_layer("topk_context", top_k), reference, RoutingContext(source_TD=source_TD))


@pytest.mark.parametrize("top_k", [1, 2])
def test_topk_frozen(top_k: int) -> None:
    layer = _layer("topk_frozen", top_k, freeze_step=2)
    sync, gate = StateSync(layer), layer.router.gate.weight
    for step in range(2):
        kept_ND = gate.detach().double()

        def learned(weights: dict[str, Tensor], x_TD: Tensor) -> tuple[oracle.Rows, Tensor]:
            scores = oracle.linear_scores(x_TD, weights["gate.weight"])
            rows = oracle.softmax_rows(scores, top_k, over_all=top_k == 1)
            return rows, oracle.auxiliary(scores, rows, 0.3, 0.2)

        layer.zero_grad()
        _compare(layer, learned)
        assert gate.grad.abs().max() > 0.01
        sync.step()
        assert layer.router.is_frozen is (step == 1)
        gate.data += 0.3 * torch.randn(gate.shape, generator=torch.Generator().manual_seed(step))

    def frozen(weights: dict[str, Tensor], x_TD: Tensor) -> tuple[oracle.Rows, Tensor]:
        rows = oracle.softmax_rows(oracle.linear_scores(x_TD, kept_ND), top_k, over_all=top_k == 1)
        return rows, torch.zeros((), dtype=torch.float64)

    layer.zero_grad()
    _compare(layer, frozen)
    assert gate.grad is not None and gate.grad.abs().max() == 0, "engines wait for it"
    again = _layer("topk_frozen", top_k, freeze_step=90)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(_states().unsqueeze(0))[0], layer(_states().unsqueeze(0))[0]), "the checkpoint decides"


@pytest.mark.parametrize("top_k", [1, 2])
def test_expert_bias(top_k: int) -> None:
    layer = _layer("expert_bias", top_k)
    bias_N = [0.3, -0.2, 0.0, 0.5, -0.4, 0.1]
    layer.router.bias_N.copy_(torch.tensor(bias_N))

    def reference(weights: dict[str, Tensor], x_TD: Tensor) -> tuple[oracle.Rows, Tensor]:
        scores = oracle.linear_scores(x_TD, weights["gate.weight"])
        rows = oracle.expert_bias(x_TD, weights["gate.weight"], bias_N, top_k)
        return rows, oracle.auxiliary(scores, rows, 0.0, 0.2)

    _compare(layer, reference)


def test_expert_bias_moves_against_the_load_once_a_step() -> None:
    layer, bias_N = _layer("expert_bias", 2, bias_rate=0.05), [0.0] * EXPERTS
    sync, gate_ND = StateSync(layer), layer.router.gate.weight.detach().double()
    busiest = []
    for step in range(30):
        loads = [0] * EXPERTS
        for micro in range(2):
            x_TD = _states(2 * step + micro) + 0.7
            layer(x_TD.unsqueeze(0))
            for row in oracle.expert_bias(x_TD.double(), gate_ND, bias_N, 2):
                for e, _ in row:
                    loads[e] += 1
        sync.step()
        bias_N = oracle.expert_bias_step(bias_N, loads, 0.05)
        assert layer.router.bias_N.tolist() == pytest.approx(bias_N, abs=1e-6)
        busiest.append(max(loads) / (2 * TOKENS * 2 / EXPERTS))
    assert sum(busiest[-10:]) / 10 < 1.45 < 1.55 < busiest[0], "the loads were evened out"


@pytest.mark.parametrize(("router", "top_k"), [("random_frozen", 1), ("random_frozen", 2), ("smoe_dropout", 2)])
def test_frozen_gates(router: str, top_k: int) -> None:
    layer = _layer(router, top_k)
    gate_ND = layer.router.gate_ND.double()

    def reference(weights: dict[str, Tensor], x_TD: Tensor) -> tuple[oracle.Rows, Tensor]:
        assert not [name for name in weights if not name.startswith("experts")], "nothing here learns"
        scores = oracle.linear_scores(x_TD, gate_ND)
        return oracle.softmax_rows(scores, top_k, over_all=False), torch.zeros(())

    _compare(layer, reference)


@pytest.mark.parametrize("router", ["random_frozen", "smoe_dropout"])
def test_the_scale_of_a_frozen_gate_is_that_of_its_logits(router: str) -> None:
    config = LayerConfig(400, MoEConfig(router=router, num_experts=64, top_k=2), {"gate_scale": 0.32})
    x_TD = torch.nn.functional.rms_norm(torch.randn(500, 400, generator=torch.Generator().manual_seed(1)), (400,))
    layer = MoELayer(config)
    assert (x_TD @ layer.router.gate_ND.t()).std().item() == pytest.approx(0.32, rel=0.02)
    whole = MoELayer(LayerConfig(400, config.moe))
    assert torch.allclose(whole.router.gate_ND * 0.32, layer.router.gate_ND)
    assert torch.equal(whole(x_TD.unsqueeze(0))[2], layer(x_TD.unsqueeze(0))[2]), "the same choice"


def test_smoe_dropout_grows_linearly_and_reads_a_saved_counter() -> None:
    layer = _layer("smoe_dropout", 2, steps=8, final_top_k=6)
    sync, counts = StateSync(layer), []
    for _ in range(11):
        layer(_states().unsqueeze(0))
        counts.append(round(float(layer.tokens_per_expert.sum()) / TOKENS))
        layer.tokens_per_expert.zero_()
        sync.step()
    assert counts == [int(2 + 4 * min(1.0, step / 8) + 0.5) for step in range(11)]
    again = _layer("smoe_dropout", 2, steps=8, final_top_k=6)
    again.load_state_dict(layer.state_dict())
    assert again.router.top_k == 6
    assert layer(_states().unsqueeze(0))[2].shape == (TOKENS, 2), "what is compared between steps keeps its shape"


@pytest.mark.parametrize("top_k", [1, 2])
def test_xmoe(top_k: int) -> None:
    def reference(weights: dict[str, Tensor], x_TD: Tensor) -> tuple[oracle.Rows, Tensor]:
        names = ("scores.projection_PD", "scores.experts_NP", "scores.log_temperature")
        scores = oracle.xmoe_scores(x_TD, *(weights[name] for name in names))
        rows = oracle.softmax_rows(scores, top_k, over_all=top_k == 1)
        return rows, oracle.auxiliary(scores, rows, 0.3, 0.2)

    layer = _layer("xmoe", top_k, low_dim=4, temperature=0.5)
    assert layer.router.scores.log_temperature.item() == pytest.approx(math.log(0.5))
    _compare(layer, reference)
    assert layer.router.scores.log_temperature.grad.abs() > 0, "the temperature is learned"
    assert _layer("xmoe", 1).router.scores.projection_PD.shape == (EXPERTS // 2, WIDTH)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("stage", [1, 2])
def test_stablemoe(stage: int, top_k: int) -> None:
    layer, ids_T = _layer("stablemoe", top_k, low_dim=3, distil_steps=1, distil_weight=0.7), _ids(VOCAB)
    if stage == 2:
        StateSync(layer).step()

    def reference(weights: dict[str, Tensor], x_TD: Tensor) -> tuple[oracle.Rows, Tensor]:
        names = ("gate.weight", "light.words_VP", "light.experts_NP")
        light = (weights[name] for name in names)
        rows, scores, distillation = oracle.stablemoe(x_TD, ids_T.tolist(), *light, top_k, stage)
        if stage == 2:
            return rows, torch.zeros((), dtype=torch.float64)
        return rows, oracle.auxiliary(scores, rows, 0.3, 0.2) + 0.7 * distillation

    _compare(layer, reference, RoutingContext(token_ids_T=ids_T))


def test_stablemoe_freezes_what_it_distilled() -> None:
    layer, ids_T = _layer("stablemoe", 1, low_dim=6, distil_steps=25), _ids(VOCAB)
    words_VD = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(1))
    x_TD = words_VD[ids_T]  # states that follow from their tokens can be distilled
    light, rest = layer.router.light.parameters(), [layer.router.gate.weight, *layer.experts.parameters()]
    groups = [{"params": list(light)}, {"params": rest, "lr": 0.0}]  # a gate that stands still has routes to learn
    optimizer, sync = torch.optim.AdamW(groups, lr=0.3, weight_decay=0.01), StateSync(layer)
    chosen = []
    for step in range(30):
        optimizer.param_groups[1]["lr"] = 0.1 * (step >= 25)
        y_BSD, aux, experts_TR = layer(x_TD.unsqueeze(0), RoutingContext(token_ids_T=ids_T))
        (0.01 * y_BSD.square().mean() + aux).backward()
        optimizer.step()
        optimizer.zero_grad()
        sync.step()
        chosen.append(experts_TR[:, 0])
    assert isinstance(layer.router, StableMoERouter) and layer.router.frozen
    assert torch.equal(chosen[24], chosen[25]), "the light router learned the routes"
    assert len(chosen[25].unique()) > 2
    assert all(torch.equal(chosen[25], later) for later in chosen[26:]), "and nothing moves them any more"
    assert layer.router.gate(x_TD).argmax(-1).ne(chosen[25]).any(), "although the gate goes on learning"


@pytest.mark.parametrize("steps_then", [3, 90])
def test_stablemoe_changes_stage_once_though_the_run_goes_on_with_another_length(steps_then: int) -> None:
    first = _layer("stablemoe", 1, distil_steps=9)
    known, sync = RoutingContext(token_ids_T=_ids(VOCAB)), StateSync(first)
    for _ in range(6 if steps_then == 3 else 12):
        first(_states().unsqueeze(0), known)
        sync.step()
    then = _layer("stablemoe", 1, distil_steps=steps_then)
    then.load_state_dict(first.state_dict())
    assert bool(then.router.frozen) is (steps_then == 90)
    StateSync(then).step()
    assert bool(then.router.frozen)
    assert torch.equal(then.router.table_Vk, then.router.light.table(1))


@pytest.mark.parametrize("top_k", [0, 1, 2])
def test_hash_context(top_k: int) -> None:
    layer, told_T = _layer("hash_context", top_k), _ids(EXPERTS)

    def reference(weights: dict[str, Tensor], x_TD: Tensor) -> tuple[oracle.Rows, Tensor]:
        if top_k == 0:
            one = torch.ones((), dtype=torch.float64)
            return [[(e, one)] for e in told_T.tolist()], torch.zeros((), dtype=torch.float64)
        scores = oracle.linear_scores(x_TD, weights["continuous.gate.weight"])
        rows = oracle.dual(
            x_TD,
            told_T.tolist(),
            weights["continuous.gate.weight"],
            weights["path_gate.weight"],
            weights["path_gate.bias"],
            top_k,
        )
        chosen = oracle.softmax_rows(scores, top_k, over_all=True)
        return rows, oracle.auxiliary(scores, chosen, 0.3, 0.2)

    _compare(layer, reference, RoutingContext(told_T.unsqueeze(1)))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("router, told", [("hash_and_code", 2), ("hash_ngrams", 3)])
def test_experts_that_are_told(router: str, told: int, gated: bool) -> None:
    layer = _layer(router, 1, gated=gated, **({"ngrams": told} if router == "hash_ngrams" else {}))
    told_TR = torch.stack([_ids(EXPERTS).roll(7 * place) for place in range(told)], dim=1)

    def reference(weights: dict[str, Tensor], x_TD: Tensor) -> tuple[oracle.Rows, Tensor]:
        weights_TR = torch.ones(len(x_TD), told, dtype=torch.float64)
        if gated:
            powers_TR = (x_TD @ weights["gate.weight"].T + weights["gate.bias"]).exp()
            weights_TR = powers_TR / powers_TR.sum(dim=1, keepdim=True)
        rows = [list(zip(ids, ours, strict=True)) for ids, ours in zip(told_TR.tolist(), weights_TR, strict=True)]
        return rows, torch.zeros((), dtype=torch.float64)

    _compare(layer, reference, RoutingContext(told_TR))


@pytest.mark.parametrize("top_k", [1, 2])
def test_online_kmeans(top_k: int) -> None:
    layer = _layer("online_kmeans", top_k, temperature=0.4)
    means_ND = layer.router.means_ND.double()

    def reference(weights: dict[str, Tensor], x_TD: Tensor) -> tuple[oracle.Rows, Tensor]:
        scores = oracle.online_kmeans_scores(x_TD, means_ND, 0.4)
        return oracle.softmax_rows(scores, top_k, over_all=False), torch.zeros(())

    _compare(layer, reference)


def test_online_kmeans_follows_the_states_it_is_sent() -> None:
    layer = _layer("online_kmeans", 2, decay=0.7)
    layer.router.means_ND[3] = -10 * _states().sum(0)  # far from all: an expert without tokens stays
    sync, means_ND = StateSync(layer), layer.router.means_ND.double()
    for step in range(6):
        x_TD = _states(step).abs()
        rows = oracle.softmax_rows(oracle.online_kmeans_scores(x_TD.double(), means_ND, 0.3), 2, False)
        for half_TD in x_TD.split(TOKENS // 2):
            layer(half_TD.unsqueeze(0))
        sync.step()
        means_ND = oracle.online_kmeans_step(means_ND, x_TD.double(), rows, min(0.7, step / (step + 1)))
        assert torch.allclose(layer.router.means_ND.double(), means_ND, atol=1e-4)


@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_expert_choice(top_k: int) -> None:
    layer = _layer("expert_choice", top_k)

    def reference(weights: dict[str, Tensor], x_TD: Tensor) -> tuple[oracle.Rows, Tensor]:
        scores = oracle.linear_scores(x_TD, weights["gate.weight"])
        rows = oracle.expert_choice(x_TD, weights["gate.weight"], top_k, SEQUENCE)
        return rows, oracle.auxiliary(scores, [[(0, torch.ones(()))]], 0.0, 0.2)

    _compare(layer, reference)
    each = SEQUENCES * math.ceil(SEQUENCE * top_k / EXPERTS)
    assert layer.tokens_per_expert.tolist() == [each] * EXPERTS, "equal loads by construction"
    weights = {"gate.weight": layer.router.gate.weight.detach().double()}
    seen_TN = layer(_states().view(SEQUENCES, SEQUENCE, WIDTH))[2]
    for seen_N, row in zip(seen_TN.tolist(), reference(weights, _states().double())[0], strict=True):
        assert [e for e in seen_N if e >= 0] == [e for e, _ in row]


CLUSTERS = {
    "mixed": _ids(EXPERTS),
    "empty and single": torch.where(_ids(EXPERTS) > 3, 2, _ids(EXPERTS)).index_fill(0, torch.tensor([7]), 5),
    "one for all": torch.full((TOKENS,), 4),
    "each alone, one empty": torch.arange(TOKENS) % 5,
}


@pytest.mark.parametrize("clusters", CLUSTERS)
@pytest.mark.parametrize("scaling", list(FeatureScaling))
@pytest.mark.parametrize("top_k", [1, 2])
def test_adaptive_clustering_of_the_batch(top_k: int, scaling: FeatureScaling, clusters: str) -> None:
    clusters_T = CLUSTERS[clusters]
    layer = _layer("adaptive_clustering", top_k, statistics="batch", scaling=scaling, feature_clip=2.0)

    def reference(weights: dict[str, Tensor], x_TD: Tensor) -> tuple[oracle.Rows, Tensor]:
        deviations = oracle.ac_deviations(x_TD.detach(), clusters_T.tolist(), EXPERTS)
        feature = oracle.ac_weights(*deviations, scaling.value, 2.0)
        assert feature.max() > 1.1
        scores = oracle.ac_scores(x_TD, clusters_T.tolist(), feature, weights["scores.experts_ND"])
        rows = oracle.softmax_rows(scores, top_k, over_all=top_k == 1)
        return rows, oracle.auxiliary(scores, rows, 0.3, 0.2)

    if clusters == "one for all" and scaling is FeatureScaling.PER_FEATURE:
        with pytest.raises(AssertionError):  # the mean over one cluster is that cluster: weights are 1
            _compare(layer, reference, RoutingContext(previous_T=clusters_T))
        return
    _compare(layer, reference, RoutingContext(previous_T=clusters_T))


def test_weights_of_clusters_that_say_nothing_are_one_and_leave_the_others_alone() -> None:
    deviations_KD = torch.rand(EXPERTS, WIDTH, generator=torch.Generator().manual_seed(0)) + 0.1
    alone_KD = deviations_KD.clone()
    alone_KD[3] = alone_KD[5] = 0.0
    counts_K = torch.tensor([4, 9, 2, 1, 30, 7])
    for scaling in FeatureScaling:
        got_KD = feature_weights(alone_KD, counts_K, scaling, 10.0)
        rest = [0, 1, 2, 4]
        assert torch.equal(got_KD[[3, 5]], torch.ones(2, WIDTH)), "one token; many that are alike"
        assert torch.allclose(got_KD[rest], feature_weights(deviations_KD[rest], counts_K[rest], scaling, 10.0))
        assert torch.isfinite(feature_weights(alone_KD * 0, counts_K * 0, scaling, 10.0)).all()
    mean_D = feature_weights(deviations_KD, counts_K.clamp_min(2), FeatureScaling.PER_FEATURE, 10.0).mean(0)
    assert torch.allclose(mean_D, torch.ones(WIDTH))


@pytest.mark.parametrize("scaling", list(FeatureScaling))
def test_adaptive_clustering_of_earlier_steps(scaling: FeatureScaling) -> None:
    layer = _layer("adaptive_clustering", 2, scaling=scaling, decay=0.6, feature_clip=2.0)
    sync, running = StateSync(layer), oracle.RunningClusters(EXPERTS, WIDTH)
    for step in range(6):
        x_TD, clusters_T = _states(step), CLUSTERS["empty and single" if step % 2 else "mixed"]
        for half_TD, half_T in zip(x_TD.chunk(2), clusters_T.chunk(2), strict=True):
            layer(half_TD.unsqueeze(0), RoutingContext(previous_T=half_T))
        sync.step()
        running.step(x_TD.double(), clusters_T.tolist(), min(0.6, step / (step + 1)))
        want_KD = running.weights(scaling.value, 2.0)
        assert torch.allclose(layer.router.weights_KD.double(), want_KD, atol=1e-5), step
    assert (want_KD - 1).abs().max() > 0.1

    def reference(weights: dict[str, Tensor], x_TD: Tensor) -> tuple[oracle.Rows, Tensor]:
        clusters = CLUSTERS["mixed"].tolist()
        scores = oracle.ac_scores(x_TD, clusters, want_KD, weights["scores.experts_ND"])
        rows = oracle.softmax_rows(scores, 2, over_all=False)
        return rows, oracle.auxiliary(scores, rows, 0.3, 0.2)

    layer.zero_grad()
    _compare(layer, reference, RoutingContext(previous_T=CLUSTERS["mixed"]))


def test_the_control_of_adaptive_clustering_differs_in_the_weights_alone() -> None:
    known, x_BSD = RoutingContext(previous_T=CLUSTERS["mixed"]), _states().unsqueeze(0)
    control = _layer("adaptive_clustering", 2, statistics="none")
    fresh = _layer("adaptive_clustering", 2, statistics="running")
    assert torch.equal(control(x_BSD, known)[0], fresh(x_BSD, known)[0]), "before the first step weights are 1"
    for layer in (control, fresh):
        sync = StateSync(layer)
        for step in range(3):
            layer(_states(step).unsqueeze(0), known)
            sync.step()
    assert torch.equal(control.router.weights_KD, torch.ones(EXPERTS, WIDTH))
    assert not torch.equal(fresh.router.weights_KD, control.router.weights_KD)
    assert control.state_dict().keys() == fresh.state_dict().keys()
    assert _layer("adaptive_clustering", 2, layer=0).router.state_dict().keys() == {"gate.weight"}


@pytest.mark.parametrize(("sequence", "options", "slots"), [(SEQUENCE, {}, 3), (0, {}, 1), (SEQUENCE, {"slots": 2}, 2)])
def test_softmoe(sequence: int, options: dict[str, int], slots: int) -> None:
    layer = _layer("softmoe", 2, sequence=sequence, **options)
    layer.router.scores.scale.data.fill_(3.0)  # at 1 every slot is almost the mean of its sequence

    def outputs(
        weights: dict[str, Tensor], experts: tuple[Tensor, Tensor, Tensor], x_TD: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        phi_CD, scale = weights["scores.slots_CD"], weights["scores.scale"]
        return oracle.softmoe(x_TD, experts, phi_CD, scale, SEQUENCE, torch.ones_like(x_TD)), torch.zeros(())

    _compare_outputs(layer, outputs)
    assert layer.tokens_per_expert.tolist() == [SEQUENCES * slots] * EXPERTS, "equal loads by construction"
    phi_CD, x_TD = layer.router.scores.slots_CD, _states()
    strongest_T = (F.normalize(x_TD, dim=1) @ F.normalize(phi_CD, dim=1).t()).argmax(1) // slots
    assert torch.equal(layer(x_TD.view(SEQUENCES, SEQUENCE, WIDTH))[2], strongest_T.unsqueeze(1))


@pytest.mark.parametrize("smoothing", [1e-4, 0.35])
@pytest.mark.parametrize("scaling", list(FeatureScaling))
def test_softmoe_ac_of_the_batch(scaling: FeatureScaling, smoothing: float) -> None:
    clusters_T = CLUSTERS["empty and single"]
    layer = _layer(
        "softmoe_ac", 2, sequence=SEQUENCE, statistics="batch", scaling=scaling, feature_clip=2.0, smoothing=smoothing
    )
    layer.router.scores.scale.data.fill_(3.0)

    def outputs(
        weights: dict[str, Tensor], experts: tuple[Tensor, Tensor, Tensor], x_TD: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        unit_TD = torch.stack([x_D / x_D.norm() for x_D in x_TD.detach()])
        deviations = oracle.ac_deviations(unit_TD, clusters_T.tolist(), EXPERTS)
        feature_KD = oracle.ac_weights(*deviations, scaling.value, 2.0, smoothing)
        assert feature_KD.max() > 1.05
        phi_CD, scale = weights["scores.slots_CD"], weights["scores.scale"]
        return oracle.softmoe(x_TD, experts, phi_CD, scale, SEQUENCE, feature_KD[clusters_T]), torch.zeros(())

    _compare_outputs(layer, outputs, RoutingContext(previous_T=clusters_T))


def test_softmoe_ac_follows_earlier_steps_and_its_control_is_softmoe() -> None:
    known, x_BSD = RoutingContext(previous_T=CLUSTERS["mixed"]), _states().view(SEQUENCES, SEQUENCE, WIDTH)
    options = {"sequence": SEQUENCE, "slots": 2}
    plain = _layer("softmoe", 1, **options)
    control = _layer("softmoe_ac", 1, **options, statistics="none")
    running = _layer("softmoe_ac", 1, **options, decay=0.6)
    sync, clusters = StateSync(running), oracle.RunningClusters(EXPERTS, WIDTH)
    for step in range(3):
        x_TD = _states(step)
        running(x_TD.view(SEQUENCES, SEQUENCE, WIDTH), known)
        sync.step()
        unit_TD = F.normalize(x_TD.double(), dim=1)
        clusters.step(unit_TD, CLUSTERS["mixed"].tolist(), min(0.6, step / (step + 1)))
        want_KD = clusters.weights("global", 10.0, 0.35)
        assert torch.allclose(running.router.weights_KD.double(), want_KD, atol=1e-5), step
    assert torch.equal(control(x_BSD, known)[0], plain(x_BSD)[0])
    assert not torch.equal(running(x_BSD, known)[0], plain(x_BSD)[0])
    assert _layer("softmoe_ac", 1, layer=0).router.name == "softmoe"


def test_the_first_layers_of_adaptive_clustering_may_be_plain() -> None:
    for plain in (1, 2, 3):
        routers_of = [
            type(_layer("adaptive_clustering", 2, layer=layer, plain_layers=plain).router).name for layer in range(5)
        ]
        assert routers_of == ["topk"] * plain + ["adaptive_clustering"] * (5 - plain)

    def reference(weights: dict[str, Tensor], x_TD: Tensor) -> tuple[oracle.Rows, Tensor]:
        scores = oracle.linear_scores(x_TD, weights["gate.weight"])
        rows = oracle.softmax_rows(scores, 2, over_all=False)
        return rows, oracle.auxiliary(scores, rows, 0.3, 0.2)

    known = RoutingContext(previous_T=CLUSTERS["mixed"])
    _compare(_layer("adaptive_clustering", 2, layer=1, plain_layers=2, statistics="batch"), reference, known)


@pytest.mark.parametrize("router", ["expert_bias", "smoe_dropout", "stablemoe", "online_kmeans", "adaptive_clustering"])
def test_state_stays_in_full_precision_and_evaluation_and_skipped_steps_leave_none(router: str) -> None:
    layer = _layer(router, 2).bfloat16()
    for module in layer.modules():  # as DeepSpeed casts: parameters alone
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.dtype == torch.bfloat16:
                module._buffers[name] = buffer.float()
    known = RoutingContext(token_ids_T=_ids(VOCAB), previous_T=_ids(EXPERTS))
    x_BSD, sync = _states().bfloat16().unsqueeze(0), StateSync(layer)
    before = {name: buffer.clone() for name, buffer in layer.router.named_buffers()}
    layer.eval()
    layer(x_BSD, known)
    assert layer.router.pending.abs().sum() == 0
    layer.train()
    y_BSD, _, _ = layer(x_BSD, known)
    assert y_BSD.dtype == torch.bfloat16 and layer.router.pending.dtype == torch.float64
    sync.skip()
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.router.named_buffers())
    assert layer.router.pending.abs().sum() == 0


def test_every_router_is_here() -> None:
    here = {name for name in routers() if f"test_{name}" in globals()}
    others = {"vq", "dense", "hash_token", "token_table", "random_frozen", "smoe_dropout", "adaptive_clustering"}
    others |= {"softmoe_ac", "hash_and_code", "hash_ngrams"}
    assert here | others == set(routers())
