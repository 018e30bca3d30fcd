#!/usr/bin/env python
"""Whole training steps of one transformer: with our layer, and with each DeepSpeed layer in its place.

    python benchmarks/step.py                       # 1 rank, then 2 ranks with expert parallelism 2; about 5 minutes
    python benchmarks/step.py --ranks 2 --dtype bf16 --json out.json
    python benchmarks/step.py --ranks 2 --experts 128 --variants top-2 "codes beside top-1" "hash and code"

The model (embedding, attention, experts, head) runs through ``deepspeed.initialize`` with ZeRO-2, AdamW and clipping.
The variants take turns step by step in the same processes, on new random tokens each time; the batch is split over the
ranks, with one thread a rank where there are two. ``ours`` looks codes up in token context, plans the routes of all
layers ahead and exchanges counts once; ``ours, layer by layer`` looks them up in every layer's own state, as a learned
router must. The second table says where the time of a step of ours goes, backward included; the third gives the floor
of each part (floors.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import vqmoe_ds  # noqa: F401  before torch: it sets how long idle OpenMP threads spin

# isort: split

import deepspeed
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from floors import Floors
from measuring import table, write_json
from peers import PEERS, NativeMoE, WithoutAux, auto_ep, free_port, join_group
from torch import nn

import vqmoe_ds.models.transformer as transformer
import vqmoe_ds.moe.dispatch as dispatch
import vqmoe_ds.moe.experts as experts
import vqmoe_ds.moe.kernels.combine as combine
import vqmoe_ds.moe.layer as layer
from vqmoe_ds.config.schema import CodebookConfig, CodeSource, ModelConfig, MoEConfig, RunConfig
from vqmoe_ds.models.parameter_groups import parameter_groups
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.moe.codebook import CodebookBank
from vqmoe_ds.moe.deepspeed_layer import DeepSpeedMoELayer
from vqmoe_ds.moe.sources import EmbeddingSource
from vqmoe_ds.moe.state_sync import StateSync
from vqmoe_ds.runtime.allocator import tune_allocator
from vqmoe_ds.train.zero import spare_passes

OURS: dict[str, tuple[str, int, CodeSource]] = {
    "ours": ("vq", 0, CodeSource.CONTEXT),
    "ours, layer by layer": ("vq", 0, CodeSource.LAYER_STATE),
    "top-2": ("topk", 2, CodeSource.CONTEXT),
    "codes beside top-1": ("vq", 1, CodeSource.CONTEXT),
    "hash and code": ("hash_and_code", 1, CodeSource.CONTEXT),
}
"""Variant -> its router, ``moe.top_k`` and what its codes look at; the last three give a token two experts each."""
BY_DEFAULT = [*list(OURS)[:2], *PEERS]
ZERO_2 = Path(__file__).resolve().parent.parent / "ds_configs" / "zero2.json"
SEARCH, BOOKKEEPING, SYNC = "code search", "code statistics", "codebook sync"


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    runs = []
    for ranks in options.ranks:
        context = mp.get_context("spawn")
        answers = context.SimpleQueue()
        mp.spawn(run_rank, (ranks, free_port(), options, answers), nprocs=ranks, join=True)
        runs.append(answers.get())
        print(report(runs[-1], options), flush=True)
    write_json(options.json, runs)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, default=4096, help="of a step, over all ranks")
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=512, help="hidden width of an expert")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--variants", nargs="+", default=BY_DEFAULT, choices=[*OURS, *PEERS])
    parser.add_argument("--json", help="write the figures to a file, or to the terminal with -")
    return parser.parse_args(argv)


def run_rank(rank: int, ranks: int, port: int, options: argparse.Namespace, answers: Any) -> None:
    """Body of one process: build every variant, take turns, and have rank 0 answer."""
    torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    tune_allocator()
    join_group(rank, ranks, port)
    clock = Clock()
    clock.watch_our_layer()
    variants = {name: Variant(name, options, ranks, rank, clock) for name in options.variants}
    owned = sum(p.numel() for p in next(iter(variants.values())).engine.module.parameters())
    lowest = Floors(options, ranks, owned)
    times: dict[str, list[float]] = defaultdict(list)
    parts: dict[str, list[dict[str, float]]] = defaultdict(list)
    for repetition in range(options.repeats + 3):  # three to warm up: codes are initialized at the end of the first
        for name, variant in variants.items():
            dist.barrier()
            clock.spent.clear()
            start = time.perf_counter()
            variant.step(repetition)
            dist.barrier()
            if repetition >= 3:
                times[name].append((time.perf_counter() - start) * 1e3)
                parts[name].append({part: spent * 1e3 for part, spent in clock.spent.items()})
        lowest.measure()
    if rank == 0:
        answers.put(
            {
                "ranks": ranks,
                "threads": torch.get_num_threads(),
                "times": dict(times),
                "parts": dict(parts),
                "floors": lowest.milliseconds(),
            }
        )
    dist.barrier()


class Variant:
    """One transformer in its own DeepSpeed engine."""

    def __init__(self, name: str, options: argparse.Namespace, ranks: int, rank: int, clock: Clock) -> None:
        self.options, self.ranks, self.rank, self.clock = options, ranks, rank, clock
        model = build_model(name, options, ranks, rank)
        clock.watch_attention(model)
        precision = {"bf16": {"enabled": True}} if options.dtype == "bf16" else {}
        settings = {
            "train_micro_batch_size_per_gpu": options.tokens // options.sequence // ranks,
            "gradient_clipping": 1.0,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True, "fused": True}},
            "zero_optimization": json.loads(ZERO_2.read_text(encoding="utf-8"))["zero_optimization"],
            "steps_per_print": 1_000_000,
            **precision,
        }
        self.engine, *_ = deepspeed.initialize(
            model=model, model_parameters=parameter_groups(model, 0.1), config=settings, dist_init_required=False
        )
        spare_passes(self.engine)
        self.sync = StateSync(model)
        self.sync.broadcast()

    def step(self, seed: int) -> None:
        """Forward, backward, optimizer and codebook on this rank's part of batch ``seed``."""
        generator = torch.Generator().manual_seed(seed * 64 + self.rank)
        shape = (self.options.tokens // self.options.sequence // self.ranks, self.options.sequence + 1)
        tokens = torch.randint(256, shape, generator=generator)
        loss, aux_loss = self.engine(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        self.sync.start()
        self.engine.backward(loss + aux_loss)
        with self.clock("optimizer and ZeRO"):
            self.engine.step()
        with self.clock(SYNC):
            self.sync.step()


def build_model(name: str, options: argparse.Namespace, ranks: int, rank: int) -> MoETransformer:
    router, top_k, source = OURS.get(name, ("dense", 1, CodeSource.CONTEXT))
    config = RunConfig(
        model=ModelConfig(
            layers=options.layers, width=options.width, sequence_length=options.sequence, dense_hidden=options.hidden
        ),
        moe=MoEConfig(router=router, num_experts=options.experts, expert_hidden=options.hidden, top_k=top_k),
        codebook=CodebookConfig(source=source),
    )
    model = MoETransformer(config, ranks, rank, DeepSpeedMoELayer)
    if name not in OURS:
        for block in model.blocks:
            block.mlp = WithoutAux(peer(name, options, ranks, rank))
    return model


def peer(name: str, options: argparse.Namespace, ranks: int, rank: int) -> nn.Module:
    if name == PEERS[2]:
        return auto_ep(options.width, options.hidden, options.experts, ranks, rank)
    return NativeMoE(options.width, options.hidden, options.experts, name == PEERS[0], ranks)


class Clock:
    """Time by part of a step; time spent in a part inside another counts for the inner one alone."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._open: list[tuple[str, float]] = []

    def start(self, part: str) -> None:
        now = time.perf_counter()
        if self._open:
            self.spent[self._open[-1][0]] += now - self._open[-1][1]
        self._open.append((part, now))

    def stop(self) -> None:
        now = time.perf_counter()
        part, since = self._open.pop()
        self.spent[part] += now - since
        if self._open:
            self._open[-1] = (self._open[-1][0], now)

    @contextmanager
    def __call__(self, part: str) -> Any:
        self.start(part)
        try:
            yield
        finally:
            self.stop()

    def watch(self, owner: Any, names: Sequence[str], part: str) -> None:
        """Count the time of ``owner.name`` as that of ``part``."""
        for name in names:
            setattr(owner, name, self._timed(owner.__dict__[name], part))

    def _timed(self, function: Any, part: str) -> Any:
        inner: Callable[..., Any] = function.__func__ if isinstance(function, staticmethod) else function

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(part):
                return inner(*args, **kwargs)

        return staticmethod(timed) if isinstance(function, staticmethod) else timed

    def watch_our_layer(self) -> None:
        both = ("forward", "backward")
        self.watch(EmbeddingSource, ["forward"], SEARCH)
        self.watch(CodebookBank, ["prepare", "lookup", "lookup_all"], SEARCH)
        self.watch(CodebookBank, ["observe_all"], BOOKKEEPING)
        self.watch(transformer, ["make_plans", "sort_rows"], "dispatch")
        self.watch(layer, ["sort_rows", "merge_rows", "plans_of", "expand_rows", "combine"], "dispatch")
        self.watch(combine.PermuteRows, both, "dispatch")
        self.watch(combine._Expand, both, "dispatch")
        self.watch(dispatch._AllToAll, both, "all-to-all")
        self.watch(dispatch, ["_exchange_counts"], "all-to-all")
        for function in (experts._PlainExperts, experts.CompiledExperts):
            self.watch(function, both, "experts")

    def watch_attention(self, model: MoETransformer) -> None:
        for block in model.blocks:
            attention: Any = block.attention
            attention.register_forward_pre_hook(lambda *_: self.start("attention"))
            attention.register_forward_hook(lambda *_: self.stop())
            attention.register_full_backward_pre_hook(lambda *_: self.start("attention"))
            attention.register_full_backward_hook(lambda *_: self.stop())


def report(run: dict[str, Any], options: argparse.Namespace) -> str:
    title = (
        f"\n## {run['ranks']} rank(s), {run['threads']} thread(s) each, {options.dtype}, "
        f"{options.tokens} tokens per step"
    )
    best = {name: min(times) for name, times in run["times"].items()}
    first = "ours" if "ours" in best else next(iter(best))
    rows = [
        [
            name,
            f"{best[name]:.0f}",
            f"{statistics.median(times):.0f}",
            f"{best[name] / best[first]:.2f}",
            f"{1e3 * options.tokens / best[name]:,.0f}",
        ]
        for name, times in run["times"].items()
    ]
    text = title + "\n\n" + table(["variant", "ms best", "median", f"/ {first}", "tokens/s"], rows)
    text += "\n\n" + breakdown(run)
    return text + "\n\n" + floor_table(run, best[first]) if first == "ours" else text


def floor_table(run: dict[str, Any], best: float) -> str:
    """Least cost of the parts (benchmarks/floors.py), and our best step as a multiple of their sum."""
    lowest: dict[str, float] = run["floors"]
    rows = [[part, f"{value:.1f}"] for part, value in lowest.items()]
    rows.append(["**sum**; ours is " + f"{best / sum(lowest.values()):.2f} times that", f"{sum(lowest.values()):.1f}"])
    return table(["floor of", "ms"], rows)


def breakdown(run: dict[str, Any]) -> str:
    """Median milliseconds of each part over the steps, for our variants."""
    columns, names = ["part"], [name for name in OURS if name in run["times"]]
    cells: dict[str, list[str]] = defaultdict(lambda: ["–"] * 2 * len(names))
    for place, name in enumerate(names):
        whole = statistics.median(run["times"][name])
        parts = sorted({part for step in run["parts"][name] for part in step})
        spent = {part: statistics.median(step.get(part, 0.0) for step in run["parts"][name]) for part in parts}
        codes = sum(spent.get(part, 0.0) for part in (SEARCH, BOOKKEEPING, SYNC))
        spent |= {"other": whole - sum(spent.values()), "*all codebook work*": codes, "*whole step*": whole}
        columns += [f"{name}: ms", "share"]
        for part, value in spent.items():
            cells[part][2 * place : 2 * place + 2] = [f"{value:.1f}", f"{value / whole:.1%}"]
    return table(columns, [[part, *values] for part, values in cells.items()])


if __name__ == "__main__":
    main()
