"""The evaluation as its users start it: on a real run, on two ranks, killed, and with input that cannot work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import warm
from tests.launchers.test_pretrain import ROOT, SMALL, _free_port, _wait_for, environment, run

LAUNCHER = [sys.executable, str(ROOT / "launchers/evaluate.py")]
DAMAGE = ["--corrupt", "word_swap", "--corrupt", "char_noise:0.1", "--seeds", "2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of seconds on 40 kB of text."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "small.yaml").write_text(SMALL)
    (folder / "text.txt").write_text("".join(f"{i} little words make {i * i % 97} long stories. " for i in range(900)))
    arguments = ["--ds_config", str(ROOT / "ds_configs/zero2.json"), "--config", str(folder / "small.yaml")]
    result = run([*arguments, "--data", str(folder / "text.txt"), "--run_dir", str(folder / "run")])
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def scored(finished) -> tuple[str, dict]:
    """What one process shows and writes about the run's own held-out text."""
    arguments = [str(finished / "run"), "--stride", "32", *DAMAGE, "--json", str(finished / "one.json")]
    arguments += ["--shift", str(finished / "small.yaml")]
    result = run(arguments, LAUNCHER, cold=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout, json.loads((finished / "one.json").read_text())


def test_windows_as_long_as_the_context_give_the_trainers_own_validation(finished, scored):
    output, figures = scored
    summary = json.loads((finished / "run/summary.json").read_text())
    assert figures["clean"]["bits_per_byte"] == pytest.approx(summary["validation_bits_per_byte"], rel=1e-6)
    assert figures["model"]["step"] == 12 and figures["setting"]["stride"] == figures["setting"]["context"] == 32
    assert [(row["kind"], row["rate"], row["mode"]) for row in figures["corrupted"]] == [
        (kind, rate, mode)
        for kind, rate in (("word_swap", 0.025), ("char_noise", 0.1))
        for mode in ("inputs", "inputs_and_targets")
    ]
    lines = output.splitlines()
    assert f"{figures['clean']['bits_per_byte']:.4f}" in next(line for line in lines if line.startswith("clean"))
    (shifted,) = figures["shifted"]
    assert shifted["bytes"] == (finished / "small.yaml").stat().st_size - 1, "all of a raw text that is named"
    assert f"{shifted['bits_per_byte_rise']:+.4f}" in next(line for line in lines if "small.yaml" in line)
    assert "char_noise 0.1, inputs and targets" in output and "±" in output and "one.json" in lines[-1]
    assert not list(finished.glob(".*.tmp"))


@pytest.mark.parametrize("sharing", [[], ["--sp_size", "2"]], ids=["experts", "experts and windows"])
def test_two_ranks_with_half_the_experts_each_give_the_same_figures(finished, scored, sharing):
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", str(_free_port())]
    command += [LAUNCHER[1], str(finished / "run"), "--ep_size", "2", *sharing, "--stride", "32", *DAMAGE]
    result = subprocess.run(
        [*command, "--json", str(finished / "two.json")],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("\nclean ") == 1, "one rank speaks"
    two = json.loads((finished / "two.json").read_text())
    assert two["setting"] == scored[1]["setting"]
    for ours, theirs in zip([two["clean"], *_means(two)], [scored[1]["clean"], *_means(scored[1])], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


def _means(figures: dict) -> list[dict]:
    return [{k: v for k, v in row["mean"].items() if v is not None} for row in figures["corrupted"]]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75)])
def test_a_killed_evaluation_leaves_no_half_file(finished, tmp_path, number, code):
    arguments = [str(finished / "run"), "--corruptions", "all", "--seeds", "300", "--json", str(tmp_path / "out.json")]
    place = {**environment(), "TMPDIR": str(tmp_path)}
    process = warm.Popen([*LAUNCHER, *arguments], stdout=subprocess.DEVNULL, env=place)
    _wait_for(lambda: bool(list(tmp_path.glob("vqmoe_evaluate_*.log"))), process)
    time.sleep(2.5)
    assert process.poll() is None
    process.send_signal(number)
    assert process.wait() == code
    assert not [path.name for path in tmp_path.iterdir() if "out" in path.name]
    assert len(list(tmp_path.glob("vqmoe_evaluate_*.log"))) == (number == signal.SIGKILL)


def test_without_a_killed_rank_the_others_leave_and_name_it(finished):
    arguments = [*LAUNCHER, str(finished / "run"), "--corruptions", "all", "--seeds", "300", "--peer_timeout", "2"]
    pipe = subprocess.PIPE
    ranks = warm.start_ranks(2, arguments, _free_port(), environment(), stdout=pipe, stderr=pipe, text=True)
    try:
        assert ranks[0].stdout.readline().startswith("2 ranks score "), ranks[0].communicate()
        ranks[1].kill()
        started = time.monotonic()
        _, said = ranks[0].communicate(timeout=30)
        assert time.monotonic() - started < 10
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert ranks[0].returncode == 76
    assert said.startswith(f"error: rank 1 on {os.uname().nodename} is missing (its process ended)")
    assert said.endswith("; the others leave; start it again\n") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["missing"], "checkpoint missing does not exist; give a run folder or a checkpoint"),
        (["run", "--corrupt", "typos"], "the kind 'typos' is unknown; known are word_swap,"),
        (["run", "--corrupt", "word_drop:2"], "the rate '2' is not a number from 0 to 1"),
        (["run", "--stride", "0"], "--stride 0 is too small; the least is 1"),
        (["run", "--peer_timeout", "0"], "--peer_timeout 0 is too small; give seconds, such as 120"),
        (["run", "--ep_size", "2"], "--ep_size 2 does not divide the 1 rank(s)"),
        (["run", "--sp_size", "2"], "--sp_size 2 does not divide the 1 rank(s)"),
        (["run", "--json", "no/such/folder.json"], "--json no/such/folder.json lies in no folder that exists"),
        (["run", "--stride", "33"], "--stride 33 must lie between 1 and the model's context of 32 tokens"),
    ],
)
def test_bad_input_is_one_sentence(finished, arguments, sentence):
    result = run(arguments, LAUNCHER, cwd=finished)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ") and sentence in result.stderr
    assert result.stderr.count("\n") == 1 and result.stdout == ""
