"""Traps of using the layer outside the trainer: each works, warns once or is refused in a sentence."""

from __future__ import annotations

import copy
import importlib
import pkgutil
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import vqmoe_ds
from vqmoe_ds.config.routers import routers
from vqmoe_ds.config.schema import CodebookConfig
from vqmoe_ds.moe import (
    LayerConfig,
    MoEConfig,
    MoELayer,
    Router,
    Routing,
    RoutingContext,
    StatefulRouter,
    StateSync,
    state,
)
from vqmoe_ds.moe.codebook import CodebookBank
from vqmoe_ds.runtime.errors import ConfigError

WIDTH, EXPERTS, TOKENS, VOCAB = 16, 4, 12, 50
NAMES = [name for name, kind in routers().items() if kind.has_experts]


@pytest.fixture(autouse=True)
def _nothing_was_warned_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(state, "_warned", set())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _layer(name: str, layer: int = 0, top_k: int = 1) -> MoELayer:
    moe = MoEConfig(router=name, num_experts=EXPERTS, expert_hidden=8, top_k=top_k)
    return MoELayer(LayerConfig(WIDTH, moe, layer=layer, vocab_size=VOCAB, steps=10))


def _call(layer: MoELayer, x_BSD: Tensor | None = None) -> Tensor:
    x_BSD = torch.randn(2, TOKENS // 2, WIDTH) if x_BSD is None else x_BSD
    return layer(x_BSD, _known(layer, x_BSD))[0]


def _known(layer: MoELayer, x_BSD: Tensor) -> RoutingContext:
    ids_T = torch.arange(x_BSD.shape[:-1].numel())
    facts = layer.config.moe.facts
    told_TR = None  # others choose for themselves
    if facts.uses_token_table:
        told_TR = torch.stack([(ids_T + row) % EXPERTS for row in range(facts.told_rows(layer.config.options))], dim=1)
    source_TD = x_BSD.detach().reshape(-1, x_BSD.shape[-1])
    return RoutingContext(told_TR, token_ids_T=ids_T % VOCAB, previous_T=ids_T % EXPERTS, source_TD=source_TD)


# ------------------------------------------------------------------- StateSync


def test_a_loop_without_sync_is_told_once_and_keeps_few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "PATIENCE", 20)
    model = nn.ModuleList([_layer("vq"), _layer("vq", 1), _layer("expert_bias", 2), _layer("online_kmeans", 3)])
    kept = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(50):
            for layer in model:
                _call(layer)
            kept.append(sum(len(samples) for samples in model[0].router.own_codebook._samples))
    assert len(caught) == 1
    assert "sync = vqmoe_ds.moe.StateSync(model)" in str(caught[0].message)
    assert "sync.step() after every optimizer.step()" in str(caught[0].message)
    assert kept[:3] == [1, 2, 3] and kept[15:] == [16] * 35


def test_samples_are_those_of_the_announced_micro_batches() -> None:
    layer = _layer("vq")
    StateSync(layer, accumulation_steps=3)
    for _ in range(5):
        _call(layer)
    assert len(layer.router.own_codebook._samples[0]) == 3


