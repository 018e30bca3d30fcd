"""Check 8: whole training steps of one transformer under DeepSpeed: with our layer, AutoEP or a dense MLP.

bfloat16, ZeRO-2, clipping, one expert per token (``top_k 1`` has two); tokens are random and new in every step. All run
in a plain DeepSpeed engine, but for ``our trainer``: that is the step of ``launchers/pretrain.py``, with its ZeRO
JSON, on the host's clock.

Legend: B batch, S sequence, D width, H hidden width of an expert.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
from peers import PEERS, WithoutAux, build_layer, build_on
from torch import nn

from vqmoe_ds.config.schema import CodebookConfig, ModelConfig, MoEConfig, RunConfig
from vqmoe_ds.models.parameter_groups import parameter_groups
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.moe.codebook import CodebookBank
from vqmoe_ds.moe.sources import EmbeddingSource
from vqmoe_ds.moe.state_sync import StateSync

from . import training
from .frame import Bench, Clock, Finding, as_its_users, attempt, fastest_round, peak_memory
from .report import FAILED, MEASURED, MET, MISSED, SKIPPED

ROOT = Path(__file__).resolve().parents[2]
OURS, OURS_1, AUTO_EP, DENSE = "ours, top_k 0", "ours, top_k 1", PEERS[2], "dense"
TRAINER = "our trainer, top_k 0"
FUSED, FOREACH = "fused", "foreach"
VARIANTS = ((OURS, FUSED), (AUTO_EP, FUSED), (OURS_1, FUSED), (DENSE, FUSED), (OURS, FOREACH))
CODEBOOK_SHARE = 0.02
"""Most of a step that search, statistics and synchronisation of the codes may take."""


class Sizes(NamedTuple):
    tokens: tuple[int, ...]
    sequence: int
    layers: int
    width: int
    hidden: int
    experts: int
    vocab: int
    repeats: int


LARGE = Sizes((16384, 4096, 65536), 2048, 8, 1024, 704, 64, 8192, 6)
SMALL = Sizes((128, 64), 32, 2, 32, 32, 8, 64, 2)


def sizes_of(bench: Bench) -> Sizes:
    return SMALL if bench.small else LARGE


def run(bench: Bench) -> Iterator[Finding]:
    sizes, times = sizes_of(bench), dict[tuple[int, str], float]()
    for name, adam in VARIANTS:
        out_of_memory = FAILED if name in (OURS, OURS_1) else SKIPPED  # others need not fit
        for finding in attempt(f"{name}, {adam} Adam", partial(_measure, bench, name, adam), out_of_memory):
            if adam == FUSED and "variant" in finding.figures:
                times[finding.figures["tokens"], name] = finding.figures["ms"]
            yield finding
    yield from attempt(TRAINER, partial(_time_trainer, bench))
    for tokens in sizes.tokens if bench.cuda else ():
        ours, theirs = times.get((tokens, OURS)), times.get((tokens, AUTO_EP))
        if ours is not None and theirs is not None:
            figures = {OURS: ours, AUTO_EP: theirs, "ratio": ours / theirs, "aim": 1.0}
            why = "" if ours <= theirs else f"{ours / theirs:.2f} x {AUTO_EP}"
            yield Finding(f"aim: ms, step of {tokens} tokens, {OURS} / {AUTO_EP}", MISSED if why else MET, figures, why)


def _measure(bench: Bench, name: str, adam: str) -> Iterator[Finding]:
    with as_its_users(name in (OURS, OURS_1)), variant(bench, name, adam) as steps:
        yield from _time(bench, steps.sizes, steps, f"{name}, {adam} Adam")
        if (name, adam) == VARIANTS[0]:
            yield _codebook_share(bench, steps, steps.sizes.tokens[0])


class Steps:
    """One transformer in its engine."""

    def __init__(self, bench: Bench, name: str, adam: str) -> None:
        self.bench, self.sizes = bench, sizes_of(bench)
        model = build_on(bench.device, torch.float32, lambda: _model(name, self.sizes))
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True, adam: True}},
            "zero_optimization": {"stage": 2, "contiguous_gradients": True, "reduce_scatter": True},
            "steps_per_print": 1_000_000,
        }
        self.engine, *_ = deepspeed.initialize(
            model=model, model_parameters=parameter_groups(model, 0.1), config=settings, dist_init_required=False
        )
        self.sync = StateSync(model)
        self.engine.train()

    def step(self, tokens: int, mark: Callable[[], Any] = lambda: None) -> list[Any]:
        """Forward, backward, optimizer and codebook; the marks between them."""
        shape = (tokens // self.sizes.sequence, self.sizes.sequence + 1)
        ids_BS = torch.randint(self.sizes.vocab, shape, device=self.bench.device)
        marks = [mark()]
        loss, aux_loss = self.engine(ids_BS[:, :-1].contiguous(), ids_BS[:, 1:].contiguous())
        marks.append(mark())
        self.sync.start()
        self.engine.backward(loss + aux_loss)
        marks.append(mark())
        self.engine.step()
        marks.append(mark())
        self.sync.step()
        return [*marks, mark()]


@contextmanager
def variant(bench: Bench, name: str, adam: str) -> Iterator[Steps]:
    """A transformer ready to train, with its codes initialized; its memory is given back afterwards."""
    bench.free()
    steps = Steps(bench, name, adam)
    try:
        steps.step(steps.sizes.tokens[0])  # kernels compiled, codes initialized
        yield steps
    finally:
        steps.engine.destroy()
        del steps
        bench.free()


def _time(bench: Bench, sizes: Sizes, steps: Steps, name: str) -> Iterator[Finding]:
    for tokens in sizes.tokens:
        with peak_memory(bench) as memory:
            *parts, ms = fastest_round(bench, partial(steps.step, tokens), sizes.repeats)
        named = zip(("forward_ms", "backward_ms", "optimizer_ms", "codebook_sync_ms"), parts, strict=True)
        figures = {"tokens": tokens, "variant": name, "ms": ms, **dict(named), "tokens_s": tokens / ms * 1e3, **memory}
        yield Finding(f"{tokens} tokens, {name}", MEASURED, figures)


def _time_trainer(bench: Bench) -> Finding:
    sizes = sizes_of(bench)
    tokens = sizes.tokens[0]
    model: dict[str, Any] = {"layers": sizes.layers, "width": sizes.width, "heads": max(2, sizes.width // 128)}
    model |= {"sequence_length": sizes.sequence, "vocab_size": max(sizes.vocab, 256), "dense_hidden": sizes.hidden}
    moe: dict[str, Any] = {"router": "vq", "top_k": 0, "num_experts": sizes.experts, "expert_hidden": sizes.hidden}
    book: dict[str, Any] = {"kmeans_samples": 8 * sizes.experts, "kmeans_iterations": 1, "overused_above": 0}
    sections = {"model": model, "moe": moe, "codebook": book, "train": {"batch_size": tokens // sizes.sequence}}
    run = {f"{section}__{name}": value for section, values in sections.items() for name, value in values.items()}
    shipped = json.loads((ROOT / "ds_configs" / "zero2.json").read_text("utf-8"))["zero_optimization"]
    deepspeed_json = training.settings(2, "bf16", gradient_clipping=1.0, zero_optimization=shipped)
    with training.trainer(bench, training.fields(bench, **run), deepspeed_json) as loop:
        training.losses(loop, 3)
        with peak_memory(bench) as memory:
            rounds = [[1e3 * loop.train_step().seconds for _ in range(sizes.repeats)] for _ in range(3)]
        ms = min(map(statistics.median, rounds))
    figures = {"tokens": tokens, "variant": TRAINER, "ms": ms, "tokens_s": tokens / ms * 1e3, **memory}
    return Finding(f"{tokens} tokens, {TRAINER}", MEASURED, figures)


def _codebook_share(bench: Bench, steps: Steps, tokens: int) -> Finding:
    """Time in the stream between entering and leaving the codes' methods, as a share of the step."""
    whole, spent = [], []
    for _ in range(3):
        clock, inside = Clock(bench), list[tuple[Any, Any]]()
        with _timing_codes(clock, inside):
            marks = steps.step(tokens, clock.mark)
        bench.synchronize()
        whole.append(clock.milliseconds(marks[0], marks[-1]))
        spent.append(sum(clock.milliseconds(*pair) for pair in inside))
    share = statistics.median(spent) / statistics.median(whole)
    figures = {"share": share, "ms": statistics.median(spent), "of_ms": statistics.median(whole)}
    case = f"aim: codebook's share of a step, {tokens} tokens, {OURS}"
    if not bench.cuda:
        return Finding(case, MEASURED, figures)
    good = share <= CODEBOOK_SHARE
    return Finding(case, MET if good else MISSED, {**figures, "aim": CODEBOOK_SHARE}, "" if good else f"{share:.1%}")


