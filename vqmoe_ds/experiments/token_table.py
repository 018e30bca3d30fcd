"""``tools/make_token_table.py``: a table from token ids to experts, of a corpus and a model's embeddings or routes.

Legend: L MoE layers, V vocabulary, N experts, D width, B windows, S positions.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from vqmoe_ds.checkpoint.formats.huggingface.folder import TRAINING, run_config
from vqmoe_ds.checkpoint.io.safetensors_io import Entry, write_safetensors
from vqmoe_ds.checkpoint.io.shards import entry_of, read_weights
from vqmoe_ds.checkpoint.load_model import load_model, require_tokenizer
from vqmoe_ds.checkpoint.open import open_checkpoint
from vqmoe_ds.checkpoint.reader import sound
from vqmoe_ds.config.fields import MOST_EXPERTS, MOST_LAYERS
from vqmoe_ds.config.routers import add_plugin_option
from vqmoe_ds.config.schema import CodeSource
from vqmoe_ds.data.documents import plan_units, read_unit
from vqmoe_ds.data.index_files import check_prefix, chunks
from vqmoe_ds.data.indexed import UNKNOWN, described_tokenizer, weighted_entry, without_ending
from vqmoe_ds.data.tokenizer_base import MOST_IDS, Tokenizer
from vqmoe_ds.data.tokenizers import load_tokenizer
from vqmoe_ds.data.units import SourceOptions
from vqmoe_ds.evaluation.passes import Passes
from vqmoe_ds.evaluation.probe import BATCH, load_routed, read_probe, rows_of, visit_layers
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.moe import token_tables
from vqmoe_ds.moe.routers.token_table import NAME
from vqmoe_ds.runtime.errors import CheckpointError, ConfigError, DataError, reports_errors
from vqmoe_ds.runtime.files import check_targets
from vqmoe_ds.runtime.memory import check_room

BOUNDS = {
    "seed": (0, (1 << 32) - 1),
    "vocab_size": (1, MOST_IDS),
    "experts": (1, MOST_EXPERTS),
    "layers": (1, MOST_LAYERS),
    "tokens": (1, 1 << 40),
}
"""Least and most of the options that are numbers."""
METHODS = ("embedding", "random", "round_robin", "codes", "routes")
GATE = "model.layers.{}.mlp.gate.tid2eid"
"""Names of the gates' tables in DeepSeek-V4's checkpoints, as vLLM and Megatron's hash layers read them."""
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed.weight", "embed_in.weight", "word_embeddings.weight",
              "tok_embeddings.weight", "backbone.embeddings.weight")  # fmt: skip
"""Last parts of the names that input embeddings have in Hugging Face folders."""


def build_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="run folder, checkpoint or Hugging Face folder with the embeddings")
    add(
        "--method",
        choices=METHODS,
        default="embedding",
        help="codes: those of a run with codes of tokens; routes: the expert that MODEL sends a token to most",
    )
    add("--experts", type=int, metavar="N", help="experts per layer (not with codes or routes)")
    add("--layers", type=int, metavar="L", help="MoE layers, each with a table of its own (not with codes or routes)")
    add("--data", nargs="+", metavar="SPEC", help="corpus that tokens are counted in: text, or prepared prefixes")
    add("--tokenizer", metavar="TOKENIZER", help="of text (default: that of MODEL)")
    add("--vocab_size", type=int, metavar="V", help="without MODEL: token ids (default: the tokenizer's)")
    add("--seed", type=int, default=0, help="of the table (default 0)")
    add(
        "--tokens",
        type=int,
        default=1 << 18,
        help="--method routes: tokens of --data that MODEL reads (default 262,144)",
    )
    add("--form", choices=("table", "gate"), default="table", help="gate: a tensor [V, 1] per layer, for vLLM")
    add("--names", default=GATE, metavar="PATTERN", help=f"--form gate: names of tensors (default {GATE})")
    add("--out", required=True, metavar="FILE.safetensors", help="file to write")
    add_plugin_option(parser)
    return parser


@reports_errors
def main(args: argparse.Namespace) -> int:
    """Make a table and say how balanced it is; the exit code."""
    _check(args)
    made = _make(args)
    try:
        write(Path(args.out), made.table_LV, args.form, args.names, made.blocks)
    except OSError as error:
        raise ConfigError(f"--out {args.out} could not be written ({error.strerror}); make room there") from None
    layers, vocab = made.table_LV.shape
    print(f"{args.out}: {layers} layer(s), {vocab:,} token ids, {made.experts} experts ({args.method})")
    if made.rows_beside:
        print(f"{args.model} also has a learned router (moe.top_k={made.rows_beside}), whose experts no table holds")
    if made.counts_V.sum():
        loads = token_tables.busiest(made.table_LV, made.counts_V, made.experts)
        frequent = made.counts_V.max() / made.counts_V.sum() * made.experts
        print(
            f"busiest expert by layer, times the mean of {int(made.counts_V.sum()):,} tokens: "
            f"{', '.join(f'{load:.3f}' for load in loads)} (the most frequent token alone: {frequent:.3f})"
        )
    return 0


