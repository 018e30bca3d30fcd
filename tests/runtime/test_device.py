"""Which GPU a rank takes, that it is bound before anything communicates, and what is refused before training.

Real processes meet over a real store; GPUs and NCCL are stand-ins.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests import warm
from tests.distributed import _free_port
from tests.fake_gpu import fake_gpus
from tests.launchers.test_pretrain import ROOT, environment, run, small  # noqa: F401 (a fixture)
from vqmoe_ds.runtime.device import (
    Seat,
    bind,
    bind_single,
    choose,
    contradiction,
    make_deterministic,
    memory_errors,
    read_cublas_workspace_once,
    uses_gpu,
    without_cudnn_attention,
)
from vqmoe_ds.runtime.errors import ConfigError
from vqmoe_ds.runtime.ranks import Place

context = multiprocessing.get_context("fork")


@pytest.mark.parametrize(
    ("place", "visible", "number"),
    [
        (Place(0, 1, 0, 1), 1, 0),
        (Place(0, 1, 0, 1), 8, 0),
        (Place(5, 8, 5, 8), 8, 5),
        (Place(13, 16, 5, 8), 8, 5),
        (Place(5, 8, 5, 8), 1, 0),  # each rank sees its own
        (Place(3, 4, 1, 2), 4, 1),
        (Place(13, 16, 5, 16), 8, 5),  # a launcher that does not say how many ranks are here
    ],
)
def test_a_rank_takes_the_gpu_of_its_local_rank_or_the_only_one(place, visible, number):
    assert choose(place, visible) == number


@pytest.mark.parametrize(
    ("visible", "sentence"),
    [(2, "4 rank.s. run on .*, and rank 3 sees 2 GPUs .*start at most 2"), (0, "asks for a GPU, and rank 3 sees none")],
)
def test_fewer_gpus_than_ranks_are_refused(visible, sentence):
    with pytest.raises(ConfigError, match=sentence):
        choose(Place(3, 4, 3, 4), visible)


def test_deepspeeds_choice_of_a_processor_is_followed(monkeypatch):
    assert not uses_gpu(), "tests set DS_ACCELERATOR=cpu"
    with fake_gpus(1):
        assert uses_gpu()
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        assert not uses_gpu()
        assert bind(Place(0, 1, 0, 1)) == torch.device("cpu")
    with fake_gpus(0) as events:
        assert not uses_gpu()
        assert bind(Place(0, 1, 0, 1)) == torch.device("cpu")
    assert not events


@pytest.mark.parametrize("asked", ["xpu", "hpu", "CPU"])
def test_other_accelerators_are_refused(monkeypatch, asked):
    monkeypatch.setenv("DS_ACCELERATOR", asked)
    with pytest.raises(ConfigError, match=f"DS_ACCELERATOR={asked} is not supported here; set it to cpu or cuda"):
        uses_gpu()


@pytest.mark.parametrize("command", ["launchers/pretrain.py", "launchers/evaluate.py", "tools/generate.py"])
def test_commands_refuse_other_accelerators_in_one_sentence(tmp_path, command):
    arguments = ["--ds_config", "ds_configs/zero2.json"] if "pretrain" in command else [str(tmp_path)]
    arguments += ["--run_dir", str(tmp_path / "run")] if "pretrain" in command else []
    clean = {**environment(), "DS_ACCELERATOR": "xpu"}
    line = [sys.executable, command, *arguments]
    start = subprocess.run if "tools" in command else warm.run
    result = start(line, capture_output=True, text=True, timeout=120, env=clean, cwd=ROOT)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: DS_ACCELERATOR=xpu is not supported here")
    assert result.stderr.count("\n") == 1


def test_a_command_of_one_process_names_its_device_to_deepspeed():
    for count, device in ((0, "cpu"), (2, "cuda:0")):
        with fake_gpus(count):
            assert bind_single() == torch.device(device)
            assert os.environ["DS_ACCELERATOR"] == device.partition(":")[0]


@pytest.mark.parametrize(
    "reason",
    ["CUDA error: out of memory", "CUDA error: all CUDA-capable devices are busy or unavailable"],
)
def test_a_gpu_that_cannot_be_used_is_one_sentence(reason, monkeypatch):
    def fail(number):
        raise RuntimeError(f"{reason}\nCUDA kernel errors might be asynchronously reported at some other API call")

    with fake_gpus(2):
        monkeypatch.setattr(torch.cuda, "set_device", fail)
        for start in (bind_single, lambda: bind(Place(1, 2, 1, 2))):
            with pytest.raises(
                ConfigError, match=rf"cannot use GPU \d \({reason}\); look at nvidia-smi, or name others"
            ):
                start()


def test_deepspeed_is_told_the_device_through_the_variables_that_it_reads(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "3")
    with fake_gpus(1) as events:
        assert bind(Place(3, 4, 3, 4)) == torch.device("cuda", 0)
        assert events == ["bound to 0"]
        assert os.environ["LOCAL_RANK"] == os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == "0"


GOOD = [Seat("one", "A", None), Seat("one", "B", None), Seat("two", "A", None)]


@pytest.mark.parametrize(
    ("seats", "sentence"),
    [
        (GOOD, None),
        ([Seat("one", None, None)] * 2, None),
        ([*GOOD, Seat("two", "A", None)], "ranks 2 and 3 on two would share the GPU A"),
        ([*GOOD, Seat("three", None, None)], "rank 0 on one has a GPU, and rank 3 on three sees none"),
        ([Seat("one", None, None), *GOOD], "rank 1 on one has a GPU, and rank 0 on one sees none"),
        ([*GOOD, Seat("three", None, "too old")], "too old"),
    ],
)
def test_devices_that_do_not_go_together_are_one_sentence(seats, sentence):
    found = contradiction(seats)
    assert found is None if sentence is None else found.startswith(sentence)


# ---------------------------------------------------------------- ranks that meet


def _set_up(rank: int, world: int, port: int, folder: Path, gpus: dict[str, Any], nccl: str | None, leave: Any) -> None:
    """What ``set_up_torch`` did on this rank, in order, or the sentence it raised."""
    from vqmoe_ds.runtime import meeting, torch_setup

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    with fake_gpus(**gpus) as events:
        kept: list[Any] = []

        def start(backend: str, device_id: torch.device | None, store: Any, **_: Any) -> None:
            events.append(f"{backend} starts on {device_id}")
            kept.append(store)
            store.set(f"started{rank}", "")  # as the real one, it keeps the store and ends when all ranks have come
            store.wait([f"started{other}" for other in range(world)])
            if nccl is not None:
                raise dist.DistBackendError(nccl)

        def meet(*args: Any) -> None:
            events.append("meets")
            real_meet(*args)

        real_meet, torch_setup.meet = meeting.meet, meet
        meeting.dist = SimpleNamespace(**{**vars(dist), "init_process_group": start})
        accelerator = SimpleNamespace(communication_backend_name=lambda: "nccl" if uses_gpu() else "gloo")
        torch_setup.get_accelerator = lambda: accelerator
        torch_setup.deepspeed = SimpleNamespace(init_distributed=lambda **_: None, ops=torch_setup.deepspeed.ops)
        try:
            events.append(str(torch_setup.set_up_torch(Place(rank, world, rank, world), 20.0)))
        except ConfigError as error:
            events.append(f"{error.local} {error}")
        (folder / f"{rank}.json").write_text(json.dumps(events))
        leave.wait(30)  # the store goes with rank 0


def _meet(folder: Path, gpus: list[dict[str, Any]], nccl: str | None = None) -> list[list[str]]:
    port, world = _free_port(), len(gpus)
    leave = context.Barrier(world)
    jobs = [(rank, world, port, folder, one, nccl, leave) for rank, one in enumerate(gpus)]
    processes = [context.Process(target=_set_up, args=job) for job in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.parametrize(
    ("gpus", "numbers"),
    [
        ([{"count": 2}, {"count": 2}], [0, 1]),
        ([{"count": 1, "ids": "A"}, {"count": 1, "ids": "B"}], [0, 0]),
        ([{"count": 0}, {"count": 0}], None),
    ],
    ids=["all see all", "each its own", "none"],
)
def test_a_gpu_is_bound_before_ranks_meet_and_nccl_starts_on_it(tmp_path, gpus, numbers):
    for rank, events in enumerate(_meet(tmp_path, gpus)):
        if numbers is None:
            assert events == ["meets", "gloo starts on None", "cpu"]
            continue
        number = numbers[rank]
        assert events == [f"bound to {number}", "meets", f"nccl starts on cuda:{number}", f"cuda:{number}"]


def test_a_single_rank_is_bound_but_has_nobody_to_connect_to(tmp_path):
    assert _meet(tmp_path, [{"count": 4}]) == [["bound to 0", "meets", "nccl starts on None", "cuda:0"]]


@pytest.mark.parametrize(
    ("gpus", "sentence"),
    [
        ([{"count": 1}, {"count": 1}], "ranks 0 and 1 on .* would share the GPU A0"),
        ([{"count": 1}, {"count": 0}], "rank 0 on .* has a GPU, and rank 1 on .* sees none"),
        ([{"count": 2}, {"count": 2}, {"count": 2, "ids": "B"}], "rank 2 sees 2 GPUs"),
    ],
    ids=["shared", "mixed", "too few"],
)
def test_all_ranks_leave_with_the_same_sentence_before_nccl_starts(tmp_path, gpus, sentence):
    answers = _meet(tmp_path, gpus)
    assert len({events[-1] for events in answers}) == 1
    for events in answers:
        assert not any("starts" in event for event in events)
    assert re.match(f"False .*{sentence}", answers[0][-1])


def test_nccl_that_does_not_start_says_where_and_what_to_look_at(tmp_path):
    failure = "NCCL error in: ProcessGroupNCCL.cpp:1: unhandled system error\nLast error: ..."
    for rank, events in enumerate(_meet(tmp_path, [{"count": 2}, {"count": 2}], failure)):
        assert events[-1].startswith(f"{rank == 0} NCCL does not start on rank {rank} (cuda:{rank} of ")
        for part in ("unhandled system error;", "NCCL_DEBUG=INFO", "NCCL_SOCKET_IFNAME", "NCCL_P2P_DISABLE"):
            assert part in events[-1]
        assert "\n" not in events[-1]


# ---------------------------------------------------------------- the commands


def on(gpus: dict[str, Any]) -> list[str]:
    return [sys.executable, "-m", "tests.fake_gpu", json.dumps(gpus), str(ROOT / "launchers/pretrain.py")]


REFUSED = {
    "width": ({}, ["--set", "model.width=36"], "model.width=36 is not a multiple of 8"),
    "too old": ({"capability": [7, 5]}, [], "(Fake GPU, compute capability 7.5; bf16 needs 8.0) has no bf16"),
    "too small": ({"memory": 2e5}, [], "but its GPU has 0.0 GB; no micro-batch"),
    "no NCCL": ({}, [], "NCCL does not start on rank 0 (cuda:0 of "),
    "no GPU": ({"count": 0}, ["--set", "model.width=36"], None),
}


@pytest.mark.parametrize(("gpus", "extra", "sentence"), REFUSED.values(), ids=REFUSED)
def test_training_is_refused_in_one_sentence_before_it_starts(small, tmp_path, gpus, extra, sentence):  # noqa: F811
    clean = {k: v for k, v in environment().items() if k != "DS_ACCELERATOR"}
    extra = [*extra, "--run_dir", str(tmp_path / "run")]
    if sentence is None:
        assert run([*small, *extra, "--print_config"], on(gpus), cwd=ROOT).returncode == 0
        return
    result = subprocess.run(
        [*on(gpus), *small, *extra], capture_output=True, text=True, timeout=120, env=clean, cwd=ROOT
    )
    assert result.returncode == 2, result.stderr
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_on_a_gpu_is_bf16_with_fused_adam_unless_told_otherwise(small, tmp_path):  # noqa: F811
    result = run([*small, "--run_dir", str(tmp_path), "--print_config"], on({}), cwd=ROOT)
    shown = json.loads(result.stdout[result.stdout.index("deepspeed: ") + 11 :])
    assert shown["bf16"] == {"enabled": True}
    assert shown["data_types"] == {"grad_accum_dtype": "fp32"}
    assert shown["optimizer"]["params"]["fused"] is True
    on_cpu = run([*small, "--run_dir", str(tmp_path), "--print_config"])
    shown = json.loads(on_cpu.stdout[on_cpu.stdout.index("deepspeed: ") + 11 :])
    assert "bf16" not in shown and "data_types" not in shown


def _job(place: Place) -> Any:
    from vqmoe_ds.config.deepspeed_json import resolve
    from vqmoe_ds.config.load import load_config
    from vqmoe_ds.runtime.console import Console
    from vqmoe_ds.train.job import Job

    config = resolve(str(ROOT / "ds_configs/zero2.json"), load_config(), place.world_size, gpu=True)
    return Job(config, place, Console(place.rank), "zero2.json", "auto", False, 0.0)


def test_the_start_up_line_names_card_precision_and_determinism(monkeypatch, capsys):
    from vqmoe_ds.runtime import torch_setup
    from vqmoe_ds.train import job

    asked: list[Any] = []
    monkeypatch.setattr(torch_setup, "set_up_torch", lambda *args: asked.append(args) or torch.device("cuda", 0))
    here = _job(Place(0, 1, 0, 1))
    with fake_gpus(1):
        assert job._run(SimpleNamespace(run=lambda job: 0), here) == 0
    assert asked[0][2] is True
    line = "GPU: Fake GPU, 80 GB; bf16, fused Adam; deterministic (bit-exact resume)"
    assert line in capsys.readouterr().out


def test_running_out_of_memory_says_what_would_fit(monkeypatch):
    from vqmoe_ds.runtime import torch_setup
    from vqmoe_ds.train import job

    def work(job: Any) -> int:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB"
        )

    monkeypatch.setattr(torch_setup, "set_up_torch", lambda *args: torch.device("cuda", 0))
    here = _job(Place(0, 1, 0, 1))
    with fake_gpus(1, memory=1.2e9), pytest.raises(ConfigError) as caught:
        job._run(SimpleNamespace(run=work), here)
    assert "cuda:0 has too little memory (CUDA out of memory: Tried to allocate 2.00 GiB); what would fit: " in str(
        caught.value
    )
    assert "train_micro_batch_size_per_gpu" in str(caught.value)
    assert caught.value.local and caught.value.exit_code == 2


@pytest.mark.parametrize(
    "message",
    ["CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "CUDA error: out of memory"],
)
def test_memory_that_cuda_lacks_outside_pytorchs_allocator_is_the_same_sentence(message):
    with pytest.raises(ConfigError) as caught, memory_errors(0, torch.device("cuda", 0), lambda: "use less"):
        raise RuntimeError(f"{message}\nCompile with ...")
    assert str(caught.value).endswith(f"cuda:0 has too little memory ({message}); use less")


def test_other_errors_pass_through():
    with pytest.raises(RuntimeError, match="other"), memory_errors(0, torch.device("cpu"), lambda: ""):
        raise RuntimeError("other")


@pytest.mark.parametrize(("count", "device"), [(1, "cuda:0"), (2, "cuda:1")])
def test_evaluation_takes_the_gpu_that_the_rank_is_bound_to(monkeypatch, count, device):
    from vqmoe_ds.checkpoint import load_model
    from vqmoe_ds.evaluation import command
    from vqmoe_ds.runtime import torch_setup

    class Reached(Exception):
        pass

    def load(
        path: str, tokenizer: str | None, ep: int, rank: int, device: Any, precision: str, *_: Any, **__: Any
    ) -> None:
        raise Reached(f"{device} {precision}")

    monkeypatch.setattr(load_model, "load_model", load)
    monkeypatch.setattr(command, "watch_peers", lambda *args: nullcontext())
    monkeypatch.setattr(torch_setup, "meet", lambda *args: None)
    monkeypatch.setattr(torch_setup, "make_deterministic", lambda exact: None)
    monkeypatch.setattr(torch_setup.deepspeed, "init_distributed", lambda **_: None)
    args = command.build_parser("").parse_args(["checkpoint", "--precision", "fp32"])
    with fake_gpus(count), pytest.raises(Reached, match=f"{device} fp32"):
        command._evaluate(args, (), Place(1, 2, 1, 2), SimpleNamespace(rank=1))


def test_evaluation_refuses_a_gpu_without_bf16_before_the_ranks_meet(monkeypatch):
    from vqmoe_ds.evaluation import command
    from vqmoe_ds.runtime import torch_setup

    def meet(place: Place, backend: str, seconds: float, device: torch.device, trouble: str | None) -> None:
        raise ConfigError(trouble)

    monkeypatch.setattr(torch_setup, "meet", meet)
    monkeypatch.setattr(torch_setup, "make_deterministic", lambda exact: None)
    args = command.build_parser("").parse_args(["checkpoint"])
    with fake_gpus(1, capability=(7, 5)), pytest.raises(ConfigError, match="has no bf16; choose --precision fp32"):
        command._evaluate(args, (), Place(1, 2, 1, 2), SimpleNamespace(rank=1))


# ---------------------------------------------------------------- determinism


@pytest.fixture
def restored() -> Any:
    """PyTorch's switches as they were."""
    mode, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic
    cudnn, fill = torch.backends.cuda.cudnn_sdp_enabled(), deterministic.fill_uninitialized_memory
    torch.backends.cuda.enable_cudnn_sdp(True)  # PyTorch's own default
    yield
    torch.use_deterministic_algorithms(mode, warn_only=warns)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    deterministic.fill_uninitialized_memory = fill


