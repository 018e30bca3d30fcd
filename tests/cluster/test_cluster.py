"""The launchers on a real SLURM cluster of virtual nodes: what users do, and what happens to them.

``make test-cluster`` runs this file; it needs root and Debian's SLURM (``cluster.sh`` says what is missing).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vqmoe_ds.checkpoint.io.store import tag_name

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = str(Path(__file__).with_name("cluster.sh"))
SCRIPTS = ROOT / "launchers/slurm"
SMALL = """
model: {layers: 2, width: 32, heads: 2, sequence_length: 32}
moe: {num_experts: 4, expert_hidden: 32, top_k: 1}
codebook: {num_codes: 8, code_map: balanced}
train: {steps: 12, batch_size: 4, warmup_steps: 2}
run: {log_every: 1, eval_every: 0, eval_batches: 2, save_every: 50, probe_tokens: 64, sample_tokens: 0, peer_timeout: 5,
  start_timeout: 60}
"""
TRAINING = ["--ds_config", str(ROOT / "ds_configs/zero2.json"), "--config", "small.yaml", "--data", "text.txt"]
LONG = ["--train_steps", "3000", "--set", "run.save_every=25", "--set", "run.log_every=25"]
"""A run that does not end while something happens to it."""
STEPS, MIDDLE = 60, 45
"""Of a run that ends, but not before something happened to it; and where it saves on its way."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