class Made(NamedTuple):
    """A table and what it was balanced by."""

    table_LV: Tensor
    counts_V: np.ndarray
    experts: int
    blocks: list[int] | None = None
    """Blocks of MODEL that the layers are of; None: the first L."""
    rows_beside: int = 0
    """Rows per token of MODEL that no table holds."""


def _check(args: argparse.Namespace) -> None:
    out = Path(args.out)
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out {out} must end in .safetensors")
    weights = [] if args.model is None else list(Path(args.model).rglob("*.safetensors"))
    check_targets({"--out": args.out}, [*map(str, weights), *(args.data or [])])
    if args.form == "gate" and (args.names.count("{}") != 1 or any(c in args.names.replace("{}", "") for c in "{}")):
        raise ConfigError(f"--names {args.names} must have {{}} once, for the number of the layer, and no other braces")
    for name, (least, most) in BOUNDS.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            raise ConfigError(f"--{name} {value} must lie between {least} and {most:,}")
    if args.method in ("embedding", "codes", "routes") and args.model is None:
        raise ConfigError(f"--method {args.method} needs MODEL; or take --method random")
    if args.method in ("codes", "routes"):
        if args.experts or args.layers:
            raise ConfigError(f"--experts and --layers are those of MODEL with --method {args.method}; leave them out")
    else:
        for name, value in (("experts", args.experts), ("layers", args.layers)):
            if value is None:
                raise ConfigError(f"--method {args.method} needs --{name}, 1 or more")
    if args.data is None and args.method != "codes":
        raise ConfigError(f"--method {args.method} balances by frequency; name a corpus with --data")


def _make(args: argparse.Namespace) -> Made:
    if args.method == "routes":
        return _of_routes(args)
    if args.method == "codes":
        model = load_model(args.model, args.tokenizer).model
        table_LV = table_of_codes(model)
        vocab, moe = table_LV.shape[1], model.config.moe
        counts_V = _counts(args, vocab) if args.data else np.zeros(vocab, dtype=np.int64)
        beside = moe.facts.rows_per_token(moe, model.config.router) - 1
        return Made(table_LV, counts_V, moe.num_experts, model.moe_blocks, beside)
    embeddings_VD = None
    if args.method == "embedding":
        with sound(args.model):
            embeddings_VD = read_embeddings(args.model)
    if embeddings_VD is not None:
        vocab = len(embeddings_VD)
    elif args.vocab_size is not None:
        vocab = args.vocab_size
    elif args.model is None:
        vocab = _tokenizer(args).vocab_size
    else:
        with sound(args.model):  # it may have more ids than its tokenizer
            vocab = find_embeddings(args.model)[1][0]
    if args.experts > vocab:
        raise ConfigError(f"--experts {args.experts} are more than the {vocab} token ids; give at most one for each")
    if args.method != "round_robin":  # the others compare every token with every expert
        remedy = "give fewer --experts, or take --method round_robin"
        check_room(8 * vocab * args.experts, f"a table of {vocab:,} token ids", remedy, ConfigError)
    counts_V, shape = _counted(args, vocab), (args.experts, args.layers)
    if embeddings_VD is not None:
        table_LV = token_tables.embedding_table(embeddings_VD, counts_V, *shape, args.seed)
    elif args.method == "random":
        table_LV = token_tables.random_table(counts_V, *shape, args.seed)
    else:
        table_LV = token_tables.round_robin_table(counts_V, *shape)
    return Made(table_LV, counts_V, args.experts)