def test_a_loop_with_sync_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "PATIENCE", 2)
    layer = _layer("vq")
    sync = StateSync(layer, accumulation_steps=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            for _ in range(4):
                _call(layer)
            sync.step()


@pytest.mark.parametrize("name", ["vq", "expert_bias", "online_kmeans"])
def test_a_second_step_without_tokens_warns_once(name: str) -> None:
    layer = _layer(name)
    sync = StateSync(layer)
    _call(layer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sync.step()
        assert not caught
        sync.step()
        sync.step()
    assert len(caught) == 1 and "no forward pass in training since the last call" in str(caught[0].message)


@pytest.mark.parametrize("name", ["expert_bias", "online_kmeans"])
def test_a_sync_of_a_model_that_is_not_the_trained_one_warns_once(name: str) -> None:
    layer = _layer(name)
    sync, twin = StateSync(layer), copy.deepcopy(layer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            _call(twin)
            sync.step()
    (warning,) = caught
    assert "make it of the model that is trained, not of one that this is a copy of" in str(warning.message)


@pytest.mark.parametrize("name", NAMES)
def test_first_steps_of_a_model_do_not_warn(name: str) -> None:
    """Fresh and resumed, with a layer that is not used yet, after a skip, and in evaluation."""
    model = nn.ModuleList([_layer(name), _layer("expert_bias", 1)])
    resumed = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sync = StateSync(model)
        _call(model[0])
        sync.skip()
        for _ in range(2):
            _call(model[0])
            sync.step()
        _call(model[1])
        resumed.load_state_dict(model.state_dict())
        sync = StateSync(resumed)
        _call(resumed[0])
        sync.step()
        StateSync(_layer("expert_bias").eval()).step()


@pytest.mark.parametrize(("micro_batches", "accumulation"), [(0, 1), (1, 4)])
def test_too_few_micro_batches_are_refused_where_codes_are_placed(micro_batches: int, accumulation: int) -> None:
    layer = _layer("vq")
    sync = StateSync(layer, accumulation)
    for _ in range(micro_batches):
        _call(layer)
    with pytest.raises(ConfigError) as refusal:
        sync.step()
    text = str(refusal.value)
    assert f"no tokens in micro-batch {micro_batches}" in text and f"accumulation_steps={accumulation}" in text


@pytest.mark.parametrize("empty", [[True], [True, False], [False, True], [True, True]])
def test_empty_batches_place_codes_on_the_others_or_later(empty: list[bool]) -> None:
    layer = _layer("vq")
    sync, book = StateSync(layer, len(empty)), layer.router.own_codebook
    for none in empty:
        _call(layer, torch.randn(2, 0 if none else TOKENS, WIDTH))
    sync.step()
    assert book.initialized is not all(empty)
    for _ in empty:
        _call(layer)
    sync.step()
    assert book.initialized


# ------------------------------------------------------------------- inputs


@pytest.mark.parametrize("shape", [(2, 3, WIDTH - 1), (2, 3, WIDTH + 1), (WIDTH,)])
def test_inputs_of_another_width_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"D = 16, its LayerConfig\.width, and was given \["):
        _layer("topk")(torch.zeros(shape))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(2, 0, WIDTH), (0, 3, WIDTH), (0, WIDTH)])
