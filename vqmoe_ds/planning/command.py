"""``tools/plan.py``: the layouts of a model that fit a cluster, likely fastest first."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vqmoe_ds.config.cli import Parser
from vqmoe_ds.config.deepspeed_json import Joiner, join_batch_size, read_deepspeed_json
from vqmoe_ds.config.gpu import check_widths
from vqmoe_ds.config.load import load_config, parse_override, preset_names
from vqmoe_ds.config.routers import add_plugin_option
from vqmoe_ds.planning.hardware import MOST_RANKS, NETWORK_GBPS, PROCESSORS, Cluster, find_processor
from vqmoe_ds.runtime.errors import ConfigError, reports_errors
from vqmoe_ds.runtime.files import check_targets, write_atomically

if TYPE_CHECKING:
    from vqmoe_ds.planning.layouts import Plan

LARGEST = 10**7
"""Largest figure of a cluster: 10,000 TB, TFLOP/s and GB/s of one processor are far off."""
OVERRIDES = {
    "gpu_memory": ("memory_gb", "GB of one processor"),
    "gpu_tflops": ("tflops", "its bf16 TFLOP/s"),
    "gpu_fp32_tflops": ("fp32_tflops", "its float32 TFLOP/s"),
    "memory_gbps": ("memory_gbps", "bandwidth of its memory, GB/s"),
    "link_gbps": ("link_gbps", "within a node, GB/s per processor and direction"),
    "host_gbps": ("host_gbps", "to the host's memory, GB/s per processor and direction"),
}
"""Options that replace a figure of the catalogue."""


def build_parser(description: str) -> argparse.ArgumentParser:
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", default="tiny", help=f"model: {', '.join(preset_names())} (default tiny)")
    add("--config", metavar="YAML", help="run configuration; overrides the preset")
    add("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="override one field; repeatable")
    add("--ds_config", metavar="JSON", help="take bucket sizes and the like from this file, not DeepSpeed's defaults")
    add("--nodes", type=int, default=1)
    add("--gpus_per_node", type=int, default=8)
    add("--gpu", default="h100", help=f"{', '.join(PROCESSORS)} (default h100)")
    for option, (_, meaning) in OVERRIDES.items():
        add(f"--{option}", type=float, metavar="X", help=meaning)
    network = f"between nodes, GB/s per processor and direction (default {NETWORK_GBPS:g}: 400 Gb/s InfiniBand)"
    add("--network_gbps", type=float, default=NETWORK_GBPS, help=network)
    add("--latency_us", type=float, default=Cluster.latency_us, help="of one message (default 15)")
    add("--efficiency", type=float, default=Cluster.efficiency, help="share of the peak products reach (default 0.4)")
    add("--zero", type=int, nargs="+", default=[1, 2, 3], choices=range(4), metavar="STAGE", help="default 1 2 3")
    add("--ep_size", type=int, nargs="+", default=[], metavar="N", help="default: all that divide ranks and experts")
    add("--micro_batch", type=int, nargs="+", default=[], metavar="N", help="default: powers of two")
    add("--precision", default="bf16", choices=["bf16", "fp32"])
    add("--offload", action="store_true", help="try layouts with the optimizer in the host's memory, too")
    add("--imbalance", type=float, default=1.2, help="rows of the busiest rank, relative to the mean (default 1.2)")
    add("--top", type=int, default=12, help="layouts shown (default 12)")
    add("--json", metavar="FILE", nargs="?", const="-", help="write everything as JSON, to the terminal without a name")
    add("--figure", metavar="PNG", help="draw memory by part and tokens per second of the layouts shown")
    add_plugin_option(parser)
    return parser


_BLOCKS_A_SECOND = 30
"""Blocks that one core lays out per second."""


@reports_errors
def main(options: argparse.Namespace) -> int:
    """Print the plan, or in one sentence why there is none; the exit code."""
    _check_numbers(options)
    check_targets({"--json": None if options.json == "-" else options.json, "--figure": options.figure})
    cluster = cluster_of(options)
    loaded = load_config(options.preset, options.config, dict(parse_override(text) for text in options.set))
    loaded.print_notes()
    run = loaded.config
    base = read_deepspeed_json(options.ds_config) if options.ds_config else {}
    if base:
        joiner = Joiner(options.ds_config, loaded)
        joiner.join(base, "sequence_parallel_size", "train.sequence_parallel_size")
        # Sizes that do not divide the ranks are refused where layouts are made.
        join_batch_size(base, joiner, max(1, cluster.ranks // joiner.values["train"]["sequence_parallel_size"]))
        run = joiner.config()
    if options.gpu != "cpu":
        # At the widest spread of the experts: too many on a GPU there are too many at every other.
        check_widths(run, options.precision, max([1, *(options.ep_size or [cluster.ranks])]))
    # DeepSpeed and the model only now: bad options have been answered.
    from vqmoe_ds.planning import report
    from vqmoe_ds.planning.layouts import Choices, explore, remedies
    from vqmoe_ds.planning.parameters import count

    if options.figure:
        report.pyplot()
    offload = (False, True) if options.offload else (False,)
    spread = (options.zero, options.ep_size, options.micro_batch)
    choices = Choices(*spread, options.precision, offload, options.imbalance, options.gpu != "cpu")
    if run.model.layers >= 4 * _BLOCKS_A_SECOND:
        seconds = run.model.layers // _BLOCKS_A_SECOND
        print(f"{run.model.layers} blocks take about {seconds} s to lay out", file=sys.stderr, flush=True)
    plans, parameters = explore(run, cluster, choices, base), count(run)
    name = options.config or options.preset
    if options.json:
        text = json.dumps(report.as_json(name, parameters, cluster, plans), indent=2) + "\n"
        if options.json == "-":
            sys.stdout.write(text)
        else:
            write_atomically(Path(options.json), text)
    if options.json != "-":
        print(report.text(name, parameters, cluster, plans, options.top))
    if options.figure:
        report.draw(Path(options.figure), name, cluster, plans[: options.top])
    if not plans[0].fits:
        raise ConfigError(_too_small(plans[0], cluster, remedies(run, cluster, choices, base)))
    return 0


def cluster_of(options: argparse.Namespace) -> Cluster:
    """The catalogue's processor with the figures given on the command line."""
    given = {field: getattr(options, option) for option, (field, _) in OVERRIDES.items()}
    processor = dataclasses.replace(find_processor(options.gpu), **{k: v for k, v in given.items() if v is not None})
    return Cluster(
        options.nodes, options.gpus_per_node, processor, options.network_gbps, options.latency_us, options.efficiency
    )


