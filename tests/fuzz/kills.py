"""Kills at random moments: SIGKILL to any process of a training, again and again; the end is as if nothing had been.

    python -m tests.fuzz.kills --kills 100
    python -m tests.fuzz.kills --kills 20 --ranks 2 --seed 7

The real command is started on a tiny model, a process of it (launcher or rank) is killed, 10 s later nothing of it may
live, and the same command is started again. A training that gets to its end is compared with one that nobody disturbed,
bit by bit (files of the last checkpoint, rows of metrics), and the next one begins.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vqmoe_ds.checkpoint.io.store import find_newest, step_of, verify

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
SMALL = f"""
model: {{layers: 2, width: 32, heads: 2, sequence_length: 32}}
moe: {{num_experts: 4, expert_hidden: 32, top_k: 1}}
codebook: {{num_codes: 8, code_map: balanced}}
train: {{steps: {STEPS}, batch_size: 4, warmup_steps: 2}}
run: {{log_every: 1, eval_every: 10, eval_batches: 2, save_every: 3, keep_last: 2, keep_best: true, probe_tokens: 64,
  sample_tokens: 8, peer_timeout: 10}}
"""
TIMES = ("tokens_per_second", "data_share", "save_seconds", "slowest_rank", "step_time_spread", "all_to_all_seconds")
"""Columns of metrics that no two runs share."""
STAGES = {"start": 2, "training": 3, "saving": 4, "closing": 2}
"""How often which part of a life is chosen. In a start most of a life's time passes, in a save next to nothing."""
GRACE = 10.0
"""Seconds after which nothing of a killed training may live."""
SLOW = 300.0
"""Seconds that a life may take."""
MARK = "VQMOE_KILLS"
"""A variable by which the processes of a training are found, whoever their parent is by now."""


class Failure(Exception):
    """What went wrong after a kill."""


