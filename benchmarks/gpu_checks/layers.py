"""Check 7: one MoE layer, forward and backward, in bfloat16, beside DeepSpeed's layers, the dense MLP and a loop.

Every layer gives each token one expert; ``dense`` has the same active FLOPs. ``ours, routes ahead`` is handed its plan,
as a model with ``top_k=0`` hands it to every layer; ``ours, own search`` looks codes up in its own input, counts and
sums. Inputs rotate, so that none is in the cache when its turn comes.

Legend: T tokens, D width, H hidden width, N experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peers import PEERS, build_layer, build_on
from torch import Tensor, nn

from vqmoe_ds.config.schema import MoEConfig
from vqmoe_ds.moe.config import LayerConfig
from vqmoe_ds.moe.dispatch import Ahead, DispatchPlan, combine, expand_rows, make_plans
from vqmoe_ds.moe.layer import MoELayer
from vqmoe_ds.moe.routers import RoutingContext

from .frame import Bench, Finding, Mark, Rates, as_its_users, attempt, fastest_round, peak_memory
from .report import FAILED, MEASURED, MET, MISSED, SKIPPED

AHEAD, SEARCH, DENSE, LOOP = "ours, routes ahead", "ours, own search", "dense", "cuBLAS loop"
VARIANTS = (AHEAD, SEARCH, PEERS[2], DENSE, *PEERS[:2], LOOP)
ROTATED = 4

Route = tuple[Tensor, DispatchPlan, list[int]]
"""Experts of the tokens, their plan, and the rows of each expert as the host's numbers."""


class Sizes(NamedTuple):
    tokens: tuple[int, ...]
    hidden: tuple[int, ...]
    width: int
    experts: int
    repeats: int


LARGE = Sizes((16384, 4096, 65536), (1408, 5632), 2048, 64, 10)
SMALL = Sizes((256, 128), (48,), 32, 8, 2)


class Aim(NamedTuple):
    """An aim: at the tokens and hidden width given, ``of``'s figure is at most ``factor`` times that of ``to``."""

    tokens: tuple[int, ...]
    hidden: int
    of: str
    to: str
    factor: float
    figure: str = "ms"


Found = dict[tuple[int, int, str], dict[str, Any]]
"""Figures by tokens, hidden width and variant."""


ROOFLINE = "roofline"
AIMS = (
    Aim((16384, 65536), 1408, AHEAD, ROOFLINE, 1.25),
    Aim((16384, 65536), 1408, SEARCH, PEERS[2], 1 / 1.3),
    Aim((16384, 65536), 1408, SEARCH, PEERS[0], 1 / 2),
    Aim((16384, 65536), 1408, SEARCH, PEERS[1], 1 / 2),
    Aim((16384, 65536), 1408, SEARCH, PEERS[2], 1.0, "activations_MiB"),
)


def run(bench: Bench) -> Iterator[Finding]:
    sizes, found = SMALL if bench.small else LARGE, Found()
    for hidden in sizes.hidden:
        for name in VARIANTS:
            measure = partial(_measure, bench, sizes, name, hidden)
            for finding in attempt(f"H {hidden}, {name}", measure, _out_of_memory(name)):
                if finding.status == MEASURED:
                    found[int(finding.figures["tokens"]), hidden, name] = finding.figures
                yield finding
        for tokens in sizes.tokens:
            found[tokens, hidden, ROOFLINE] = {"ms": roofline_ms(bench.rates, tokens, sizes.width, hidden)}
        yield from _aims(found, hidden)


def roofline_ms(rates: Rates, tokens: int, width: int, hidden: int) -> float:
    """The expert products at the product rate, and at the copy rate what must move besides, in bfloat16.

    That is four permutations of ``[T, D]`` (read and written), SwiGLU forward (two read, one written) and backward
    (three read, two written) in ``[T, H]``, and adding the two input gradients (two read, one written).
    """
    moved = 2 * (8 * tokens * width + 8 * tokens * hidden + 3 * tokens * width)
    return (flops(tokens, width, hidden) / rates.product + moved / rates.copy) * 1e3


def flops(tokens: int, width: int, hidden: int) -> int:
    """FLOPs of three products, forward and twice backward."""
    return 18 * tokens * width * hidden


def _measure(bench: Bench, sizes: Sizes, name: str, hidden: int) -> Iterator[Finding]:
    """One variant at all numbers of tokens; it is built once, for that fills gigabytes."""
    bench.free()
    layer = build_on(bench.device, torch.bfloat16, lambda: _build(name, sizes, hidden)).train()
    for tokens in sizes.tokens:  # the most last, for memory may not suffice for them
        case = f"T {tokens}, H {hidden}, {name}"
        timed = partial(_time, bench, sizes, name, layer, tokens, hidden, case)
        yield from attempt(case, timed, _out_of_memory(name))
        bench.free()


def _out_of_memory(name: str) -> str:
    """Ours has to fit; what does not fit of others is no failure of ours."""
    return FAILED if name in (AHEAD, SEARCH) else SKIPPED


