"""Routes in a file, as an inference engine recorded them: a line of JSON for each sequence.

``{"tokens": [ids], "experts": [one list per token of one list per MoE layer of the experts' numbers]}``. There may be
experts for fewer tokens than there are ids: the token that an engine draws last is one that it never reads.

Legend: L MoE layers, S tokens of a sequence, R experts per token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.data.json_lines import read_json
from vqmoe_ds.runtime.errors import ConfigError, DataError, reason_of
from vqmoe_ds.runtime.files import open_regular, write_atomically

SUFFIX = ".jsonl"


def write_routes(path: Path, tokens_BS: Tensor, routes_LTR: Tensor) -> None:
    """Write sequences and their routes, int64 ``[B, S]`` and ``[L, B * S, R]``.

    Raises:
        ConfigError: tokens have different numbers of experts.
    """
    if bool((routes_LTR < 0).any()):
        raise ConfigError(f"--record {path}: the router gives tokens different numbers of experts; leave it out")
    experts_BSLR = routes_LTR.transpose(0, 1).unflatten(0, tokens_BS.shape)
    pairs = zip(tokens_BS.tolist(), experts_BSLR.tolist(), strict=True)
    lines = [json.dumps({"tokens": tokens, "experts": experts}) + "\n" for tokens, experts in pairs]
    write_atomically(path, "".join(lines))


def read_routes(path: str, config: RunConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, experts) of each line, int64 ``[S]`` and ``[L, S, R]``.

    Args:
        config: of the model that is to read the ids.

    Raises:
        DataError: no such file, or a line that is something else or not of this model.
    """
    try:
        with open_regular(path, links=True) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _read_line(f"{path}: line {number}", line, config)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _read_line(place: str, line: bytes, config: RunConfig) -> tuple[Tensor, Tensor]:
    try:
        content = read_json(line.decode())
        tokens_S, experts_SLR = (torch.tensor(content[name]) for name in ("tokens", "experts"))
    except (ValueError, TypeError, KeyError, RuntimeError, RecursionError) as error:
        raise DataError(
            f"{place} is not JSON with the lists tokens and experts, as docs/routes.md has them ({reason_of(error)})"
        ) from None
    model, moe, length = config.model, config.moe, len(experts_SLR) if experts_SLR.dim() else 0
    shapes = tokens_S.dim() == 1 and experts_SLR.dim() == 3 and 0 < length <= len(tokens_S)
    if not shapes or {tokens_S.dtype, experts_SLR.dtype} != {torch.int64}:
        raise DataError(f"{place} has not one whole number per token, and one list of experts per token and layer")
    if length > model.sequence_length:
        raise DataError(f"{place} has routes of {length} tokens; this model reads {model.sequence_length} at once")
    for name, values, limit in (("token", tokens_S, model.vocab_size), ("expert", experts_SLR, moe.num_experts)):
        if values.min() < 0 or values.max() >= limit:
            raise DataError(f"{place} names {name} {_outside(values, limit)}; this model has 0 to {limit - 1}")
    return tokens_S[:length], experts_SLR.transpose(0, 1)


def _outside(values: Tensor, limit: int) -> int:
    return int(values[(values < 0) | (values >= limit)].flatten()[0])
