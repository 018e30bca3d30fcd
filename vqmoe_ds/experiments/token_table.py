"""``tools/make_token_table.py``: a table from token ids to experts, of a model's embeddings or codes and a corpus.

Legend: L MoE layers, V vocabulary, N experts, D width.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vqmoe_ds.checkpoint.io.safetensors_io import Entry, write_safetensors
from vqmoe_ds.checkpoint.io.shards import entry_of, read_weights
from vqmoe_ds.checkpoint.load_model import load_model
from vqmoe_ds.checkpoint.reader import sound
from vqmoe_ds.config.routers import add_plugin_option
from vqmoe_ds.config.schema import CodeSource
from vqmoe_ds.data.documents import plan_units, read_unit
from vqmoe_ds.data.index_files import check_prefix, chunks
from vqmoe_ds.data.indexed import weighted_entry
from vqmoe_ds.data.tokenizer_base import Tokenizer
from vqmoe_ds.data.tokenizers import load_tokenizer
from vqmoe_ds.data.units import SourceOptions
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.moe import token_tables
from vqmoe_ds.moe.routers.token_table import NAME
from vqmoe_ds.runtime.errors import CheckpointError, ConfigError, DataError, reports_errors

METHODS = ("embedding", "random", "round_robin", "codes")
GATE = "model.layers.{}.mlp.gate.tid2eid"
"""Names of the gates' tables in DeepSeek-V4's checkpoints, as vLLM and Megatron's hash layers read them."""
EMBEDDINGS = (
    "embed.weight",
    "model.embed_tokens.weight",
    "transformer.wte.weight",
    "wte.weight",
    "embed_tokens.weight",
)


def build_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="run folder, checkpoint or Hugging Face folder with the embeddings")
    add("--method", choices=METHODS, default="embedding", help="codes: those of a run with codes of tokens")
    add("--experts", type=int, metavar="N", help="experts per layer (not with codes)")
    add("--layers", type=int, metavar="L", help="MoE layers, each with a table of its own (not with codes)")
    add("--data", nargs="+", metavar="SPEC", help="corpus that tokens are counted in: text, or prepared prefixes")
    add("--tokenizer", metavar="TOKENIZER", help="of text (default: that of MODEL)")
    add("--vocab_size", type=int, metavar="V", help="without MODEL: token ids (default: the tokenizer's)")
    add("--seed", type=int, default=0, help="of the table (default 0)")
    add("--form", choices=("table", "gate"), default="table", help="gate: a tensor [V, 1] per layer, for vLLM")
    add("--names", default=GATE, metavar="PATTERN", help=f"--form gate: names of tensors (default {GATE})")
    add("--out", required=True, metavar="FILE.safetensors", help="file to write")
    add_plugin_option(parser)
    return parser


@reports_errors
def main(args: argparse.Namespace) -> int:
    """Make a table and say how balanced it is; the exit code."""
    _check(args)
    with sound(args.model or args.out):
        made = _make(args)
    write(Path(args.out), made.table_LV, args.form, args.names)
    layers, vocab = made.table_LV.shape
    print(f"{args.out}: {layers} layer(s), {vocab:,} token ids, {made.experts} experts ({args.method})")
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


def _check(args: argparse.Namespace) -> None:
    out = Path(args.out)
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out {out} must end in .safetensors")
    if out.is_dir() or not os.access(out.absolute().parent, os.W_OK):
        raise ConfigError(f"--out {out} cannot be written there; name a file in a folder that exists")
    if args.form == "gate" and "{}" not in args.names:
        raise ConfigError(f"--names {args.names} has no {{}} for the number of the layer")
    if args.method in ("embedding", "codes") and args.model is None:
        raise ConfigError(f"--method {args.method} needs MODEL; or take --method random")
    if args.method == "codes":
        if args.experts or args.layers:
            raise ConfigError("--experts and --layers are those of MODEL with --method codes; leave them out")
        return
    for name, value in (("experts", args.experts), ("layers", args.layers)):
        if value is None or value < 1:
            raise ConfigError(f"--method {args.method} needs --{name}, 1 or more")
    if args.data is None:
        raise ConfigError(f"--method {args.method} balances by frequency; name a corpus with --data")