def _of_routes(args: argparse.Namespace) -> Made:
    loaded = load_routed(args.model, args.tokenizer)
    model = loaded.model
    vocab, experts, layers = model.config.model.vocab_size, model.config.moe.num_experts, len(model.moe_layers())
    needed, remedy = 16 * vocab * experts * layers + 8 * args.tokens, "give fewer --tokens, or take --method random"
    check_room(needed, f"the routes of {vocab:,} token ids in {args.tokens:,} tokens", remedy, ConfigError)
    counts_V = _counted(args, vocab)
    each = -(-args.tokens // len(args.data))
    tokens_BS = torch.cat([read_probe(loaded, path, each) for path in _paths(args)])
    shares_LVN = shares_of_routes(model, tokens_BS, Passes(sys.stderr))
    table_LV = token_tables.routes_table(shares_LVN, counts_V, args.seed)
    seen = int((shares_LVN[0].sum(dim=-1) > 0).sum())
    print(f"{tokens_BS.numel():,} tokens read, {seen:,} of {vocab:,} ids among them; the others have experts at random")
    return Made(table_LV, counts_V, experts, model.moe_blocks)


def shares_of_routes(model: MoETransformer, tokens_BS: Tensor, passes: Passes) -> Tensor:
    """Weight of each expert for each token id, as a share of all that the token was given, float64 ``[L, V, N]``."""
    shape = (len(model.moe_layers()), model.config.model.vocab_size, model.config.moe.num_experts)
    sums_LVN = torch.zeros(shape, dtype=torch.float64)
    tell = passes("routes", len(tokens_BS))
    for window_BS in tokens_BS.split(BATCH):
        ids_T = window_BS.flatten()
        for visit in visit_layers(model, window_BS):
            rows = rows_of(visit.routing)
            places_M = ids_T[rows.tokens_M] * shape[2] + rows.experts_M
            sums_LVN[visit.index].view(-1).index_add_(0, places_M, rows.weights_M.double())
        tell(len(window_BS))
    return sums_LVN / sums_LVN.sum(dim=-1, keepdim=True).clamp_min(1e-12)


@torch.no_grad()
def table_of_codes(model: MoETransformer) -> Tensor:
    """Experts of all tokens of a model whose codes look at embeddings of single tokens, int64 ``[L, V]``.

    Raises:
        CheckpointError: its codes look at more, or it has none.
    """
    book, moe = model.config.codebook, model.config.moe
    ids_1V = torch.arange(model.config.model.vocab_size).unsqueeze(0)
    told = moe.facts.told_rows(model.config.router)
    if told > 1:
        raise CheckpointError(
            f"a table holds one expert per token, and moe.router={moe.router} has {told} that are known ahead; make a "
            "table for router.path by another --method"
        )
    if model.token_table_LV is not None and not moe.facts.looks_back(model.config):
        return cast(Tensor, moe.facts.experts_of(model.token_table_LV, ids_1V, moe.num_experts)).flatten(1)
    if model.bank is None or model.source is None or book.source is not CodeSource.TOKEN_EMBEDDING:
        looks = f"codebook.source={book.source.value}" if model.bank is not None else f"router {moe.router}"
        raise CheckpointError(
            f"a table holds routes that follow from the token alone (codebook.source=token_embedding), and this model "
            f"has {looks}"
        )
    # All ids as one sequence, for ``token_embedding`` looks at no neighbours.
    z_VC = model.bank.prepare(model.source(ids_1V, model.embed(ids_1V)).flatten(0, 1))
    if not z_VC.isfinite().all():
        raise CheckpointError("the model's embeddings are no finite numbers; take another checkpoint")
    return model.bank.experts_of(model.bank.lookup_all(z_VC))


def read_embeddings(path: str) -> Tensor:
    """Input embeddings of a model, float32 ``[V, D]``: of a checkpoint of ours, or of any Hugging Face folder.

    Raises:
        CheckpointError: nothing there that can be read.
    """
    name, shape, read = find_embeddings(path)
    embeddings = read().view(shape).float()
    if embeddings.dim() != 2 or not embeddings.isfinite().all():
        raise CheckpointError(
            f"{path}: {name} is no matrix of finite numbers, a row for each token; take another checkpoint"
        )
    return embeddings


def find_embeddings(path: str) -> tuple[str, tuple[int, ...], Callable[[], Tensor]]:
    """Name, shape and reading of the input embeddings of a model, as of ``read_embeddings``.

    Raises:
        CheckpointError: there are none, or they are quantised.
    """
    if not _is_hf(path):
        reader = open_checkpoint(path)
        shape = reader.shapes.get("embed.weight")
        if shape is None:
            raise CheckpointError(f"{path} has no embeddings of tokens; give a language model")
        return "embed.weight", shape, lambda: reader.read("embed.weight", "fp32", 0, math.prod(shape))
    weights = read_weights(Path(path))
    named = (name for end in EMBEDDINGS for name in sorted(weights, key=len) if f".{name}".endswith(f".{end}"))
    if (name := next(named, None)) is None:
        raise CheckpointError(f"{path} has none of {', '.join(EMBEDDINGS)}, so its embeddings are not known")
    if not weights[name].dtype.is_floating_point:
        raise CheckpointError(f"{path} holds {name} as whole numbers, as quantised weights are; dequantise it first")
    return name, weights[name].shape, weights[name].whole


def _is_hf(path: str) -> bool:
    return (Path(path) / "config.json").exists() and any(Path(path).glob("*.safetensors"))


def _tokenizer(args: argparse.Namespace) -> Tokenizer:
    if args.tokenizer is not None:
        return load_tokenizer(args.tokenizer)
    if args.model is None:
        raise ConfigError(
            "the tokenizer is not known: name it with --tokenizer, or give --vocab_size and prepared --data"
        )
    if (Path(args.model) / "tokenizer.json").exists():
        return load_tokenizer(Path(args.model) / "tokenizer.json")
    reader = open_checkpoint(args.model)
    return require_tokenizer(reader, run_config(reader.config, reader.path))


def _checksum(args: argparse.Namespace) -> str | None:
    """Checksum of the tokenizer whose ids the table is for: of MODEL's, or else of the one named."""
    noted, folder = None, Path(args.model or "")
    if args.model is not None and (not _is_hf(args.model) or (folder / TRAINING).exists()):
        noted = open_checkpoint(args.model).config.get("data", {}).get("tokenizer_sha256")
    elif args.model is not None and (folder / "tokenizer.json").exists():
        noted = load_tokenizer(folder / "tokenizer.json").checksum
    if noted in (None, UNKNOWN) and args.tokenizer is not None:
        return load_tokenizer(args.tokenizer).checksum
    return None if noted == UNKNOWN else noted


def _counted(args: argparse.Namespace, vocab_size: int) -> np.ndarray:
    """The counts of a corpus that has tokens."""
    counts_V = _counts(args, vocab_size)
    if not counts_V.any():
        raise DataError(f"--data {' '.join(args.data)} holds no tokens, by which a table is balanced; name a text")
    return counts_V


def _counts(args: argparse.Namespace, vocab_size: int) -> np.ndarray:
    """How often each token id occurs in ``--data``, int64 ``[V]``."""
    counts_V, checksum = np.zeros(vocab_size, dtype=np.int64), _checksum(args)
    for path in _paths(args):
        for ids in _ids(args, path, checksum):
            # ``bincount`` refuses negative ids and grows with those beyond the vocabulary.
            beyond = [int(id) for id in (ids.max(), ids.min()) if not 0 <= id < vocab_size] if len(ids) else []
            if beyond:
                raise DataError(
                    f"{path} has the token id {beyond[0]}, and the vocabulary has {vocab_size}; it was made by "
                    "another tokenizer"
                )
            counts_V += np.bincount(ids, minlength=vocab_size)
    return counts_V


def _paths(args: argparse.Namespace) -> list[str]:
    """Corpora of ``--data``, without weights and endings."""
    return [without_ending(weighted_entry(spec)[0]) for spec in args.data]


def _ids(args: argparse.Namespace, path: str, checksum: str | None) -> Iterator[np.ndarray]:
    """Token ids of a corpus, in parts; refused if another tokenizer than that of this checksum made them."""
    prepared = os.path.exists(f"{path}.idx")
    theirs = (described_tokenizer(path) or {}).get("checksum") if prepared else _tokenizer(args).checksum
    if theirs != checksum and None not in (theirs, checksum):
        whose = args.model if args.model is not None else f"--tokenizer {args.tokenizer}"
        raise DataError(f"{path} comes in the ids of another tokenizer than that of {whose}; use the same for both")
    if prepared:
        yield from chunks(check_prefix(path).ids, 1 << 22)
        return
    tokenizer = _tokenizer(args)
    for unit in plan_units([path], SourceOptions()):
        yield from (tokenizer.encode(piece.text) for piece in read_unit(unit))


def write(path: Path, table_LV: Tensor, form: str, names: str, blocks: list[int] | None = None) -> None:
    """Write a table: ``token_table`` int32 ``[L, V]``, or one tensor int64 ``[V, 1]`` per layer.

    Args:
        names: of the tensors of gates, with ``{}`` for the number of the block.
        blocks: those numbers; None: 0 to L - 1.
    """
    if form == "table":
        tensors = {NAME: table_LV.int()}
    else:
        numbered = zip(range(len(table_LV)) if blocks is None else blocks, table_LV, strict=True)
        tensors = {names.format(block): table_V.unsqueeze(1) for block, table_V in numbered}
    entries: list[Entry] = [entry_of(name, tensor.contiguous()) for name, tensor in tensors.items()]
    partial = path.with_name(f".{path.name}.partial")
    try:
        write_safetensors(partial, entries)
        # ``write_safetensors`` has flushed it: the name never stands for a part of the table.
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