def _check_numbers(options: argparse.Namespace) -> None:
    """Check the numbers of the command line before anything loops over them.

    Raises:
        ConfigError: an option that is no finite number above 0, or more than any cluster has.
    """
    for name in ["nodes", "gpus_per_node", "network_gbps", "efficiency", "top", *OVERRIDES]:
        value = getattr(options, name)
        value = None if value is None else float(min(value, LARGEST))  # an integer may be past what a float holds
        if value is not None and not 0 < value < LARGEST:
            raise ConfigError(f"--{name} {value:g} must be more than 0 and less than {LARGEST:,}")
    if not 0 <= options.latency_us < LARGEST:
        raise ConfigError(f"--latency_us {options.latency_us:g} must be 0 to {LARGEST:,}")
    if not 1 <= options.imbalance <= 1000:
        raise ConfigError(f"--imbalance {options.imbalance:g} must be at least 1, the even share, and at most 1000")
    if options.nodes * options.gpus_per_node > MOST_RANKS:
        ranks = options.nodes * options.gpus_per_node
        raise ConfigError(f"--nodes x --gpus_per_node are {ranks:,} ranks, and a plan takes {MOST_RANKS:,} at the most")


def _too_small(least: Plan, cluster: Cluster, would_do: list[str]) -> str:
    return (
        f"no layout fits {cluster.processor.memory_gb:g} GB a processor; the least is {least.name} with micro-batch "
        f"{least.config.micro_batch}, {least.memory.device / 1e9:.1f} GB; what would do: {', or '.join(would_do)}"
    )
