#!/usr/bin/env python
"""Check a SLURM job of this repository and submit it, with the mistakes found before it waits for hours.

    python launchers/slurm/submit.py --nodes 4 --tasks_per_node 8 --gpus_per_node 8 --partition gpu --time 04:00:00 \\
        pretrain --ds_config ds_configs/zero2.json --preset base --set train.batch_size=64 --ep_size 8 \\
        --run_dir runs/base
    python launchers/slurm/submit.py --dry_run evaluate runs/base --json base.json        # shows it, submits nothing
    python launchers/slurm/submit.py --chain 5 --time 01:00:00 pretrain ...               # five jobs, one after another

Everything after the name of the job goes to its launcher. The environment of the ranks is set by the variables
VQMOE_VENV, VQMOE_MODULES and VQMOE_CONTAINER, how they are started by VQMOE_LAUNCH (launchers/slurm/common.sh).
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vqmoe_ds.config import cli
from vqmoe_ds.config.deepspeed_json import resolve
from vqmoe_ds.finetune import cli as finetune_cli
from vqmoe_ds.runtime.errors import ConfigError, reports_errors, shown

ROOT = Path(__file__).resolve().parents[2]
JOBS = {
    "pretrain": "pretrain.sbatch",
    "finetune": "finetune.sbatch",
    "evaluate": "evaluate.sbatch",
    "compare": "compare_array.sbatch",
}
TRAININGS = ("pretrain", "finetune")
BOUNDS = {
    "nodes": (1, 100_000),
    "tasks_per_node": (1, 1024),
    "gpus_per_node": (0, 1024),
    "cpus_per_task": (1, 10_000),
    "chain": (1, 1000),
    "save_before": (1, 86_400),
}
"""Least and most of whole numbers: what the largest clusters have, a thousand jobs in a queue, and a day."""
SECONDS = 120
"""Longest wait for an answer of SLURM's commands."""
SPECIAL = set(" '\"\\`$#")
"""Characters with a meaning of their own in an #SBATCH line, where sbatch reads quotes and comments its own way."""


@reports_errors
def main(arguments: list[str]) -> int:
    """Check, show or submit; the exit code."""
    args = build_parser().parse_args(arguments)
    check(args)
    script = render(args)
    if args.dry_run:
        print(script, end="")
        return 0
    return submit(args, script)


def build_parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = cli.Parser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--nodes", type=int, default=1, metavar="N")
    add("--tasks_per_node", type=int, default=1, metavar="N", help="ranks on a node: one per GPU")
    add("--gpus_per_node", type=int, default=0, metavar="N")
    add(
        "--cpus_per_task",
        type=int,
        metavar="N",
        help="default: a rank's share of the node's where it has a GPU, else 1",
    )
    add("--partition", metavar="NAME")
    add("--account", metavar="NAME")
    add("--time", default="04:00:00", metavar="LIMIT", help="time limit, as sbatch reads it (default 04:00:00)")
    add("--save_before", type=int, default=300, metavar="SECONDS", help="save so long before the time limit")
    add("--array", metavar="RANGE", help="runs of a comparison, such as 0-35%%8")
    add("--chain", type=int, default=1, metavar="N", help="N jobs, each of which goes on where the one before stopped")
    add("--sbatch", default="", metavar="WORDS", help="further options of sbatch, in one string")
    add("--dry_run", action="store_true", help="print the script that would be submitted, and stop")
    add("job", choices=JOBS)
    add("rest", nargs=argparse.REMAINDER, metavar="...", help="for the launcher")
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot work.

    Raises:
        ConfigError: naming the first thing that cannot.
    """
    _check_words(args)
    for name, (least, most) in BOUNDS.items():
        value = getattr(args, name)
        if value is None:
            continue
        if value < least:
            raise ConfigError(f"--{name} {shown(value)} is too small; the least is {least}")
        if value > most:
            raise ConfigError(f"--{name} {shown(value)} is too large; the most is {most:,}")
    if args.gpus_per_node and args.tasks_per_node != args.gpus_per_node:
        raise ConfigError(
            f"--tasks_per_node {args.tasks_per_node} and --gpus_per_node {args.gpus_per_node} differ: a rank uses "
            "one GPU, so make them equal"
        )
    # Written out, as option in common.sh looks for it; argparse would also take --run_d.
    if args.job in TRAININGS and not any(word.split("=")[0] == "--run_dir" for word in args.rest):
        raise ConfigError(f"give {args.job} a --run_dir, so that a requeued job finds its run again")
    if args.job == "pretrain":
        _check_pretraining(args)
    if args.job == "finetune":
        _check_finetuning(args)
    if args.job == "compare" and (args.array is None or args.nodes * args.tasks_per_node > 1):
        raise ConfigError("a comparison runs one run of its grid a task: give --array 0-N, one node and one task")
    if args.chain > 1 and args.job not in TRAININGS:
        raise ConfigError(f"--chain is for {' and '.join(TRAININGS)}, not for {args.job}")
    # SLURM's commands may be installed where no controller answers.
    if shutil.which("sinfo") and subprocess.run(["sinfo", "-h"], capture_output=True).returncode == 0:
        _check_cluster(args)


def _check_words(args: argparse.Namespace) -> None:
    """Refuse what could become a line of its own, of the script or of its #SBATCH options."""
    for word in args.rest:
        if not word.isprintable():
            raise ConfigError(f"{word[:100]!r}, for {args.job}, has a line break or another character that is not text")
    for name in ("partition", "account", "time", "array"):
        _check_word(f"--{name}", getattr(args, name) or "")
    for word in _sbatch_words(args):
        _check_word("--sbatch", word)
        if not re.match(r"--[a-z][a-z-]*(=|$)", word):
            raise ConfigError(f"--sbatch: {word[:100]!r} is not an option; write each as --name=value")


