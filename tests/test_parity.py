"""Layouts do not change training: DeepSpeed on four real ranks against a plain loop in one process.

The reference is PyTorch alone: one process, all experts at home, AdamW, ``clip_grad_norm_``, the four micro-batches
one after another. Every engine has to route every token like it and to reach its losses, weights and codes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed import run_ranks
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.data.batches import positions_in_documents
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.moe.deepspeed_layer import DeepSpeedMoELayer, clip_over_all_experts
from vqmoe_ds.moe.layer import MoELayer
from vqmoe_ds.moe.state import recomputing
from vqmoe_ds.moe.state_sync import StateSync
from vqmoe_ds.train.engine import undo_empty_step

MICRO_BATCHES, MICRO_SIZE, VOCAB = 4, 2, 64
EXPERTS, LEARNING_RATE, CLIP = 8, 3e-3, 0.4

CASES: dict[str, dict[str, Any]] = {
    "context, discrete only": {"moe": {"top_k": 0}, "codebook": {"source": "context"}},
    "context, top-1": {"moe": {"top_k": 1}, "codebook": {"source": "context", "num_codes": 20}},
    "layer state, discrete only": {"moe": {"top_k": 0}, "codebook": {"source": "layer_state"}},
    "layer state, top-1": {"moe": {"top_k": 1}, "codebook": {"source": "layer_state"}},
    "the paper's input and rule": {
        "moe": {"top_k": 1, "code_blend": 1.0},
        "codebook": {
            "source": "layer_state",
            "normalize_source": False,
            "commitment_weight": 0.1,
            "learning": "gradient",
            "learning_rate": 0.01,
        },
    },
    "norms around the discrete expert": {
        "moe": {"top_k": 0, "input_norm": True, "output_norm": True},
        "codebook": {"source": "context"},
        # The exchanged rows that the norm's gradient reads are kept for the recomputation.
        "train": {"activation_checkpointing": True},
    },
    "early block": {"moe": {"top_k": 0}, "codebook": {"source": "early_block"}, "model": {"layers": 3}},
    "top-2 router, normed": {"moe": {"router": "topk", "top_k": 2, "z_loss_weight": 0.01, "output_norm": True}},
    "shared experts beside codes, grouped queries": {
        "moe": {"top_k": 0, "shared_experts": 2, "shared_gate": True},
        "codebook": {"source": "context"},
        "model": {"kv_heads": 1, "qkv_bias": True, "layers": 3, "dense_layers": 1},
    },
    "documents kept apart": {
        "moe": {"top_k": 1},
        "codebook": {"source": "context", "num_codes": 20, "context_window": 5},
        "train": {"activation_checkpointing": True},
        "data": {"separate_documents": True},
    },
    "tied embeddings, sliding window": {
        "moe": {"top_k": 1},
        "codebook": {"source": "context", "num_codes": 20},
        "model": {"tie_embeddings": True, "sliding_window": 7},
        "train": {"activation_checkpointing": True},
    },
    "hash of tokens": {"moe": {"router": "hash_token"}, "model": {"layers": 3, "moe_every": 2}},
}


def _config(case: str, **changes: dict[str, Any]) -> RunConfig:
    sections: dict[str, dict[str, Any]] = {
        "model": {"vocab_size": VOCAB, "layers": 2, "width": 32, "heads": 2, "sequence_length": 24},
        "moe": {"num_experts": EXPERTS, "expert_hidden": 16},
        "codebook": {"init_step": 2, "kmeans_samples": 128, "dead_below": 0.2},
        "train": {},
        "data": {},
    }
    for section, values in [*CASES[case].items(), *changes.items()]:
        sections[section] = {**sections[section], **values}
    return RunConfig(**sections)


def _micro_batch(config: RunConfig, step: int, number: int) -> dict[str, Tensor]:
    """Symbols of a noisy counting machine, so that there is something to learn, cut into documents at any places."""
    generator = torch.Generator().manual_seed(100 * step + number)
    length = config.model.sequence_length + 1
    start, stride = (torch.randint(1, 64, (MICRO_SIZE, 1), generator=generator) for _ in range(2))
    noise = torch.rand(MICRO_SIZE, length, generator=generator) < 0.1
    tokens_BS = (start + (stride % 3 + 1) * torch.arange(length) + 17 * noise) % VOCAB
    batch = {"tokens_BS": tokens_BS[:, :-1], "targets_BS": tokens_BS[:, 1:]}
    if config.data.separate_documents:
        starts_BS = torch.rand(MICRO_SIZE, length - 1, generator=generator) < 0.2
        batch["positions_BS"] = torch.from_numpy(positions_in_documents(starts_BS.numpy()))
    return batch


@dataclass
class Run:
    """What one training leaves behind."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    routes: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    """(step, micro-batch number, layer) -> experts of its rows."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Of the first step, averaged and before clipping."""
    codes: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


