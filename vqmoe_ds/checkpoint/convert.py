"""``tools/convert_checkpoint.py``: any checkpoint to any layout or format."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqmoe_ds.config.routers import add_plugin_option
from vqmoe_ds.runtime.errors import CheckpointError, reports_errors
from vqmoe_ds.runtime.files import why_missing, write_atomically

if TYPE_CHECKING:
    from vqmoe_ds.checkpoint.reader import CheckpointReader

FORMATS = ("portable", "deepspeed", "hf", "discrete-only", "megatron", "native")


def build_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "src",
        metavar="SRC",
        help="tag folder, run folder (newest tag; of a fine-tuning the best validated), portable, Hugging Face, "
        "Megatron or native DeepSpeed-MoE folder",
    )
    parser.add_argument("dst", metavar="DST", help="folder to make")
    parser.add_argument("--to", choices=FORMATS, required=True, help="format to write")
    parser.add_argument("--force", action="store_true", help="replace DST")
    parser.add_argument("--verify", action="store_true", help="compare SRC with its checksums first")
    layout = parser.add_argument_group(
        "--to deepspeed, native: the layout it will be resumed on (default: that of SRC)"
    )
    layout.add_argument("--zero", type=int, choices=range(4), help="ZeRO stage")
    layout.add_argument("--ep", type=int, help="expert-parallel size")
    layout.add_argument("--world", type=int, help="ranks in all")
    layout.add_argument("--precision", choices=("fp32", "bf16"), help="of the weights; master weights are float32")
    shards = parser.add_argument_group("--to portable, discrete-only, hf")
    shards.add_argument("--max_shard", help="largest file, such as 2GB (a larger tensor has one to itself)")
    megatron = parser.add_argument_group("--to megatron (and --ep)")
    megatron.add_argument("--tp", type=int, default=1, help="tensor-parallel size")
    megatron.add_argument("--experts", choices=("sequential", "grouped"), default="sequential", help="Megatron's layer")
    hf = parser.add_argument_group("--to hf (--dtype: megatron too)")
    hf.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    hf.add_argument("--arch", choices=("vqmoe", "mixtral", "llama"), default="vqmoe", help="stock where equal")
    hf.add_argument("--tokenizer", default="auto", help="auto (that of the run's data), none, or a tokenizer's path")
    ties = "take a unigram tokenizer whose sums of scores are rounded: about one token in a million differs"
    hf.add_argument("--inexact_tokenizer", action="store_true", help=ties)
    add_plugin_option(parser)
    return parser


@reports_errors
def main(options: argparse.Namespace) -> int:
    """Convert; on bad input one sentence. Returns the exit code."""
    from vqmoe_ds.checkpoint.reader import sound

    with sound(options.src):
        lines = convert(options)
    for line in lines:
        print(line)
    return 0


def convert(options: argparse.Namespace) -> list[str]:
    """Do what the command line says; returns what to tell the user.

    Raises:
        CheckpointError: SRC is damaged or of another kind, DST exists, options contradict each other, the disk is full.
            Nothing is left at DST then.
    """
    from vqmoe_ds.checkpoint.open import open_checkpoint, verify_opened
    from vqmoe_ds.checkpoint.reader import require_language_model, require_text
    from vqmoe_ds.checkpoint.views.adapters import merged

    dst = Path(options.dst)
    # new_folder cannot rename a folder onto a link, and would find out when all is written.
    if os.path.islink(dst) and not os.path.exists(dst):
        raise CheckpointError(f"{dst} {why_missing(dst)}; choose another folder, or remove the link")
    if os.path.exists(dst) and not options.force:
        raise CheckpointError(f"{dst} exists; choose another folder, or give --force to replace it")
    reader = open_checkpoint(options.src)
    # Also with --force, which would delete the source after it was read.
    if dst.resolve() == reader.path.resolve() or dst.resolve() in reader.path.resolve().parents:
        raise CheckpointError(f"{dst} holds the checkpoint that is to be converted; choose another folder")
    if options.verify:
        verify_opened(reader)
    writers: dict[str, Callable[[CheckpointReader, Path, argparse.Namespace], list[str]]] = {
        "portable": _to_portable,
        "discrete-only": _to_discrete_only,
        "deepspeed": _to_deepspeed,
        "hf": _to_hf,
        "megatron": _to_megatron,
        "native": _to_native,
    }
    if "native" in reader.config and options.to not in ("native", "portable"):
        raise CheckpointError(
            f"{reader.path} is of a model with deepspeed.moe.layer.MoE layers, not of this trainer's; "
            "--to native and --to portable take it"
        )
    # These two keep every parameter under its name, adapters too; the others take a model without any.
    if options.to not in ("portable", "deepspeed"):
        require = require_text if options.to == "hf" else require_language_model
        require(reader, f"--to {options.to}")
        reader = merged(reader)
    lost = getattr(reader, "dropped", [])
    left = [f"left behind, as they are no plain values: {', '.join(lost)}"] if lost else []
    return [*writers[options.to](reader, dst, options), *left]


def _to_portable(reader: CheckpointReader, dst: Path, options: argparse.Namespace) -> list[str]:
    from vqmoe_ds.checkpoint.formats.portable import SHARD_BYTES, total_bytes, write_portable
    from vqmoe_ds.runtime.files import new_folder
    from vqmoe_ds.runtime.memory import parse_memory

    limit = parse_memory(options.max_shard, "--max_shard") or SHARD_BYTES
    check_complete(reader)
    with new_folder(dst, options.force) as folder, _bar(total_bytes(reader), dst) as tell:
        write_portable(reader, folder, tell, limit)
    return [f"{dst}: portable checkpoint of step {reader.step}"]


def _to_discrete_only(reader: CheckpointReader, dst: Path, options: argparse.Namespace) -> list[str]:
    from vqmoe_ds.checkpoint.figures import sizes
    from vqmoe_ds.checkpoint.formats.huggingface.folder import run_config
    from vqmoe_ds.checkpoint.views.discrete import DiscreteOnly

    discrete = DiscreteOnly(reader)
    lines = _to_portable(discrete, dst, options)
    before, after = (sizes(r.shapes, run_config(r.config, r.path)) for r in (reader, discrete))
    titles = ("parameters stored", "parameters used by a token", "FLOPs a token, forward")
    for title, key in zip(titles, before, strict=True):
        saved = 100 * (1 - after[key] / before[key])
        lines.append(f"{title}: {before[key]:,} before, {after[key]:,} after ({saved:.1f} % less)")
    return lines


def _to_deepspeed(reader: CheckpointReader, dst: Path, options: argparse.Namespace) -> list[str]:
    from vqmoe_ds.checkpoint.formats.deepspeed.writer import bytes_told, check_layout, write_tag
    from vqmoe_ds.checkpoint.formats.deepspeed.zero import TagLayout
    from vqmoe_ds.checkpoint.io.store import tag_name
    from vqmoe_ds.runtime.files import new_folder

    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed need not look for a GPU
    sizes = {"zero_stage": options.zero, "ep_size": options.ep, "world_size": options.world}
    layout = TagLayout.chosen(reader.layout, **sizes, precision=options.precision)
    check_layout(reader, layout)
    check_complete(reader)
    with new_folder(dst, options.force) as folder, _bar(bytes_told(reader, layout), dst) as tell:
        tag = folder / tag_name(reader.step)
        tag.mkdir()
        write_tag(reader, tag, layout, tell)
        # load_checkpoint without a tag reads it.
        write_atomically(folder / "latest", tag.name)
    return [f"{dst / tag_name(reader.step)}: DeepSpeed checkpoint for {layout}"]


def _to_hf(reader: CheckpointReader, dst: Path, options: argparse.Namespace) -> list[str]:
    from vqmoe_ds.checkpoint.formats.huggingface.folder import ExportOptions, export_hf

    more = {"max_shard": options.max_shard} if options.max_shard else {}
    wanted = ExportOptions(
        dtype=options.dtype,
        arch=options.arch,
        tokenizer=options.tokenizer,
        inexact_tokenizer=options.inexact_tokenizer,
        force=options.force,
        **more,
    )
    return [f"{dst}: Hugging Face model", *export_hf(reader, dst, wanted)]


def _to_megatron(reader: CheckpointReader, dst: Path, options: argparse.Namespace) -> list[str]:
    from vqmoe_ds.checkpoint.formats.megatron.writer import MegatronOptions, export_megatron

    check_complete(reader)
    ep = 1 if options.ep is None else options.ep
    wanted = MegatronOptions(options.tp, ep, options.experts, options.dtype, options.force)
    return [f"{dst}: Megatron checkpoint of step {reader.step}", *export_megatron(reader, dst, wanted)]


def _to_native(reader: CheckpointReader, dst: Path, options: argparse.Namespace) -> list[str]:
    from vqmoe_ds.checkpoint.formats.native_moe.writer import native_layout, write_native
    from vqmoe_ds.checkpoint.formats.portable import total_bytes
    from vqmoe_ds.runtime.files import new_folder

    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed need not look for a GPU
    layout = native_layout(reader, options.zero, options.ep, options.world, options.precision)
    check_complete(reader)
    with new_folder(dst, options.force) as folder, _bar(total_bytes(reader), dst) as tell:
        write_native(reader, folder, layout, tell)
    return [f"{dst}: native DeepSpeed-MoE checkpoint for {layout}"]


def check_complete(reader: CheckpointReader) -> None:
    """See that every value has its place in a file, before anything is written.

    Raises:
        CheckpointError: a shard is missing, cut short or of another tag.
    """
    from vqmoe_ds.checkpoint.reader import KINDS

    reader.buffers()
    for kind in KINDS if reader.has_optimizer else KINDS[:1]:
        for name in reader.names_of(kind):
            reader.pieces(name, kind)


@contextmanager
def _bar(total: int, dst: Path) -> Iterator[Callable[[int], Any]]:
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc=dst.name, disable=None, leave=False) as bar:
        yield bar.update