def _check_word(name: str, value: str) -> None:
    wrong = next((letter for letter in value if letter in SPECIAL or not letter.isprintable()), None)
    if wrong is not None:
        raise ConfigError(f"{name} {value[:100]!r} has {wrong!r} in it, which an #SBATCH line cannot hold")


def _sbatch_words(args: argparse.Namespace) -> list[str]:
    try:
        return shlex.split(args.sbatch)
    except ValueError as error:
        raise ConfigError(f"--sbatch {args.sbatch[:100]!r} cannot be split into options ({error})") from None


def _check_pretraining(args: argparse.Namespace) -> None:
    """The launcher's own checks of its arguments, for the ranks this job would have."""
    options = cli.build_parser("").parse_args(args.rest)
    loaded, ranks = cli.config_from_args(options), args.nodes * args.tasks_per_node
    loaded.print_notes()
    # Nodes without --gpus_per_node may have GPUs that --sbatch asks for: then as this machine would.
    resolve(options.ds_config, loaded, ranks, options.ep_size, gpu=bool(args.gpus_per_node) or None)


def _check_finetuning(args: argparse.Namespace) -> None:
    """The launcher's own checks of its arguments, as far as they go without reading the checkpoint."""
    options = finetune_cli.build_parser("", str(ROOT / "ds_configs/zero2.json")).parse_args(args.rest)
    finetune_cli.check_options(options)
    ranks = args.nodes * args.tasks_per_node
    if options.ep_size is not None and (options.ep_size < 1 or ranks % options.ep_size):
        raise ConfigError(f"--ep_size {shown(options.ep_size)} does not divide the {ranks} ranks of this job")


