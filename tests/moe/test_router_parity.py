"""Layouts do not change any router: DeepSpeed on four real ranks against a plain loop in one process.

As ``tests/test_parity.py`` for vq. All routers share a launch. The default suite tries those whose state is the hardest
to keep, on two layouts that differ in everything; all routers on all layouts are slow.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed import run_ranks
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.moe.deepspeed_layer import clip_over_all_experts
from vqmoe_ds.moe.router_sync import RouterSync

MICRO_BATCHES, MICRO_SIZE, VOCAB, LENGTH, LAYERS = 4, 2, 64, 24, 3
LEARNING_RATE, CLIP, STEPS = 3e-3, 0.4, 12

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "topk over all": ({"router": "topk", "top_k": 2, "z_loss_weight": 0.01}, {"softmax_over": "all"}),
    "expert_bias": ({"router": "expert_bias", "top_k": 2}, {"bias_rate": 0.02}),
    "xmoe": ({"router": "xmoe", "top_k": 1}, {}),
    "stablemoe": ({"router": "stablemoe", "top_k": 1}, {"distil_steps": 6, "low_dim": 8}),
    "smoe_dropout": ({"router": "smoe_dropout", "top_k": 1}, {"final_top_k": 4, "growth_steps": 10}),
    "random_frozen": ({"router": "random_frozen", "top_k": 2}, {}),
    "hash_token": ({"router": "hash_token"}, {}),
    "online_kmeans": ({"router": "online_kmeans", "top_k": 2}, {"decay": 0.8}),
    "expert_choice": ({"router": "expert_choice", "top_k": 2}, {}),
    "adaptive_clustering": ({"router": "adaptive_clustering", "top_k": 2}, {"decay": 0.8}),
    "adaptive_clustering of the batch": (
        {"router": "adaptive_clustering", "top_k": 1},
        {"statistics": "batch", "scaling": "global"},
    ),
    "adaptive_clustering, control": ({"router": "adaptive_clustering", "top_k": 1}, {"statistics": "none"}),
}

HARDEST = ["stablemoe", "smoe_dropout", "expert_choice", "adaptive_clustering"]
"""A change of stages, a number of rows that grows, rows that are not per token, state handed from layer to layer."""
OTHERS = [case for case in CASES if case not in HARDEST]


def _config(case: str, **train: Any) -> RunConfig:
    moe, router = CASES[case]
    model = {"vocab_size": VOCAB, "layers": LAYERS, "width": 32, "heads": 2, "sequence_length": LENGTH}
    return RunConfig(model=model, moe={"num_experts": 8, "expert_hidden": 16, **moe}, router=router, train=train)


def _micro_batch(step: int, number: int) -> tuple[Tensor, Tensor]:
    """Symbols of a noisy counting machine, so that there is something to learn."""
    generator = torch.Generator().manual_seed(100 * step + number)
    start, stride = (torch.randint(1, 64, (MICRO_SIZE, 1), generator=generator) for _ in range(2))
    noise = torch.rand(MICRO_SIZE, LENGTH + 1, generator=generator) < 0.1
    tokens_BS = (start + (stride % 3 + 1) * torch.arange(LENGTH + 1) + 17 * noise) % VOCAB
    return tokens_BS[:, :-1], tokens_BS[:, 1:]


@dataclass(frozen=True)
class Layout:
    """One engine to try; ``scattered``: nothing stays whole at ZeRO-3."""

    ep_size: int
    stage: int
    bf16: bool = False
    scattered: bool = False

    def engine_config(self, accumulation: int) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": self.stage}
        if self.scattered:
            zero["stage3_param_persistence_threshold"] = 0
        return {
            "train_micro_batch_size_per_gpu": MICRO_SIZE,
            "gradient_accumulation_steps": accumulation,
            "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "torch_adam": True, "eps": 1e-6}},
            "gradient_clipping": CLIP,
            "zero_optimization": zero,
            "bf16": {"enabled": self.bf16},
        }


@dataclass
class Run:
    """What one training leaves behind."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    """Routed rows a layer, from the last step."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """Buffers of all routers."""
    in_step: bool = True


def _state(model: MoETransformer) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers() if ".router." in name}


def _plain(config: RunConfig, steps: int) -> Run:
    """The reference: no DeepSpeed, no process group."""
    assert not dist.is_initialized()
    run, model = Run(), MoETransformer(config)
    sync = RouterSync.of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, eps=1e-6)
    for step in range(steps):
        total = 0.0
        for number in range(MICRO_BATCHES):
            loss, aux = model(*_micro_batch(step, number))
            ((loss + aux) / MICRO_BATCHES).backward()
            total += loss.item()
        run.norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
        if sync is not None:
            sync.step()
        run.losses.append(total / MICRO_BATCHES)
    run.counts = [int(layer.tokens_per_expert.sum()) for layer in model.moe_layers()]
    run.state = _state(model)
    return run


class _Engine:
    """A DeepSpeed engine on this rank's share of every global batch."""

    def __init__(self, rank: int, world: int, config: RunConfig, layout: Layout) -> None:
        self.rank, self.world, self.accumulation = rank, world, MICRO_BATCHES // world
        self.model = MoETransformer(config, layout.ep_size, rank % layout.ep_size)
        self.engine, _, _, _ = deepspeed.initialize(
            model=self.model,
            model_parameters=list(self.model.parameters()),
            config=layout.engine_config(self.accumulation),
        )
        if layout.stage == 0 and not layout.bf16:
            clip_over_all_experts(self.engine)
        self.sync = RouterSync.of(self.model)
        if self.sync is not None:
            self.sync.broadcast()

    def train(self, first: int, end: int) -> Run:
        run = Run()
        for step in range(first, end):
            total = torch.zeros((), dtype=torch.float64)
            for micro in range(self.accumulation):
                loss, aux = self.engine(*_micro_batch(step, micro * self.world + self.rank))
                self.engine.backward(loss + aux)
                total += loss.detach().double()
                self.engine.step()
            if self.sync is not None:
                self.sync.step()
            dist.all_reduce(total)
            run.losses.append(total.item() / MICRO_BATCHES)
            run.norms.append(float(self.engine.get_global_grad_norm()))
        run.counts = [int(layer.tokens_per_expert.sum()) for layer in self.model.moe_layers()]
        run.state = _state(self.model)
        run.in_step = self.sync is None or self.sync.in_step()
        return run


