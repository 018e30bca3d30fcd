"""Names in checkpoints of native ``deepspeed.moe.layer.MoE`` models, and which optimizer group holds which of them.

An expert's parameter is ``PREFIX`` + number + ``.REST`` with a prefix that ends in ``deepspeed_experts.``; the number
is local to a rank in optimizer files and global elsewhere. A *pattern* is such a name with ``*`` for the number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from vqmoe_ds.checkpoint.formats.deepspeed.zero import LARGEST_GROUP
from vqmoe_ds.runtime.errors import CheckpointError

EXPERT = re.compile(r"(.*\.deepspeed_moe\.experts\.deepspeed_experts\.)(\d+|\*)\.(.+)")
MOST_WAYS = 100_000
"""Ways to deal out names that are followed at a time; a model's own groups leave a handful."""


class ExpertName(NamedTuple):
    prefix: str
    number: str
    rest: str


def expert_name(name: str) -> ExpertName | None:
    """The parts of an expert's name, or None for all others."""
    match = EXPERT.fullmatch(name)
    return ExpertName(match[1], match[2], match[3]) if match else None


def pattern_of(name: str) -> str:
    """A name with ``*`` for its expert's number; others as they are."""
    parts = expert_name(name)
    return f"{parts.prefix}*.{parts.rest}" if parts else name


def prefix_of(name: str) -> str:
    """The prefix of an expert's name.

    Raises:
        CheckpointError: it is none.
    """
    parts = expert_name(name)
    if parts is None:
        raise CheckpointError(f"{name} is no parameter of an expert")
    return parts.prefix


def numbered(pattern: str, number: int) -> str:
    """A pattern, or an expert's name, with this number; other names as they are."""
    parts = expert_name(pattern)
    return f"{parts.prefix}{number}.{parts.rest}" if parts else pattern


def expand(patterns: list[str], experts: dict[str, int], first: int = 0) -> Iterator[tuple[str, str]]:
    """(local name, global name) of a group's parameters on one rank in the optimizer's order: layer, expert, parameter.

    Args:
        patterns: of one group; those of a layer side by side.
        experts: experts of a rank in each layer, by prefix.
        first: place of the rank among the expert-parallel ones.
    """
    layers: dict[str, list[str]] = {}
    for pattern in patterns:
        parts = expert_name(pattern)
        layers.setdefault(parts.prefix if parts else pattern, []).append(pattern)
    for prefix, members in layers.items():
        if prefix not in experts:
            yield prefix, prefix
            continue
        # DeepSpeed's Experts is a list of copies: named_parameters() ends one expert before the next.
        for local in range(experts[prefix]):
            for pattern in members:
                yield numbered(pattern, local), numbered(pattern, first * experts[prefix] + local)


def merge_split(groups: list[dict[str, Any]], counts: dict[str, int]) -> list[dict[str, Any]]:
    """Undo the cuts at ``LARGEST_GROUP``: groups that differ in nothing and would not fit together are one.

    Args:
        groups: ``options``, ``moe`` and ``names`` (local) of each.
        counts: values of every local name.
    """
    merged: list[dict[str, Any]] = []
    for group in groups:
        before = merged[-1] if merged else None
        if before and group["moe"] and before["moe"] and group["options"] == before["options"]:
            # DeepSpeed begins another group where a parameter does not fit; one that would have is the model's own.
            room = LARGEST_GROUP - before["last"]
            if counts[group["names"][0]] > room:
                before["names"] += group["names"]
                before["last"] = sum(counts[name] for name in group["names"])
                continue
        merged.append({**group, "names": [*group["names"]], "last": sum(counts[name] for name in group["names"])})
    return [{key: group[key] for key in ("options", "moe", "names")} for group in merged]


def match_names(
    names: list[str], shapes: dict[str, tuple[int, ...]], groups: list[list[tuple[int, ...]]], where: str
) -> list[list[str]]:
    """Match names with the places of optimizer groups that record shapes alone (ZeRO stage 0).

    Every group keeps the order of the model, so the names are dealt out in order; there must be one way to do it.

    Args:
        names: in the order of the model.
        shapes: of each.
        groups: the shapes in each group, in its order.
        where: the file, for the message.

    Raises:
        CheckpointError: no way, or more than one.
    """
    # By the places filled in each group. Ways that meet are counted and one is kept: listed, they would grow
    # exponentially with the number of names.
    ways: dict[tuple[int, ...], tuple[int, tuple[Any, ...] | None]] = {(0,) * len(groups): (1, None)}
    for name in names:
        following: dict[tuple[int, ...], tuple[int, tuple[Any, ...] | None]] = {}
        for done, (count, path) in ways.items():
            for g, wanted in enumerate(groups):
                if done[g] < len(wanted) and wanted[done[g]] == shapes[name]:
                    then = (*done[:g], done[g] + 1, *done[g + 1 :])
                    following[then] = (following.get(then, (0, None))[0] + count, (g, path))
        ways = following
        if len(ways) > MOST_WAYS:
            raise CheckpointError(f"{where} has its parameters in more orders than can be looked at")
    count, path = ways.get(tuple(map(len, groups)), (0, None))
    if count != 1:
        reason = "more than one of its parameters could stand in a place" if count else "they are not the model's"
        raise CheckpointError(
            f"{where} records no names for the optimizer's parameters, and by their shapes {reason}; save the run with "
            "ZeRO stage 1 or 2, which records them"
        )
    dealt: list[list[str]] = [[] for _ in groups]
    for name in reversed(names):
        assert path is not None
        dealt[path[0]].insert(0, name)
        path = path[1]
    return dealt
