"""VQGate in a native DeepSpeed-MoE model: its contract, its mathematics, training and checkpoints on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from tests.distributed import run_ranks
from vqmoe_ds.config.schema import CodebookConfig, CodeSource, MoEConfig
from vqmoe_ds.moe.deepspeed_gate import VQGate, vq_gates
from vqmoe_ds.moe.routers import RoutingContext
from vqmoe_ds.moe.state_sync import StateSync
from vqmoe_ds.runtime.errors import ConfigError

WIDTH, EXPERTS, VOCAB, LENGTH = 16, 4, 32, 12
BOOK = CodebookConfig(source=CodeSource.LAYER_STATE, kmeans_samples=64, num_codes=6)


@pytest.mark.parametrize("top_k", [0, 1, 2])
def test_the_seven_answers(top_k: int) -> None:
    gate = VQGate(WIDTH, EXPERTS, MoEConfig(top_k=top_k), BOOK)
    x_TD = torch.randn(40, WIDTH)
    aux, capacity, experts, ids_RT, places_RT, weights_RT, counts_N = gate(x_TD, None, True, False)
    routing = gate.router(x_TD, RoutingContext(codebooks=gate.bank))
    assert experts == EXPERTS and ids_RT.shape == places_RT.shape == weights_RT.shape == (top_k + 1, 40)
    assert ids_RT.dtype == places_RT.dtype == torch.int32 and weights_RT.dtype == torch.float32
    assert torch.equal(ids_RT.t().long(), routing.expert_ids_TR)
    wanted_TR = torch.ones(40, 1) if routing.weights_TR is None else routing.weights_TR
    assert torch.equal(weights_RT.t(), wanted_TR)
    assert counts_N.tolist() == torch.bincount(ids_RT.flatten(), minlength=EXPERTS).tolist()
    assert int(capacity) == max(counts_N)
    for e in range(EXPERTS):  # every row of an expert has a place of its own, without gaps
        assert sorted(places_RT[ids_RT == e].tolist()) == list(range(int(counts_N[e])))
    assert aux.dim() == 0 and (aux > 0) == (top_k > 0)


def test_names_that_deepspeed_saves() -> None:
    gate = VQGate(WIDTH, EXPERTS, MoEConfig(top_k=1), BOOK.model_copy(update={"code_dim": 4, "learning": "gradient"}))
    names = [name for name, _ in (*gate.named_parameters(), *gate.named_buffers())]
    assert len(names) > 8
    assert not [name for name in names if "expert" in name], "DeepSpeed's native save drops or trips over these"


def test_options_a_gate_cannot_honour() -> None:
    with pytest.raises(ConfigError, match="codebook.source=context cannot work"):
        VQGate(WIDTH, EXPERTS, book=CodebookConfig())
    with pytest.raises(ConfigError, match="code_blend must be 0"):
        VQGate(WIDTH, EXPERTS, MoEConfig(code_blend=0.5), BOOK)
    for norm in ("input_norm", "output_norm"):
        with pytest.raises(ConfigError, match="must be false with VQGate"):
            VQGate(WIDTH, EXPERTS, MoEConfig(top_k=0, **{norm: True}), BOOK)
    with pytest.raises(ValueError, match="used_token"):
        VQGate(WIDTH, EXPERTS)(torch.randn(4, WIDTH), torch.ones(4))


class _Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class _Model(nn.Module):
    """Next symbol from the last two, through two native MoE layers."""

    def __init__(self, ep_size: int, top_k: int, seed: int) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(VOCAB, WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.layers = nn.ModuleList(MoE(WIDTH, _Expert(), EXPERTS, ep_size) for _ in range(2))
        for index, layer in enumerate(self.layers):
            layer.deepspeed_moe.gate = VQGate(WIDTH, EXPERTS, MoEConfig(top_k=top_k), BOOK, seed=seed + index)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        embedded = self.embed(tokens_BS)
        x = self.mix(torch.cat([embedded[:, 1:-1], embedded[:, :-2]], dim=-1))
        aux = 0.0
        for layer in self.layers:
            y, layer_aux, _ = layer(x)
            x, aux = x + y, aux + layer_aux
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), tokens_BS[:, 2:].flatten()) + aux


def _tokens(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    start = torch.randint(0, VOCAB, (8, 1), generator=generator)
    return (start + torch.randint(1, 4, (8, 1), generator=generator) * torch.arange(LENGTH)) % VOCAB


def _engine(top_k: int, stage: int = 2) -> tuple[Any, list[StateSync]]:
    torch.manual_seed(3)
    model = _Model(2, top_k, seed=10 * dist.get_rank())  # codes start apart
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 5e-3, "torch_adam": True}},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
    }
    engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    syncs = [StateSync(gate.bank) for gate in vq_gates(model)]
    for sync in syncs:
        assert not sync.in_step()
        sync.broadcast()
        assert sync.in_step()
    return engine, syncs


def _steps(engine: Any, syncs: list[StateSync], rank: int, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = engine(_tokens(step, rank))
        engine.backward(loss)
        engine.step()
        for sync in syncs:
            sync.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / 2)
    return losses


def _state(engine: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in engine.module.state_dict().items()}


def _train_save_load(rank: int, world: int, folder: str, top_k: int) -> dict[str, Any]:
    engine, syncs = _engine(top_k)
    losses = _steps(engine, syncs, rank, range(30))
    in_step = all(sync.in_step() for sync in syncs)
    engine.save_checkpoint(folder, tag="mid")
    saved = _state(engine)
    onward = _steps(engine, syncs, rank, range(30, 36))

    other, other_syncs = _engine(top_k)
    codes = "layers.1.deepspeed_moe.gate.bank.codes_LKC"
    differed = not torch.equal(_state(other)[codes], saved[codes])
    other.load_checkpoint(folder, tag="mid")
    loaded = _state(other)
    same = {name: torch.equal(tensor, saved[name]) for name, tensor in loaded.items()}
    return {
        "losses": losses,
        "in_step": in_step,
        "differed": differed,
        "changed": [name for name, equal in same.items() if not equal],
        "buffers": [name for name in loaded if ".bank." in name],
        "onward": onward,
        "resumed": _steps(other, other_syncs, rank, range(30, 36)),
        "initialized": all(gate.bank.initialized for gate in vq_gates(other.module)),
    }


@pytest.mark.parametrize("top_k", [0, 1])
def test_training_and_checkpoint_on_two_ranks(tmp_path: Path, top_k: int) -> None:
    for answer in run_ranks(2, _train_save_load, str(tmp_path), top_k):
        assert answer["losses"][-1] < 0.5 * answer["losses"][0]
        assert answer["in_step"]
        assert answer["differed"] and not answer["changed"]
        assert len(answer["buffers"]) == 2 * 6, answer["buffers"]
        assert answer["initialized"]
        assert answer["resumed"] == answer["onward"], "resumed training is not the one that went on"


def _layer_against_loop(rank: int, world: int) -> float:
    """Two ranks with unlike loads: output of the MoE layer is the weighted sum of each token's experts."""
    worst = 0.0
    for top_k in (0, 1, 2):
        torch.manual_seed(0)
        moe = MoE(WIDTH, _Expert(), EXPERTS, ep_size=2)
        moe.deepspeed_moe.gate = VQGate(WIDTH, EXPERTS, MoEConfig(top_k=top_k), BOOK)
        everyone = [_Expert() for _ in range(EXPERTS)]
        for local, expert in enumerate(moe.deepspeed_moe.experts.deepspeed_experts):
            expert.load_state_dict(everyone[2 * rank + local].state_dict())
        moe.set_deepspeed_parallelism()
        x_TD = torch.randn(10 + 30 * rank, WIDTH, generator=torch.Generator().manual_seed(rank))
        x_TD = x_TD * torch.tensor([1.0, 5.0])[rank]
        with torch.no_grad():
            y_TD, _, _ = moe(x_TD)
            routing = moe.deepspeed_moe.gate.router(x_TD, RoutingContext(codebooks=moe.deepspeed_moe.gate.bank))
            for t, x_D in enumerate(x_TD):
                weights_R = torch.ones(1) if routing.weights_TR is None else routing.weights_TR[t]
                want_D = sum(
                    w * everyone[int(e)](x_D) for w, e in zip(weights_R, routing.expert_ids_TR[t], strict=True)
                )
                worst = max(worst, (y_TD[t] - want_D).abs().max().item())
    return worst


def test_layer_output_is_the_weighted_sum_of_experts() -> None:
    assert max(run_ranks(2, _layer_against_loop)) < 1e-5
