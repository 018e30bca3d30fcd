"""States, routes and codes of every token in a model's MoE layers while it reads a probe.

Legend: B windows, S positions, T = B * S tokens, D width, N experts, R routed rows per token, M rows of all tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqmoe_ds.checkpoint.load_model import LoadedModel, load_model
from vqmoe_ds.data.batches import Windows
from vqmoe_ds.data.corpus import open_corpus
from vqmoe_ds.data.indexed import IndexedWindows, Reader, open_indexed_text
from vqmoe_ds.data.raw_text import open_raw_text
from vqmoe_ds.data.tokenizer_base import Tokenizer
from vqmoe_ds.data.tokenizers import ByteTokenizer
from vqmoe_ds.evaluation.texts import check_same_tokenizer
from vqmoe_ds.models.block import Block
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.moe.codebook import CodebookBank
from vqmoe_ds.moe.layer import MoELayer
from vqmoe_ds.moe.routers import Routing, RoutingContext
from vqmoe_ds.runtime.errors import CheckpointError, ConfigError, DataError

BATCH = 8
"""Windows read at a time."""


@dataclass(frozen=True)
class Rows:
    """The routed rows of one layer, one entry per row; a token may have any number."""

    tokens_M: Tensor
    slots_M: Tensor
    """Choice of the token the row is: 0 the first; of a dual path the last is the discrete one. Where experts choose,
    the expert."""
    experts_M: Tensor
    weights_M: Tensor

    def counts_TN(self, tokens: int, num_experts: int) -> Tensor:
        """Number of times each token was sent to each expert, int64."""
        flat = torch.bincount(self.tokens_M * num_experts + self.experts_M, minlength=tokens * num_experts)
        return flat.view(tokens, num_experts)

    def main_expert_T(self, tokens: int, num_experts: int) -> Tensor:
        """The expert with the largest weight of each token, the lowest of equals; -1 of tokens without any."""
        total_TN = self.weights_M.new_full((tokens * num_experts,), 0.0)
        total_TN.index_add_(0, self.tokens_M * num_experts + self.experts_M, self.weights_M)
        best_T = total_TN.view(tokens, num_experts).argmax(dim=1)
        none_T = torch.bincount(self.tokens_M, minlength=tokens) == 0
        return torch.where(none_T, -1, best_T)


def rows_of(routing: Routing) -> Rows:
    """The rows of a router's answer; of slots, for each token the expert of the one that weighs most."""
    ids_TR = routing.expert_ids_TR
    if routing.slots is not None:
        strongest_T = routing.slots.strongest_T
        tokens_T = torch.arange(len(strongest_T), device=ids_TR.device)
        weights_T = routing.slots.weights_BSC.flatten(0, 1)[tokens_T, strongest_T]
        return Rows(tokens_T, torch.zeros_like(tokens_T), ids_TR[strongest_T, 0], weights_T)
    weights_TR = torch.ones_like(ids_TR, dtype=torch.float32) if routing.weights_TR is None else routing.weights_TR
    if routing.tokens_M is not None:
        experts_M = ids_TR[:, 0]
        return Rows(routing.tokens_M, experts_M, experts_M, weights_TR[:, 0].float())
    tokens, routes = ids_TR.shape
    tokens_M = torch.arange(tokens, device=ids_TR.device).repeat_interleave(routes)
    slots_M = torch.arange(routes, device=ids_TR.device).repeat(tokens)
    return Rows(tokens_M, slots_M, ids_TR.flatten(), weights_TR.float().flatten())


@dataclass(frozen=True)
class Visit:
    """One MoE layer during one forward pass."""

    index: int
    """Number among the MoE layers."""
    layer: MoELayer
    context: RoutingContext
    stream_TD: Tensor
    """Residual stream before the layer's norm."""
    x_TD: Tensor
    """The layer's input: the normalised stream."""
    y_TD: Tensor
    """The layer's output, which is added to the stream."""
    routing: Routing
    codes_T: Tensor | None
    """None without a codebook."""
    code_distances_T: Tensor | None
    """Squared distance of what was compared from the code that was nearest to it."""

    def route(self, x_TD: Tensor) -> Routing:
        """The router's answer to other states of the same tokens."""
        routing: Routing = self.layer.router(x_TD, self.context)
        return routing


@torch.no_grad()
def visit_layers(model: MoETransformer, tokens_BS: Tensor) -> list[Visit]:
    """Run the model, in evaluation mode, and look into each of its MoE layers, in order.

    Args:
        model: with all its experts (expert-parallel size 1).
        tokens_BS: token ids, or images.
    """
    visits: list[Visit] = []
    streams: list[Tensor] = []

    def keep_stream(module: Any, args: Any) -> None:
        streams.append(args[0].flatten(0, 1))

    def keep_visit(module: Any, args: Any, output: Any) -> None:
        x_BSD, context, _ = args
        # ``MoELayer.forward`` fills it in for its router, and leaves its own argument as it was.
        context = replace(context, sequence=x_BSD.shape[1])
        x_TD, index = x_BSD.flatten(0, 1), len(visits)
        # The layer keeps its ``Routing`` to itself; in evaluation asking again counts nothing and gives the same.
        routing = module.router(x_TD, context)
        y_TD = output[0].flatten(0, 1)
        visits.append(Visit(index, module, context, streams[-1], x_TD, y_TD, routing, *codes.get(index, (None, None))))

    blocks = [block for block in model.blocks if isinstance(block, Block) and isinstance(block.mlp, MoELayer)]
    # ``Block.forward`` calls ``mlp_norm`` on the stream right before ``mlp``: the last one kept is that of the layer.
    handles = [block.mlp_norm.register_forward_pre_hook(keep_stream) for block in blocks]
    handles += [block.mlp.register_forward_hook(keep_visit) for block in blocks]
    try:
        with _overheard_codes(model.bank) as codes:
            model(tokens_BS)
    finally:
        for handle in handles:
            handle.remove()
    return visits


