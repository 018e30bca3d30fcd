"""Traffic of one rank in an optimizer step: every collective, its group and its payload in bytes.

Payloads are exact for all-to-all (its rows in and out average the rows routed) and all-reduce, and proved against real
runs in tests/planning. All-gathers of ZeRO-3 are an upper bound: what is used again soon is not gathered again.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from vqmoe_ds.config.deepspeed_json import EngineConfig
from vqmoe_ds.config.schema import SequencePlacement
from vqmoe_ds.planning.memory import (
    Group,
    accumulates_in_fp32,
    code_statistics,
    moe_layers,
    offloads,
    optimizer_groups,
    width_of,
)
from vqmoe_ds.planning.parameters import Parameters


class Over(StrEnum):
    """The process group a collective runs over."""

    ALL = "all ranks"
    EP = "expert-parallel group"
    EDP = "expert-data-parallel group"
    SP = "sequence-parallel group"


@dataclass(frozen=True)
class Transfer:
    """All collectives of one kind and purpose in one step, on one rank."""

    purpose: str
    kind: str
    """``all_to_all``, ``all_reduce``, ``reduce_scatter`` or ``all_gather``."""
    over: Over
    payload: int
    """Bytes of the whole tensor: what is sent in an all-to-all, reduced, or stands gathered at the end."""
    calls: int


def group_size(config: EngineConfig, over: Over) -> int:
    """Ranks of a process group."""
    if over is Over.SP:
        return config.sp_size
    sizes = {Over.ALL: config.world_size, Over.EP: config.ep_size, Over.EDP: config.world_size // config.ep_size}
    return sizes[over]


def transfers(parameters: Parameters, config: EngineConfig) -> list[Transfer]:
    """Everything a rank exchanges in one step; groups of one rank exchange nothing."""
    groups = optimizer_groups(parameters, config)
    found = [*_expert_rows(config), _heads(config)]
    for part in (_gradients, _weights, _bookkeeping):
        found += part(groups, config)
    if config.run.moe.facts.uses_codebook:
        found.append(Transfer("codebook", "all_reduce", Over.ALL, code_statistics(config.run), 1))
    return [t for t in found if t.payload and group_size(config, t.over) > 1]


def _expert_rows(config: EngineConfig) -> list[Transfer]:
    """Rows to the experts and back, forward and backward.

    Recomputed blocks take rows and plans from their first forward (``dispatch.Kept``) and exchange nothing again. Where
    tokens are computed on the rank of the experts that codes name, the numbers of these travel instead of their rows.
    """
    run, rounds, layers = config.run, config.accumulation_steps, moe_layers(config.run)
    found, travelling = list[Transfer](), run.rows_per_token
    if run.train.sp_placement is SequencePlacement.EXPERT:
        # int64, of all positions: moe/sequence.py gathers whole sequences.
        numbers = rounds * layers * config.tokens * config.sp_size * 8
        found, travelling = [Transfer("expert numbers", "all_gather", Over.SP, numbers, rounds)], run.moe.top_k
        if not travelling:
            return found
    calls, plans = 4 * layers * rounds, layers * rounds
    rows = calls * config.tokens * travelling * run.model.width * width_of(config)
    return [
        *found,
        Transfer("expert rows", "all_to_all", Over.EP, rows, calls),
        # int32, of all experts of all peers.
        Transfer("row counts", "all_to_all", Over.EP, plans * run.moe.num_experts * 4, plans),
    ]


def _heads(config: EngineConfig) -> Transfer:
    """Queries, keys and values to the ranks of their heads, outputs back to those of their positions; forward, backward
    and in a recomputation, which asks again: kept, they would be three times what it saves."""
    model, passes = config.run.model, 3 if config.run.train.activation_checkpointing else 2
    turns = passes * model.layers * config.accumulation_steps
    payload = turns * 2 * (model.attention_width + model.kv_width) * config.tokens * width_of(config)
    return Transfer("heads and positions", "all_to_all", Over.SP, payload, 2 * turns)


def _gradients(groups: list[Group], config: EngineConfig) -> list[Transfer]:
    """ZeRO-2 and 3 reduce after every micro-batch, 0 and 1 once a step. ZeRO-2 all-reduces its buckets, too."""
    stage, rounds = config.zero_stage, config.accumulation_steps if config.zero_stage >= 2 else 1
    found = []
    for over, members in _by_group(groups).items():
        values = sum(sum(g.sizes) for g in members)
        if stage == 3:
            values = sum(-(-size // g.ranks) * g.ranks for g in members for size in g.sizes)
        elif stage == 1 and accumulates_in_fp32(config):
            values = sum(g.padded for g in members)
        kind = "reduce_scatter" if stage == 3 else "all_reduce"
        found.append(Transfer(f"gradients{_of(over)}", kind, over, rounds * values * width_of(config), rounds))
    return found


def _weights(groups: list[Group], config: EngineConfig) -> list[Transfer]:
    """New weights after the step (ZeRO-1 and 2), or every weight for forward and for backward (ZeRO-3)."""
    if config.zero_stage == 0:
        return []
    found = []
    for over, members in _by_group(groups).items():
        if config.zero_stage < 3:
            payload, calls = sum(g.padded for g in members), len(members)
        else:
            payload, calls = _gathered(members, config)
        found.append(Transfer(f"weights{_of(over)}", "all_gather", over, payload * width_of(config), calls))
    return found


def _gathered(groups: list[Group], config: EngineConfig) -> tuple[int, int]:
    """Values and calls of ZeRO-3's gathers: small weights once a step, the others twice a micro-batch.

    The weight of tied embeddings is gathered for the embedding and for the head.
    """
    threshold = int(config.deepspeed["zero_optimization"].get("stage3_param_persistence_threshold", 1e5))
    weights = [
        (weight.source, size, -(-size // g.ranks) * g.ranks)
        for g in groups
        for weight, size in zip(g.weights, g.sizes, strict=True)
    ]
    kept = [padded for _, size, padded in weights if size <= threshold]
    large = [padded for _, size, padded in weights if size > threshold]
    if config.run.ties_head:
        large += [padded for name, size, padded in weights if name == "embed.weight" and size > threshold]
    uses = 2 * config.accumulation_steps
    return sum(kept) + uses * sum(large), bool(kept) + uses * len(large)


def _bookkeeping(groups: list[Group], config: EngineConfig) -> list[Transfer]:
    """Losses, tokens, targets, their bytes and a wish to stop (six float64), gradient norms and overflow flags."""
    low = config.precision != "fp32"
    experts = sum(g.is_expert for g in groups)
    all_ranks, ep, edp = 48, 0, 0
    if config.zero_stage == 0:
        all_ranks, ep = all_ranks + 8, 4 + low
    elif config.zero_stage == 1 and accumulates_in_fp32(config):
        ep = 4
    elif config.zero_stage < 3:
        all_ranks, edp = all_ranks + 4 * len(groups) + low, 4 * experts
    else:
        norm = 4 if offloads(config) else 8
        all_ranks, edp, ep = all_ranks + norm * (len(groups) - experts), norm * experts, norm * experts
    sizes = {Over.ALL: all_ranks, Over.EP: ep if experts else 0, Over.EDP: edp}
    return [Transfer("norms and losses", "all_reduce", over, size, 1 + size // 8) for over, size in sizes.items()]


def _by_group(groups: list[Group]) -> dict[Over, list[Group]]:
    parts = {Over.ALL: [g for g in groups if not g.is_expert], Over.EDP: [g for g in groups if g.is_expert]}
    return {over: members for over, members in parts.items() if members}


def _of(over: Over) -> str:
    return " of experts" if over is Over.EDP else ""