@dataclass
class Command:
    """A training in a folder: how it is started, and which processes are of it."""

    folder: Path
    ranks: int
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    process: subprocess.Popen[bytes] = field(init=False)

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def start(self) -> subprocess.Popen[bytes]:
        python, launcher = Path(sys.executable), str(ROOT / "launchers/pretrain.py")
        words = [str(python), launcher]
        if self.ranks > 1:
            words = [str(python.parent / "deepspeed"), "--num_gpus", str(self.ranks)]
            words += ["--master_port", str(_free_port()), launcher]
        words += ["--ds_config", str(ROOT / "ds_configs/zero2.json"), "--config", "../small.yaml"]
        words += ["--data", "../text.txt", "--run_dir", "run"]
        env = {**os.environ, MARK: self.mark, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        env["PATH"] = f"{python.parent}:{env['PATH']}"
        with open(self.folder / "output.txt", "ab") as output:
            self.process = subprocess.Popen(words, cwd=self.folder, env=env, stdout=output, stderr=output)
        return self.process

    def processes(self) -> dict[int, str]:
        """Processes that live (a zombie does not), and what each is."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                environ = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:  # it ended meanwhile
                continue
            if f"{MARK}={self.mark}" in environ:
                found[int(entry.name)] = _kind(words, environ)
        return found

    def newest(self) -> int:
        """Step of the newest whole checkpoint; 0: there is none."""
        path = find_newest(self.run_dir / "checkpoints").path
        return 0 if path is None else step_of(path.name) or 0

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics but for times; a last one that a kill cut short is left out."""
        try:
            lines = (self.run_dir / "metrics.jsonl").read_text().split("\n")[:-1]
        except OSError:
            return []
        return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def _kind(words: list[str], environ: list[str]) -> str:
    if "deepspeed.launcher.launch" in words:
        return "launch.py"
    if any(word.endswith("bin/deepspeed") for word in words):
        return "deepspeed"
    ranks = [item.removeprefix("RANK=") for item in environ if item.startswith("RANK=")]
    return f"rank {ranks[0] if ranks else 0}" if any(word.endswith("pretrain.py") for word in words) else words[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---------------------------------------------------------------- an undisturbed run


@dataclass(frozen=True)
class Reference:
    """What every training has to end with, and how long its parts take."""

    rows: list[dict[str, Any]]
    files: dict[str, Any]
    seconds: dict[str, float]
    """Of ``start``, ``training``, ``saving`` and ``closing``."""


def undisturbed(command: Command) -> Reference:
    """Run the training once without a kill.

    Raises:
        Failure: it did not end with 0.
    """
    marks, process = [time.monotonic()], command.start()
    for reached in (lambda: _steps(command) > 0, lambda: _steps(command) >= STEPS, lambda: False):
        _wait(process, reached)
        marks.append(time.monotonic())
    if process.wait() != 0:
        raise Failure(f"the undisturbed run ended with {process.returncode}; see {command.folder / 'output.txt'}")
    start, training, closing = (after - before for before, after in zip(marks, marks[1:], strict=False))
    seconds = {"start": start, "training": training, "saving": 0.15, "closing": closing}
    return Reference(command.rows(), _last_files(command), seconds)


def _steps(command: Command) -> int:
    return max((row["step"] for row in command.rows()), default=0)


def _last_files(command: Command) -> dict[str, Any]:
    files: dict[str, Any] = verify(command.run_dir / "checkpoints" / f"global_step{STEPS:07d}")["files"]
    return files


def _wait(process: subprocess.Popen[bytes], reached: Callable[[], bool]) -> bool:
    """Wait until something is reached, or the process ends; whether it is reached."""
    deadline = time.monotonic() + SLOW
    while not reached():
        if process.poll() is not None:
            return False
        if time.monotonic() > deadline:
            raise Failure(f"nothing happened for {SLOW:g} s")
        time.sleep(0.005)
    return True


# ---------------------------------------------------------------- a life and its end


def live(command: Command, stage: str, seconds: float, chance: random.Random) -> str | None:
    """Start the command, and kill a process of it in a stage of its life; what was killed, None: it ended before.

    Args:
        seconds: after the stage began.
    """
    before, process = _places(command), command.start()

    def opened() -> bool:  # this life has put its own file of metrics in the place of the last one's
        return any(path.name == "metrics.jsonl" for path, _ in _places(command) - before)

    signs: dict[str, Callable[[], bool]] = {
        "start": lambda: True,
        "training": opened,
        "saving": lambda: any(path.name.startswith(".saving-") for path, _ in _places(command) - before),
        "closing": lambda: opened() and _steps(command) >= STEPS,
        "end": lambda: False,
    }
    if _wait(process, signs[stage]) and _lives(process, seconds) and _wait(process, lambda: bool(command.processes())):
        victims = command.processes()
        pid = chance.choice(sorted(victims))
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, signal.SIGKILL)
            return victims[pid]
    if _lives(process, SLOW):
        raise Failure(f"it did not end within {SLOW:g} s")
    if process.returncode != 0 and not _finished(command):
        raise Failure(f"it ended by itself with {process.returncode}; see {command.folder / 'output.txt'}")
    return None


def _places(command: Command) -> set[tuple[Path, int]]:
    """Metrics and checkpoints, each with what another one of its name would not have."""
    found = set()
    for path in (command.run_dir / "metrics.jsonl", *(command.run_dir / "checkpoints").glob(".saving-*")):
        with contextlib.suppress(OSError):  # it comes and goes
            found.add((path, path.stat().st_ino))
    return found


def _lives(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def _finished(command: Command) -> bool:
    """Whether all that a run leaves is there: the same command then says so, with code 2."""
    return all((command.run_dir / name).exists() for name in ("summary.json", "loss.png", "usage.png"))


def bury(command: Command) -> tuple[float, list[str]]:
    """Wait until nothing of a killed training lives: how long that took, and what did after ``GRACE``, killed then."""
    started = time.monotonic()
    while command.processes() and time.monotonic() < started + GRACE:
        time.sleep(0.1)
        command.process.poll()
    seconds, orphans = time.monotonic() - started, command.processes()
    for pid in orphans:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    command.process.wait()
    return seconds, sorted(orphans.values())


def compare(command: Command, reference: Reference) -> None:
    """Compare what a disturbed training ended with.

    Raises:
        Failure: naming the first difference.
    """
    rows = command.rows()
    if rows != reference.rows:
        at = next((i for i, (a, b) in enumerate(zip(rows, reference.rows, strict=False)) if a != b), "the last")
        raise Failure(f"{len(rows)} rows of metrics instead of {len(reference.rows)}, or other ones from row {at} on")
    if _last_files(command) != reference.files:
        raise Failure("the last checkpoint holds something else")
    if not _finished(command):
        raise Failure("the run ended without its summary or figures")


# ---------------------------------------------------------------- many


def main() -> int:
    options = parse()
    top = Path(tempfile.mkdtemp(prefix="vqmoe-kills-", dir=options.folder))
    (top / "small.yaml").write_text(SMALL)
    (top / "text.txt").write_text("".join(f"{i} little words make {i * i % 97} long stories. " for i in range(900)))
    try:
        reference = undisturbed(_fresh(top, "undisturbed", options.ranks))
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    parts = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in reference.seconds.items())
    print(f"undisturbed: {parts}; seed {options.seed}", flush=True)
    failures = kill_often(top, options, reference)
    if failures:
        print(f"{top} holds the runs")
    else:
        shutil.rmtree(top)
    print(f"kills with {options.ranks} rank(s): {options.kills} tried, {len(failures)} failed")
    return 1 if failures else 0


def kill_often(top: Path, options: argparse.Namespace, reference: Reference) -> list[str]:
    """``options.kills`` kills, in as many trainings as they take, the last of which gets to its end; what failed."""
    chance, failures, lives = random.Random(options.seed), list[str](), Counter[str]()
    trainings, command = 1, _fresh(top, "run-1", options.ranks)
    while True:
        over = sum(lives.values()) >= options.kills
        stage = "end" if over else chance.choices([*STAGES], [*STAGES.values()])[0]
        seconds = 0.0 if over else chance.uniform(0, reference.seconds[stage])
        where = f"in {stage} + {seconds:.2f} s"
        try:
            victim = one_life(command, stage, seconds, chance, reference)
        except Failure as failure:
            victim, where = "FAILED", f"{where}: {failure}"
            failures.append(where)
            bury(command)
        if victim is None and over:
            print(f"stages: {dict(lives)}; trainings: {trainings}", flush=True)
            return failures
        if victim is not None:
            lives[stage] += 1
            print(f"{sum(lives.values())}: {victim} {where}; newest {command.newest()}", flush=True)
        if victim in (None, "FAILED"):  # what a failure leaves is kept, and no later one comes of it
            if victim and over:
                return failures
            trainings += 1
            command = _fresh(top, f"run-{trainings}", options.ranks)


def one_life(command: Command, stage: str, seconds: float, chance: random.Random, reference: Reference) -> str | None:
    """``live``, and what has to be true afterwards.

    Raises:
        Failure: it is not.
    """
    newest = command.newest()
    victim = live(command, stage, seconds, chance)
    lasted, orphans = bury(command)
    if orphans:
        raise Failure(f"{victim} was killed, and {GRACE:g} s later there lived: {', '.join(orphans)}")
    if victim is None:
        compare(command, reference)
    elif command.newest() < newest:
        raise Failure(f"{victim} was killed; checkpoint {newest} had been whole, the newest is {command.newest()}")
    return f"{victim} (gone after {lasted:.1f} s)" if victim else None


def _fresh(top: Path, name: str, ranks: int) -> Command:
    (top / name).mkdir()
    return Command(top / name, ranks)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=1, choices=(1, 2))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where the runs go (default: the system's temporary folder)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