class Cluster:
    """Commands on the login node, from a folder of the user's."""

    def __init__(self, home: Path) -> None:
        self.home = home
        names = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "OMPI_", "PMI")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(names)}
        root = {f"{name}_ALLOW_RUN_AS_ROOT{end}": "1" for name in ("OMPI", "PRTE") for end in ("", "_CONFIRM")}
        venv = Path(sys.executable).parent.parent
        self.environ = {**clean, **root, "VQMOE_VENV": str(venv), "VQMOE_WAIT": "8", "OMP_NUM_THREADS": "1"}
        self.environ["PATH"] = f"{venv / 'bin'}:{clean['PATH']}"

    def run(self, *command: str | Path, node: str = "head", **environ: str) -> subprocess.CompletedProcess[str]:
        words, environ = [CLUSTER, "on", node, *map(str, command)], self.environ | environ
        return subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=self.home, env=environ)

    def sbatch(self, *command: str | Path, **environ: str) -> str:
        result = self.run("sbatch", "--parsable", "--output=%x-%j.out", *command, **environ)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def pretrain(self, run_dir: str, *more: str, options: tuple[str, ...] = ("--nodes=2",), **environ: str) -> str:
        """Submit a small run; relative paths refer to the user's folder."""
        command = [*options, SCRIPTS / "pretrain.sbatch", *TRAINING, "--run_dir", run_dir, *more]
        return self.sbatch(*command, **environ)

    def finetune(self, run_dir: str, checkpoint: str) -> str:
        """Submit a small fine-tuning over two nodes."""
        options = ("--train_steps", str(STEPS), "--set", "run.log_every=1", "--set", "finetune.patience=0")
        command = ["--nodes=2", SCRIPTS / "finetune.sbatch", "--checkpoint", checkpoint, "--task", "labelled"]
        return self.sbatch(*command, "--run_dir", run_dir, *options)

    def state(self, job: str, field: str = "JobState") -> str:
        found = re.search(rf"{field}=(\S+)", self.run("scontrol", "show", "job", job).stdout)
        return found.group(1) if found else ""

    def output(self, job: str) -> str:
        return "".join(path.read_text() for path in sorted(self.home.glob(f"*-{job}.out")))

    def wait(self, what: Callable[[], object], job: str, seconds: float = 100) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, f"{self.state(job)}: {self.output(job)}"
            time.sleep(0.2)

    def ended(self, job: str, seconds: float = 100) -> str:
        """The final state of a job."""
        final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait(lambda: self.state(job) in final, job, seconds)
        return self.state(job)

    def cancel(self, job: str) -> None:
        self.run("scancel", job)
        assert self.ended(job, 60) == "CANCELLED", "it may not requeue itself"

    def steps(self, run_dir: str) -> dict[int, float]:
        path = self.home / run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        return {row["step"]: row["loss"] for row in rows if "loss" in row}

    def process(self, run_dir: str, rank: int) -> int:
        """Process id of a rank, known by the log file it holds open."""
        log = str(self.home / run_dir / "logs" / f"rank{rank}.log")
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(entry / "fd/1") == log:
                    return int(entry.name)
            except OSError:
                continue
        raise AssertionError(f"no process writes {log}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if "VQMOE_TEST_CLUSTER" not in os.environ:
        pytest.skip("make test-cluster runs it, and may install SLURM")
    try:
        # It goes down with this process as well, should that be killed.
        up = subprocess.run([CLUSTER, "up", str(os.getpid())], capture_output=True, text=True, timeout=250)
        if up.returncode == 2:
            pytest.skip(up.stderr.strip().splitlines()[-1])
        assert up.returncode == 0, up.stderr
        yield Cluster(_home(tmp_path_factory.mktemp("home") / "my home"))
    finally:
        subprocess.run([CLUSTER, "down"], timeout=60)


def _home(folder: Path) -> Path:
    """The folder of a user with data, and with spaces in paths."""
    folder.mkdir()
    (folder / "small.yaml").write_text(SMALL)
    (folder / "text.txt").write_text("".join(f"{i} little words make {i * i % 97} long stories. " for i in range(900)))
    (folder / "hosts").write_text("node1 slots=2\nnode2 slots=2\n")
    (folder / "my code").symlink_to(ROOT)
    return folder


@pytest.fixture(scope="module")
def finished(cluster: Cluster) -> tuple[str, str]:
    """A run over two nodes that nothing disturbed, and its job."""
    job = cluster.pretrain("finished", "--train_steps", str(STEPS), "--set", f"run.save_every={MIDDLE}")
    assert cluster.ended(job) == "COMPLETED", cluster.output(job)
    return "finished", job


def test_a_job_over_two_nodes_trains_from_the_folder_it_was_submitted_in(cluster, finished):
    run_dir, job = finished
    assert list(cluster.steps(run_dir)) == list(range(1, STEPS + 1))
    assert (cluster.home / run_dir / "logs/rank1.log").exists()
    assert "2 rank(s)" in cluster.output(job)
    assert "health: slowest rank" in cluster.output(job)


def test_the_evaluation_script_scores_it_from_a_repository_with_a_space_in_its_path(cluster, finished):
    script = cluster.home / "my code/launchers/slurm/evaluate.sbatch"
    job = cluster.sbatch("--nodes=2", script, finished[0], "--json", "score.json", "--max_tokens", "300")
    assert cluster.ended(job) == "COMPLETED", cluster.output(job)
    assert json.loads((cluster.home / "score.json").read_text())["model"]["step"] == STEPS
    assert cluster.output(job).startswith(f"2 ranks score {finished[0]}\n")


@pytest.fixture(scope="module")
def tuned(cluster: Cluster, finished: tuple[str, str]) -> tuple[str, str]:
    """A fine-tuning of it over two nodes that nothing disturbed, and its job."""
    (cluster.home / "labelled").mkdir()
    for split, rows in (("train", 64), ("validation", 16), ("test", 16)):
        lines = [f"{i} little words,{'odd' if i % 2 else 'even'}" for i in range(rows)]
        (cluster.home / f"labelled/{split}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    job = cluster.finetune("tuned", finished[0])
    assert cluster.ended(job) == "COMPLETED", cluster.output(job)
    return "tuned", job


def test_the_finetuning_script_makes_a_classifier_of_it(cluster, tuned):
    run_dir, job = tuned
    assert "2 rank(s)" in cluster.output(job)
    assert json.loads((cluster.home / run_dir / "summary.json").read_text())["steps"] == STEPS


def test_a_signalled_finetuning_requeues_itself_and_makes_the_same_classifier(cluster, finished, tuned):
    job = cluster.finetune("tuned, signalled", finished[0])
    cluster.wait(lambda: cluster.steps("tuned, signalled"), job)
    assert cluster.run("scancel", "--signal=USR1", "--batch", job).returncode == 0
    cluster.wait(lambda: cluster.state(job, "Restarts") == "1", job)
    assert cluster.ended(job) == "COMPLETED", cluster.output(job)
    assert "resumed from" in cluster.output(job)
    assert cluster.steps("tuned, signalled") == cluster.steps(tuned[0])
    ours, theirs = (cluster.home / folder / "predictions.csv" for folder in ("tuned, signalled", tuned[0]))
    assert ours.read_text() == theirs.read_text()


@pytest.mark.parametrize("shape", [("--nodes=2", "--ntasks-per-node=2"), ("--nodes=1",)], ids=["4 ranks", "1 rank"])
def test_a_run_submitted_again_on_other_ranks_goes_on_with_the_same_losses(cluster, finished, shape):
    """From what the undisturbed run on two ranks would have left, had it ended after its first checkpoint."""
    run_dir, source = f"on {shape[-1][-1]}", cluster.home / finished[0]
    shutil.copytree(source, cluster.home / run_dir, ignore=shutil.ignore_patterns("summary.json", tag_name(STEPS)))
    (cluster.home / run_dir / "checkpoints/latest").write_text(tag_name(MIDDLE))
    job = cluster.pretrain(run_dir, "--train_steps", str(STEPS), options=shape)
    assert cluster.ended(job) == "COMPLETED", cluster.output(job)
    assert f"at step {MIDDLE}" in cluster.output(job)
    before, after = cluster.steps(finished[0]), cluster.steps(run_dir)
    assert after == pytest.approx(before, rel=1e-3), "data order and model are those of two ranks"
    assert any(after[step] != before[step] for step in range(MIDDLE + 1, STEPS + 1)), "these steps were trained again"


def test_an_array_runs_a_grid_one_run_a_task(cluster):
    settings = {"model.layers": 2, "model.width": 32, "model.heads": 2, "model.sequence_length": 32, "train.steps": 4}
    settings |= {"moe.num_experts": 4, "moe.expert_hidden": 32, "train.batch_size": 4, "run.sample_tokens": 0}
    grid = {"ds_config": str(ROOT / "ds_configs/zero0.json"), "set": settings, "seeds": [1, 2]}
    grid |= {"corpora": {"text": {"data.path": "text.txt"}}, "entries": [{"name": "codes"}]}
    (cluster.home / "grid.yaml").write_text(json.dumps(grid))
    job = cluster.sbatch("--array=0-1", SCRIPTS / "compare_array.sbatch", "grid.yaml", "--out", "grid")
    cluster.wait(lambda: len(list(cluster.home.glob("grid/**/summary.json"))) == 2, job)
    cluster.wait(lambda: not cluster.run("squeue", "-h", "-j", job).stdout.strip(), job)


def _check_places(output: str) -> None:
    """Four ranks on two nodes that would meet."""
    found = re.findall(r"rank=(\d), world_size=(\d), local_rank=(\d), local_world_size=(\d)\) at (\S+)", output)
    assert sorted(row[:4] for row in found) == [(str(r), "4", str(r % 2), "2") for r in range(4)], output
    assert len({row[4] for row in found}) == 1, "one rendezvous"
    assert not found[0][4].startswith(("127.", "localhost")), "that both nodes can reach"


def test_every_launcher_gives_the_ranks_their_places_inside_a_job(cluster):
    show = ROOT / "tests/runtime/show_place.py"
    script = cluster.home / "places.sh"
    script.write_text(
        f"""#!/bin/bash
        export PYTHONPATH={ROOT}
        echo srun; srun -n 4 python {show}
        echo mpirun; mpirun -n 4 python {show}
        echo torchrun; srun -n 2 --ntasks-per-node=1 python {SCRIPTS / "node.py"} --nproc_per_node 2 {show}
        echo none; python {show} 2>&1 | tail -n 1
        """
    )
    job = cluster.sbatch("--nodes=2", "--ntasks-per-node=2", "--job-name=places", script)
    assert cluster.ended(job) == "COMPLETED", cluster.output(job)
    output = cluster.output(job)
    parts = {part.split("\n")[0]: part for part in re.split(r"^(?=srun$|mpirun$|torchrun$|none$)", output, flags=re.M)}
    for launcher in ("srun", "mpirun", "torchrun"):
        _check_places(parts[launcher])
    assert "this process is its batch script: put srun" in parts["none"]


@pytest.mark.parametrize(
    "launcher",
    [
        "deepspeed --hostfile hosts --launcher pdsh",
        "deepspeed --hostfile hosts --launcher openmpi",
        "mpirun --hostfile hosts -n 4 -x PATH -x PYTHONPATH python",
    ],
)
def test_launchers_that_go_by_ssh_from_host_to_host_give_the_ranks_their_places(cluster, launcher):
    result = cluster.run(*launcher.split(), ROOT / "tests/runtime/show_place.py", node="node1", PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    _check_places(result.stdout)


def test_a_signal_before_the_time_limit_saves_and_the_job_requeues_itself_and_goes_on(cluster, finished):
    """With a torchrun on each node, through which signal and exit code have to pass as well."""
    more = ["--train_steps", str(STEPS), "--set", "run.save_every=0"]
    job = cluster.pretrain("signalled", *more, VQMOE_LAUNCH="torchrun")
    cluster.wait(lambda: cluster.steps("signalled"), job)
    assert cluster.run("scancel", "--signal=USR1", "--batch", job).returncode == 0
    cluster.wait(lambda: cluster.state(job, "Restarts") == "1", job)
    assert "stopped by" in cluster.output(job)
    assert cluster.ended(job) == "COMPLETED", cluster.output(job)
    assert "resumed from" in cluster.output(job)
    assert cluster.steps("signalled") == cluster.steps(finished[0]), "the losses of the run that nothing disturbed"


def test_an_unreachable_master_is_one_sentence_after_a_bounded_wait(cluster):
    script = cluster.home / "unreachable.sh"
    script.write_text(
        f"""#!/bin/bash
        export MASTER_ADDR=10.78.0.99 MASTER_PORT=29400
        run="{ROOT / "launchers/pretrain.py"} {" ".join(TRAINING)} --run_dir unreachable"
        srun python $run --set run.start_timeout=3
        """
    )
    job = cluster.sbatch("--nodes=2", "--ntasks-per-node=1", "--job-name=unreachable", script)
    assert cluster.ended(job) == "FAILED"
    assert "rank 1 on node2 cannot reach rank 0 at 10.78.0.99:29400" in cluster.output(job)
    assert "Traceback" not in cluster.output(job)


def test_submit_chains_short_jobs_to_a_long_training(cluster, finished):
    command = [sys.executable, SCRIPTS / "submit.py", "--nodes", "2", "--chain", "3", "--sbatch=--output=%x-%j.out"]
    result = cluster.run(*command, "pretrain", *TRAINING, "--run_dir", "chained", "--train_steps", str(STEPS))
    assert result.returncode == 0, result.stderr
    first, second, third = re.findall(r"submitted job (\d+)", result.stdout)
    cluster.wait(lambda: cluster.steps("chained"), first)
    cluster.run("scancel", "--signal=USR1", "--batch", first)
    assert cluster.ended(first) == "COMPLETED", cluster.output(first)
    assert cluster.ended(second) == "COMPLETED", cluster.output(second)
    assert "resumed from" in cluster.output(second)
    assert cluster.ended(third) == "COMPLETED", cluster.output(third)
    assert "nothing is left for this job of the chain" in cluster.output(third)
    assert cluster.steps("chained") == cluster.steps(finished[0])


@pytest.mark.parametrize(
    ("options", "arguments", "sentence"),
    [
        (["--partition", "gpu"], [], "--partition gpu is not on this cluster; it has main, urgent"),
        (["--nodes", "4"], [], "--nodes 4 is more than the 2 node(s) of partition main"),
        (["--tasks_per_node", "4"], [], "--tasks_per_node 4 with --cpus_per_task 1 needs more than the 2 CPUs"),
        (["--tasks_per_node", "2", "--gpus_per_node", "2"], [], "--gpus_per_node 2: a node of partition main has 0"),
        (["--nodes", "2"], ["--ep_size", "3"], "expert-parallel size 3 does not divide the 2 ranks"),
    ],
)
def test_shapes_that_cannot_work_are_refused_before_they_queue(cluster, options, arguments, sentence):
    base = ["pretrain", "--ds_config", str(ROOT / "ds_configs/zero2.json"), "--run_dir", "refused"]
    result = cluster.run(sys.executable, SCRIPTS / "submit.py", *options, *base, *arguments)
    assert result.returncode == 2
    assert sentence in result.stderr and result.stderr.count("\n") == 1
    assert shutil.which("squeue") and not cluster.run("squeue", "-h", "-n", "vqmoe").stdout.strip()


@pytest.fixture(scope="module")
def long_job(cluster: Cluster) -> Iterator[str]:
    """A training over two nodes in the folder ``long`` that does not end by itself."""
    job = cluster.pretrain("long", *LONG)
    yield job
    cluster.cancel(job)


def _newest(cluster: Cluster, job: str) -> str:
    """Wait for a checkpoint of the present start of the long job; its name."""
    path, restarts = cluster.home / "long/checkpoints/latest", int(cluster.state(job, "Restarts") or 0)
    before = path.read_text() if path.exists() else ""
    cluster.wait(lambda: cluster.output(job).count("; ready in") > restarts, job)
    cluster.wait(lambda: path.exists() and path.read_text() != before, job)
    return path.read_text()


def _goes_on(cluster: Cluster, job: str, tag: str, restarts: int) -> None:
    """The job comes back by itself, from a checkpoint no older than ``tag``."""
    cluster.wait(lambda: int(cluster.state(job, "Restarts")) > restarts, job)
    cluster.wait(lambda: cluster.output(job).count("resumed from") > restarts, job)
    assert re.findall(r"resumed from long/checkpoints/(\S+)", cluster.output(job))[-1] >= tag


def test_two_jobs_on_one_run_folder_are_one_too_many(cluster, long_job):
    _newest(cluster, long_job)
    second = cluster.pretrain("long", *LONG, options=("--nodes=1",))
    assert cluster.ended(second) == "FAILED"
    sentence = rf"error: run folder long is in use by process \d+ on node1 \(SLURM job {long_job}\) since"
    assert re.search(sentence, cluster.output(second)), cluster.output(second)


def test_a_job_of_a_higher_partition_takes_the_nodes_and_the_run_comes_back(cluster, long_job):
    tag, restarts = _newest(cluster, long_job), int(cluster.state(long_job, "Restarts"))
    urgent = cluster.sbatch("--nodes=2", "--exclusive", "--partition=urgent", "--wrap", "sleep 1")
    assert cluster.ended(urgent) == "COMPLETED"
    assert "stopped by" in cluster.output(long_job), "it saved before it went"
    _goes_on(cluster, long_job, tag, restarts)


@pytest.mark.parametrize("fault", ["killed", "stopped", "cut off", "crashed with its node"])
def test_without_a_rank_the_others_name_it_and_the_job_goes_on_from_its_checkpoint(cluster, long_job, fault):
    tag, restarts = _newest(cluster, long_job), int(cluster.state(long_job, "Restarts"))
    said = cluster.output(long_job).count("rank 1 on node2 is missing")
    if fault == "cut off":
        subprocess.run([CLUSTER, "cut", "node2"], check=True)
    elif fault == "crashed with its node":
        subprocess.run([CLUSTER, "crash", "node2"], check=True)
    else:
        os.kill(cluster.process("long", rank=1), signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
    cluster.wait(lambda: cluster.output(long_job).count("rank 1 on node2 is missing") > said, long_job, 30)
    if fault == "cut off":
        subprocess.run([CLUSTER, "join", "node2"], check=True)
    elif fault == "crashed with its node":
        subprocess.run([CLUSTER, "boot", "node2"], check=True)
    _goes_on(cluster, long_job, tag, restarts)