class _RouteRecorder:
    """Notes the experts of every row when the layer plans its dispatch (not again in a recomputation)."""

    def __init__(self, run: Run, model: MoETransformer) -> None:
        self.run, self.place = run, (0, 0)
        for layer in model.moe_layers():
            original = layer._plan
            layer._plan = lambda *args, layer=layer, original=original: self._note(layer, original, *args)

    def _note(self, layer: MoELayer, original: Any, routing: Any, known: Any) -> Any:
        if layer.training and not recomputing():
            self.run.routes[(*self.place, layer.layer)] = routing.expert_ids_TR.to(torch.uint8)
        return original(routing, known)


def _prepared(model: MoETransformer, one_expert: int | None) -> MoETransformer:
    if one_expert is not None and model.bank is not None:
        model.bank.code_map_LK.fill_(one_expert)
    return model


def _codes(model: MoETransformer) -> dict[str, Tensor]:
    return {} if model.bank is None else {name: buffer.clone() for name, buffer in model.bank.named_buffers()}


def _plain(config: RunConfig, steps: int, one_expert: int | None = None) -> Run:
    """The reference: no DeepSpeed, no process group."""
    assert not dist.is_initialized()
    run, model = Run(), _prepared(MoETransformer(config), one_expert)
    sync = StateSync(model, MICRO_BATCHES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    recorder = _RouteRecorder(run, model)
    for step in range(steps):
        total = 0.0
        for number in range(MICRO_BATCHES):
            recorder.place = (step, number)
            loss, aux = model(**_micro_batch(config, step, number))
            ((loss + aux) / MICRO_BATCHES).backward()
            total += loss.item()
        if step == 0:
            run.gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        run.norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
        sync.step()
        run.losses.append(total / MICRO_BATCHES)
    run.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    run.codes = _codes(model)
    return run


def _engine_config(stage: int, accumulation: int, **more: Any) -> dict[str, Any]:
    more = {**more, "zero_optimization": {"stage": stage, **more.get("zero_optimization", {})}}
    return {
        "train_micro_batch_size_per_gpu": MICRO_SIZE,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "torch_adam": True}},
        "gradient_clipping": CLIP,
        **more,
    }


@dataclass(frozen=True)
class Layout:
    """One engine to try."""

    ep_size: int
    stage: int
    more: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return f"EP {self.ep_size}, ZeRO {self.stage} {dict(self.more) or ''}"


def _engine_run(rank: int, world: int, config: RunConfig, layout: Layout, steps: int, one_expert: int | None) -> Run:
    accumulation = MICRO_BATCHES // world
    run, model = Run(), MoETransformer(config, layout.ep_size, rank % layout.ep_size, DeepSpeedMoELayer)
    model = _prepared(model, one_expert)
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        model_parameters=list(model.parameters()),
        config=_engine_config(layout.stage, accumulation, **dict(layout.more)),
    )
    if layout.ep_size == 1:  # others do by themselves; DeepSpeed reports no norm of float32 gradients
        clip_over_all_experts(engine)
    undo_empty_step(engine.optimizer)
    sync = StateSync(model, accumulation)
    sync.broadcast()
    recorder = _RouteRecorder(run, model)
    for step in range(steps):
        total = torch.zeros(())
        for micro in range(accumulation):
            number = micro * world + rank
            recorder.place = (step, number)
            loss, aux = engine(**_micro_batch(config, step, number))
            engine.backward(loss + aux)
            total += loss.detach().float()
            if step == 0 and micro == accumulation - 1 and layout.stage == 0:
                run.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            engine.step()
        sync.step()
        dist.all_reduce(total)
        run.losses.append(total.item() / MICRO_BATCHES)
        run.norms.append(float(engine.get_global_grad_norm()))
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=layout.stage == 3):
        run.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    run.codes = _codes(model)
    run.facts["in step"] = sync.in_step()
    if model.bank is not None:
        run.facts["pending"] = model.bank.pending.dtype
    run.facts["offload"] = bool(engine.zero_cpu_offload())
    run.facts["counted"] = [int(layer.tokens_per_expert.sum()) for layer in model.moe_layers()]
    engine.destroy()
    return run


