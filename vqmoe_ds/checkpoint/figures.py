"""What a checkpoint weighs and how its codes and experts are doing.

Legend: L MoE layers, K codes, N experts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vqmoe_ds.checkpoint.reader import CheckpointReader
from vqmoe_ds.config.schema import MoEConfig, Router, RouterConfig, RunConfig
from vqmoe_ds.models.flops import forward_flops
from vqmoe_ds.moe.routers.abilities import rows_per_token


def expert_calls(config: dict[str, Any]) -> int:
    """Experts that a token visits in one MoE layer."""
    moe = MoEConfig(**config["moe"])
    return 1 if moe.router is Router.DENSE else rows_per_token(moe, RouterConfig(**config.get("router", {})))


def sizes(shapes: dict[str, tuple[int, ...]], config: dict[str, Any]) -> dict[str, int]:
    """Parameters stored, parameters that one token uses, and floating-point operations of one token's forward pass.

    The embedding counts as stored and as active; operations are those of ``forward_flops``.
    """
    stored = active = 0
    for name, shape in shapes.items():
        count = math.prod(shape)
        stored += count
        active += count // shape[0] * expert_calls(config) if ".experts." in name else count
    flops = forward_flops(RunConfig.model_validate(config)).total
    return {"stored": stored, "active": active, "forward_flops_per_token": flops}


def health(reader: CheckpointReader) -> list[dict[str, Any]]:
    """Per MoE layer: use of codes and experts by the codebook's running counts, and norms of expert weights."""
    buffers = reader.buffers()
    prefixes = list(dict.fromkeys(name.rsplit(".", 1)[0] for name in reader.names() if ".experts." in name))
    rows = []
    for layer, prefix in enumerate(prefixes):
        row: dict[str, Any] = {"layer": prefix.removesuffix(".experts")}
        if "bank.ema_count_LK" in buffers:
            row.update(_usage(buffers, layer, reader.config))
        row["weight_norms"] = {
            name[-2:]: _norms(reader, name) for name in reader.names() if name.startswith(prefix + ".")
        }
        rows.append(row)
    return rows


def _usage(buffers: dict[str, Tensor], layer: int, config: dict[str, Any]) -> dict[str, Any]:
    count_K, expert_K = buffers["bank.ema_count_LK"][layer].double(), buffers["bank.code_map_LK"][layer]
    load_N = torch.zeros(config["moe"]["num_experts"], dtype=torch.float64).index_add_(0, expert_K, count_K)
    share_N = load_N / load_N.sum().clamp_min(1e-12)
    return {
        "codes": len(count_K),
        "code_perplexity": round(_perplexity(count_K), 2),
        "dead_codes": int((count_K < config["codebook"]["dead_below"] * count_K.mean()).sum()),
        "expert_perplexity": round(_perplexity(load_N), 2),
        "busiest_expert": round(float(share_N.max() * len(share_N)), 2),
        "idle_experts": int((share_N * len(share_N) < 0.01).sum()),
        "expert_load": [round(float(v), 5) for v in share_N],
    }


def _perplexity(counts: Tensor) -> float:
    return float(torch.special.entr(counts / counts.sum().clamp_min(1e-12)).sum().exp())


def _norms(reader: CheckpointReader, name: str) -> dict[str, float]:
    """Root mean square of each expert's weights: the least, the mean and the largest over experts."""
    experts, *rest = reader.shape(name)
    each = math.prod(rest)
    squares = [float(reader.read(name, "fp32", e * each, each).double().square().mean()) ** 0.5 for e in range(experts)]
    return {"min": round(min(squares), 6), "mean": round(sum(squares) / experts, 6), "max": round(max(squares), 6)}
