"""Sizes of a checkpoint, and the state of its codes and experts.

Legend: L MoE layers, K codes, N experts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vqmoe_ds.checkpoint.formats.native_moe.names import expert_name
from vqmoe_ds.checkpoint.reader import CheckpointReader
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.models.flops import forward_flops


def sizes(shapes: dict[str, tuple[int, ...]], run: RunConfig) -> dict[str, int]:
    """Parameters stored, parameters that one token uses, and floating-point operations of one token's forward pass.

    The embedding counts as stored and as active; operations are those of ``forward_flops``.
    """
    active, calls = 0, run.rows_per_token
    for name, shape in shapes.items():
        # Routed experts alone: every token passes shared ones (.shared.), as it does all other matrices.
        active += math.prod(shape[1:]) * calls if ".experts." in name else math.prod(shape)
    flops = forward_flops(run).total
    return {"stored": stored_numbers(shapes), "active": active, "forward_flops_per_token": flops}


def stored_numbers(shapes: dict[str, tuple[int, ...]]) -> int:
    """Values of all parameters together."""
    return sum(map(math.prod, shapes.values()))


def health(reader: CheckpointReader) -> list[dict[str, Any]]:
    """Per MoE layer: use of codes and experts by the codebook's running counts, and norms of expert weights."""
    buffers = reader.buffers()
    rows = []
    for layer, (name, weights) in enumerate(_expert_weights(reader).items()):
        row: dict[str, Any] = {"layer": name}
        if "bank.ema_count_LK" in buffers:
            row.update(_usage(buffers, layer, reader.config))
        row["weight_norms"] = {weight: _norms(reader, experts) for weight, experts in weights.items()}
        rows.append(row)
    return rows


def _expert_weights(reader: CheckpointReader) -> dict[str, dict[str, list[tuple[str, int, int]]]]:
    """Layer -> weight -> (tensor, start, count) of every expert: one tensor for all of them, or in native one each."""
    found: dict[str, dict[str, list[tuple[str, int, int]]]] = {}
    for name, shape in reader.shapes.items():
        if native := expert_name(name):
            layer, weight, experts = native.prefix.removesuffix(".experts.deepspeed_experts."), native.rest, 1
        elif ".experts." in name and "native" not in reader.config:
            (layer, weight), experts = name.split(".experts."), shape[0]
        else:
            continue
        each = math.prod(shape) // experts
        stretches = found.setdefault(layer, {}).setdefault(weight, [])
        stretches += [(name, e * each, each) for e in range(experts)]
    return found


def _usage(buffers: dict[str, Tensor], layer: int, config: dict[str, Any]) -> dict[str, Any]:
    count_K, expert_K = buffers["bank.ema_count_LK"][layer].double(), buffers["bank.code_map_LK"][layer]
    codes = {
        "codes": len(count_K),
        "code_perplexity": round(_perplexity(count_K), 2),
        "dead_codes": int((count_K < config["codebook"]["dead_below"] * count_K.mean()).sum()),
    }
    # Within groups an expert follows from this layer's code and the first one's together, which nobody counted.
    if layer and config["codebook"].get("groups", 1) > 1:
        return codes
    load_N = torch.zeros(config["moe"]["num_experts"], dtype=torch.float64).index_add_(0, expert_K, count_K)
    share_N = load_N / load_N.sum().clamp_min(1e-12)
    return codes | {
        "expert_perplexity": round(_perplexity(load_N), 2),
        "busiest_expert": round(float(share_N.max() * len(share_N)), 2),
        "idle_experts": int((share_N * len(share_N) < 0.01).sum()),
        "expert_load": [round(float(v), 5) for v in share_N],
    }


def _perplexity(counts: Tensor) -> float:
    return float(torch.special.entr(counts / counts.sum().clamp_min(1e-12)).sum().exp())


def _norms(reader: CheckpointReader, experts: list[tuple[str, int, int]]) -> dict[str, float]:
    """Root mean square of each expert's weights: the least, the mean and the largest over experts."""
    # Expert by expert, as the weights of all may be more than memory holds.
    norms = [float(reader.read(name, "fp32", start, n).double().square().mean()) ** 0.5 for name, start, n in experts]
    return {"min": round(min(norms), 6), "mean": round(sum(norms) / len(norms), 6), "max": round(max(norms), 6)}
