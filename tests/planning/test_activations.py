"""What the planner says a forward pass keeps is what autograd keeps on real ranks.

Here the ranks run on CPU, so stand-ins for GPU kernels are exchanged for those of this processor: attention keeps as
much, norms keep float32 copies, compiled experts keep less. ``grouped`` runs the experts of GPUs on the ranks, too.

Legend: P rows, E experts, D width, H expert hidden width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tests.checkpoint.layouts import Layout
from tests.distributed import run_ranks
from tests.planning.measured import SKIPPED, build, close, configure, storage_bytes
from vqmoe_ds.models.loss import cross_entropy
from vqmoe_ds.moe import experts
from vqmoe_ds.moe.kernels.grouped import grouped_experts
from vqmoe_ds.planning import memory, meta_forward
from vqmoe_ds.planning.parameters import count

LARGER = {
    **{"model.layers": 3, "model.width": 64, "model.heads": 4, "model.sequence_length": 64, "moe.num_experts": 8},
    **{"moe.expert_hidden": 48, "codebook.num_codes": 16},
}
LONG = {**LARGER, "model.vocab_size": 512, "model.width": 128, "model.sequence_length": 256, "moe.expert_hidden": 128}
"""Large enough that activations outweigh what kernels and collectives hold for a moment."""
DUAL: dict[str, Any] = {}
DISCRETE = {"moe.top_k": 0}
OF_STATE = {"codebook.source": "layer_state", "codebook.source_momentum": 0.0}
TOPK = {"moe.router": "topk", "moe.top_k": 2}
RECOMPUTED = {"train.activation_checkpointing": True}
WINDOW = {"model.sliding_window": 16, "model.sequence_length": 512, "model.width": 16, "moe.expert_hidden": 16}
"""So narrow that the mask is a tenth or more of what is kept."""
SHARED: dict[str, Any] = {"train.sequence_parallel_size": 2}

Case = tuple[Layout, dict[str, Any]]
SAMPLE: dict[int, list[Case]] = {
    1: [(Layout(2, 1, 1), DUAL), (Layout(2, 1, 1, "bf16"), RECOMPUTED), (Layout(2, 1, 1), WINDOW)],
    2: [
        *[(Layout(2, 2, 2, "bf16"), DUAL), (Layout(3, 2, 2), DISCRETE), (Layout(0, 2, 2), {**TOPK, **RECOMPUTED})],
        *[(Layout(2, 2, 2, "bf16"), {**SHARED, **TOPK}), (Layout(2, 1, 2), {**SHARED, **RECOMPUTED})],
        (Layout(2, 2, 2, "bf16"), {**SHARED, **DISCRETE, "model.kv_heads": 2, "moe.shared_experts": 2}),
    ],
}
TOLERANCE = 0.02
"""Relative. Seen: 0.5 % under to 1.3 % over."""


def observe(rank: int, world: int, folder: str, cases: list[Case], grouped: bool) -> list[int]:
    """Bytes that the forward pass of one micro-batch keeps on this rank, case by case."""
    if grouped:
        experts.supports = lambda *_: False
        experts._PlainExperts.apply = _grouped
    return [_observe(rank, world, f"{folder}/{number}", *case) for number, case in enumerate(cases)]


def _grouped(x_PD: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, counts_E: list[int]) -> Tensor:
    return grouped_experts(x_PD, w1, w2, w3, torch.tensor(counts_E).cumsum(0).to(torch.int32))


def _observe(rank: int, world: int, folder: str, layout: Layout, changes: dict[str, Any]) -> int:
    trainer = build(rank, world, folder, layout, {**LARGER, **changes})
    trainer.train_step()  # codes are initialized at its end
    model = trainer.session.engine.module
    forward, kept = model.forward, {}

    def watched(*inputs: Any) -> Any:
        kept.clear()  # the last micro-batch counts

        def pack(tensor: Tensor) -> Tensor:
            own = {t.untyped_storage().data_ptr() for t in (*inputs, *model.buffers(), *_values(model))}
            if tensor.untyped_storage().data_ptr() not in own:  # ZeRO-3: as gathered at this moment
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return forward(*inputs)

    model.forward = watched
    trainer.train_step()
    size = storage_bytes(list(kept.values()))
    kept.clear()
    close(trainer)
    return size


def observe_peaks(rank: int, world: int, folder: str, cases: list[Case]) -> list[int]:
    """Most bytes that a step holds beyond what was there before it, as PyTorch's allocator counts them.

    The least of six steps: gloo's threads let go of what they sent when they come to run.
    """
    return [_observe_peak(rank, world, f"{folder}/{number}", *case) for number, case in enumerate(cases)]


def _observe_peak(rank: int, world: int, folder: str, layout: Layout, changes: dict[str, Any]) -> int:
    trainer = build(rank, world, folder, layout, {**LONG, **changes})
    for _ in range(SKIPPED):
        trainer.train_step()
    peaks = [_peak(trainer.train_step) for _ in range(6)]
    close(trainer)
    return min(peaks)


def _peak(step: Callable[[], Any]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda event: event.start_ns())))


def _values(model: torch.nn.Module) -> list[Tensor]:
    return [param.data for param in model.parameters()]


def cpu_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = True, enable_gqa: bool = False
) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal)[0]


def cpu_loss(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """In float32 the CPU keeps log-probabilities, elsewhere logits are kept as they are."""
    if logits_TV.element_size() < 4:
        return cross_entropy(logits_TV, targets_T)
    return torch.nn.functional.cross_entropy(logits_TV, targets_T)


class CompiledExperts(torch.autograd.Function):
    """Shapes of the kernel for CPU: it keeps its rows and two projections."""

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_PD, *(x_PD.new_empty(len(x_PD), w1.shape[1]) for _ in range(2)))
        return torch.empty_like(x_PD)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Stand-ins for this processor's kernels instead of a GPU's."""
    stand_ins: dict[str, Any] = {
        "torch.nn.functional.scaled_dot_product_attention": cpu_attention,
        "vqmoe_ds.moe.experts.grouped_experts": CompiledExperts.apply,
        "vqmoe_ds.models.transformer.cross_entropy": cpu_loss,
    }
    monkeypatch.setattr(meta_forward, "GPU_KERNELS", stand_ins)
    memory._kept.cache_clear()
    yield stand_ins
    memory._kept.cache_clear()