def test_no_tokens_at_all(name: str, shape: tuple[int, ...]) -> None:
    layer = _layer(name)
    x_BSD = torch.zeros(shape, requires_grad=True)
    y_BSD = _call(layer, x_BSD)
    assert y_BSD.shape == shape
    y_BSD.sum().backward()
    assert all(w.grad is not None and not w.grad.any() for w in layer.experts.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_flat_batch_is_one_sequence(name: str) -> None:
    layer, x_TD = _layer(name).eval(), torch.randn(TOKENS, WIDTH)
    assert torch.equal(_call(layer, x_TD), _call(layer, x_TD.unsqueeze(0)).squeeze(0))


# ------------------------------------------------------------------- modes


def _state(layer: MoELayer) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


@pytest.mark.parametrize("name", NAMES)
def test_inference_mode_leaves_no_trace_in_training(name: str) -> None:
    layer, other = _layer(name), _layer(name)
    x_BSD, before = torch.randn(2, TOKENS // 2, WIDTH), torch.get_num_threads()
    for training in (False, True):
        layer.train(training)
        torch.set_num_threads(1 + training)  # helper threads are in no mode of their caller's by themselves
        with torch.inference_mode():
            _call(layer, x_BSD + 1)
    torch.set_num_threads(before)
    for trained in (layer, other):
        _call(trained, x_BSD).sum().backward()
        StateSync(trained).step()
    wanted = _state(other)
    for key, buffer in _state(layer).items():
        assert key == "tokens_per_expert" or torch.equal(buffer, wanted[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_built_in_inference_mode_runs_in_it(name: str) -> None:
    with torch.inference_mode():
        assert _call(_layer(name)).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_autocast_computes_in_its_type_and_learns_in_float32(name: str) -> None:
    layer = _layer(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_BSD = _call(layer)
    y_BSD.float().sum().backward()
    StateSync(layer).step()
    assert y_BSD.dtype == torch.bfloat16
    assert all(w.grad.dtype == torch.float32 for w in layer.experts.parameters())


@pytest.mark.parametrize("mean_tokens", [None, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_no_token_has_no_loss(name: str, mean_tokens: float | None) -> None:
    layer, x_BSD = _layer(name), torch.randn(2, 0, WIDTH)
    y_BSD, aux_loss, _ = layer(x_BSD, replace(_known(layer, x_BSD), mean_tokens=mean_tokens))
    assert y_BSD.shape == x_BSD.shape and aux_loss == 0


@pytest.mark.parametrize("name", NAMES)
def test_losses_go_by_the_tokens_of_the_ranks_that_share_them(name: str) -> None:
    moe = MoEConfig(router=name, num_experts=EXPERTS, expert_hidden=8, top_k=1, balance_weight=0.0, z_loss_weight=1.0)
    layer, x_BSD = MoELayer(LayerConfig(WIDTH, moe, vocab_size=VOCAB)), torch.randn(2, 6, WIDTH)
    if moe.facts.looks_ahead(layer.config.options) is not None:
        return  # refused where ranks share sequences
    context = _known(layer, x_BSD)
    here, shared = (layer(x_BSD, replace(context, mean_tokens=mean))[1] for mean in (None, 24.0))
    assert torch.allclose(shared, here / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_routes_are_those_of_float32_under_autocast(name: str, dtype: torch.dtype) -> None:
    layer, x_TD = _layer(name), torch.randn(1000, WIDTH).to(dtype)
    context = _known(layer, x_TD)
    want = layer.router(x_TD.float(), context)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = layer.router(x_TD, context)
    assert torch.equal(got.expert_ids_TR, want.expert_ids_TR)
    for one, other in ((got.weights_TR, want.weights_TR), (got.aux_loss, want.aux_loss)):
        assert (one is None and other is None) or torch.equal(one, other)
    assert want.slots is None or torch.equal(got.slots.weights_BSC, want.slots.weights_BSC)


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
@pytest.mark.parametrize("name", NAMES)
def test_a_cast_model_keeps_its_state_in_full_precision(name: str, cast: str) -> None:
    layer = _layer(name)
    before = _state(layer)
    getattr(nn.Sequential(layer), cast)()
    after = _state(layer)
    assert {w.dtype for w in layer.experts.parameters()} == {getattr(torch, cast)}
    assert {key: b.dtype for key, b in after.items()} == {key: b.dtype for key, b in before.items()}
    assert all(torch.equal(after[key], before[key]) for key in before)  # and no bit went through the narrow type
    if cast == "bfloat16":
        _call(layer, torch.randn(2, TOKENS // 2, WIDTH).bfloat16()).sum().backward()
        StateSync(layer).step()


def test_state_follows_its_model_to_another_device() -> None:
    layer = _layer("vq").to(device="meta", dtype=torch.bfloat16)
    assert all(b.is_meta for b in layer.buffers()) and layer.router.own_codebook.codes_LKC.dtype == torch.float32


def test_wider_types_are_taken() -> None:
    assert _layer("vq").double().router.own_codebook.codes_LKC.dtype == torch.float64


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _learn(layer: MoELayer, dtype: torch.dtype, steps: int = 3) -> None:
    sync = StateSync(layer)
    for step in range(steps):
        x_BSD = torch.randn(2, TOKENS // 2, WIDTH, generator=torch.Generator().manual_seed(step), dtype=torch.float32)
        y_BSD, aux_loss, _ = layer(x_BSD.to(dtype), _known(layer, x_BSD.to(dtype)))
        assert y_BSD.dtype == dtype and aux_loss.dtype == torch.float32
        (y_BSD.sum() + aux_loss).backward()
        sync.step()


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_float64_learns_and_routes_as_in_float32(name: str, index: int) -> None:
    layer, x_TD = _layer(name, index), torch.randn(200, WIDTH)
    wanted = layer.eval()(x_TD, _known(layer, x_TD))[2]
    layer.double()
    assert torch.equal(layer(x_TD.double(), _known(layer, x_TD.double()))[2], wanted)
    _learn(layer.train(), torch.float64)


@pytest.mark.parametrize(
    "book",
    [
        {"learning": "gradient", "learning_rate": 0.1},
        {"code_dim": 8, "distance": "cosine"},
        {"soft_output": 1.0, "commitment_weight": 0.1},
        {"num_codes": 12, "dead_below": 0.9, "overused_above": 1.1},
    ],
)
def test_every_way_of_codes_learns_in_float64(book: dict[str, Any]) -> None:
    blend = 0.5 if "soft_output" in book else 0.0
    moe = MoEConfig(router="vq", num_experts=EXPERTS, expert_hidden=8, top_k=1, code_blend=blend)
    _learn(
        MoELayer(LayerConfig(WIDTH, moe, codebook=CodebookConfig(source="layer_state", **book))).double(),
        torch.float64,
        25,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_state_is_float32_whatever_the_default_type(name: str, dtype: torch.dtype) -> None:
    wanted = _state(_layer(name, 1))
    with _default(dtype):
        layer = _layer(name, 1)
        found = _state(layer)
        _learn(layer, dtype)
    assert {key: b.dtype for key, b in found.items()} == {key: b.dtype for key, b in wanted.items()}
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


# ------------------------------------------------------------------- second derivatives


def _layer_in(width: int) -> MoELayer:
    """With a kernel for its experts at 32, without one at 24; with products of ours and PyTorch's."""
    moe = MoEConfig(router="hash_token", num_experts=EXPERTS, expert_hidden=width, top_k=1, shared_experts=1)
    return MoELayer(LayerConfig(width, moe, vocab_size=VOCAB))


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_are_refused(name: str) -> None:
    layer, x_BSD = _layer(name), torch.randn(2, TOKENS // 2, WIDTH, requires_grad=True)
    with pytest.raises(ConfigError, match="has no derivative of its own: leave out create_graph=True"):
        torch.autograd.grad(_call(layer, x_BSD).square().sum(), x_BSD, create_graph=True)


@pytest.mark.parametrize("width", [24, 32])
def test_hessians_and_penalties_of_linear_losses_are_refused(width: int) -> None:
    layer, x_BSD = _layer_in(width), torch.randn(1, 3, width)
    for loss in (lambda x: _call(layer, x).square().sum(), lambda x: _call(layer, x).sum()):
        with pytest.raises(ConfigError, match="Hessians"):
            torch.autograd.functional.hessian(loss, x_BSD)


@pytest.mark.parametrize("width", [24, 32])
def test_first_derivatives_are_taken_twice_and_recomputed(width: int) -> None:
    layer, x_BSD = _layer_in(width), torch.randn(1, 3, width, requires_grad=True)

    def gradients(loss: Tensor, **options: Any) -> list[Tensor]:
        return list(torch.autograd.grad(loss, [x_BSD, *layer.experts.parameters()], **options))

    loss = _call(layer, x_BSD).square().sum()
    wanted = gradients(loss, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(gradients(loss), wanted, strict=True))
    again = checkpoint(lambda x: _call(layer, x), x_BSD, use_reentrant=False).square().sum()
    assert all(torch.equal(a, b) for a, b in zip(gradients(again), wanted, strict=True))
    x_BSD.grad = None
    checkpoint(lambda x: _call(layer, x), x_BSD, use_reentrant=True).square().sum().backward()
    assert torch.equal(x_BSD.grad, wanted[0])


def test_no_custom_function_is_forgotten() -> None:
    for module in pkgutil.walk_packages(vqmoe_ds.__path__, "vqmoe_ds."):
        if module.name.startswith(("vqmoe_ds.moe.", "vqmoe_ds.models.")):
            importlib.import_module(module.name)
    ours = [kind for kind in torch.autograd.Function.__subclasses__() if kind.__module__.startswith("vqmoe_ds.mo")]
    assert len(ours) > 10
    for kind in ours:
        with torch.enable_grad(), pytest.raises(ConfigError, match="create_graph"):
            kind.backward(None, None)


# ------------------------------------------------------------------- copies


@pytest.mark.parametrize("name", NAMES)
def test_copies_learn_on_their_own_and_alike(name: str) -> None:
    layer, batches = _layer(name), [torch.randn(2, TOKENS // 2, WIDTH) for _ in range(3)]
    _call(layer, batches[0])
    StateSync(layer).step()
    _call(layer, batches[1])
    twin, at_rest = copy.deepcopy(layer), _state(layer)
    sync = StateSync(twin)
    sync.step()
    _call(twin, batches[2])
    sync.step()
    assert all(torch.equal(b, at_rest[key]) for key, b in _state(layer).items())
    sync = StateSync(layer)
    sync.step()
    _call(layer, batches[2])
    sync.step()
    wanted = _state(twin)
    assert all(torch.equal(b, wanted[key]) for key, b in _state(layer).items())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_carries_all_that_was_learned(name: str, assign: bool) -> None:
    trained, fresh = _layer(name), _layer(name)
    fresh_sync = StateSync(fresh)
    sync = StateSync(trained)
    for _ in range(2):
        _call(trained)
        sync.step()
    saved = {key: value.clone() for key, value in trained.state_dict().items()}
    fresh.load_state_dict(saved, strict=True, assign=assign)
    x_BSD = torch.randn(2, TOKENS // 2, WIDTH)
    assert torch.equal(_call(fresh, x_BSD), _call(trained, x_BSD))
    sync.step()
    fresh_sync.step()
    after = trained.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in fresh.state_dict().items())
    if isinstance(fresh.router, StatefulRouter):
        assert fresh.router.steps_taken == 3
    del saved["experts.w1"]
    with pytest.raises(RuntimeError, match=r"experts\.w1"):
        fresh.load_state_dict(saved, strict=True)


# ------------------------------------------------------------------- torch.compile


class _Model(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.mix, self.moe = nn.Linear(WIDTH, WIDTH), _layer(name)

    def forward(self, x_BSD: Tensor) -> Tensor:
        y_BSD, aux_loss, _ = self.moe(self.mix(x_BSD))
        return y_BSD.square().mean() + aux_loss


def _trained(model: nn.Module, forward: nn.Module) -> list[float]:
    sync, optimizer, losses = StateSync(model), torch.optim.SGD(model.parameters(), lr=0.1), []
    for step in range(3):
        loss = forward(torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(step)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        sync.step()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("apart", [pytest.param(False, marks=pytest.mark.slow), True])  # dozens of graphs, or two
def test_a_compiled_model_learns_what_a_plain_one_does(apart: bool) -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    plain = _Model("vq")
    compiled = copy.deepcopy(plain)
    if apart:
        compiled.moe = torch.compiler.disable(compiled.moe)
    try:
        assert _trained(compiled, torch.compile(compiled, backend="eager")) == _trained(plain, plain)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs == 2 if apart else graphs > 2
    finally:
        torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")
def test_the_default_backend_compiles_experts_that_have_no_kernel() -> None:
    """Its own lowering of their products would fail; widths of other than multiples of 16 have no kernel of ours."""
    torch.compiler.reset()
    experts, rows_PD, ends_E = _layer("topk").experts, torch.randn(6, WIDTH), torch.tensor([1, 1, 4, 6]).int()
    try:
        assert torch.equal(torch.compile(experts)(rows_PD, ends_E), experts(rows_PD, ends_E))
    finally:
        torch.compiler.reset()


# ------------------------------------------------------------------- wrong answers


class _Answers(Router):
    """Answers what a test says."""

    answer: Any

    def route(self, x_TD: Tensor, context: RoutingContext) -> Any:
        return self.answer


IDS_TR, WEIGHTS_TR = torch.zeros(TOKENS, 2, dtype=torch.int64), torch.ones(TOKENS, 2)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (None, "the answers router answered NoneType, and route() gives a Routing"),
        ((IDS_TR, WEIGHTS_TR), "answered tuple, and route() gives a Routing"),
        (Routing([0] * TOKENS), "answered expert ids list; give int64 [12, R] with R of 1 or more"),
        (Routing(IDS_TR.int()), "answered expert ids torch.int32 [12, 2]; give int64 [12, R]"),
        (Routing(WEIGHTS_TR, IDS_TR), "answered expert ids torch.float32 [12, 2]; give int64 [12, R]"),
        (Routing(IDS_TR[:, 0]), "answered expert ids torch.int64 [12]; give int64 [12, R]"),
        (Routing(IDS_TR[:, :0]), "answered expert ids torch.int64 [12, 0]; give int64 [12, R]"),
        (Routing(IDS_TR[1:]), "answered expert ids torch.int64 [11, 2]; give int64 [12, R]"),
        (Routing(IDS_TR, tokens_M=torch.arange(3)), "answered expert ids torch.int64 [12, 2]; give int64 [3, R]"),
        (Routing(IDS_TR, WEIGHTS_TR[:, :1]), "answered weights torch.float32 [12, 1]; give floats [12, 2]"),
        (Routing(IDS_TR, IDS_TR), "answered weights torch.int64 [12, 2]; give floats [12, 2]"),
        (Routing(IDS_TR, aux_loss=0.5), "answered aux_loss float; give a tensor without dimensions"),
        (Routing(IDS_TR, aux_loss=torch.ones(1)), "answered aux_loss torch.float32 [1]; give a tensor without"),
    ],
)
def test_answers_of_other_types_and_shapes_are_refused(answer: Any, sentence: str) -> None:
    layer = _layer("topk")
    layer.router = _Answers(layer.config)
    layer.router.name, layer.router.answer = "answers", answer
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        _call(layer)


@pytest.mark.parametrize("wrong", [-1, EXPERTS, 65536 + 2])
def test_experts_that_are_not_there_are_refused(wrong: int) -> None:
    layer = _layer("topk")
    layer.router = _Answers(layer.config)
    ids_TR = IDS_TR.clone()
    ids_TR[3, 1] = wrong
    layer.router.answer = Routing(ids_TR)
    with pytest.raises(
        IndexError, match=r"24 rows were given to 4 experts, .* counted as \[23, 0, 0, 0\]: some are of no"
    ):
        _call(layer)


@pytest.mark.parametrize("wrong", [-1, EXPERTS])
@pytest.mark.parametrize("top_k", [0, 1, 2])
def test_experts_known_ahead_that_are_not_there_are_refused_beside_others_too(wrong: int, top_k: int) -> None:
    ids_TR = IDS_TR[:, :1].clone()
    ids_TR[3] = wrong
    with pytest.raises(IndexError, match=r"rows were given to 4 experts, .*some are of no"):
        _layer("vq", top_k=top_k)(torch.randn(TOKENS, WIDTH), RoutingContext(ids_TR))


@pytest.mark.parametrize("known", [IDS_TR[1:, :1], IDS_TR[:, :1].int(), [[0]] * TOKENS])
def test_experts_known_of_other_tokens_are_refused(known: Any) -> None:
    for name in ("hash_token", "vq"):
        with pytest.raises(ConfigError, match=r"expert_ids_TR is .*; give int64 \[12, R\], a row for each token"):
            _layer(name)(torch.randn(TOKENS, WIDTH), RoutingContext(known))


def test_statistics_of_another_shape_are_refused() -> None:
    router = StatefulRouter(_layer("topk").config, EXPERTS)
    for statistics, found in (
        (torch.ones(1), r"torch.float32 \[1\]"),
        (torch.ones(4, 1), r".*\[4, 1\]"),
        (3.0, "float"),
    ):
        with pytest.raises(
            ConfigError, match=rf"observed {found}, and its StatefulRouter.__init__ was told of .* \[4\]"
        ):
            router.observe(statistics)
    assert not router.pending.any()


def test_configurations_that_make_no_layer_are_refused() -> None:
    moe = MoEConfig(router="topk")
    with pytest.raises(ConfigError, match="options of the topk router: bogus=1: extra inputs are not permitted$"):
        LayerConfig(WIDTH, moe, options={"bogus": 1})
    with pytest.raises(ConfigError, match="layer=-1 is no index of an MoE layer; give 0 or more"):
        LayerConfig(WIDTH, moe, layer=-1)
    for steps in (0, -1, 1.5):
        with pytest.raises(ConfigError, match=f"accumulation_steps={steps} is no number of micro-batches"):
            StateSync(_layer("topk"), steps)
    bank = CodebookBank(CodebookConfig(), 1, EXPERTS + 1, WIDTH, 0)
    config = LayerConfig(WIDTH, MoEConfig(router="vq", num_experts=EXPERTS, expert_hidden=8), shared_codebook=True)
    with pytest.raises(ValueError, match="the codebooks are for 5 experts, and the layer has 4"):
        MoELayer(config)(torch.randn(TOKENS, WIDTH), RoutingContext(codebooks=bank))


@pytest.mark.parametrize("steps", [float("nan"), float("inf"), "2", None, True, [1]])
def test_what_is_no_number_of_micro_batches_is_refused(steps: Any) -> None:
    with pytest.raises(ConfigError) as refusal:
        StateSync(_layer("topk"), steps)
    assert str(refusal.value) == f"accumulation_steps={steps!r} is no number of micro-batches; give 1 or more"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"width": "16"}, "LayerConfig.width='16' is of type str; give int"),
        ({"width": 16.0}, "LayerConfig.width=16.0 is of type float; give int"),
        ({"layer": None}, "LayerConfig.layer=None is of type NoneType; give int"),
        ({"seed": 1.5}, "LayerConfig.seed=1.5 is of type float; give int"),
        ({"ep_size": 2.0}, "LayerConfig.ep_size=2.0 is of type float; give int"),
        ({"out_scale": "1"}, "LayerConfig.out_scale='1' is of type str; give float"),
        ({"shared_codebook": "no"}, "LayerConfig.shared_codebook='no' is of type str; give bool"),
        ({"codebook": {}}, "LayerConfig.codebook={} is of type dict; give CodebookConfig"),
        ({"moe": {"router": "vq"}}, "LayerConfig.moe={'router': 'vq'} is of type dict; give MoEConfig"),
    ],
)
def test_values_of_other_types_are_refused_by_their_field(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        LayerConfig(**{"width": WIDTH, **values})
    assert str(refusal.value) == sentence


def test_numbers_of_numpy_are_numbers() -> None:
    config = LayerConfig(np.int64(WIDTH), MoEConfig(router="topk", num_experts=EXPERTS), out_scale=np.float32(1))
    assert MoELayer(config)(torch.randn(TOKENS, WIDTH))[0].shape == (TOKENS, WIDTH)
    StateSync(_layer("topk"), np.int64(2))


# ------------------------------------------------------------------- the meta device


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_of_the_meta_device_is_whole_after_a_load(name: str) -> None:
    """As docs/use-the-layer.md says: a whole state_dict, and two counters of use that are in none."""
    trained = _layer(name)
    _call(trained)
    StateSync(trained).step()
    with torch.device("meta"):
        layer = _layer(name)
    assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
    layer.to_empty(device="cpu")
    layer.load_state_dict(trained.state_dict())
    left = {key for key, _ in layer.named_buffers()} - trained.state_dict().keys()
    assert {key.rsplit(".", 1)[-1] for key in left} <= {"tokens_per_expert", "usage_LK"}
    x_BSD = torch.randn(2, TOKENS // 2, WIDTH)
    for model in (layer, trained):
        _call(model, x_BSD)
        StateSync(model).step()
    wanted = trained.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in layer.state_dict().items())