@contextmanager
def _timing_codes(clock: Clock, inside: list[tuple[Any, Any]]) -> Iterator[None]:
    """Mark the outermost calls of all methods of source, codebooks and their synchronisation."""
    depth, kept = [0], list[tuple[Any, str, Any]]()
    owners: tuple[Any, ...] = (EmbeddingSource, CodebookBank, StateSync)

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            depth[0] += 1
            start = clock.mark() if depth[0] == 1 else None
            try:
                return method(*args, **kwargs)
            finally:
                depth[0] -= 1
                if start is not None:
                    inside.append((start, clock.mark()))

        return call

    for owner in owners:
        for name, method in list(vars(owner).items()):
            if callable(method) and not name.startswith("_") and not isinstance(method, staticmethod | classmethod):
                kept.append((owner, name, method))
                setattr(owner, name, timed(method))
    try:
        yield
    finally:
        for owner, name, method in kept:
            setattr(owner, name, method)


def _model(name: str, sizes: Sizes) -> nn.Module:
    ours = name in (OURS, OURS_1)
    config = RunConfig(
        model=ModelConfig(
            vocab_size=sizes.vocab,
            layers=sizes.layers,
            width=sizes.width,
            heads=max(2, sizes.width // 128),
            sequence_length=sizes.sequence,
            dense_hidden=sizes.hidden,
        ),
        moe=MoEConfig(
            router="vq" if ours else "dense",
            num_experts=sizes.experts,
            expert_hidden=sizes.hidden,
            top_k=int(name == OURS_1),
        ),
        # A quick initialization; nothing of the steps measured depends on how good the codes are.
        codebook=CodebookConfig(kmeans_samples=8 * sizes.experts, kmeans_iterations=1, overused_above=0),
    )
    model = MoETransformer(config)
    if name == AUTO_EP:
        for block in model.blocks:
            block.mlp = WithoutAux(build_layer(name, sizes.width, sizes.hidden, sizes.experts))
    return model
