"""The place of a process from the variables of its launcher: as they set them, alone and one inside another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vqmoe_ds.runtime.errors import ConfigError
from vqmoe_ds.runtime.ranks import FIRST_PORT, PORTS, Place, find_place, likely_rank

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
FAMILIES = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "OMPI_", "PMI", "MPI_", "SLURM_", "CUDA_VISIBLE", "GROUP_RANK")
ADDRESS = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
SRUN = {
    **{
        "SLURM_PROCID": "5",
        "SLURM_STEP_NUM_TASKS": "6",
        "SLURM_NTASKS": "6",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "2",
    },
    **{"SLURM_STEP_TASKS_PER_NODE": "2(x3)", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0"},
    "SLURM_STEP_NODELIST": "alpha",
}
BATCH = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "77", "SLURM_TASKS_PER_NODE": "2(x2)"}
MPIRUN = {
    **{"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"},
    **{"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
}
HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
TORCHRUN = {"RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}


@pytest.fixture
def environ(monkeypatch):
    """Sets exactly these launcher variables."""
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if not k.startswith(FAMILIES)})
    return os.environ.update


CASES = {
    "nobody": ({}, Place(0, 1, 0, 1)),
    "torchrun": (TORCHRUN | ADDRESS, Place(6, 8, 2, 4)),
    "mpirun": (MPIRUN | ADDRESS, Place(3, 4, 1, 2)),
    "hydra": (HYDRA | ADDRESS, Place(2, 4, 0, 2)),
    "srun": (SRUN, Place(5, 6, 1, 2)),
    "srun uneven": (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "3,2(x1),4"}, Place(5, 6, 1, 4)),
    "mpirun in sbatch": (BATCH | {"SLURM_NTASKS": "4"} | MPIRUN | ADDRESS, Place(3, 4, 1, 2)),
    "srun with pmi2": (SRUN | {"PMI_RANK": "5", "PMI_SIZE": "6"}, Place(5, 6, 1, 2)),
    "torchrun in srun": (SRUN | {"SLURM_NTASKS": "2"} | TORCHRUN | ADDRESS, Place(6, 8, 2, 4)),
    "batch script of one task": (BATCH | {"SLURM_NTASKS": "1"}, Place(0, 1, 0, 1)),
}


@pytest.mark.parametrize(("variables", "place"), CASES.values(), ids=CASES)
def test_the_inner_launcher_is_believed(environ, variables, place):
    environ(variables)
    assert find_place() == place
    assert likely_rank() == place.rank
    assert os.environ["RANK"] == str(place.rank) and os.environ["WORLD_SIZE"] == str(place.world_size)
    assert os.environ["LOCAL_SIZE"] == str(place.local_world_size)
    assert find_place() == place, "asked twice it says the same"


def test_srun_ranks_agree_on_a_rendezvous_without_talking(environ):
    environ(SRUN)
    find_place()
    assert os.environ["MASTER_ADDR"] == "alpha"
    first = int(os.environ.pop("MASTER_PORT"))
    assert FIRST_PORT <= first < FIRST_PORT + PORTS
    os.environ.pop("RANK")
    environ({"SLURM_RESTART_COUNT": "1"})
    find_place()
    assert int(os.environ["MASTER_PORT"]) != first, "ranks of the run before may still be dying"


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"RANK": "1"}, "RANK=1 is set, but not WORLD_SIZE"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "not MASTER_ADDR and MASTER_PORT"),
        (TORCHRUN | ADDRESS | {"WORLD_SIZE": "4"}, "this is rank 6 of 4, which cannot be"),
        (TORCHRUN | ADDRESS | {"LOCAL_RANK": "4"}, "this is local rank 4 of 4"),
        (TORCHRUN | ADDRESS | {"RANK": "six"}, "RANK='six' in the environment is not a number"),
        (SRUN | {"WORLD_SIZE": "4"}, "WORLD_SIZE=4 contradicts the 6 ranks that srun started"),
        (BATCH | {"SLURM_NTASKS": "4"}, "SLURM job 77 has 4 tasks, and this process is its batch script: put srun"),
        (SRUN | {"SLURM_STEP_NODELIST": "a[1-3]", "PATH": ""}, "first host of a[1-3] is unknown".replace("[", r"\[")),
    ],
)
def test_contradictions_are_one_sentence(environ, variables, sentence):
    environ(variables)
    with pytest.raises(ConfigError, match=sentence):
        find_place()


@pytest.mark.parametrize("variables", [{"RANK": "3"}, TORCHRUN | ADDRESS | {"RANK": "1", "WORLD_SIZE": "1"}])
def test_a_rank_that_may_be_alone_speaks_for_itself(environ, variables):
    environ(variables)
    with pytest.raises(ConfigError) as caught:
        find_place()
    assert caught.value.local


@pytest.mark.parametrize("port", ["tcp://10.0.0.1:29500", "0", "65536", "-1", "1e3", "9" * 5000, "٣", "29500 "])
def test_a_port_that_is_none_is_no_reason_to_try_again(environ, port):
    environ(ADDRESS | {"MASTER_PORT": port})
    with pytest.raises(ConfigError, match="is not a port .*set it to a free port of rank 0"):
        find_place()


@pytest.mark.parametrize("address", ["tcp://10.0.0.1", "a b", "x" * 300, "hôte"])
def test_an_address_that_is_none_is_one_short_sentence(environ, address):
    environ(ADDRESS | {"MASTER_ADDR": address})
    with pytest.raises(ConfigError, match="is not a host") as caught:
        find_place()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("value", ["", "x", "-1", "1" * 5000, "1(x99999999999)", "٣"])
@pytest.mark.parametrize("name", sorted({*SRUN, "SLURM_RESTART_COUNT"} - {"SLURM_STEP_NODELIST", "SLURM_NTASKS"}))
def test_empty_and_malformed_variables_of_slurm_are_one_sentence_or_unset(environ, name, value):
    environ(SRUN | {name: value})
    try:
        find_place()
    except ConfigError as error:
        assert name in str(error) and len(str(error)) < 400
    else:
        assert value == ""


def test_ranks_of_one_node_meet_on_loopback(environ):
    environ(SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_PROCID": "1"})
    find_place()
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"


def _started_by(*launcher: str) -> list[str]:
    program = ROOT / "tests/runtime/show_place.py"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(FAMILIES)}
    root = {f"{name}_ALLOW_RUN_AS_ROOT{end}": "1" for name in ("OMPI", "PRTE") for end in ("", "_CONFIRM")}
    environment = {**clean, **root, "PATH": f"{BIN}:{clean['PATH']}", "PYTHONPATH": str(ROOT)}
    command = [*launcher, str(program)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert result.returncode == 0, result.stderr
    return sorted(line for line in result.stdout.splitlines() if line.startswith("Place"))


@pytest.mark.parametrize("launcher", ["mpirun", "torchrun"])
def test_real_ranks_find_their_places_and_one_rendezvous(launcher):
    if launcher == "mpirun":
        lines = _started_by(str(BIN / "mpirun"), "--oversubscribe", "-n", "2", sys.executable)
    else:
        lines = _started_by(str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2")
    assert [line.split(" at ")[0] for line in lines] == [str(Place(rank, 2, rank, 2)) for rank in range(2)]
    assert len({line.split(" at ")[1] for line in lines}) == 1
