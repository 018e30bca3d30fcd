#!/usr/bin/env python
"""One MoE layer, forward and backward: ours beside DeepSpeed's and the dense MLP of the same active FLOPs.

    python benchmarks/layer.py                                  # fp32 and bf16, all layers
    python benchmarks/layer.py --dtype bf16 --experts 128 --json out.json
    python benchmarks/layer.py --sweep experts                  # 8 to 256 experts
    python benchmarks/layer.py --sweep tokens                   # 1,024 to 32,768 tokens

The layers take turns on the same inputs in one process; every repetition brings new inputs, as training does, so row
counts of the experts change every time. Ours looks its codes up in its own input, inside the measured time.

*floor*: time of the dense MLP plus the traffic the experts' weights cannot avoid (read in forward, read in backward,
gradient written) at the bandwidth of a large copy. *dense, our kernels* is the dense MLP run as a layer of one expert:
what our matrix products alone are worth.

With ``--allocator both`` every layer also runs alone in a process of its own, as its users run it: ours with the
allocator and OpenMP settings our package makes, the others with the system's defaults. There its peak memory is
measured (growth of the resident size from before the layer was built: weights, gradients, activations).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import vqmoe_ds  # noqa: F401  before torch: it sets how long idle OpenMP threads spin

# isort: split

import torch
from measuring import peak_bytes, seconds, table, write_json
from peers import PEERS, build_layer, copy_bandwidth, join_group
from torch import Tensor, nn

from vqmoe_ds.moe.experts import StackedExperts
from vqmoe_ds.runtime.allocator import tune_allocator

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OUR_DENSE = "dense, our kernels"
OPENMP_DEFAULT_SPIN = "300000"  # libgomp's
SWEEPS = {"experts": (8, 16, 32, 64, 128, 256), "tokens": (1024, 4096, 8192, 32768)}


class OneExpert(nn.Module):
    """The dense MLP through our expert kernel."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.experts = StackedExperts(width, hidden, 1)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.flatten(0, 1)
        y: Tensor = self.experts(x_TD, torch.tensor([len(x_TD)]))
        return y.view_as(x_BSD)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    if options.alone:
        print(json.dumps(run_alone(options)))
        return
    if options.allocator != "default":
        tune_allocator()
    join_group()
    runs = []
    for dtype in options.dtype:
        runs += [measure(options, dtype, **point) for point in points(options)]
        print(
            f"\n## {dtype}, {options.threads or torch.get_num_threads()} threads\n\n" + report(runs, dtype), flush=True
        )
    write_json(options.json, runs)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=256, help="model width")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden width of an expert")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--threads", type=int, default=0, help="0: PyTorch's default")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--allocator", choices=("tuned", "default", "both"), default="both")
    parser.add_argument("--sweep", choices=SWEEPS, help="vary one size, with the allocator tuned")
    parser.add_argument("--layers", nargs="+", help="only these layers (dense is always there)")
    parser.add_argument("--json", help="write the figures to a file, or to the terminal with -")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def points(options: argparse.Namespace) -> list[dict[str, int]]:
    base = {"tokens": options.tokens, "experts": options.experts}
    return [{**base, options.sweep: value} for value in SWEEPS[options.sweep]] if options.sweep else [base]


def build(name: str, options: argparse.Namespace, dtype: str, experts: int) -> nn.Module:
    if name == OUR_DENSE:
        return OneExpert(options.width, options.hidden).to(DTYPES[dtype])
    layer = build_layer(name, options.width, options.hidden, experts)
    # As under DeepSpeed's bf16: parameters are cast, buffers (our codes) stay as they are.
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype])
    return layer


def layer_names(options: argparse.Namespace) -> list[str]:
    names = ["dense", OUR_DENSE, "ours", *PEERS]
    return [n for n in names if n == "dense" or not options.layers or n in options.layers]


