"""submit.py shows the script it would submit and refuses shapes that cannot work; with no cluster at hand.

What needs a cluster is in tests/cluster.
"""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = ["pretrain", "--ds_config", str(ROOT / "ds_configs/zero2.json"), "--run_dir", "runs/a b"]

FINETUNE = ["finetune", "--checkpoint", str(ROOT), "--task", "sst2", "--run_dir", "x"]


def submit(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launchers/slurm/submit.py"), *arguments]
    environment = {**os.environ, "PATH": "/nowhere"}  # no sinfo, no sbatch
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder, env=environment)


def test_the_dry_run_is_a_whole_script_with_the_options_in_front(tmp_path):
    result = submit("--dry_run", "--nodes", "2", "--tasks_per_node", "4", "--chain", "3", *PRETRAIN, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "#!/bin/bash"
    options = [line for line in lines if line.startswith("#SBATCH")]
    assert "#SBATCH --nodes=2" in options and "#SBATCH --ntasks-per-node=4" in options
    assert sum(option.startswith("#SBATCH --nodes") for option in options) == 1, "its own value is gone"
    assert "#SBATCH --requeue" in options and "export VQMOE_REQUEUE=0" in lines
    assert f"export VQMOE_ROOT={ROOT}" in lines and any("'runs/a b'" in line for line in lines)
    code = [line for line in lines if line and not line.startswith("#")]
    assert code[0].startswith("export"), "sbatch reads options up to the first command only"
    assert lines.index(code[0]) > max(lines.index(option) for option in options)
    subprocess.run(["bash", "-n"], input=result.stdout, text=True, check=True)


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "launchers/slurm").glob("*.s*")))
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", str(ROOT / "launchers/slurm" / script)], check=True)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--nodes", "2", *PRETRAIN, "--ep_size", "4"], "expert-parallel size 4 does not divide the 2 ranks"),
        (["--nodes", "3", *PRETRAIN, "--ep_size", "3"], "batch sizes contradict"),
        (["--gpus_per_node", "8", *PRETRAIN], "--tasks_per_node 1 and --gpus_per_node 8 differ"),
        (
            ["--gpus_per_node", "1", *PRETRAIN, "--set", "moe.expert_hidden=190"],
            "moe.expert_hidden=190 is not a multiple of 8",
        ),
        (["--nodes", "0", *PRETRAIN], "--nodes 0 is too small"),
        (PRETRAIN[:3], "give pretrain a --run_dir"),
        (["finetune", "--checkpoint", "runs/x", "--task", "sst2"], "give finetune a --run_dir"),
        (
            ["finetune", "--checkpoint", "no/run", "--task", "sst2", "--run_dir", "x"],
            "checkpoint no/run does not exist",
        ),
        ([*FINETUNE, "--ep_size", "2"], "--ep_size 2 does not divide the 1 ranks of this job"),
        (["--dry_run", "compare", "grid.yaml", "--out", "x"], "give --array 0-N"),
        (["--chain", "2", "evaluate", "runs/x"], "--chain is for pretrain and finetune, not for evaluate"),
        (["evaluate", "runs/x"], "sbatch is not on this machine"),
        (["--partition", "gpu\ntouch pwned", "evaluate", "x"], "--partition 'gpu\\ntouch pwned' has '\\n' in it"),
        (["--account", "a b", "evaluate", "x"], "--account 'a b' has ' ' in it"),
        (["--time", "1:00'", "evaluate", "x"], """--time "1:00'" has "'" in it"""),
        (["--array", "0-3#", "compare", "x"], "--array '0-3#' has '#' in it"),
        (["--sbatch", "--comment='a\n#SBATCH --exclusive'", "evaluate", "x"], "has '\\n' in it"),
        (["--sbatch", "--mem=1G rm", "evaluate", "x"], "--sbatch: 'rm' is not an option"),
        (["--sbatch=--comment='", "evaluate", "x"], "cannot be split into options (No closing quotation)"),
        (["evaluate", "runs/x\n#SBATCH --exclusive"], "has a line break or another character that is not text"),
        (["evaluate", "runs/\udcff"], "has a line break or another character that is not text"),
    ],
)
def test_what_cannot_work_is_refused_with_one_sentence(tmp_path, arguments, sentence):
    result = submit(*arguments, folder=tmp_path)
    assert result.returncode == 2
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_job_for_gpus_may_ask_for_what_the_login_node_cannot_run(tmp_path):
    (tmp_path / "lamb.json").write_text('{"train_batch_size": 16, "optimizer": {"type": "Lamb"}}')
    job = ["pretrain", "--ds_config", "lamb.json", "--run_dir", "x"]
    job += ["--set", "codebook.birth_step=1"]
    result = submit("--dry_run", "--gpus_per_node", "1", *job, folder=tmp_path)
    assert result.returncode == 0
    assert result.stderr == "codebook.birth_step is deprecated: write codebook.init_step\n"


# ------------------------------------------------------------------ hostile words