def _time(bench: Bench, sizes: Sizes, name: str, layer: nn.Module, tokens: int, hidden: int, case: str) -> Finding:
    inputs = [torch.randn(2, 1, tokens, sizes.width, device=bench.device).bfloat16() for _ in range(ROTATED)]
    routes = [_route(bench, tokens, sizes.experts) for _ in range(ROTATED)]

    def forward(i: int) -> tuple[Tensor, Tensor]:
        x_BSD = inputs[i % ROTATED][0].detach().requires_grad_()
        layer.zero_grad(set_to_none=True)
        return _output(layer, x_BSD, routes[i % ROTATED]), inputs[i % ROTATED][1]

    turns = count()

    def queue(mark: Mark) -> list[Any]:
        marks = [mark()]
        y_BSD, gradient_BSD = forward(next(turns))
        marks.append(mark())
        y_BSD.backward(gradient_BSD)
        return [*marks, mark()]

    with as_its_users(name in (AHEAD, SEARCH)):
        forward_ms, _, ms = fastest_round(bench, queue, sizes.repeats)
        memory = _memory(bench, forward)
    roof_ms = roofline_ms(bench.rates, tokens, sizes.width, hidden)
    moved = 2 * (11 * tokens * sizes.width + 8 * tokens * hidden)
    moved += 0 if name == DENSE else 3 * 2 * 3 * sizes.experts * sizes.width * hidden  # read twice, gradient written
    figures: dict[str, Any] = {"tokens": tokens, "hidden": hidden, "variant": name, "ms": ms, "forward_ms": forward_ms}
    figures |= {"TFLOP_s": flops(tokens, sizes.width, hidden) / ms / 1e9, "GB_s": moved / ms / 1e6, **memory}
    figures |= {"roofline_ms": roof_ms, "of_roofline": ms / roof_ms}
    skipped = "" if bench.cuda else "memory is not measured on a CPU: PyTorch counts it on GPUs alone"
    return Finding(case, MEASURED, figures, skipped)


def _memory(bench: Bench, forward: Callable[[int], tuple[Tensor, Tensor]]) -> dict[str, float]:
    """MiB kept for backward, its output included, and the peak with gradients; nothing on a CPU."""
    if not bench.cuda:
        return {}
    forward(0)
    bench.synchronize()
    before = torch.cuda.memory_allocated()
    with peak_memory(bench) as found:
        y_BSD, gradient_BSD = forward(1)
        found["activations_MiB"] = (torch.cuda.memory_allocated() - before) / 2**20
        y_BSD.backward(gradient_BSD)
    return found


def _aims(found: Found, hidden: int) -> Iterator[Finding]:
    for aim in (aim for aim in AIMS if aim.hidden == hidden):
        for tokens in aim.tokens:
            one, other = (found.get((tokens, hidden, name), {}).get(aim.figure) for name in (aim.of, aim.to))
            if one is None or other is None:
                continue
            figures = {aim.of: one, aim.to: other, "ratio": one / other, "aim": aim.factor}
            why = "" if one <= aim.factor * other else f"{one / other:.2f} x {aim.to}, more than {aim.factor:.2f}"
            case = f"aim: {aim.figure}, T {tokens}, H {hidden}, {aim.of} / {aim.to}"
            yield Finding(case, MISSED if why else MET, figures, why)


# ---------------------------------------------------------------- the variants


class RoutesAhead(nn.Module):
    """Our layer with its plan made before, as that of all layers is made at the start of a forward pass."""

    def __init__(self, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        config = MoEConfig(router="hash_token", num_experts=experts, expert_hidden=hidden)
        self.layer = MoELayer(LayerConfig(width, config))

    def forward(self, x_BSD: Tensor, route: Route) -> Tensor:
        y_BSD: Tensor = self.layer(x_BSD, RoutingContext(route[0]), Ahead(route[1]))[0]
        return y_BSD


class Loop(nn.Module):
    """Three plain products for each expert in turn, with rows sorted ahead and counts that the host knows."""

    def __init__(self, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = (
            nn.ParameterList(nn.Parameter(torch.empty(shape)) for _ in range(experts))
            for shape in ((hidden, width), (hidden, width), (width, hidden))
        )

    def forward(self, x_BSD: Tensor, route: Route) -> Tensor:
        _, plan, counts = route
        parts = []
        for rows, gate, up, down in zip(
            expand_rows(x_BSD.flatten(0, 1), plan).split(counts), self.gate, self.up, self.down, strict=True
        ):
            parts.append(F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down))
        return combine(torch.cat(parts), plan, None).view_as(x_BSD)


def _build(name: str, sizes: Sizes, hidden: int) -> nn.Module:
    if name in (AHEAD, LOOP):
        return (RoutesAhead if name == AHEAD else Loop)(sizes.width, hidden, sizes.experts)
    return build_layer("ours" if name == SEARCH else name, sizes.width, hidden, sizes.experts)


def _route(bench: Bench, tokens: int, experts: int) -> Route:
    ids_T = torch.randint(experts, (tokens,), device=bench.device)
    (plan,) = make_plans(ids_T.view(1, -1, 1), experts)
    return ids_T.unsqueeze(1), plan, torch.bincount(ids_T, minlength=experts).tolist()


def _output(layer: nn.Module, x_BSD: Tensor, route: Route) -> Tensor:
    y: Any = layer(x_BSD, route) if isinstance(layer, RoutesAhead | Loop) else layer(x_BSD)
    return y[0] if isinstance(y, tuple) else y
