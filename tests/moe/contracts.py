"""The contracts of every router: layouts, accumulation, recomputation and resume do not change it.

DeepSpeed on real ranks against a plain loop in one process. ``check_router`` is all of it for one router, built in or
from a plug-in; ``test_router_parity.py`` tries the built-in ones in shared launches.
"""

from __future__ import annotations

import tempfile
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
from vqmoe_ds.moe.deepspeed_layer import DeepSpeedMoELayer, clip_over_all_experts
from vqmoe_ds.moe.state_sync import StateSync

MICRO_BATCHES, MICRO_SIZE, VOCAB, LENGTH, LAYERS = 4, 2, 64, 24, 3
LEARNING_RATE, CLIP, STEPS = 3e-3, 0.4, 12


def config_of(moe: dict[str, Any], options: dict[str, Any], **train: Any) -> RunConfig:
    model = {"vocab_size": VOCAB, "layers": LAYERS, "width": 32, "heads": 2, "sequence_length": LENGTH}
    return RunConfig(model=model, moe={"num_experts": 8, "expert_hidden": 16, **moe}, router=options, train=train)


def check_router(name: str, top_k: int = 2, **options: Any) -> None:
    """Hold one registered router to all contracts, in about a minute.

    Args:
        top_k: experts per token.
        options: of the router.
    """
    moe = {"router": name, "top_k": top_k}
    config, recomputed = (config_of(moe, options, activation_checkpointing=on) for on in (False, True))
    check_causality_and_rows(config)
    check_layouts({name: config}, TWO, timeout=150)
    check_accumulation([(config, recomputed)], 5, timeout=100)
    with tempfile.TemporaryDirectory() as folder:
        check_resume({name: config}, Path(folder), timeout=100)


def check_causality_and_rows(config: RunConfig) -> None:
    """A router sees later tokens only if it says so, makes as many expert calls as it announces, and learns."""
    model, generator = MoETransformer(config), torch.Generator().manual_seed(2)
    tokens_BS = torch.randint(0, VOCAB, (8, LENGTH + 1), generator=generator)
    sum(model(tokens_BS[:, :-1], tokens_BS[:, 1:])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, f"{name} never learns"
    for layer in model.moe_layers():
        assert layer.tokens_per_expert.sum() == 8 * LENGTH * config.rows_per_token, "rows_per_token is another number"
    leaked = leak(model, tokens_BS[:, :LENGTH], VOCAB)
    assert config.looks_ahead is not None or leaked < 1e-5, "looks_ahead says that it is causal"


def leak(model: MoETransformer, tokens_BS: Tensor, vocab: int) -> float:
    """Change of the first nine positions' logits when later tokens change."""
    model.eval()
    other_BS = tokens_BS.clone()
    other_BS[:, 9:] = (other_BS[:, 9:] + 7) % vocab
    with torch.no_grad():
        before, after = model(tokens_BS)[0], model(other_BS)[0]
    return (before[:, :9] - after[:, :9]).abs().max().item()


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


def plain(config: RunConfig, steps: int) -> Run:
    """The reference: no DeepSpeed, no process group."""
    assert not dist.is_initialized()
    run, model = Run(), MoETransformer(config)
    sync = StateSync(model, MICRO_BATCHES)
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
        sync.step()
        run.losses.append(total / MICRO_BATCHES)
    run.counts = [int(layer.tokens_per_expert.sum()) for layer in model.moe_layers()]
    run.state = _state(model)
    return run


class _Engine:
    """A DeepSpeed engine on this rank's share of every global batch."""

    def __init__(self, rank: int, world: int, config: RunConfig, layout: Layout) -> None:
        self.rank, self.world, self.accumulation = rank, world, MICRO_BATCHES // world
        self.model = MoETransformer(config, layout.ep_size, rank % layout.ep_size, DeepSpeedMoELayer)
        self.engine, _, _, _ = deepspeed.initialize(
            model=self.model,
            model_parameters=list(self.model.parameters()),
            config=layout.engine_config(self.accumulation),
        )
        if layout.stage == 0 and not layout.bf16:
            clip_over_all_experts(self.engine)
        self.sync = StateSync(self.model, self.accumulation)
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
            self.sync.step()
            dist.all_reduce(total)
            run.losses.append(total.item() / MICRO_BATCHES)
            run.norms.append(float(self.engine.get_global_grad_norm()))
        run.counts = [int(layer.tokens_per_expert.sum()) for layer in self.model.moe_layers()]
        run.state = _state(self.model)
        run.in_step = self.sync.in_step()
        return run


def engines(rank: int, world: int, configs: list[RunConfig], layouts: list[Layout], steps: int) -> list[list[Run]]:
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


def check_layouts(cases: dict[str, RunConfig], layouts: list[Layout], timeout: float) -> None:
    configs = list(cases.values())
    references = [plain(config, STEPS) for config in configs]
    answers = run_ranks(4, engines, configs, layouts, STEPS, timeout=timeout)
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


def check_accumulation(pairs: list[tuple[RunConfig, RunConfig]], steps: int, timeout: float) -> None:
    """Of each pair the second recomputes its blocks."""
    configs = [config for pair in pairs for config in pair]
    one = run_ranks(1, engines, configs, [Layout(1, 1)], steps, timeout=timeout)[0]
    four = run_ranks(4, engines, configs, [Layout(1, 1)], steps, timeout=timeout)[0]
    for number, config in enumerate(configs):
        alone, here, there = one[number - number % 2][0], one[number][0], four[number][0]
        name = f"{config.moe.router}, {getattr(config.router, 'statistics', '')}"
        assert here.losses == alone.losses, f"{name}: recomputation changed a bit"
        assert here.counts == alone.counts == [4 * rows for rows in there.counts], f"{name}: tokens counted twice"
        assert all(torch.equal(here.state[key], alone.state[key]) for key in alone.state), name
        assert there.losses == pytest.approx(alone.losses, abs=1e-6), name
        assert _same_state(there.state, alone.state), name


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


def check_resume(cases: dict[str, RunConfig], folder: Path, timeout: float) -> None:
    for answer in run_ranks(2, _resume, str(folder), RESUMED, list(cases.values()), timeout=timeout):
        assert dict(zip(cases, answer, strict=True)) == dict.fromkeys(cases, True)
