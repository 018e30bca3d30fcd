"""The language model: causality, routes planned ahead, recomputation, layouts of blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vqmoe_ds.checkpoint.formats.huggingface.names import placement_of
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.moe.dispatch import sort_rows
from vqmoe_ds.moe.layer import MoELayer
from vqmoe_ds.moe.mlp import DenseMLP
from vqmoe_ds.moe.routers import RoutingContext
from vqmoe_ds.moe.state_sync import StateSync

VOCAB, LENGTH = 50, 16

ROUTERS = {
    "context": ({}, {"source": "context"}),
    "context, discrete only": ({"top_k": 0}, {"source": "context"}),
    "token embedding": ({"top_k": 0}, {"source": "token_embedding"}),
    "position embedding": ({"top_k": 0}, {"source": "position_embedding"}),
    "layer state": ({}, {"source": "layer_state"}),
    "layer state, discrete only": ({"top_k": 0}, {"source": "layer_state"}),
    "the paper's input": ({"code_blend": 1.0}, {"source": "layer_state", "normalize_source": False}),
    "early block": ({"top_k": 0}, {"source": "early_block", "source_block": 1}),
    "early block and top-1": ({}, {"source": "early_block", "source_block": 1}),
    "top-k": ({"router": "topk", "top_k": 2}, {}),
    "hash of tokens": ({"router": "hash_token"}, {}),
    "dense": ({"router": "dense"}, {}),
}


def _config(case: str, train: dict[str, Any] | None = None, **model: Any) -> RunConfig:
    moe, book = ROUTERS[case]
    shape = {"vocab_size": VOCAB, "layers": 4, "width": 24, "heads": 2, "sequence_length": LENGTH, **model}
    return RunConfig(model=shape, moe={"num_experts": 4, "expert_hidden": 12, **moe}, codebook=book, train=train or {})


def _tokens(batch: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (batch, LENGTH + 1), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", ROUTERS)
def test_a_later_token_never_changes_an_earlier_logit(case: str) -> None:
    model = MoETransformer(_config(case)).eval()
    tokens_BS = _tokens()[:, :LENGTH]
    changed = 9
    other_BS = tokens_BS.clone()
    other_BS[:, changed:] = (other_BS[:, changed:] + 7) % VOCAB
    with torch.no_grad():
        before, after = model(tokens_BS)[0], model(other_BS)[0]
    assert (before[:, :changed] - after[:, :changed]).abs().max() < 1e-5, "float32 rounding is all there may be"
    assert (before[:, changed] - after[:, changed]).abs().amax(-1).min() > 1e-3
    assert before.shape == (3, LENGTH, VOCAB)


@pytest.mark.parametrize("case", ROUTERS)
def test_loss_is_that_of_the_logits_and_every_parameter_learns(case: str) -> None:
    model = MoETransformer(_config(case))
    tokens_BS = _tokens(8)
    logits_BSV, _ = model(tokens_BS[:, :-1])
    loss, aux = model(tokens_BS[:, :-1], tokens_BS[:, 1:])
    want = nn.functional.cross_entropy(logits_BSV.flatten(0, 1), tokens_BS[:, 1:].flatten())
    assert torch.allclose(loss, want)
    (loss + aux).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def _layer_by_layer(model: MoETransformer, tokens_BS: Tensor) -> Tensor:
    """The model's forward with a route made inside every layer: no plan, no shared product, no shared exchange."""
    config, bank = model.config, model.bank
    x_BSD = model.embed(tokens_BS)
    source_BSD = x_BSD if config.codebook.source == "early_block" else model.source(tokens_BS, x_BSD)
    for index, block in enumerate(model.blocks):
        x_BSD = x_BSD + block.attention(block.attention_norm(x_BSD))
        normed = block.mlp_norm(x_BSD)
        z_TC = bank.prepare(source_BSD.flatten(0, 1))
        experts_T = bank.code_map_LK[index][bank.lookup(index, z_TC)]
        x_BSD = x_BSD + block.mlp(normed, RoutingContext(experts_T.unsqueeze(1)))[0]
        if config.codebook.source == "early_block" and index == config.codebook.source_block:
            source_BSD = x_BSD
    return model.head(model.norm(x_BSD))


