"""The launcher as its users run it: real processes, real signals, real damage."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import warm
from tests.distributed import _free_port

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = [sys.executable, str(ROOT / "launchers/pretrain.py")]
SMALL = """
model: {layers: 2, width: 32, heads: 2, sequence_length: 32}
moe: {num_experts: 4, expert_hidden: 32, top_k: 1}
codebook: {num_codes: 8, code_map: balanced}
train: {steps: 12, batch_size: 4, warmup_steps: 2}
run: {log_every: 1, eval_every: 5, eval_batches: 2, save_every: 4, keep_last: 2, probe_tokens: 64, sample_tokens: 8}
"""


def environment() -> dict[str, str]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    clean = {k: v for k, v in os.environ.items() if k not in names}
    return {**clean, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{clean['PATH']}"}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> list[str]:
    """Arguments of a run of seconds on 40 kB of text."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "small.yaml").write_text(SMALL)
    (folder / "text.txt").write_text("".join(f"{i} little words make {i * i % 97} long stories. " for i in range(900)))
    arguments = ["--ds_config", str(ROOT / "ds_configs/zero2.json"), "--config", str(folder / "small.yaml")]
    return [*arguments, "--data", str(folder / "text.txt")]


def run(arguments: list[str], launcher: list[str] | None = None, timeout: float = 120, cold: bool = False, **kwargs):
    """Run a launcher to its end; ``cold``: in a new interpreter, as every launch by another program than Python is."""
    command = [*(launcher or LAUNCHER), *arguments]
    start = subprocess.run if cold or command[0] != sys.executable else warm.run
    return start(command, capture_output=True, text=True, timeout=timeout, env=environment(), **kwargs)


