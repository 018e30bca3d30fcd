#!/usr/bin/env python
"""Time of a stopped training from its command to its first new step, and the share of imports in it.

python benchmarks/recovery.py                                  # python launchers/pretrain.py, one rank
python benchmarks/recovery.py --ranks 2 --launcher deepspeed   # or torchrun, or node (launchers/slurm/node.py)

Seconds of the processor count all processes of the command; on a busy machine they say more than the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from measuring import table, write_json

ROOT = Path(__file__).resolve().parent.parent
SMALL = """
model: {layers: 2, width: 32, heads: 2, sequence_length: 32}
moe: {num_experts: 4, expert_hidden: 32, top_k: 1}
train: {batch_size: 4, warmup_steps: 2}
run: {log_every: 1, save_every: 4, probe_tokens: 64, sample_tokens: 0}
"""
SAVED, ENOUGH = 4, 100_000
"""Steps of the checkpoint that is resumed, and of a run that does not end by itself."""
QUIET = subprocess.DEVNULL
MARK = "VQMOE_RECOVERY"
"""A variable by which the processes of the command are found."""


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "small.yaml").write_text(SMALL, encoding="utf-8")
        (folder / "text.txt").write_text(
            "".join(f"{i} words make {i * i % 97} stories. " for i in range(2000)), encoding="utf-8"
        )
        subprocess.run(
            command(folder, folder / "run", options, SAVED), env=environment(""), check=True, stdout=QUIET, stderr=QUIET
        )
        tries = [recover(folder, number, options) for number in range(options.tries)]
    rows = [[what, f"{statistics.median(seconds):.1f}", f"{min(seconds):.1f}"] for what, seconds in columns(tries)]
    print(f"{options.launcher}, {options.ranks} rank(s), {options.tries} tries")
    print(table(["seconds from command to first new step", "median", "least"], rows))
    write_json(options.json, [{"launcher": options.launcher, "ranks": options.ranks, "tries": tries}])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--launcher", choices=("python", "deepspeed", "torchrun", "node"), default="python")
    parser.add_argument("--tries", type=int, default=5)
    parser.add_argument("--json", help="write the figures to a file, or to the terminal with -")
    return parser.parse_args()


def columns(tries: list[tuple[float, float]]) -> list[tuple[str, list[float]]]:
    return [("clock", [clock for clock, _ in tries]), ("processor, all processes", [busy for _, busy in tries])]


def command(folder: Path, run_dir: Path, options: argparse.Namespace, steps: int) -> list[str]:
    """The words of a training of so many steps."""
    here, ranks = Path(sys.executable).parent, str(options.ranks)
    starts = {
        "python": [sys.executable],
        "deepspeed": [str(here / "deepspeed"), "--num_gpus", ranks, "--master_port", str(free_port())],
        "torchrun": [str(here / "torchrun"), "--nproc_per_node", ranks, "--master_port", str(free_port())],
        "node": [sys.executable, str(ROOT / "launchers/slurm/node.py"), "--nproc_per_node", ranks],
    }
    words = [*starts[options.launcher], str(ROOT / "launchers/pretrain.py"), "--train_steps", str(steps)]
    words += ["--ds_config", str(ROOT / "ds_configs/zero2.json"), "--config", str(folder / "small.yaml")]
    return [*words, "--data", str(folder / "text.txt"), "--run_dir", str(run_dir)]


def recover(folder: Path, number: int, options: argparse.Namespace) -> tuple[float, float]:
    """Resume a copy of the run: seconds of the clock and of the processor until its first new step is written."""
    run_dir, mark = folder / f"run-{number}", uuid.uuid4().hex
    shutil.copytree(folder / "run", run_dir)
    (run_dir / "summary.json").unlink()
    words, started = command(folder, run_dir, options, ENOUGH), time.perf_counter()
    process = subprocess.Popen(words, env=environment(mark), stdout=QUIET, stderr=QUIET)
    try:
        while newest_step(run_dir) <= SAVED:
            if process.poll() is not None:
                sys.exit(f"the run ended with {process.returncode}: {' '.join(words)}")
            time.sleep(0.02)
        return time.perf_counter() - started, busy_seconds(mark)
    finally:
        for pid in processes(mark):
            os.kill(pid, 9)
        process.wait()


def newest_step(run_dir: Path) -> int:
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return max((int(json.loads(line)["step"]) for line in lines), default=0)


def processes(mark: str) -> list[int]:
    """Processes whose environment bears the mark."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:  # it ended, or is somebody else's
            continue
    return found


def busy_seconds(mark: str) -> float:
    """Processor time, user and system, of the marked processes and of their children that have ended."""
    ticks = 0
    for pid in processes(mark):
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        ticks += sum(int(field) for field in fields[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def environment(mark: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, MARK: mark, "PATH": path, "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
