"""The command line of ``launchers/finetune.py``."""

from __future__ import annotations

import argparse
from pathlib import Path

from vqmoe_ds.errors import CheckpointError, ConfigError
from vqmoe_ds.finetune.defaults import shown
from vqmoe_ds.train.cli import PREPARED, common_parser

LANGUAGE_MODEL = "lm"
"""``--task``: not a labelled set but plain text."""


def build_parser(description: str, ds_config: str) -> argparse.ArgumentParser:
    """The parser; ``ds_config`` is the default of that option."""
    parser = common_parser(description, ds_config, f"text of --task lm: {PREPARED}", shown())
    add = parser.add_argument
    what = "run folder, checkpoint of any layout, portable, Hugging Face or Megatron folder"
    add("--checkpoint", metavar="PATH", help=what)
    add("--task", metavar="TASK", help="sst2, sst5, imdb, banking77, a CSV, TSV, JSONL or folder, NAME=PATH, or lm")
    add("--tokenizer", metavar="TOKENIZER", help="of the model, where it is not found: bytes, a folder, .model or .txt")
    add("--seeds", type=int, metavar="N", help="train N times, with the seeds 1 to N, and report mean and error")
    add("--shots", metavar="N,...", help="train on so many texts of each class; several: one after the other")
    return parser


def check_options(args: argparse.Namespace) -> None:
    """What can be refused before anything heavy is loaded.

    Raises:
        ConfigError, CheckpointError: an option is missing, too small, or contradicts another.
    """
    if args.checkpoint is None:
        raise ConfigError("--checkpoint is missing: give the run folder or checkpoint to start from")
    if not Path(args.checkpoint).exists():
        raise CheckpointError(f"checkpoint {args.checkpoint} does not exist; give a run folder or a checkpoint")
    if args.task is None:
        raise ConfigError("--task is missing: sst2, sst5, imdb, banking77, a file or folder of labelled texts, or lm")
    if args.seeds is not None and args.seeds < 1:
        raise ConfigError(f"--seeds {args.seeds} is too small; the least is 1")
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
        raise ConfigError(f"--shots {args.shots} is not of the form 1,4,16") from None
    if any(number < 1 for number in shots):
        raise ConfigError(f"--shots {args.shots}: the least is 1")
    return sorted(set(shots))
