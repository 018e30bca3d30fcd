"""The command line of the launchers: short names for daily options, ``--set`` for every other."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vqmoe_ds.config.load import LoadedConfig, field_table, load_config, parse_override, preset_names

SHORT_NAMES = {
    "run_dir": ("run.run_dir", str),
    "train_steps": ("train.steps", int),
    "seed": ("train.seed", int),
    "data": ("data.path", str),
}
"""Options that are another name for one field."""
PREPARED = "file or folder of text, or prepared data as PREFIX ... or WEIGHT:PREFIX ..."
"""What ``--data`` takes."""


def build_parser(description: str) -> argparse.ArgumentParser:
    """The parser of pretraining."""
    parser = common_parser(description)
    add = parser.add_argument
    add("--preset", default="tiny", help=f"starting point: {', '.join(preset_names())} (default tiny)")
    add(
        "--dry_run", action="store_true", help="build one rank of a large job without memory or peers, and report on it"
    )
    add("--world_size", type=int, metavar="N", help="--dry_run: ranks of the job")
    add("--rank", type=int, default=0, metavar="N", help="--dry_run: the one to build (default 0)")
    add("--gpus_per_node", type=int, default=8, metavar="N", help="--dry_run: ranks a node (default 8)")
    add("--json", action="store_true", help="--dry_run: print JSON")
    return parser


def common_parser(
    description: str,
    ds_config: str | None = None,
    data: str = f"{PREPARED} (default: the standard library's documentation)",
    defaults: Mapping[str, str] | None = None,
) -> argparse.ArgumentParser:
    """What all training launchers take; ``--help`` ends with every field, its default and unit.

    Args:
        ds_config: the default of ``--ds_config``; None: it has to be given.
        data: what ``--help`` says of ``--data``.
        defaults: what it says of defaults that are not the schema's, by field or by section.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog=_field_help(defaults or {}),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    default = f" (default {Path(ds_config).name})" if ds_config else ""
    add(
        "--ds_config",
        required=ds_config is None,
        default=ds_config,
        metavar="JSON",
        help=f"DeepSpeed configuration, e.g. ds_configs/zero2.json{default}",
    )
    add("--config", metavar="YAML", help="run configuration; overrides what the run starts from")
    add("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="override one field; repeatable")
    add("--data", nargs="+", metavar="SPEC", help=data)
    add("--run_dir", metavar="DIR", help="folder of everything the run writes")
    add("--train_steps", type=int, metavar="N", help="optimizer steps of the whole run")
    add("--seed", type=int, metavar="N", help="seed of weights, data order and codes")
    add("--ep_size", type=int, metavar="N", help="expert-parallel ranks (or autoep_size in the JSON; give it once)")
    add("--resume", default="auto", metavar="auto|never|PATH", help="auto: newest whole checkpoint of the run folder")
    add("--print_config", action="store_true", help="show what would run, and stop")
    add("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    return parser


def config_from_args(args: argparse.Namespace) -> LoadedConfig:
    """Preset, file, ``--set`` and short names, in that order."""
    return load_config(args.preset, args.config, overrides_from_args(args))


def overrides_from_args(args: argparse.Namespace) -> dict[str, Any]:
    """``--set`` and short names as dotted name -> value."""
    overrides: dict[str, Any] = dict(parse_override(text) for text in args.set)
    for option, (name, _) in SHORT_NAMES.items():
        value = getattr(args, option)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if value is not None:
            overrides[name] = value
    return overrides


def _field_help(defaults: Mapping[str, str]) -> str:
    lines = ["fields for --set and --config (default, unit):"]
    for name, default, unit, meaning in field_table():
        own = defaults.get(name) or defaults.get(name.split(".")[0])
        head = f"  {name} = {own or default}" + (f" [{unit}]" if unit else "")
        lines.append(head)
        lines += textwrap.wrap(meaning, 96, initial_indent="      ", subsequent_indent="      ")
    codes = "0 finished, 1 defect, 2 bad input, 3 training cannot go on, 75 stopped by a signal after saving, "
    codes += "76 a rank went missing"
    return "\n".join([*lines, "", f"exit codes: {codes}"])
