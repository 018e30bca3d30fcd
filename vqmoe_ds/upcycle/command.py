"""``tools/upcycle.py``: a Hugging Face model as a checkpoint to train on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vqmoe_ds.checkpoint.formats.portable import write_portable
from vqmoe_ds.checkpoint.io.shards import read_json
from vqmoe_ds.checkpoint.reader import sound
from vqmoe_ds.config.load import parse_override
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.runtime.errors import ConfigError, reports_errors
from vqmoe_ds.runtime.files import new_folder
from vqmoe_ds.upcycle.dense import DENSE, ROUTED, UpcycleOptions, check_kind, upcycle
from vqmoe_ds.upcycle.routed import RoutedSource, calibration_ids, routed_config, with_codes


def build_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", metavar="SRC", help="folder of a Hugging Face model (safetensors): " + ", ".join(DENSE + ROUTED))
    add("target", metavar="DST", help="portable checkpoint to write")
    add("--config", metavar="YAML", help="run configuration of the new model; its shape comes from SRC")
    add("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="override one field; repeatable")
    add("--granularity", type=int, default=1, metavar="G", help="cut every copy of the MLP into G experts (topk only)")
    add("--noise", type=float, default=0.0, metavar="S", help="noise on the experts, relative to each matrix")
    add("--force", action="store_true", help="replace DST if it exists")
    experts = parser.add_argument_group("SRC has experts (Mixtral, OLMoE, Qwen-MoE, Granite-MoE): each gets a code")
    experts.add_argument("--calibration", metavar="FILE", help="UTF-8 text like that of training (needed)")
    experts.add_argument(
        "--calibration_tokens", type=int, default=100_000, metavar="N", help="tokens of it that are read"
    )
    experts.add_argument("--tokenizer", metavar="TOKENIZER", help="of the model (default: the one in SRC)")
    return parser


@reports_errors
def main(args: argparse.Namespace) -> int:
    """Convert, or say in one sentence why not; the exit code."""
    overrides = dict(parse_override(text) for text in args.set)
    with sound(args.source):
        return _run(args, overrides)


def _run(args: argparse.Namespace, overrides: dict[str, Any]) -> int:
    described = read_json(Path(args.source) / "config.json")
    check_kind(described, Path(args.source))
    if described.get("model_type") in ROUTED:
        return _upcycle_routed(args, overrides)
    if args.calibration:
        raise ConfigError("--calibration is for a source with experts, and SRC is dense; leave it out")
    options = UpcycleOptions(args.granularity, args.noise)
    reader = upcycle(args.source, args.target, options, overrides, args.config, args.force)
    moe = RunConfig(**reader.config).moe
    print(
        f"{args.target}: {moe.num_experts} experts of hidden width {moe.expert_hidden} a layer, router "
        f"{moe.router} with top_k {moe.top_k}, "
        + ("function preserved" if not options.noise else f"noise {options.noise} on the experts")
    )
    return 0


def _upcycle_routed(args: argparse.Namespace, overrides: dict[str, Any]) -> int:
    if args.granularity != 1 or args.noise:
        raise ConfigError("--granularity and --noise are for dense sources; SRC has experts of its own")
    if not args.calibration:
        raise ConfigError("SRC has experts, so its codes need --calibration FILE, a text like that of training")
    source = RoutedSource(args.source)
    config = routed_config(source, overrides, args.config)
    ids = calibration_ids(args.calibration, args.tokenizer or args.source, args.calibration_tokens, config)
    # Around the measuring, so that a target that exists is refused before it.
    with new_folder(Path(args.target), args.force) as folder:
        reader, report = with_codes(source, config, ids)
        write_portable(reader, folder)
    print("\n".join([f"{args.target}: {source.experts} experts a layer, one code for each", *report.lines()]))
    return 0