def measure(options: argparse.Namespace, dtype: str, tokens: int, experts: int) -> dict[str, Any]:
    """Times of all layers, taken in turns, in milliseconds."""
    layers = {name: build(name, options, dtype, experts) for name in layer_names(options)}
    times: dict[str, list[float]] = {name: [] for name in layers}
    for repetition in range(options.repeats + 2):
        x_BSD, gradient_BSD = batch(tokens, options.width, dtype, seed=repetition)
        for name, layer in layers.items():
            times[name].append(step(layer, x_BSD, gradient_BSD) * 1e3)
    weight_bytes = 3 * experts * options.width * options.hidden * DTYPES[dtype].itemsize
    bandwidth = copy_bandwidth()
    run: dict[str, Any] = {"dtype": dtype, "tokens": tokens, "experts": experts, "copy_GB_s": bandwidth / 1e9}
    run["traffic_ms"] = 3 * weight_bytes / bandwidth * 1e3
    run["layers"] = {n: {"best": min(t[2:]), "median": statistics.median(t[2:])} for n, t in times.items()}
    run["floor_ms"] = run["layers"]["dense"]["best"] + run["traffic_ms"]
    if options.allocator == "both" and not options.sweep:
        for name in layers:
            run["layers"][name]["alone"] = in_own_process(name, dtype, options)
    return run


def batch(tokens: int, width: int, dtype: str, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_BSD, gradient_BSD = torch.randn(2, 1, tokens, width, generator=generator).to(DTYPES[dtype])
    return x_BSD, gradient_BSD


def step(layer: nn.Module, x_BSD: Tensor, gradient_BSD: Tensor) -> float:
    """Seconds of one forward and backward."""
    layer.zero_grad(set_to_none=True)
    x_BSD = x_BSD.clone().requires_grad_()

    def forward_backward() -> None:
        y = layer(x_BSD)
        (y[0] if isinstance(y, tuple) else y).backward(gradient_BSD)

    return seconds(forward_backward)


def in_own_process(name: str, dtype: str, options: argparse.Namespace) -> dict[str, float]:
    sizes = {key: getattr(options, key) for key in ("tokens", "width", "hidden", "experts", "threads", "repeats")}
    arguments = [f"--{key}={value}" for key, value in sizes.items()]
    command = [sys.executable, __file__, "--alone", name, "--dtype", dtype, *arguments]
    environment = dict(os.environ)
    if name not in ("ours", OUR_DENSE):
        environment["GOMP_SPINCOUNT"] = OPENMP_DEFAULT_SPIN
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    result: dict[str, float] = json.loads(output.strip().splitlines()[-1])
    return result


def run_alone(options: argparse.Namespace) -> dict[str, float]:
    if options.alone in ("ours", OUR_DENSE):
        tune_allocator()
    join_group()
    (dtype,) = options.dtype
    before = peak_bytes()
    layer = build(options.alone, options, dtype, options.experts)
    times = [step(layer, *batch(options.tokens, options.width, dtype, seed)) for seed in range(options.repeats + 2)]
    peak = (peak_bytes() - before) / 2**20
    return {"best": min(times[2:]) * 1e3, "median": statistics.median(times[2:]) * 1e3, "peak_MiB": peak}


def report(runs: list[dict[str, Any]], dtype: str) -> str:
    """The table of one number type, and the floor it is held against."""
    runs = [run for run in runs if run["dtype"] == dtype]
    columns = ["tokens", "experts", "layer", "ms best", "median", "tokens/s", "/ dense", "/ floor"]
    alone = "alone" in runs[0]["layers"]["dense"]
    columns += ["ms alone", "median", "peak MiB"] if alone else []
    rows = []
    for run in runs:
        dense = run["layers"]["dense"]["best"]
        for name, t in run["layers"].items():
            row = [str(run["tokens"]), str(run["experts"]), name, f"{t['best']:.1f}", f"{t['median']:.1f}"]
            row += [f"{run['tokens'] / t['best'] * 1e3:,.0f}"]
            row += [f"{t['best'] / dense:.2f}", f"{t['best'] / run['floor_ms']:.2f}"]
            row += [f"{t['alone'][key]:.{digits}f}" for key, digits in ALONE if alone]
            rows.append(row)
    lines = [
        f"{run['tokens']} tokens, {run['experts']} experts: floor {run['floor_ms']:.1f} ms, of which weight traffic "
        f"{run['traffic_ms']:.1f} ms at {run['copy_GB_s']:.1f} GB/s"
        for run in runs
    ]
    return table(columns, rows) + "\n\n" + "\n".join(lines)


ALONE = (("best", 1), ("median", 1), ("peak_MiB", 0))


if __name__ == "__main__":
    main()