FAKE_SBATCH = (
    '#!/bin/sh\ncat > "$RECORDS/script"\nfor word; do printf "%s\\0" "$word"; done > "$RECORDS/sbatch"\necho 7\n'
)
FAKE_SRUN = '#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done > "$RECORDS/srun"\n'
BAITS = [
    *(
        "\n",
        "\r",
        "\n#SBATCH --exclusive\n",
        "\ntouch pwned\n",
        "'",
        '"',
        "`touch pwned`",
        "$(touch pwned)",
        "${IFS}",
        "\\",
    ),
    *(
        ";touch pwned;",
        "|touch pwned",
        "&touch pwned&",
        "'; touch pwned; '",
        '"; touch pwned; "',
        "#",
        "!",
        "*",
        "~",
        "\t",
    ),
    *(
        "\x1b[2J",
        "\x7f",
        "\u2028",
        "\x85",
        "\udcff",
        "é",
        " ",
        "a",
        "=",
        "-",
        "--",
        "%",
        "<in",
        ">pwned",
        "(",
        ")",
        "EOF",
    ),
]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with an sbatch and an srun that write down what they are given."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("sbatch", FAKE_SBATCH), ("srun", FAKE_SRUN)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("RECORDS", str(tmp_path))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.fixture(scope="module")
def launcher() -> ModuleType:
    spec = importlib.util.spec_from_file_location("submit", ROOT / "launchers/slurm/submit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_sbatch_that_does_not_answer_may_have_submitted(cluster, launcher, monkeypatch, capsys):
    monkeypatch.setattr(launcher, "SECONDS", 0.2)
    (cluster / "programs/sbatch").write_text("#!/bin/sh\nexec sleep 10\n")
    assert launcher.main(["evaluate", "runs/x"]) == 2
    assert "sbatch gave no answer within 0.2 s; look with squeue whether the job" in capsys.readouterr().err


def _words(path: Path) -> list[str]:
    return path.read_bytes().decode(errors="surrogateescape").split("\0")[:-1]


def _hostile(rng: random.Random, good: str) -> str:
    """A good value, or a bait in it."""
    if rng.random() < 0.6:
        return good
    return good[: rng.randint(0, len(good))] + "".join(rng.choices(BAITS, k=rng.randint(1, 3)))


def _command(rng: random.Random) -> tuple[list[str], list[str]]:
    """Options of submit.py, and what its launcher is to be given."""
    options = {"--partition": "gpu", "--account": "me", "--time": "01:00:00", "--sbatch": "--mem=1G --comment=x"}
    chosen = [word for name, good in options.items() if rng.random() < 0.6 for word in (name, _hostile(rng, good))]
    rest = [_hostile(rng, "runs/x") for _ in range(rng.randint(1, 3))]
    if rng.random() < 0.2:
        rest = [*PRETRAIN[1:-1], rest[0]]
        return [*chosen, "pretrain"], rest
    return [*chosen, "evaluate"], rest


def test_no_word_becomes_a_line_of_the_script(cluster, launcher, capsys):
    """200 commands: refused in a sentence, or the ranks get their words and sbatch its options, as they were given."""
    rng, accepted = random.Random(15), 0
    for _ in range(200):
        options, rest = _command(rng)
        try:
            code = launcher.main([*options, *rest])
        except SystemExit as exit:  # of argparse, which takes a word for an option that it does not know
            code = exit.code
        error = capsys.readouterr().err
        if code:
            assert code == 2 and error.rstrip("\n").split("\n")[-1].isprintable(), error
            continue
        accepted += 1
        _check_script((cluster / "script").read_text(), options, launcher)
        environment = {**os.environ, "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "1", "SLURM_JOB_ID": "7"}
        subprocess.run(["bash", "-n", str(cluster / "script")], check=True)
        done = subprocess.run(["bash", str(cluster / "script")], env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        started = _words(cluster / "srun")
        assert started[started.index("python") + 2 :] == rest
        assert list((cluster / "work").rglob("pwned")) == []
    assert 40 < accepted < 160, "some of both"


def _check_script(script: str, options: list[str], launcher: ModuleType) -> None:
    """It is that of a job without any options but for one #SBATCH line for each, and the words of the launcher."""
    job = options[-1]
    own = (ROOT / "launchers/slurm" / launcher.JOBS[job]).read_text().splitlines()
    lines = script.splitlines()
    code = [line for line in lines if not line.startswith(("#", "set -- ", "export VQMOE_ROOT="))]
    assert code == [line for line in own if not line.startswith("#")]
    given = dict(zip(options[:-1:2], options[1:-1:2], strict=True))
    sbatch = given.pop("--sbatch", "").split()
    expected = {*(f"#SBATCH {name}={value}" for name, value in given.items()), *(f"#SBATCH {word}" for word in sbatch)}
    found = {line for line in lines if line.startswith("#SBATCH")}
    assert expected <= found
    names = {line.split("=")[0] for line in found - expected}
    ours = {
        "#SBATCH --nodes",
        "#SBATCH --ntasks-per-node",
        "#SBATCH --cpus-per-task",
        "#SBATCH --signal",
        "#SBATCH --time",
    }
    assert names <= ours | {line.split("=")[0] for line in own if line.startswith("#SBATCH")}


@pytest.mark.parametrize(
    ("options", "cpus"),
    [
        (["--tasks_per_node", "4", "--gpus_per_node", "4"], 16),  # half of the GPUs, and half of the CPUs
        (["--tasks_per_node", "8", "--gpus_per_node", "8"], 16),
        (["--tasks_per_node", "8", "--gpus_per_node", "8", "--cpus_per_task", "3"], 3),
        (["--tasks_per_node", "8"], 1),
    ],
)
def test_a_task_with_a_gpu_gets_its_share_of_the_nodes_cpus(options, cpus, cluster, launcher, capsys):
    sinfo = cluster / "programs/sinfo"
    sinfo.write_text('#!/bin/sh\ncase "$*" in *%P*) echo "main*" ;; *) echo "main|4|128|gpu:h100:8(S:0-1)"; ;; esac\n')
    sinfo.chmod(0o755)
    data = cluster / "text.txt"
    data.write_text("words " * 5000)
    job = ["pretrain", "--data", str(data), "--run_dir", "run"]
    job += ["--ds_config", str(ROOT / "ds_configs/zero2.json"), "--set", "train.batch_size=16"]
    assert launcher.main([*options, "--dry_run", *job]) == 0
    assert f"#SBATCH --cpus-per-task={cpus}\n" in capsys.readouterr().out