@pytest.mark.parametrize(("gpus", "exact", "strict"), [(1, True, True), (1, False, False), (0, True, False)])
def test_only_exact_runs_on_a_gpu_refuse_what_is_not_deterministic(restored, monkeypatch, gpus, exact, strict):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with fake_gpus(gpus):
        make_deterministic(exact)
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if gpus else None)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled() != strict
    assert torch.backends.cuda.cudnn_sdp_enabled() != strict


def test_texts_of_any_length_go_without_cudnn_attention(restored):
    with without_cudnn_attention():
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()
    with fake_gpus(1):
        bind_single()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(("setting", "after"), [(":4096:8", None), (":16:8", ":16:8"), (None, None)])
def test_cublas_own_setting_leaves_the_environment_and_another_stays(monkeypatch, setting, after):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if setting is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", setting)
    read_cublas_workspace_once(torch.device("cpu"))
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == after


def test_the_table_of_operators_is_never_probed(monkeypatch):
    import deepspeed.ops

    from vqmoe_ds.runtime.torch_setup import build_no_shared_memory_op

    def probe() -> Callable[..., Any]:
        raise AssertionError("probed")

    monkeypatch.setattr(deepspeed.ops, "_probe_compatible_ops", probe)
    monkeypatch.delitem(vars(deepspeed.ops), "__compatible_ops__", raising=False)
    build_no_shared_memory_op()
    assert deepspeed.ops.__compatible_ops__.get("deepspeed_shm_comm", True) is False
    from deepspeed.comm.torch import build_shm_op

    assert build_shm_op() is None