def losses(run_dir: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """One run that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    result = run([*small, "--run_dir", str(run_dir)], cold=True)
    assert result.returncode == 0, result.stderr
    return run_dir, result


def test_the_run_folder_holds_what_the_docs_promise(finished):
    run_dir, result = finished
    names = {path.name for path in run_dir.iterdir()}
    promised = "config.yaml ds_config.json metrics.jsonl summary.json loss.png usage.png checkpoints tensorboard logs"
    assert set(promised.split()) <= names
    row = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-2])
    assert {"step", "loss", "bits_per_byte", "tokens_per_second", "code_perplexity", "busiest_expert"} <= set(row)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["steps"] == 12
    assert 0 < summary["validation_bits_per_byte"] < 9
    assert "--- sample ---" in result.stdout
    assert list((run_dir / "tensorboard").glob("events*"))
    assert sorted(p.name for p in (run_dir / "checkpoints").glob("global*")) == [
        "global_step0000008",
        "global_step0000012",
    ]


def test_the_screen_shows_one_plain_line_an_interval_and_no_chatter(finished):
    _, result = finished
    lines = result.stdout.splitlines()
    assert sum(line.startswith("step ") and "tokens/s" in line for line in lines) == 12
    assert result.stderr == ""
    assert not any(word in result.stdout for word in ("WARNING", "INFO", "Traceback", "Warning"))


def test_the_loss_falls(finished):
    values = losses(finished[0])
    assert values[12] < values[1] - 0.5


def test_killed_in_the_middle_it_goes_on_bit_identically_from_the_newest_whole_checkpoint(small, finished, tmp_path):
    run_dir = tmp_path / "run"
    arguments = [*small, "--run_dir", str(run_dir), "--set", "run.keep_last=0"]
    process = warm.Popen([*LAUNCHER, *arguments], stdout=subprocess.DEVNULL, env=environment())
    _wait_for(lambda: (run_dir / "checkpoints/global_step0000008/manifest.json").exists(), process)
    process.kill()
    process.wait()
    damaged = next((run_dir / "checkpoints/global_step0000008").glob("zero_pp_rank*"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (run_dir / "checkpoints/global_step0000012").mkdir(exist_ok=True)  # as a kill inside a save leaves it
    for manifest in (run_dir / "checkpoints/global_step0000012").glob("manifest.json"):
        manifest.unlink()
    result = run(arguments)
    assert result.returncode == 0, result.stderr
    assert "passed over:" in result.stdout
    assert "never finished" in result.stdout
    assert "bytes instead of" in result.stdout
    assert "global_step0000004 at step 4" in result.stdout
    assert losses(run_dir) == losses(finished[0])


def test_a_folder_of_damaged_checkpoints_stops_the_run_which_leaves_it_as_it_is(small, finished, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished[0] / "checkpoints", run_dir / "checkpoints")
    damaged = [next(tag.glob("zero_pp_rank*")) for tag in (run_dir / "checkpoints").glob("global_step*")]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    before = {path: path.stat().st_mtime_ns for path in (run_dir / "checkpoints").rglob("*")}
    result = run([*small, "--run_dir", str(run_dir)])
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    for part in ("global_step0000012, global_step0000008", "does not match its checksum", "--resume never"):
        assert part in result.stderr
    assert {path: path.stat().st_mtime_ns for path in (run_dir / "checkpoints").rglob("*")} == before
    anew = ["--run_dir", str(tmp_path / "anew"), "--resume", "never", "--train_steps", "2"]
    assert run([*small, *anew]).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_finishes_the_step_saves_and_exits_75(small, finished, tmp_path, number):
    run_dir = tmp_path / "run"
    arguments = [*small, "--run_dir", str(run_dir)]
    start = subprocess.Popen if number == signal.SIGTERM else warm.Popen
    process = start([*LAUNCHER, *arguments], stdout=subprocess.PIPE, text=True, env=environment())
    _wait_for(lambda: (run_dir / "metrics.jsonl").exists() and len(losses(run_dir)) >= 2, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert f"stopped by {signal.Signals(number).name} after step" in output
    assert not (run_dir / "summary.json").exists()
    if number == signal.SIGTERM:
        assert run(arguments).returncode == 0
        assert losses(run_dir) == losses(finished[0])


def test_a_full_disk_stops_with_a_sentence_and_leaves_earlier_checkpoints_whole(small, tmp_path):
    from vqmoe_ds.checkpoint.io.store import verify

    run_dir = tmp_path / "run"
    first = run([*small, "--run_dir", str(run_dir), "--train_steps", "4"])
    assert first.returncode == 0, first.stderr
    limit = 100_000  # the optimizer states are larger, everything else is smaller
    result = run(
        [*small, "--run_dir", str(run_dir)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert result.returncode == 3, result.stderr
    assert "could not be written" in result.stderr
    assert verify(run_dir / "checkpoints/global_step0000004")["step"] == 4


def test_a_finished_run_is_not_run_again_and_a_longer_one_goes_on(small, finished, monkeypatch):
    run_dir, _ = finished
    result = run([*small, "--run_dir", str(run_dir)])
    assert result.returncode == 2
    assert "holds a finished run of 12 steps; raise --train_steps" in result.stderr
    monkeypatch.setenv("SLURM_JOB_DEPENDENCY", "afterok:7(unfulfilled)")
    left = run([*small, "--run_dir", str(run_dir)])
    assert (left.returncode, left.stdout) == (0, f"{run_dir} is finished: nothing is left for this job of the chain\n")


def test_the_configuration_of_a_run_names_the_folder_that_was_free(small, tmp_path):
    (tmp_path / "runs/pretrain").mkdir(parents=True)
    (tmp_path / "runs/pretrain/summary.json").write_text('{"steps": 12}')
    result = run([*small, "--train_steps", "2"], cwd=tmp_path)
    assert result.returncode == 0 and "run folder: runs/pretrain-2" in result.stdout, result.stderr
    again = run([*small[:2], "--config", "runs/pretrain-2/config.yaml"], cwd=tmp_path)
    assert "run folder runs/pretrain-2 holds a finished run of 2 steps" in again.stderr


def test_a_checkpoint_of_another_model_is_refused_by_naming_the_field(small, finished):
    run_dir, _ = finished
    result = run([*small, "--run_dir", str(run_dir), "--train_steps", "14", "--set", "moe.expert_hidden=48"])
    assert result.returncode == 2
    assert "moe.expert_hidden=32 there, 48 here" in result.stderr


def test_other_text_at_the_same_place_is_refused_unless_it_is_meant(small, finished, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished[0], run_dir)
    other = tmp_path / "text.txt"
    other.write_text(Path(small[-1]).read_text().replace("little", "LITTLE"))
    arguments = [*small[:-1], str(other), "--run_dir", str(run_dir), "--train_steps", "13"]
    result = run(arguments)
    assert result.returncode == 2, result.stderr
    assert "was trained with other inputs (changed: held-out text, training text)" in result.stderr
    assert "--allow_changed_data" in result.stderr and result.stderr.count("\n") == 1
    split = [*small, *arguments[len(small) :], "--set", "data.holdout_every=5"]
    result = run(split)
    assert result.returncode == 2 and "(changed: share of the text held out (data.holdout_every))" in result.stderr
    result = run([*arguments, "--allow_changed_data", "--seed", "7", "--set", "train.weight_decay=0.2"])
    assert result.returncode == 0, result.stderr
    assert "not what global_step0000012 was trained with" in result.stdout
    assert "goes on with train.weight_decay=0.2 (0.1 before), train.seed=7 (1234 before)" in result.stdout
    assert "the finished run of 12 steps goes on to 13: its learning rate goes from" in result.stdout


def test_two_ranks_through_the_deepspeed_launcher_with_expert_parallelism(small, tmp_path):
    run_dir = tmp_path / "run"
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", str(_free_port())]
    arguments = [*small, "--run_dir", str(run_dir), "--ep_size", "2", "--train_steps", "6"]
    arguments += ["--set", "run.keep_best=true", "--set", "run.eval_every=3", "--set", "run.save_every=2"]
    arguments += ["--set", "run.keep_last=1"]
    result = run(arguments, [*launcher, str(ROOT / "launchers/pretrain.py")])
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads((run_dir / "summary.json").read_text())["layout"]["ep_size"] == 2
    assert (run_dir / "logs/rank1.log").exists()
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(row["slowest_rank"] in (0, 1) and row["all_to_all_bytes"] > 0 for row in rows if "loss" in row)
    assert result.stdout.count("health: slowest rank") == 6
    tags = sorted(path.name for path in (run_dir / "checkpoints").glob("global*"))
    assert tags == ["global_step0000003", "global_step0000006"], "the best validation so far, and the newest"


def test_bad_input_of_two_ranks_is_one_sentence_of_rank_0(small):
    command, pipe = [*LAUNCHER, *small, "--ep_size", "3"], subprocess.PIPE
    ranks = warm.start_ranks(2, command, _free_port(), environment(), stdout=pipe, stderr=pipe, text=True)
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert "".join(said).count("error:") == 1, "one sentence, on rank 0 only"
    assert "expert-parallel size 3 does not divide the 2 ranks" in said[0]


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (["--data", "/nowhere/text"], "data path /nowhere/text does not exist"),
        (["--set", "moe.num_expert=4"], "did you mean moe.num_experts?"),
        (["--preset", "tinny"], "did you mean tiny?"),
        (["--ds_config", "/nowhere.json"], "/nowhere.json cannot be read"),
        (["--ep_size", "2"], "does not divide the 1 ranks"),
        (["--sp_size", "2"], "sequence-parallel size 2 does not divide the 1 ranks"),
        (["--set", "model.sequence_length=30000"], "fewer than"),
        (["--set", "data.tokenizer=nowhere"], "tokenizer nowhere does not exist"),
        (["--run_dir", "x" * 300, "--resume", "never"], "a folder of the run cannot be made: [Errno 36] File name too"),
        (["--set", "data.max_tokens=9"], "data.max_tokens=9 is of text that is prepared when a pretraining starts"),
    ],
)
def test_bad_input_is_answered_at_once_with_one_sentence(small, tmp_path, extra, sentence):
    started = time.monotonic()
    result = run([*small, "--run_dir", str(tmp_path / "run"), *extra], cold=extra[0] == "--data")
    assert result.returncode == 2
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert time.monotonic() - started < 15, "no heavy import before the check"


def test_print_config_shows_what_would_run_and_stops(small, tmp_path):
    result = run([*small, "--run_dir", str(tmp_path / "run"), "--print_config"])
    assert result.returncode == 0
    assert "num_codes: 8" in result.stdout
    assert '"train_batch_size": 4' in result.stdout
    assert not (tmp_path / "run").exists()


def test_a_reader_of_print_config_that_leaves_is_no_error(small):
    reading, writing = os.pipe()
    os.close(reading)
    process = warm.Popen([*LAUNCHER, *small, "--print_config"], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (process.communicate(timeout=60)[1], process.returncode) == ("", 0)


def _wait_for(condition, process, timeout: float = 90) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, "the run ended before it was disturbed"
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.02)