def _make(args: argparse.Namespace) -> Made:
    if args.method == "codes":
        model = load_model(args.model, args.tokenizer).model
        table_LV = table_of_codes(model)
        vocab, experts = table_LV.shape[1], model.config.moe.num_experts
        return Made(table_LV, _counts(args, vocab) if args.data else np.zeros(vocab, dtype=np.int64), experts)
    embeddings_VD = read_embeddings(args.model) if args.model and args.method == "embedding" else None
    vocab = args.vocab_size if embeddings_VD is None else len(embeddings_VD)
    if vocab is None:
        vocab = _tokenizer(args).vocab_size
    counts_V, shape = _counts(args, vocab), (args.experts, args.layers)
    if embeddings_VD is not None:
        table_LV = token_tables.embedding_table(embeddings_VD, counts_V, *shape, args.seed)
    elif args.method == "random":
        table_LV = token_tables.random_table(counts_V, *shape, args.seed)
    else:
        table_LV = token_tables.round_robin_table(counts_V, *shape)
    return Made(table_LV, counts_V, args.experts)


@torch.no_grad()
def table_of_codes(model: MoETransformer) -> Tensor:
    """Experts of all tokens of a model whose codes look at embeddings of single tokens, int64 ``[L, V]``.

    Raises:
        CheckpointError: its codes look at more, or it has none.
    """
    book = model.config.codebook
    if model.token_table_LV is not None and model.token_table_LV.dim() == 2:
        return model.token_table_LV.clone()
    if model.bank is None or model.source is None or book.source is not CodeSource.TOKEN_EMBEDDING:
        looks = (
            f"codebook.source={book.source.value}" if model.bank is not None else f"router {model.config.moe.router}"
        )
        raise CheckpointError(
            f"a table holds routes that follow from the token alone (codebook.source=token_embedding), and this model "
            f"has {looks}"
        )
    ids_1V = torch.arange(model.config.model.vocab_size).unsqueeze(0)
    z_VC = model.bank.prepare(model.source(ids_1V, model.embed(ids_1V)).flatten(0, 1))
    return model.bank.experts_of(model.bank.lookup_all(z_VC))


def read_embeddings(path: str) -> Tensor:
    """Input embeddings of a model, float32 ``[V, D]``: of a checkpoint of ours, or of any Hugging Face folder.

    Raises:
        CheckpointError: nothing there that can be read.
    """
    folder = Path(path)
    if (folder / "config.json").exists() and any(folder.glob("*.safetensors")):
        weights = read_weights(folder)
        name = next((name for name in EMBEDDINGS if name in weights), None)
        if name is None:
            raise CheckpointError(f"{path} has none of {', '.join(EMBEDDINGS)}, so its embeddings are not known")
        return weights[name].whole().float()
    return load_model(path).model.embed.weight.float()


def _tokenizer(args: argparse.Namespace) -> Tokenizer:
    if args.tokenizer is not None:
        return load_tokenizer(args.tokenizer)
    if args.model is None:
        raise ConfigError("the vocabulary is not known: name a tokenizer with --tokenizer, or give --vocab_size")
    if (Path(args.model) / "tokenizer.json").exists():
        return load_tokenizer(Path(args.model) / "tokenizer.json")
    return load_model(args.model).need_tokenizer()


def _counts(args: argparse.Namespace, vocab_size: int) -> np.ndarray:
    """How often each token id occurs in ``--data``, int64 ``[V]``."""
    counts_V = np.zeros(vocab_size, dtype=np.int64)
    for spec in args.data:
        path = weighted_entry(spec)[0]
        if Path(f"{path}.idx").exists():
            parts = chunks(check_prefix(path).ids, 1 << 22)
        else:
            tokenizer = _tokenizer(args)
            units = plan_units([path], SourceOptions())
            parts = (tokenizer.encode(piece.text) for unit in units for piece in read_unit(unit))
        for ids in parts:
            if len(ids) and (int(ids.max()) >= vocab_size or int(ids.min()) < 0):
                raise DataError(
                    f"{path} has the token id {int(ids.max())}, and the vocabulary has {vocab_size}; it was made by "
                    "another tokenizer"
                )
            counts_V += np.bincount(ids, minlength=vocab_size)
    return counts_V


def write(path: Path, table_LV: Tensor, form: str, names: str) -> None:
    """Write a table: ``token_table`` int32 ``[L, V]``, or one tensor int64 ``[V, 1]`` per layer."""
    if form == "table":
        tensors = {NAME: table_LV.int()}
    else:
        tensors = {names.format(layer): table_V.unsqueeze(1) for layer, table_V in enumerate(table_LV)}
    entries: list[Entry] = [entry_of(name, tensor.contiguous()) for name, tensor in tensors.items()]
    partial = path.with_name(f".{path.name}.partial")
    write_safetensors(partial, entries)
    partial.rename(path)