def check(folder: Path, world: int, cases: list[Case], grouped: bool = False) -> None:
    answers = run_ranks(world, observe, str(folder), cases, grouped, timeout=60 + 30 * len(cases))
    report = []
    for number, (layout, changes) in enumerate(cases):
        config, _ = configure(folder / f"planned-{number}", layout, {**LARGER, **changes})
        measured = sum(answer[number] for answer in answers) / world  # rows are uneven
        report.append((f"{layout} {changes}", memory.kept(config), measured))
    memory._kept.cache_clear()
    print(
        *(f"{name}: planned {plan}, measured {real:.0f}, {plan / real - 1:+.2%}" for name, plan, real in report),
        sep="\n",
    )
    for name, plan, real in report:
        assert plan == pytest.approx(real, rel=TOLERANCE), name


@pytest.mark.parametrize("world", SAMPLE)
def test_a_forward_pass_keeps_what_was_counted(tmp_path, kernels, world):
    check(tmp_path, world, SAMPLE[world])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_router_and_stage(tmp_path, kernels, world, precision):
    changes = [router | again for router in (DUAL, DISCRETE, OF_STATE, TOPK) for again in ({}, RECOMPUTED)]
    layouts = [Layout(number % 4, min(world, 2), world, precision) for number in range(len(changes))]
    check(tmp_path, world, list(zip(layouts, changes, strict=True)))


@pytest.mark.slow
def test_grouped_products_of_gpus(tmp_path, kernels):
    """PyTorch runs them on CPU in bfloat16."""
    del kernels["vqmoe_ds.moe.experts.grouped_experts"]
    cases = [(Layout(2, 2, 2, "bf16"), router) for router in (DUAL, DISCRETE, TOPK)]
    check(tmp_path, 2, cases, grouped=True)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", [{}, RECOMPUTED], ids=["kept", "recomputed"])
def test_a_step_needs_about_what_was_planned(tmp_path, kernels, precision, recompute):
    """Activations, rows in flight, gradients, buckets and codebook together, at their peak; states stand before it.

    So do the gradients of ZeRO-3, whose plan counts as many gathered weights as its settings allow. With recomputation
    little is held and the measured peak differs by a fifth from run to run, by what communication still holds then.
    """
    cases = []
    for stage in range(4):
        zero = {"stage": stage, "reduce_bucket_size": 60_000, "overlap_comm": False}
        cases.append((Layout(stage, 2, 2, precision), {"deepspeed": {"zero_optimization": zero}, **recompute}))
    answers = run_ranks(2, observe_peaks, str(tmp_path), cases, timeout=200)
    report = []
    for number, (layout, changes) in enumerate(cases):
        config, _ = configure(tmp_path / f"planned-{number}", layout, {**LONG, **changes})
        plan = memory.estimate(count(config.run), config, imbalance=1.2)
        planned = plan.activations + plan.dispatch + plan.buckets + plan.codebook
        planned += plan.gradients if layout.stage < 3 else 0
        report.append((f"{layout} {changes}", planned, max(answer[number] for answer in answers)))
    print(
        *(f"{name}: planned {plan}, measured {real}, {plan / real - 1:+.0%}" for name, plan, real in report), sep="\n"
    )
    for name, planned, measured in report:
        assert (0.7 if recompute else 0.9) < planned / measured < (2.2 if recompute else 1.8), name