def _many(
    rank: int, world: int, config: RunConfig, layouts: list[Layout], steps: int, one_expert: int | None = None
) -> list[Run]:
    return [_engine_run(rank, world, config, layout, steps, one_expert) for layout in layouts]


def _local(name: str, tensor: Tensor, rank: int, ep_size: int) -> Tensor:
    """The part of a whole model's tensor that a rank holds."""
    return tensor.chunk(ep_size)[rank % ep_size] if ".experts." in name else tensor


def _largest(got: dict[str, Tensor], want: dict[str, Tensor], rank: int, ep_size: int) -> float:
    """Largest difference of two sets of tensors, relative to the size of each."""
    assert got.keys() == want.keys()
    worst = 0.0
    for name, tensor in got.items():
        reference = _local(name, want[name], rank, ep_size).double()
        if tensor.numel():
            scale = max(1.0, reference.abs().max().item())
            worst = max(worst, (tensor.double() - reference).abs().max().item() / scale)
    return worst


def _compare(config: RunConfig, layouts: list[Layout], steps: int, one_expert: int | None = None) -> None:
    reference = _plain(config, steps, one_expert)
    assert max(reference.norms) > CLIP, "clipping never acted"
    answers = run_ranks(4, _many, config, layouts, steps, one_expert, timeout=240)
    for index, layout in enumerate(layouts):
        runs = [answer[index] for answer in answers]
        routes = {place: ids for run in runs for place, ids in run.routes.items()}
        assert routes.keys() == reference.routes.keys()
        strays = sum(int((ids != reference.routes[place]).sum()) for place, ids in routes.items())
        assert strays == 0, f"{layout}: {strays} rows went to another expert"
        for rank, run in enumerate(runs):
            assert run.losses == pytest.approx(reference.losses, abs=1e-5), str(layout)
            assert run.norms == pytest.approx(reference.norms, rel=1e-4), f"{layout}: gradient norms"
            assert _largest(run.codes, reference.codes, 0, 1) < 1e-5, f"{layout}: codes"
            assert _largest(run.weights, reference.weights, rank, layout.ep_size) < 2e-4, f"{layout}: weights"
            assert run.facts.get("in step", True), str(layout)
            assert run.facts["offload"] == (layout.more == OFFLOAD)
            if run.gradients:
                assert _largest(run.gradients, reference.gradients, rank, layout.ep_size) < 1e-6, f"{layout}: gradients"


ALL_LAYOUTS = [Layout(ep_size, stage) for stage in range(4) for ep_size in (1, 2, 4)]
OFFLOAD = (("zero_optimization", {"offload_optimizer": {"device": "cpu"}}), ("zero_force_ds_cpu_optimizer", False))
IN_PARTS = (("zero_optimization", {"stage3_param_persistence_threshold": 0}),)
"""ZeRO-3 keeps no small weight whole, so each is gathered for every use."""
MATRIX = {
    "context, discrete only": [Layout(1, 0), Layout(1, 1), Layout(1, 2), Layout(4, 3), Layout(2, 2, OFFLOAD)],
    "layer state, top-1": [Layout(4, 0), Layout(2, 1), Layout(4, 2), Layout(2, 3), Layout(1, 3)],
    "context, top-1": [Layout(4, 1), Layout(2, 2)],
    "layer state, discrete only": [Layout(2, 0), Layout(4, 3)],
    "the paper's input and rule": [Layout(2, 2), Layout(4, 3)],
    "norms around the discrete expert": [Layout(4, 0), Layout(2, 2)],
    "early block": [Layout(4, 2)],
    "top-2 router, normed": [Layout(4, 0), Layout(2, 3)],
    "shared experts beside codes, grouped queries": [Layout(4, 2), Layout(2, 3)],
    "documents kept apart": [Layout(4, 2), Layout(2, 3)],
    "tied embeddings, sliding window": [Layout(2, 0), Layout(4, 1), Layout(1, 2), Layout(2, 3), Layout(4, 3, IN_PARTS)],
    "hash of tokens": [Layout(4, 1)],
}
SLOW = {
    "context, top-1": [Layout(2, 0)],
    "shared experts beside codes, grouped queries": [Layout(4, 0), Layout(2, 1)],
}


def test_every_layout_is_in_the_matrix() -> None:
    assert {replace(layout, more=()) for layouts in MATRIX.values() for layout in layouts} == set(ALL_LAYOUTS)


@pytest.mark.parametrize("case", MATRIX)
def test_expert_parallelism_and_zero_change_nothing(case: str) -> None:
    _compare(_config(case), MATRIX[case], steps=12)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_more_layouts_change_nothing(case: str) -> None:
    _compare(_config(case), SLOW[case], steps=12)