def _engines(rank: int, world: int, configs: list[RunConfig], layouts: list[Layout], steps: int) -> list[list[Run]]:
    """Runs by configuration and layout."""
    answers = []
    for config in configs:
        answers.append([])
        for layout in layouts:
            engine = _Engine(rank, world, config, layout)
            answers[-1].append(engine.train(0, steps))
            engine.engine.destroy()
    return answers


def _same_state(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    assert got.keys() == want.keys()
    return all(torch.allclose(t.double(), want[name].double(), rtol=1e-4, atol=1e-4) for name, t in got.items())


def _check(cases: list[str], layouts: list[Layout], timeout: float) -> None:
    configs = [_config(case) for case in cases]
    references = [_plain(config, STEPS) for config in configs]
    answers = run_ranks(4, _engines, configs, layouts, STEPS, timeout=timeout)
    for number, (case, reference) in enumerate(zip(cases, references, strict=True)):
        assert max(reference.norms) > CLIP, "clipping never acted"
        assert reference.losses[-1] < reference.losses[0] - 0.1, f"{case}: nothing was learned"
        for place, layout in enumerate(layouts):
            runs = [answer[number][place] for answer in answers]
            for run in runs:
                assert run.losses == pytest.approx(reference.losses, abs=1e-5), f"{case}, {layout}"
                assert run.norms == pytest.approx(reference.norms, rel=1e-3), f"{case}, {layout}: gradient norms"
                assert _same_state(run.state, reference.state), f"{case}, {layout}: state"
                assert run.in_step, f"{case}, {layout}"
            rows = [sum(counts) for counts in zip(*(run.counts for run in runs), strict=True)]
            assert rows == reference.counts, f"{case}, {layout}: tokens were counted otherwise"


TWO = [Layout(4, 0), Layout(2, 3, scattered=True)]


def test_two_layouts_that_differ_in_everything() -> None:
    _check(HARDEST, TWO, timeout=200)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_layouts_with_the_other_routers() -> None:
    _check(OTHERS, TWO, timeout=500)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("stage", range(4))
def test_every_layout(stage: int) -> None:
    _check(list(CASES), [Layout(ep_size, stage) for ep_size in (1, 2, 4)], timeout=1100)


def _check_accumulation(cases: list[str], steps: int, timeout: float) -> None:
    configs = [_config(case, activation_checkpointing=on) for case in cases for on in (False, True)]
    one = run_ranks(1, _engines, configs, [Layout(1, 1)], steps, timeout=timeout)[0]
    four = run_ranks(4, _engines, configs, [Layout(1, 1)], steps, timeout=timeout)[0]
    for number, config in enumerate(configs):
        plain, here, there = one[number - number % 2][0], one[number][0], four[number][0]
        name = f"{config.moe.router.value}, {config.router.statistics}"
        assert here.losses == plain.losses, f"{name}: recomputation changed a bit"
        assert here.counts == plain.counts == [4 * rows for rows in there.counts], f"{name}: tokens counted twice"
        assert all(torch.equal(here.state[key], plain.state[key]) for key in plain.state), name
        assert there.losses == pytest.approx(plain.losses, abs=1e-6), name
        assert _same_state(there.state, plain.state), name


def test_one_rank_with_four_micro_batches_is_four_with_one_and_recomputation_changes_no_bit() -> None:
    _check_accumulation(["expert_bias", "smoe_dropout", "adaptive_clustering"], 5, timeout=140)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_accumulation_and_recomputation_with_all_routers() -> None:
    _check_accumulation(list(CASES), 8, timeout=280)


def _resume(rank: int, world: int, folder: str, layouts: list[Layout], configs: list[RunConfig]) -> list[bool]:
    same = []
    for number, config in enumerate(configs):
        layout, place = layouts[number % len(layouts)], str(Path(folder) / str(number))
        through = _Engine(rank, world, config, layout)
        through.train(0, 5)
        through.engine.save_checkpoint(place, tag="five", save_latest=False)
        want = through.train(5, 9)
        through.engine.destroy()
        again = _Engine(rank, world, config, layout)
        again.engine.load_checkpoint(place, tag="five")
        got = again.train(5, 9)
        again.engine.destroy()
        states = [torch.equal(got.state[name], tensor) for name, tensor in want.state.items()]
        same.append(got.losses == want.losses and all(states))
    return same


RESUMED = [Layout(2, 2), Layout(2, 3), Layout(2, 1, bf16=True)]


def _check_resume(cases: list[str], folder: Path, timeout: float) -> None:
    for answer in run_ranks(2, _resume, str(folder), RESUMED, [_config(case) for case in cases], timeout=timeout):
        assert dict(zip(cases, answer, strict=True)) == dict.fromkeys(cases, True)


def test_resumed_runs_repeat_those_that_never_stopped_to_the_last_bit(tmp_path: Path) -> None:
    """Through the change of stages of stablemoe and in the midst of smoe_dropout's growth."""
    _check_resume(["stablemoe", "adaptive_clustering", "smoe_dropout"], tmp_path, timeout=140)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_resumed_runs(tmp_path: Path) -> None:
    _check_resume(list(CASES), tmp_path, timeout=500)


def _bf16(rank: int, world: int, configs: list[RunConfig]) -> list[Run]:
    return [_engines(rank, world, [config], [Layout(2, 2, bf16=True)], 8)[0][0] for config in configs]


@pytest.mark.slow
def test_bfloat16_leaves_state_in_full_precision() -> None:
    cases = ["expert_bias", "stablemoe", "online_kmeans", "random_frozen", "adaptive_clustering"]
    configs = [_config(case) for case in cases]
    references = [_plain(config, 8) for config in configs]
    for answer in run_ranks(2, _bf16, configs, timeout=120):
        for case, run, reference in zip(cases, answer, references, strict=True):
            floats = {tensor.dtype for tensor in run.state.values() if tensor.is_floating_point()}
            assert floats <= {torch.float32, torch.float64}, case
            assert run.in_step, case
            assert run.losses == pytest.approx(reference.losses, abs=0.1), case