@contextmanager
def _overheard_codes(bank: CodebookBank | None) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Codes by layer, and distances from them, while the model runs: from the calls in which the bank observes them."""
    codes: dict[int, tuple[Tensor, Tensor]] = {}
    if bank is None:
        yield codes
        return

    def observe_all(layers: slice, z_TC: Tensor, codes_LT: Tensor) -> None:
        # Only what was compared is at hand here: codes that are known ahead never come to their layer.
        for layer, codes_T in zip(range(bank.num_layers)[layers], codes_LT, strict=True):
            codes[layer] = codes_T, (z_TC - bank.codes_LKC[layer, codes_T]).square().sum(dim=-1)

    vars(bank)["observe_all"] = observe_all  # hides the method of the class
    try:
        yield codes
    finally:
        del vars(bank)["observe_all"]


def load_routed(path: str, tokenizer: str | None = None, images: bool = False) -> LoadedModel:
    """Load a checkpoint that has MoE layers.

    Args:
        path, tokenizer, images: as ``load_model``.

    Raises:
        CheckpointError: as ``load_model``, or the model is dense.
    """
    loaded = load_model(path, tokenizer, images=images)
    if not loaded.model.moe_layers():
        raise CheckpointError(f"{path} is a dense model (moe.router=dense): it has no routing to look into")
    return loaded


# ---------------------------------------------------------------- what the model reads


def check_tokens(tokens: int) -> None:
    """Refuse a probe without tokens.

    Raises:
        ConfigError: ``tokens`` is under 1.
    """
    if tokens < 1:
        raise ConfigError(f"--tokens {tokens} leaves nothing to read; give 1 or more")


def read_probe(loaded: LoadedModel, path: str | None, tokens: int) -> Tensor:
    """Windows of the training length spread evenly over a text, int64 ``[B, S]``.

    Args:
        loaded: the model that is to read them.
        path: raw text (a file or a folder, cut by the model's tokenizer) or the prefix of prepared data, all of which
            is used; None: the held-out part of the run's own data.
        tokens: how many at least, if the text has so many.

    Raises:
        CheckpointError: raw text for a model whose tokenizer is unknown.
        DataError: nothing there, too short for one window, of another tokenizer, or the checkpoint does not say what
            its run's data are.
    """
    config, tokenizer = loaded.config, loaded.tokenizer
    if path is None:
        loaded.need_data()
    else:
        data = config.data.model_copy(update={"path": path, "valid_path": path})
        config = config.model_copy(update={"data": data})
    prepared = open_indexed_text(config)
    rows = -(-tokens // config.model.sequence_length)
    # megatron-core writes an index of the windows and maps it: not into a run's folder, which is only looked at.
    with tempfile.TemporaryDirectory() as cache:
        if prepared is not None:
            check_same_tokenizer(loaded, prepared)
            reader = Reader(prepared.tokenizer, config.model.vocab_size)
            windows: Windows = IndexedWindows(prepared.valid, Path(cache), reader)
        elif path is None or isinstance(tokenizer, ByteTokenizer):
            windows = open_raw_text(config).valid
        else:
            return _cut_text(path, config.model.sequence_length, rows, loaded.need_tokenizer())
        places = _spread(rows, len(windows))
        return torch.from_numpy(windows.read(places).inputs_BS.astype(np.int64))


def _cut_text(path: str, length: int, rows: int, tokenizer: Tokenizer) -> Tensor:
    """Stretches of raw text, each cut by the tokenizer to ``length`` tokens; those with fewer are left out."""
    corpus, stretch = open_corpus(path), 8 * length  # bytes; no tokenizer of ours has longer tokens on average
    # A stretch may begin and end inside a character.
    texts = [
        corpus.window(place, stretch).tobytes().decode(errors="ignore")
        for place in _spread(rows, corpus.num_windows(stretch)).tolist()
    ]
    windows = [ids[:length] for ids in map(tokenizer.encode, texts) if len(ids) >= length]
    if not windows:
        raise DataError(f"{path} ({corpus.num_bytes} bytes) has no stretch of {length} tokens; give more text")
    return torch.from_numpy(np.stack(windows).astype(np.int64))


def _spread(wanted: int, there: int) -> np.ndarray:
    """Numbers of at most so many windows, evenly spread over those that there are."""
    return np.unique(np.linspace(0, max(0, there - 1), min(wanted, there)).astype(int))
