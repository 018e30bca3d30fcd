"""The command line of the launchers: short names for daily options, ``--set`` for every other."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vqmoe_ds.config.deepspeed_json import SHIPPED
from vqmoe_ds.config.load import (
    FieldRow,
    LoadedConfig,
    field_table,
    load_config,
    parse_override,
    preset_names,
)
from vqmoe_ds.config.routers import add_plugin_option
from vqmoe_ds.config.schema import Precision
from vqmoe_ds.runtime.errors import ConfigError, one_line, shown

DS_CONFIG = SHIPPED / "zero2.json"
"""The default of ``--ds_config``, from whatever folder a launcher is started."""
SHORT_NAMES = {
    "data": "data.path",
    "tokenizer": "data.tokenizer",
    "run_dir": "run.run_dir",
    "train_steps": "train.steps",
    "batch_size": "train.batch_size",
    "lr": "train.learning_rate",
    "precision": "train.precision",
    "seq_len": "model.sequence_length",
    "seed": "train.seed",
    "sp_size": "train.sequence_parallel_size",
}
"""Options that are another name for one field."""
PREPARED = "file or folder of text, hub:NAME, or prepared data as PREFIX ... or WEIGHT:PREFIX ..."
"""Values of ``--data``, for ``--help``."""
EXIT_CODES = """exit codes: 0 finished, 1 defect, 2 bad input, 3 training cannot go on, 75 stopped by a signal after \
saving, 76 a rank went missing"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose error sentences stay short, whatever they quote."""

    def error(self, message: str) -> NoReturn:
        super().error(one_line(message))


class TrainingParser(Parser):
    """The parser of a training launcher: daily options, further ones, and at the end of ``--help`` every field."""

    def __init__(self, description: str, fields: Callable[[Sequence[str]], list[FieldRow]]) -> None:
        """
        Args:
            description: head of ``--help``.
            fields: gives the rows of ``--help``, with the defaults of the command, from the words of its line.
        """
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False)
        self.daily = self.add_argument_group("daily options")
        self.further = self.add_argument_group("further options")
        self._fields, self._words = fields, list[str]()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # --help is answered while arguments are parsed: format_help finds no namespace, only these words.
        self._words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def format_help(self) -> str:
        try:
            rows = self._fields(self._words)
        except ConfigError as error:  # a plug-in of the environment, or an installed one
            self.error(str(error))
        defaults = {row.name: row.default for row in rows}
        for action in self._actions:
            name = SHORT_NAMES.get(action.dest)
            if name is not None and action.help is not None and name in defaults:
                # argparse formats help with %. What an earlier call appended is cut off: help may be asked for again.
                told = f"{name}, default {defaults[name]}".replace("%", "%%")
                action.help = f"{action.help.partition(' [')[0]} [{told}]"
        self.epilog = field_help(rows)
        return super().format_help()


def build_parser(description: str) -> argparse.ArgumentParser:
    """The parser of pretraining."""
    parser = common_parser(description, _pretraining_fields)
    presets = preset_names()
    parser.daily.add_argument(
        "--preset", default="tiny", metavar="NAME", help=f"starting point: {', '.join(presets)} (default tiny)"
    )
    told = "bytes, a folder, a .model or a vocabulary .txt: prepare --data with it first; none: bytes as they are"
    parser.daily.add_argument("--tokenizer", metavar="TOKENIZER", help=told)
    add = parser.further.add_argument
    add("--dry_run", action="store_true", help="build one rank of a large job, without memory or peers, and report")
    add("--world_size", type=int, metavar="N", help="--dry_run: ranks of the job")
    add("--rank", type=int, default=0, metavar="N", help="--dry_run: the one to build (default 0)")
    add("--gpus_per_node", type=int, default=8, metavar="N", help="--dry_run: ranks per node (default 8)")
    add("--json", action="store_true", help="--dry_run: print JSON")
    return parser