def _check_cluster(args: argparse.Namespace) -> None:
    # -e: else nodes of unlike shapes are one line with the least of their CPUs.
    lines = _ask(["sinfo", "-h", "-e", "-o", "%R|%D|%c|%G"])
    shapes = [line.split("|") for line in lines]
    names = sorted({shape[0] for shape in shapes})
    if args.partition is not None and args.partition not in names:
        raise ConfigError(f"--partition {args.partition} is not on this cluster; it has {', '.join(names)}")
    # %P marks the default partition by a star, %R does not.
    default = [line.rstrip("*") for line in _ask(["sinfo", "-h", "-o", "%P"]) if line.endswith("*")]
    partition = args.partition or (default[0] if default else None)
    here = [shape for shape in shapes if partition in (None, shape[0])]
    nodes, cpus = sum(int(shape[1]) for shape in here), max(int(shape[2].rstrip("+")) for shape in here)
    gpus = max(_gpus(shape[3]) for shape in here)
    if args.nodes > nodes:
        raise ConfigError(f"--nodes {args.nodes} is more than the {nodes} node(s) of partition {partition}")
    if args.cpus_per_task is None and args.gpus_per_node:
        shares = [
            int(shape[2].rstrip("+")) * args.gpus_per_node // _gpus(shape[3]) for shape in here if _gpus(shape[3])
        ]
        args.cpus_per_task = max(1, min(shares, default=1) // args.tasks_per_node)
    if args.tasks_per_node * (args.cpus_per_task or 1) > cpus:
        raise ConfigError(
            f"--tasks_per_node {args.tasks_per_node} with --cpus_per_task {args.cpus_per_task or 1} needs more than "
            f"the {cpus} CPUs of a node of partition {partition}"
        )
    if args.gpus_per_node > gpus:
        raise ConfigError(f"--gpus_per_node {args.gpus_per_node}: a node of partition {partition} has {gpus}")


def _gpus(resources: str) -> int:
    """GPUs in a list of generic resources such as ``gpu:h100:8(S:0-1)``."""
    return sum(int(count) for count in re.findall(r"gpu(?::[^:,()]+)?:(\d+)", resources))


def render(args: argparse.Namespace) -> str:
    """The script with the options of this job in place of its own."""
    lines = (ROOT / "launchers/slurm" / JOBS[args.job]).read_text(encoding="utf-8").splitlines()
    ours = [f"#SBATCH {option}" for option in _options(args)]
    names = {line.split("=")[0] for line in ours}
    kept = [line for line in lines[1:] if line.split("=")[0] not in names or not line.startswith("#SBATCH")]
    setting = [f"export VQMOE_ROOT={shlex.quote(str(ROOT))}"]
    if args.chain > 1:
        # The next job waits for an end with 0 (afterok), which a job that requeues itself does not come to.
        setting.append("export VQMOE_REQUEUE=0")
    if args.rest:
        setting.append(f"set -- {shlex.join(args.rest)}")
    # Behind the last option: sbatch reads no #SBATCH line after the first command.
    body = kept.index("set -uo pipefail")
    return "\n".join([lines[0], *ours, *kept[:body], *setting, *kept[body:]]) + "\n"


def _options(args: argparse.Namespace) -> list[str]:
    options = [f"--nodes={args.nodes}", f"--ntasks-per-node={args.tasks_per_node}", f"--time={args.time}"]
    if args.job == "compare":
        options = [f"--array={args.array}", f"--time={args.time}"]
    options.append(f"--cpus-per-task={args.cpus_per_task or 1}")
    options += [f"--gpus-per-node={args.gpus_per_node}"] if args.gpus_per_node else []
    options += [f"--{name}={getattr(args, name)}" for name in ("partition", "account") if getattr(args, name)]
    if args.job != "evaluate":
        options.append(f"--signal=B:USR1@{args.save_before}")
    return options + _sbatch_words(args)


def submit(args: argparse.Namespace, script: str) -> int:
    """Hand the script to sbatch, once or as a chain.

    Raises:
        ConfigError: there is no sbatch, it refuses, or it gives no answer.
    """
    before: str | None = None
    for _ in range(args.chain):
        command = ["sbatch", "--parsable"]
        if before is not None:
            # Without the second option jobs behind a failed one stay in the queue, unless the cluster removes them.
            command += [f"--dependency=afterok:{before}", "--kill-on-invalid-dep=yes"]
        answer = _ask(command, script)
        before = answer[0].split(";")[0] if answer else ""
        if not before.isalnum():
            raise ConfigError(f"sbatch gave no job number; its answer was {' '.join(answer)[:200]!r}")
        print(f"submitted job {before} from {os.getcwd()}")
    return 0


def _ask(command: list[str], text: str | None = None) -> list[str]:
    try:
        answer = subprocess.run(command, input=text, capture_output=True, text=True, errors="replace", timeout=SECONDS)
    except FileNotFoundError:
        raise ConfigError(
            f"{command[0]} is not on this machine; submit from a login node, or look with --dry_run"
        ) from None
    except subprocess.TimeoutExpired:
        remedy = "try again later" if text is None else "look with squeue whether the job was submitted all the same"
        raise ConfigError(f"{command[0]} gave no answer within {SECONDS} s; {remedy}") from None
    if answer.returncode:
        raise ConfigError(f"{command[0]} refused: {' '.join(answer.stderr.split())}")
    return answer.stdout.split("\n")[:-1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