@pytest.mark.slow
def test_every_layout_changes_nothing_of_one_model() -> None:
    _compare(_config("context, discrete only"), ALL_LAYOUTS, steps=20)


# --------------------------------------------------------------------- unlike loads

UNLIKE = [Layout(4, 0), Layout(4, 2), Layout(2, 3)]


def test_experts_without_tokens_for_many_steps() -> None:
    """Every token goes to expert 5: three of four ranks hold only idle experts, and wait for nobody."""
    config = _config("context, discrete only", codebook={"dead_below": 0.0})
    _compare(config, UNLIKE, steps=8, one_expert=5)


def test_fewer_tokens_than_experts() -> None:
    """Two sequences of one token a rank: most experts see nothing at most steps."""
    sizes = {"model": {"sequence_length": 2}, "moe": {"num_experts": 32}, "codebook": {"kmeans_samples": 16}}
    _compare(_config("layer state, top-1", **sizes), UNLIKE, steps=8)


# --------------------------------------------------------- accumulation, recomputation, repetition


def _both(rank: int, world: int, *configs: RunConfig) -> list[Run]:
    return [_engine_run(rank, world, config, Layout(1, 1), 8, None) for config in configs]


@pytest.mark.parametrize("case", ["context, discrete only", "layer state, top-1"])
def test_one_rank_with_four_micro_batches_is_four_ranks_with_one(case: str) -> None:
    plain, recomputing = (_config(case, train={"activation_checkpointing": on}) for on in (False, True))
    runs = [*run_ranks(1, _both, plain, recomputing)[0], *run_ranks(4, _both, plain, recomputing)[0]]
    for one in runs[1:]:
        assert one.losses == pytest.approx(runs[0].losses, abs=1e-6)
        assert _largest(one.codes, runs[0].codes, 0, 1) < 1e-6
        assert _largest(one.weights, runs[0].weights, 0, 1) < 1e-4
    assert runs[0].losses == runs[1].losses and runs[2].losses == runs[3].losses, "recomputation changed a bit"
    tokens = MICRO_BATCHES * MICRO_SIZE * 24 * 8 * (1 + plain.moe.top_k)
    assert runs[1].facts["counted"] == [tokens, tokens]
    assert runs[3].facts["counted"] == [tokens // 4, tokens // 4]
    assert runs[0].losses[-1] < runs[0].losses[0] - 0.1, "nothing was learned"


def _twice(rank: int, world: int, config: RunConfig, layouts: list[Layout]) -> list[tuple[Run, Run]]:
    answers = []
    for layout in layouts:
        torch.manual_seed(rank)
        first = _engine_run(rank, world, config, layout, 6, None)
        torch.manual_seed(rank + 77)  # nothing may depend on the global random state
        answers.append((first, _engine_run(rank, world, config, layout, 6, None)))
    return answers


def test_repetition_is_bit_identical() -> None:
    layouts = [Layout(2, 2), Layout(4, 3)]
    for answer in run_ranks(4, _twice, _config("layer state, top-1"), layouts):
        for first, second in answer:
            assert first.losses == second.losses
            for before, after in ((first.weights, second.weights), (first.codes, second.codes)):
                assert all(torch.equal(before[name], after[name]) for name in before)


# ------------------------------------------------------------------------- bfloat16

BF16 = (("bf16", {"enabled": True}),)


@pytest.mark.parametrize(
    "case, layouts",
    [
        ("context, discrete only", [Layout(4, 0, BF16), Layout(2, 1, BF16)]),
        ("layer state, top-1", [Layout(4, 2, BF16), Layout(2, 3, BF16)]),
    ],
)
def test_bfloat16_keeps_codes_and_statistics_in_full_precision(case: str, layouts: list[Layout]) -> None:
    config = _config(case)
    reference = _plain(config, 8)
    answers = run_ranks(4, _many, config, layouts, 8)
    for index, layout in enumerate(layouts):
        for run in (answer[index] for answer in answers):
            assert {tensor.dtype for tensor in run.weights.values()} == {torch.bfloat16}
            floats = {name: code.dtype for name, code in run.codes.items() if code.is_floating_point()}
            assert floats.pop("usage_LK") == torch.float64
            assert set(floats.values()) == {torch.float32}, floats
            assert run.facts["pending"] == torch.float64
            assert run.facts["in step"], str(layout)
            assert run.losses == pytest.approx(reference.losses, abs=0.05), str(layout)
            assert run.norms == pytest.approx(reference.norms, rel=0.02), str(layout)