def common_parser(
    description: str,
    fields: Callable[[Sequence[str]], list[FieldRow]],
    ds_config: str | Path = DS_CONFIG,
    data: str = f"{PREPARED}; none: the standard library's documentation",
) -> TrainingParser:
    """The parser of the options that all training launchers have.

    Args:
        fields: as ``TrainingParser``.
        ds_config: the default of ``--ds_config``.
        data: what ``--help`` says of ``--data``.
    """
    parser = TrainingParser(description, fields)
    add = parser.daily.add_argument
    add("--data", nargs="+", metavar="SPEC", help=data)
    add("--run_dir", metavar="DIR", help="folder of everything the run writes")
    add("--train_steps", type=int, metavar="N", help="optimizer steps of the whole run")
    add("--batch_size", type=int, metavar="N", help="sequences per optimizer step, over all ranks")
    add("--lr", type=float, metavar="X", help="peak learning rate")
    add("--precision", choices=list(map(str, Precision)), help="of weights and products; auto: as the JSON says")
    add("--seq_len", type=int, metavar="N", help="training context in tokens")
    add("--seed", type=int, metavar="N", help="seed of weights, data order and codes")
    add("--resume", default="auto", metavar="auto|never|PATH", help="auto: newest whole checkpoint of the run folder")
    add("--config", metavar="YAML", help="run configuration; overrides what the run starts from")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="override a field (below); repeatable")
    add = parser.further.add_argument
    told = f"DeepSpeed configuration: ZeRO, offload (default: the shipped {Path(ds_config).name})"
    add("--ds_config", default=str(ds_config), metavar="JSON", help=told)
    add("--ep_size", type=int, metavar="N", help="expert-parallel ranks (or autoep_size in the JSON; give it once)")
    add("--sp_size", type=int, metavar="N", help="ranks that share every sequence (Ulysses sequence parallelism)")
    add_plugin_option(parser.further)
    add("--allow_changed_data", action="store_true", help="resume on other data than the checkpoint was trained on")
    told = "write a torch profiler trace: N, as many steps after two to warm up, or FIRST:LAST, such as 10:13"
    add("--profile", type=profiled_steps, metavar="STEPS", help=told)
    add("--print_config", action="store_true", help="show what would run, and stop")
    add("-h", "--help", action="help", help="show this, and stop")
    # The deepspeed launcher adds it to the command line of every rank.
    add("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    return parser


def profiled_steps(text: str) -> tuple[int | None, int]:
    """First and last step of ``--profile FIRST:LAST``; None and their number of ``--profile N``.

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    found = re.fullmatch(r"(?:([1-9]\d{0,11}):)?([1-9]\d{0,11})", text)
    if found is None or int(found[1] or 1) > int(found[2]):
        raise argparse.ArgumentTypeError(f"{shown(text)} is no number of steps and no FIRST:LAST; write 3, or 10:13")
    return int(found[1]) if found[1] else None, int(found[2])


def config_from_args(args: argparse.Namespace) -> LoadedConfig:
    """The configuration from preset, file, ``--set`` and short names, in that order."""
    return load_config(args.preset, args.config, overrides_from_args(args))


def overrides_from_args(args: argparse.Namespace) -> dict[str, Any]:
    """``--set`` and short names as dotted name -> value.

    Raises:
        ConfigError: a malformed ``--set``, or one that contradicts a short name.
    """
    overrides: dict[str, Any] = dict(parse_override(text) for text in args.set)
    for option, name in SHORT_NAMES.items():
        value = getattr(args, option)
        # --data takes several words: a single one is text, as --set data.path gives it, else the two would contradict.
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if value is None:
            continue
        if name in overrides and overrides[name] != value:
            raise ConfigError(
                f"--{option} {shown(value)} contradicts --set {name}={shown(overrides[name])}; leave one of them out"
            )
        overrides[name] = value
    return overrides


def _pretraining_fields(words: Sequence[str]) -> list[FieldRow]:
    """All fields but those of fine-tuning, with the values of the preset that is named."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # --help is answered whatever stands behind it, also a --preset without its name.
    parser.add_argument("--preset", nargs="?", default="tiny")
    preset = parser.parse_known_args(list(words))[0].preset
    config = load_config(preset if preset in preset_names() else "tiny").config
    return [row for row in field_table(config) if not row.name.startswith("finetune.")]


def field_help(rows: Sequence[FieldRow]) -> str:
    """The end of ``--help``: every field by section, and the exit codes."""
    lines, section = ["fields for --set and --config (default, unit, choices):"], ""
    for row in rows:
        if row.name.partition(".")[0] != section:
            section = row.name.partition(".")[0]
            lines += ["", f"{section}:"]
        lines.append(f"  {row.name} = {row.default}" + (f" [{row.unit}]" if row.unit else ""))
        lines += textwrap.wrap(row.told, 96, initial_indent="      ", subsequent_indent="      ")
    return "\n".join([*lines, "", EXIT_CODES])
