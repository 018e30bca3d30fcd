"""Experts from a table of token ids that the user gives.

Legend: L MoE layers, V vocabulary, N experts.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vqmoe_ds.config.fields import option
from vqmoe_ds.config.routers import RouterOptions, register_router
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.moe.routers.hash_token import HashTokenRouter
from vqmoe_ds.runtime.errors import ConfigError
from vqmoe_ds.runtime.files import open_regular, why_missing

NAME = "token_table"
"""Name of the tensor in a file, integers ``[L, V]``, or ``[V]`` for all layers alike. More ids are ignored."""


@register_router("token_table")
class TokenTableRouter(HashTokenRouter):
    """Expert of a token by a table, as ``hash_token`` with one of the user's (``tools/make_token_table.py``).

    The table lives in the checkpoint: only a training from scratch reads the file.
    """

    class Options(RouterOptions):
        path: str | None = option(None, "safetensors file with the table of every layer, token_table [L, V]")

    @classmethod
    def check_start(cls, run: RunConfig, layers: int) -> None:
        path = getattr(run.router, "path", None)
        if path is None:
            raise ConfigError(
                "moe.router=token_table needs a table: make one with tools/make_token_table.py and set router.path"
            )
        read_table(path, layers, run.model.vocab_size, run.moe.num_experts)

    @classmethod
    def token_table(cls, run: RunConfig, layers: int) -> Tensor:
        return given_table(run, layers)


def given_table(run: RunConfig, layers: int) -> Tensor:
    """The table of ``router.path``, int64 ``[L, V]``; zeros where there is none of this model.

    A model that is opened from a checkpoint gets its table from there, and by then the file may be gone or another.
    What starts from scratch is told of it by ``check_start``.
    """
    path = getattr(run.router, "path", None)
    if path is not None:
        with suppress(ConfigError):
            return read_table(path, layers, run.model.vocab_size, run.moe.num_experts)
    return torch.zeros(layers, run.model.vocab_size, dtype=torch.int64)


def read_table(path: str | Path, layers: int, vocab_size: int, num_experts: int) -> Tensor:
    """A table from its file, int64 ``[L, V]``.

    Raises:
        ConfigError: the file is missing or damaged, or the table is of another model.
    """
    try:
        open_regular(path, links=True).close()  # a FIFO would be waited for
        with safe_open(str(path), "pt") as file:
            # From the header: a table of another model is refused before its numbers are read.
            shape = tuple(file.get_slice(NAME).get_shape())
            if len(shape) not in (1, 2) or shape[:-1] not in ((layers,), ()) or shape[-1] < vocab_size:
                raise ConfigError(
                    f"router.path={path}: {NAME} is {list(shape)}, and the model has {layers} MoE layer(s) and "
                    f"{vocab_size} token ids; make a table for it (tools/make_token_table.py)"
                )
            table: Tensor = file.get_tensor(NAME)
    except FileNotFoundError:
        raise ConfigError(
            f"router.path={path} {why_missing(path)}; make that table first (tools/make_token_table.py)"
        ) from None
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ConfigError(f"router.path={path} cannot be read as a token table: {reason}") from None
    if table.is_floating_point() or table.is_complex() or table.dtype is torch.bool:
        raise ConfigError(f"router.path={path}: {NAME} holds {table.dtype}, not whole numbers")
    # int64 first, for PyTorch has no minimum of unsigned numbers.
    table = table[..., :vocab_size].long()
    least, most = int(table.min()), int(table.max())
    if least < 0 or most >= num_experts:
        raise ConfigError(
            f"router.path={path}: {NAME} names expert {least if least < 0 else most}, and moe.num_experts={num_experts}"
        )
    # A copy: rows of an expanded tensor share memory, and no checkpoint can be loaded into such a buffer.
    return table.expand(layers, -1).clone()