@pytest.mark.parametrize(
    "case", ["context", "context, discrete only", "position embedding", "early block", "early block and top-1"]
)
def test_planning_ahead_changes_nothing(case: str) -> None:
    model = MoETransformer(_config(case)).eval()
    tokens_BS = _tokens(4)[:, :LENGTH]
    with torch.no_grad():
        planned = model(tokens_BS)[0]
        step_by_step = _layer_by_layer(model, tokens_BS)
        assert torch.equal(planned, step_by_step)
        model.bank.code_map_LK.copy_((model.bank.code_map_LK + 1) % 4)  # the check would see another route
        assert not torch.equal(planned, _layer_by_layer(model, tokens_BS))


def test_one_plan_serves_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known ahead is sorted ahead, for all layers at once; routers add their rows to it layer by layer."""
    calls: list[tuple[int, ...]] = []

    def counted(expert_ids_LTR: Tensor, *args: Any) -> Any:
        calls.append(tuple(expert_ids_LTR.shape))
        return sort_rows(expert_ids_LTR, *args)

    for module in ("vqmoe_ds.moe.dispatch", "vqmoe_ds.moe.layer", "vqmoe_ds.models.transformer"):
        monkeypatch.setattr(f"{module}.sort_rows", counted)
    tokens = 3 * LENGTH
    for case, want in {
        "context, discrete only": [(4, tokens, 1)],
        "hash of tokens": [(4, tokens, 1)],
        "early block": [(2, tokens, 1), (2, tokens, 1)],
        "layer state, discrete only": [(1, tokens, 1)] * 4,
        "context": [(4, tokens, 1)] + [(1, tokens, 1)] * 4,
        "layer state": [(1, tokens, 1)] * 8,
    }.items():
        calls.clear()
        MoETransformer(_config(case))(_tokens()[:, :LENGTH])
        assert calls == want, case


def _train_step(case: str, recompute: bool) -> tuple[Tensor, dict[str, Tensor | None], Tensor, Tensor, Tensor]:
    model = MoETransformer(_config(case, {"activation_checkpointing": recompute}))
    tokens_BS = _tokens()
    loss, aux = model(tokens_BS[:, :-1], tokens_BS[:, 1:])
    (loss + aux).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    counted = torch.stack([layer.tokens_per_expert for layer in model.moe_layers()])
    statistics = model.bank.pending if model.bank else torch.zeros(0)
    if model.bank is not None:
        StateSync(model.bank).step()
    codes = model.bank.codes_LKC if model.bank else torch.zeros(0)
    return torch.stack([loss, aux]).detach(), gradients, statistics, counted, codes


@pytest.mark.parametrize("case", [case for case in ROUTERS if case != "dense"])
def test_activation_checkpointing_changes_no_bit(case: str) -> None:
    plain, recomputed = _train_step(case, False), _train_step(case, True)
    assert torch.equal(plain[0], recomputed[0])
    for name, gradient in plain[1].items():
        assert torch.equal(gradient, recomputed[1][name]), name
    for a, b in zip(plain[2:], recomputed[2:], strict=True):
        assert torch.equal(a, b)
    rows = _config(case).rows_per_token
    assert plain[3].sum(dim=1).tolist() == [3 * LENGTH * rows] * 4


def test_recomputation_really_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = MoELayer.forward
    monkeypatch.setattr(MoELayer, "forward", lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))[1])
    for recompute, want in ((False, 4), (True, 8)):
        calls.clear()
        _train_step("context", recompute)
        assert len(calls) == want


def test_statistics_of_every_layer_are_gathered_once() -> None:
    for case in ("context", "layer state", "early block"):
        model = MoETransformer(_config(case))
        model(_tokens()[:, :LENGTH])
        assert model.bank.pending[..., -1].sum(dim=1).tolist() == [3 * LENGTH] * 4, case


def test_early_block_codes_look_at_that_block() -> None:
    """Blocks after the source block route by its output, those up to it by the embedding."""
    model = MoETransformer(_config("early block"))
    seen = {}
    original = model.bank.observe_all

    def observe_all(layers: slice, z_TC: Tensor, codes_LT: Tensor) -> None:
        seen.update(dict.fromkeys(range(layers.start, layers.stop), z_TC))
        original(layers, z_TC, codes_LT)

    model.bank.observe_all = observe_all
    outputs = []
    model.blocks[1].register_forward_hook(lambda module, inputs, output: outputs.append(output[0]))
    tokens_BS = _tokens()[:, :LENGTH]
    model(tokens_BS)
    embedded = model.bank.prepare(model.embed(tokens_BS).flatten(0, 1))
    from_block = model.bank.prepare(outputs[0].flatten(0, 1))
    assert torch.equal(seen[0], embedded) and torch.equal(seen[1], embedded)
    assert torch.equal(seen[2], from_block) and torch.equal(seen[3], from_block)


@pytest.mark.parametrize("case", ["context", "context, discrete only", "early block", "hash of tokens", "top-k"])
def test_an_moe_layer_in_every_second_block(case: str) -> None:
    model = MoETransformer(_config(case, moe_every=2))
    kinds = [type(block.mlp) for block in model.blocks]
    assert kinds == [DenseMLP, MoELayer, DenseMLP, MoELayer]
    assert [layer.layer for layer in model.moe_layers()] == [0, 1]
    if model.bank is not None:
        assert model.bank.num_layers == 2
    tokens_BS = _tokens()
    loss, aux = model(tokens_BS[:, :-1], tokens_BS[:, 1:])
    (loss + aux).backward()
    for layer in model.moe_layers():
        assert layer.tokens_per_expert.sum() == 3 * LENGTH * model.config.rows_per_token
    assert model.blocks[0].mlp.gate.weight.shape[0] == 12 * model.config.rows_per_token


def test_blocks_with_experts() -> None:
    shape = _config("dense").model
    assert shape.moe_blocks == [0, 1, 2, 3]
    assert shape.model_copy(update={"moe_every": 2}).moe_blocks == [1, 3]
    assert shape.model_copy(update={"moe_every": 3}).moe_blocks == [2]


def test_dense_model_has_neither_experts_nor_codes() -> None:
    model = MoETransformer(_config("dense", dense_hidden=20))
    assert model.bank is None and model.moe_layers() == []
    assert model.blocks[0].mlp.up.weight.shape == (20, 24)


@pytest.mark.parametrize("case", ["context", "top-k"])
def test_layouts_start_from_one_model(case: str) -> None:
    whole = MoETransformer(_config(case))
    for ep_rank in (0, 1):
        torch.manual_seed(ep_rank)
        part = MoETransformer(_config(case), ep_size=2, ep_rank=ep_rank)
        for name, tensor in part.state_dict().items():
            want = whole.state_dict()[name]
            if ".experts." in name:
                want = want[2 * ep_rank : 2 * ep_rank + 2]
            assert torch.equal(tensor, want), name


def test_seed_fixes_every_weight_and_another_changes_them() -> None:
    models = [MoETransformer(_config("context", {"seed": seed})) for seed in (1, 1, 2)]
    states = [model.state_dict() for model in models]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    for name in ("embed.weight", "head.weight", "blocks.0.mlp.experts.w1", "bank.codes_LKC"):
        assert not torch.equal(states[0][name], states[2][name]), name


def test_initial_scales() -> None:
    """One over the root of the fan-in; smaller by sqrt(2 layers) where a block writes to the stream."""
    model = MoETransformer(_config("context", width=64, layers=8, moe_every=2))
    block, dense, narrow = model.blocks[1], model.blocks[0].mlp, (2 * 8) ** -0.5
    scales = {
        "qkv": (block.attention.qkv.weight, 64**-0.5),
        "out": (block.attention.out.weight, 64**-0.5 * narrow),
        "dense up": (dense.up.weight, 64**-0.5),
        "dense down": (dense.down.weight, dense.down.in_features**-0.5 * narrow),
        "expert up": (block.mlp.experts.w3, 64**-0.5),
        "expert down": (block.mlp.experts.w2, 64**-0.5 * narrow),
        "embedding": (model.embed.weight, 1.0),
        "head": (model.head.weight, 0.5 * 64**-0.5),
    }
    for name, (weight, want) in scales.items():
        assert weight.std().item() == pytest.approx(want, rel=0.1), name


@pytest.mark.parametrize("norm", ["none", "heads"])
def test_grouped_queries_are_all_heads_with_copies_of_keys_and_values(norm: str) -> None:
    grouped = MoETransformer(_config("context", heads=4, kv_heads=2, head_width=8, qk_norm=norm))
    every = MoETransformer(_config("context", heads=4, head_width=8, qk_norm=norm))
    state = grouped.state_dict()
    for name in [name for name in state if name.endswith("qkv.weight")]:
        q, k, v = state[name].split([32, 16, 16])
        state[name] = torch.cat([q, *(x.view(2, 8, 24).repeat_interleave(2, dim=0).flatten(0, 1) for x in (k, v))])
    every.load_state_dict(state)
    tokens_BS = _tokens()
    losses = [model(tokens_BS[:, :-1], tokens_BS[:, 1:])[0] for model in (grouped, every)]
    assert (losses[0] - losses[1]).abs() < 1e-6
    for loss in losses:
        loss.backward()
    for mine, theirs in zip(grouped.blocks, every.blocks, strict=True):
        q, k, v = theirs.attention.qkv.weight.grad.split([32, 32, 32])
        summed = torch.cat([q, *(x.view(2, 2, 8, 24).sum(dim=1).flatten(0, 1) for x in (k, v))])
        assert (mine.attention.qkv.weight.grad - summed).abs().max() < 1e-6


def test_as_many_key_value_heads_as_heads_are_the_default_to_the_bit() -> None:
    tokens_BS, seen = _tokens(), []
    for kv_heads in (0, 2):
        model = MoETransformer(_config("context", kv_heads=kv_heads))
        loss, aux = model(tokens_BS[:, :-1], tokens_BS[:, 1:])
        (loss + aux).backward()
        seen.append([loss, *(p.grad for p in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))


def test_key_value_heads_that_cannot_be_shared_evenly_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model.kv_heads=3 must divide model.heads=4"):
        _config("context", heads=4, kv_heads=3, head_width=8)


@pytest.mark.parametrize(
    ("layers", "every", "dense", "blocks"),
    [(4, 1, 0, [0, 1, 2, 3]), (4, 1, 1, [1, 2, 3]), (5, 2, 0, [1, 3]), (6, 2, 2, [3, 5]), (6, 2, 3, [3, 5])],
)
def test_first_blocks_may_be_dense(layers: int, every: int, dense: int, blocks: list[int]) -> None:
    config = _config("context", layers=layers, moe_every=every, dense_layers=dense)
    model = MoETransformer(config)
    assert [index for index, block in enumerate(model.blocks) if isinstance(block.mlp, MoELayer)] == blocks
    assert placement_of(blocks, layers) is not None
    found = config.model.model_copy(update=placement_of(blocks, layers))
    assert found.moe_blocks == blocks


def test_all_blocks_dense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model.dense_layers=4 with model.moe_every=1 leaves no MoE layer"):
        _config("context", dense_layers=4)


def test_rotary_positions_are_relative() -> None:
    attention = MoETransformer(_config("dense")).blocks[0].attention
    attention.kv_heads = 1
    q, k = torch.randn(1, 1, 1, 12), torch.randn(1, 1, 1, 12)
    qkv = torch.cat([q, k, k], dim=2).expand(1, LENGTH, 3, 12)
    turned_q, turned_k, _ = attention._turned(qkv, attention.cos_SF[:LENGTH], attention.sin_SF[:LENGTH])
    scores = turned_q[0, 0] @ turned_k[0, 0].t()
    for distance in range(4):
        diagonal = scores.diagonal(-distance)
        assert (diagonal - diagonal[0]).abs().max() < 1e-4
    assert (scores[3, 3] - scores[3, 0]).abs() > 1e-3


def test_initial_loss_is_near_that_of_a_uniform_guess() -> None:
    model = MoETransformer(_config("context"))
    tokens_BS = _tokens(32)
    loss, _ = model(tokens_BS[:, :-1], tokens_BS[:, 1:])
    assert abs(loss.item() - torch.tensor(float(VOCAB)).log().item()) < 0.5
