"""A plan as a table, as JSON and as a figure."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from vqmoe_ds.evaluation.plots import pyplot, save
from vqmoe_ds.planning.hardware import GB, Cluster
from vqmoe_ds.planning.layouts import USABLE, Plan
from vqmoe_ds.planning.memory import Memory
from vqmoe_ds.planning.parameters import Parameters
from vqmoe_ds.planning.speed import ASSUMPTIONS, sent, step_flops
from vqmoe_ds.planning.traffic import group_size
from vqmoe_ds.runtime.terminal import aligned

PARTS = [name for name in Memory.__dataclass_fields__ if name != "host"]
COLUMNS = ["layout", "micro", "GB", *PARTS, "host", "step s", "tokens/s", "bottleneck", "GB/step in", "out of node"]


def text(name: str, parameters: Parameters, cluster: Cluster, plans: list[Plan], top: int) -> str:
    """Head, the best layouts as a table, the traffic of the first, and the assumptions."""
    config = plans[0].config
    head = [
        f"{name}: {parameters.stored:,} parameters stored, {parameters.active:,} used by a token; "
        f"{step_flops(parameters, config):.3g} FLOPs a step of {plans[0].speed.tokens:,} tokens",
        f"{cluster.nodes} x {cluster.per_node} processors of {cluster.processor.memory_gb:g} GB "
        f"({USABLE:.0%} of it usable), {config.precision}; memory in GB a rank",
    ]
    rows = [COLUMNS, *(_row(plan) for plan in plans[:top])]
    return "\n".join([*head, "", *aligned(rows), "", *_traffic(plans[0], cluster), "", "What the times assume:"]) + (
        "\n" + "\n".join("  " + line for line in _assumptions(cluster).splitlines())
    )


def _row(plan: Plan) -> list[str]:
    parts = [f"{getattr(plan.memory, part) / GB:.2f}" for part in PARTS]
    links = plan.speed.links
    return [
        plan.name + ("" if plan.fits else " (too large)"),
        str(plan.config.micro_batch),
        f"{plan.memory.device / GB:.1f}",
        *parts,
        f"{plan.memory.host / GB:.1f}",
        f"{plan.speed.step_seconds:.3g}",
        f"{plan.speed.tokens_per_second:,.0f}",
        plan.speed.bottleneck,
        f"{links.within_node / GB:.2f}",
        f"{links.between_nodes / GB:.2f}",
    ]


def _traffic(plan: Plan, cluster: Cluster) -> list[str]:
    rows = [["what", "collective", "over", "ranks", "calls", "payload GB", "in node GB", "out GB"]]
    for transfer in plan.transfers:
        links = sent(transfer, plan.config, cluster.per_node)
        ranks = group_size(plan.config, transfer.over)
        rows.append(
            [transfer.purpose, transfer.kind, transfer.over.value, str(ranks), str(transfer.calls)]
            + [f"{value / GB:.3g}" for value in (transfer.payload, links.within_node, links.between_nodes)]
        )
    return [f"One rank's traffic in a step of {plan.name}:", *aligned(rows)]


def _assumptions(cluster: Cluster) -> str:
    return ASSUMPTIONS.format(efficiency=cluster.efficiency, latency=cluster.latency_us)


def as_json(name: str, parameters: Parameters, cluster: Cluster, plans: list[Plan]) -> dict[str, Any]:
    """Everything in the table and more, in bytes and seconds."""
    return {
        "model": name,
        "parameters": {"stored": parameters.stored, "active": parameters.active},
        "flops_per_step": step_flops(parameters, plans[0].config),
        "tokens_per_step": plans[0].speed.tokens,
        "cluster": asdict(cluster),
        "usable_memory": USABLE,
        "assumptions": _assumptions(cluster).splitlines(),
        "layouts": [_plan_json(plan, cluster) for plan in plans],
    }


def _plan_json(plan: Plan, cluster: Cluster) -> dict[str, Any]:
    config = plan.config
    layout = {**config.layout(), "micro_batch": config.micro_batch, "accumulation_steps": config.accumulation_steps}
    return {
        "name": plan.name,
        "fits": plan.fits,
        "layout": layout,
        "bytes": {**asdict(plan.memory), "device": plan.memory.device},
        "transfers": [{**asdict(t), **asdict(sent(t, config, cluster.per_node))} for t in plan.transfers],
        "seconds": plan.speed.parts,
        "step_seconds": plan.speed.step_seconds,
        "tokens_per_second": plan.speed.tokens_per_second,
        "bottleneck": plan.speed.bottleneck,
        "bytes_per_step": asdict(plan.speed.links),
    }


def draw(path: Path, name: str, cluster: Cluster, plans: list[Plan]) -> None:
    """Memory of each layout as a stacked bar with the device's capacity, and estimated tokens per second, as PNG."""
    plt = pyplot()
    figure, (memory, speed) = plt.subplots(1, 2, figsize=(12, 1.5 + 0.35 * len(plans)), width_ratios=(3, 1))
    names = [f"{plan.name}, micro-batch {plan.config.micro_batch}" for plan in plans]
    left = [0.0] * len(plans)
    for part in PARTS:
        sizes = [getattr(plan.memory, part) / GB for plan in plans]
        memory.barh(names, sizes, left=left, label=part)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    capacity = cluster.processor.memory_gb
    memory.axvline(capacity, color="black", linewidth=1.5, label="capacity")
    memory.axvline(USABLE * capacity, color="black", linewidth=1, linestyle=":", label="usable")
    memory.set(xlabel="GB a rank")
    figure.suptitle(f"{name} on {cluster.ranks} processors")
    memory.legend(fontsize="small", ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    memory.invert_yaxis()
    rates = [plan.speed.tokens_per_second / 1e6 if plan.fits else 0.0 for plan in plans]
    speed.barh(names, rates, color="0.5")
    speed.invert_yaxis()
    speed.set_yticks([])
    speed.set(xlabel="million tokens/s (a model)")
    save(figure, path)
