"""The command line of ``launchers/finetune.py``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vqmoe_ds.config.cli import DS_CONFIG, PREPARED, common_parser
from vqmoe_ds.config.fields import MOST_TOGETHER
from vqmoe_ds.config.load import FieldRow, field_table, load_config
from vqmoe_ds.finetune import defaults
from vqmoe_ds.runtime.errors import CheckpointError, ConfigError, shown

MOST_RUNS = 1000
"""Runs of one command, at most, by ``--seeds`` and ``--shots``: each has a folder and a line of the report."""
LANGUAGE_MODEL = "lm"
"""Value of ``--task`` for plain text in place of a labelled set."""


def build_parser(description: str, ds_config: str | Path = DS_CONFIG) -> argparse.ArgumentParser:
    """The parser; ``ds_config`` is the default of that option."""
    parser = common_parser(description, _fields, ds_config, f"text of --task lm: {PREPARED}")
    add = parser.daily.add_argument
    what = "run folder, checkpoint of any layout, portable, Hugging Face or Megatron folder"
    add("--checkpoint", metavar="PATH", help=what)
    add("--task", metavar="TASK", help="sst2, sst5, imdb, banking77, a CSV, TSV, JSONL or folder, NAME=PATH, or lm")
    add("--seeds", type=int, metavar="N", help="train N times, with the seeds 1 to N, and report mean and error")
    add("--shots", metavar="N,...", help="train on so many texts of each class; several: one after the other")
    more = "; by numbers from 0 in a table without a header"
    add("--text_column", metavar="NAME,...", help=f"columns or keys of the text, joined (default text){more}")
    add(
        "--label_column",
        metavar="NAME",
        help=f"of the label (default label); NAME:coarse: as far as its first colon{more}",
    )
    add = parser.further.add_argument
    what = "memory for frozen experts (finetune.trainable=head), such as 256MiB; the rest stays in a file"
    add("--expert_memory", metavar="SIZE", help=what)
    add("--tokenizer", metavar="TOKENIZER", help="of the model, where it is not found: bytes, a folder, .model or .txt")
    return parser


def _fields(words: Sequence[str]) -> list[FieldRow]:
    """Fields that a fine-tuning sets; of the model, which is the checkpoint's, those with defaults of their own."""
    told, rows = defaults.shown(), field_table(load_config(base=dict(defaults.DEFAULTS)).config)
    numbers = {f"{section}.{name}" for section, fields in defaults.DEFAULTS.items() for name in fields}
    kept = [row for row in rows if row.name in told or row.name.split(".")[0] not in told]
    return [row if row.name in numbers else row._replace(default=told.get(row.name, row.default)) for row in kept]


def check_options(args: argparse.Namespace) -> None:
    """Refuse what can be refused before anything heavy is loaded.

    Raises:
        ConfigError, CheckpointError: an option is missing, too small, or contradicts another.
    """
    if args.checkpoint is None:
        raise ConfigError("--checkpoint is missing: give the run folder or checkpoint to start from")
    if not _exists(args.checkpoint):
        raise CheckpointError(f"checkpoint {args.checkpoint} does not exist; give a run folder or a checkpoint")
    if args.task is None:
        raise ConfigError("--task is missing: sst2, sst5, imdb, banking77, a file or folder of labelled texts, or lm")
    if args.seeds is not None and args.seeds < 1:
        raise ConfigError(f"--seeds {args.seeds} is too small; the least is 1")
    if args.seeds is not None and args.seeds > MOST_RUNS:
        raise ConfigError(f"--seeds {shown(args.seeds)} is too large; the most is {MOST_RUNS}")
    if args.seeds is not None and args.seed is not None:
        raise ConfigError(f"--seeds {args.seeds} trains with the seeds 1 to {args.seeds}; leave --seed out")
    if (args.seeds or args.shots) and args.resume not in ("auto", "never"):
        raise ConfigError("--resume PATH names one run, and --seeds or --shots make several; leave one of them out")
    if args.task == LANGUAGE_MODEL and args.data is None:
        raise ConfigError("--task lm needs --data: a text file, a folder of texts, or prepared data")
    if args.task != LANGUAGE_MODEL and args.data is not None:
        raise ConfigError(f"--data is the text of --task lm; with --task {args.task} name a folder as NAME=PATH")
    if args.task == LANGUAGE_MODEL and args.shots is not None:
        raise ConfigError("--shots counts labelled texts, and --task lm has none; leave it out")


def shots_of(args: argparse.Namespace) -> list[int]:
    """``--shots`` as numbers; empty where it is not given."""
    try:
        shots = [int(part) for part in args.shots.split(",")] if args.shots is not None else []
    except ValueError:
        raise ConfigError(f"--shots {shown(args.shots)[1:-1]} is not of the form 1,4,16") from None
    if any(not 1 <= number <= MOST_TOGETHER for number in shots):
        raise ConfigError(f"--shots {shown(args.shots)[1:-1]}: the least is 1, the most {MOST_TOGETHER:,}")
    if len(shots) > MOST_RUNS:
        raise ConfigError(f"--shots names {len(shots):,} numbers, and {MOST_RUNS} are the most")
    return sorted(set(shots))


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # no file can have this name
        return False
