"""benchmarks/gpu.py on a CPU: its checks run and can fail, and it goes on where one of them hangs or dies."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import peers
from gpu_checks import exact, grouped, layers, machine, oracles, profiling, stages, steps, supervise, syncs, training
from gpu_checks.frame import Bench, Finding, Rates, attempt, equal, poisons, relative_error, within
from gpu_checks.report import BAD, BEGINS, CHECKS, ENDS, Check, final_report
from gpu_checks.supervise import Supervisor, read_lines

from tests.distributed import run_ranks
from vqmoe_ds.runtime.ranks import Place

ROOT = Path(__file__).resolve().parent.parent


def _bench(folder: Path) -> Bench:
    return Bench(torch.device("cpu"), True, folder, Place(0, 1, 0, 1), Rates(1e9, 1e9))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    path = tmp_path_factory.mktemp("gpu") / "out.jsonl"
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--small", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    return SimpleNamespace(code=done.returncode, out=done.stdout, errors=done.stderr, lines=read_lines(path))


def test_all_checks_run_to_their_end_and_none_fails(run: SimpleNamespace) -> None:
    assert [f"{line['case']}: {line['why']}" for line in run.lines if line["status"] in BAD] == []
    assert run.code == 0, run.errors
    ended = [line["check"] for line in run.lines if line["status"] == ENDS]
    assert ended == [check.number for check in CHECKS]
    for check in CHECKS:
        statuses = [line["status"] for line in run.lines if line["check"] == check.number]
        assert {"passed", "measured"} & set(statuses), f"{check.title} found nothing"


def test_lines_are_printed_as_they_are_written_and_tables_stand_last(run: SimpleNamespace) -> None:
    lines, _, tables = run.out.partition("\n\n")
    assert [json.loads(line) for line in lines.splitlines()] == [line for line in run.lines if line["status"] != BEGINS]
    assert run.lines[0]["figures"]["torch"] == torch.__version__
    assert "| # | check |" in tables and "deepspeed AutoEP" in tables


def test_what_has_no_meaning_on_a_cpu_says_why(run: SimpleNamespace) -> None:
    skipped = {line["case"]: line["why"] for line in run.lines if line["status"] == "skipped"}
    assert any("fp16" in case for case in skipped) and any("idle share" in case for case in skipped)
    assert all(skipped.values())
    times = [line for line in run.lines if line["check"] == 7 and "variant" in line["figures"]]
    assert {line["figures"]["variant"] for line in times} == set(layers.VARIANTS)
    assert all("memory" in line["why"] and "peak_MiB" not in line["figures"] for line in times)


# ------------------------------------------------------------------ checks can fail


def test_a_wrong_product_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch._grouped_mm
    monkeypatch.setattr(torch, "_grouped_mm", lambda *args, **more: right(*args, **more) * 1.1)
    findings = [finding for finding in grouped.run(_bench(tmp_path)) if finding.case.startswith("_grouped_mm")]
    wrong = {finding.case for finding in findings if finding.status == "failed"}
    assert "_grouped_mm, bfloat16, mixed" in wrong and "_grouped_mm, float32, one row" in wrong
    assert "_grouped_mm, float32, no rows" not in wrong


def test_empty_experts_come_last(tmp_path: Path) -> None:
    cases = [finding.case for finding in grouped.run(_bench(tmp_path))]
    full = [i for i, case in enumerate(cases) if case.endswith("mixed") or "width" in case]
    assert full == list(range(2 * 3 + 4))
    assert len(cases) == len(full) + 2 * 3 * (len(grouped.COUNTS) - 1)


def test_an_exception_of_one_case_does_not_hide_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = oracles._vq_errors

    def wrong(bench: Bench, dtype: torch.dtype, moe: dict[str, Any], book: dict[str, Any]) -> dict[str, float]:
        if "num_codes" in book:
            raise ValueError("a bug\nof many lines")
        return right(bench, dtype, moe, book)

    monkeypatch.setattr(oracles, "_vq_errors", wrong)
    findings = list(oracles.run(_bench(tmp_path)))
    bad = [finding for finding in findings if finding.status != "passed"]
    assert [finding.status for finding in bad] == ["error"] * 2 and findings[-1].case == "codebook, splitting"
    assert all(
        "more codes than experts" in finding.case and finding.why.startswith("ValueError: a bug (test_gpu_benchmark.py")
        for finding in bad
    )


def test_an_error_that_stays_in_cuda_ends_the_check() -> None:
    def broken(error: Exception) -> Finding:
        raise error

    for words in ("CUDA error: misaligned address", "Triton Error [CUDA]: an illegal memory access was encountered"):
        with pytest.raises(RuntimeError):
            list(attempt("", partial(broken, RuntimeError(words))))
    for words in ("CUBLAS_STATUS_EXECUTION_FAILED", "CUDA driver error: 700", "device-side assert", "NCCL Error 1: x"):
        assert poisons(RuntimeError(words))
    lacking = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    for error in (lacking, RuntimeError("CUDA error: out of memory"), ValueError("a bug")):
        assert not poisons(error)
    assert [finding.status for finding in attempt("", partial(broken, lacking))] == ["failed"]
    assert [finding.status for finding in attempt("", partial(broken, lacking), "skipped")] == ["skipped"]


def test_memory_that_others_lack_is_no_failure_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: Any) -> Finding:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(layers, "build_on", lambda *_: torch.nn.Identity())
    monkeypatch.setattr(layers, "_time", lacking)
    found = {finding.case: finding.status for finding in layers.run(_bench(tmp_path))}
    assert len(found) == len(layers.VARIANTS) * len(layers.SMALL.tokens), "every number of tokens is tried"
    ours = {case for case in found if "ours" in case}
    assert {found[case] for case in ours} == {"failed"} and {found[case] for case in found.keys() - ours} == {"skipped"}
    monkeypatch.setattr(steps, "Steps", lacking)
    found = {finding.case: finding.status for finding in steps.run(_bench(tmp_path))}
    assert found["ours, top_k 0, fused Adam"] == "failed" and found["deepspeed AutoEP, fused Adam"] == "skipped"
    assert layers.LARGE.tokens[-1] == steps.LARGE.tokens[-1] == 65536


def test_a_gpu_without_triton_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = _bench(tmp_path)
    bench.device = torch.device("cuda", 0)
    for why, status in (("Triton is not installed", "failed"), (None, "passed")):
        monkeypatch.setattr(machine, "why_no_triton", lambda why=why: why)
        (finding,) = (finding for finding in machine.run(bench) if finding.case == "triton")
        assert (finding.status, finding.why) == (status, why or "")


def test_errors_of_any_kind_exceed_a_limit() -> None:
    assert within("", {"a": 0.1}, 0.2).status == "passed"
    for bad in (0.3, float("nan"), float("inf")):
        assert within("", {"a": 0.1, "b": bad}, 0.2).status == "failed"
    assert equal("", {"a": True}).status == "passed" and equal("", {"a": True, "b": False}).status == "failed"
    assert relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])) == 0.5
    assert relative_error(torch.ones(2), torch.ones(3)) == float("inf")


def test_one_other_bit_is_another_run() -> None:
    first: exact.Run = ([1.0, 2.0], {"w": torch.ones(3)})
    assert all(exact._same(first, ([1.0, 2.0], {"w": torch.ones(3)})).values())
    other = torch.ones(3) + torch.tensor([0, 0, 2**-23])
    assert not exact._same(first, ([1.0, 2.0], {"w": other}))["weights and codes"]
    assert not exact._same(first, ([1.0, 2.0 + 2**-51], {"w": torch.ones(3)}))["losses"]


def test_stages_that_part_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Loop:
        bad_steps = 0

        def __enter__(self) -> Loop:
            return self

        def __exit__(self, *_: Any) -> None: ...

    curves = iter([[2.0, 1.0], [2.0, 1.00001], [2.0, 1.1], [2.0, 2.0], *[[2.0, 1.0]] * 3, [2.0, float("nan")]])
    monkeypatch.setattr(training, "trainer", lambda *_: Loop())
    monkeypatch.setattr(training, "losses", lambda *_: next(curves))
    found = {finding.case: finding.status for finding in stages.run(_bench(tmp_path))}
    failed = {case for case, status in found.items() if status == "failed"}
    assert failed == {"ZeRO-3, fp32", "ZeRO-0, fp32", "ZeRO-0, bf16"}, "parted, did not fall, not finite"


def test_reads_of_the_host_are_counted_by_the_line_that_makes_them(tmp_path: Path) -> None:
    numbers = torch.arange(6)
    with syncs.watching(_bench(tmp_path)) as found:
        for _ in range(3):
            int(numbers[2])
        numbers.nonzero()
        numbers + numbers[numbers]
        numbers[numbers > 2]
        torch.equal(numbers, numbers)
    lines = {line.split(": ", 1)[1]: count for (_, line), count in found.items()}
    assert lines.pop("int(numbers[2])") == 3
    assert lines == {"numbers.nonzero()": 1, "numbers[numbers > 2]": 1, "torch.equal(numbers, numbers)": 1}


def test_waits_on_cuda_are_counted_by_pytorchs_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    bench = _bench(tmp_path)
    bench.device = torch.device("cuda", 0)
    warnings.filterwarnings("ignore")  # as a training sets it
    with syncs.watching(bench) as found:
        assert modes == ["warn"]
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert modes == ["warn", "default"]
    assert list(found.values()) == [2]


def test_idle_share_is_what_no_kernel_covers() -> None:
    def event(
        start: float, end: float, device: DeviceType = DeviceType.CUDA, annotation: bool = False
    ) -> SimpleNamespace:
        time_range = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(time_range=time_range, device_type=device, is_user_annotation=annotation)

    events = [event(60, 100), event(0, 20), event(10, 30), event(40, 50), event(0, 900, DeviceType.CPU)]
    events.append(event(0, 100, annotation=True))
    idle = profiling._idle(SimpleNamespace(events=lambda: events))
    assert idle == {"idle_share": pytest.approx(0.2), "busy_ms": 0.08, "whole_ms": 0.1, "kernels": 4}


def _devices_of_large_models(rank: int, world: int) -> dict[str, set[str]]:
    meta = torch.device("meta")
    models = {
        name: peers.build_on(meta, torch.bfloat16, partial(layers._build, name, layers.LARGE, 5632))
        for name in layers.VARIANTS
    }
    for name, _ in steps.VARIANTS:
        models[f"step, {name}"] = peers.build_on(meta, torch.float32, partial(steps._model, name, steps.LARGE))
    assert sum(parameter.numel() for parameter in models[layers.AHEAD].parameters()) == 3 * 64 * 2048 * 5632
    return {name: {str(t.device) for t in (*model.parameters(), *model.buffers())} for name, model in models.items()}


def test_large_models_are_built_on_the_device_alone() -> None:
    """On a device without memory: nothing passes through the CPU, where drawing them takes minutes."""
    (devices,) = run_ranks(1, _devices_of_large_models, timeout=60)
    assert {"deepspeed AutoEP", layers.SEARCH, f"step, {steps.OURS_1}"} < devices.keys()
    assert {device for found in devices.values() for device in found} == {"meta"}


def test_weights_drawn_on_the_device_are_normal_and_codes_as_long_as_what_they_meet() -> None:
    layer: Any = peers.build_on(torch.device("cpu"), torch.bfloat16, lambda: peers.OurLayer(64, 32, 8))
    w1, codes = layer.layer.experts.w1, layer.bank.codes_LKC
    assert w1.dtype == torch.bfloat16 and codes.dtype == torch.float32
    assert w1.float().std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert codes.std().item() == pytest.approx(1, rel=0.1)


def test_the_roofline_counts_what_gpu_md_counts() -> None:
    """The table of one layer at D 2048: products, permutations, SwiGLU and the sum of two input gradients."""
    rates = Rates(copy=3e12, product=600e12)
    products, moved = 0.48 + 0.96, 0.18 + 0.13 + 0.07
    assert layers.roofline_ms(rates, 16384, 2048, 1408) == pytest.approx(products + moved, rel=0.02)
    assert layers.roofline_ms(rates, 65536, 2048, 5632) == pytest.approx(7.6 + 15.2 + 0.72 + 2.0 + 0.27, rel=0.02)


def test_missed_aims_are_told_and_are_no_failure() -> None:
    found: layers.Found = {
        (16384, 1408, layers.AHEAD): {"ms": 2.0},
        (16384, 1408, layers.ROOFLINE): {"ms": 1.0},
        (16384, 1408, layers.SEARCH): {"ms": 1.0, "activations_MiB": 5.0},
        (16384, 1408, "deepspeed AutoEP"): {"ms": 2.0, "activations_MiB": 9.0},
    }
    findings = list(layers._aims(found, 1408))
    assert [finding.status for finding in findings] == ["missed", "met", "met"]
    assert "missed" not in BAD


# ------------------------------------------------------------------ the supervisor


CHILD = """
import faulthandler, json, os, signal, sys, time
path, trace, numbers = sys.argv[1], sys.argv[2], sys.argv[4:]
faulthandler.register(signal.SIGUSR1, file=open(trace, "w"))
def say(number, status, **more):
    with open(path, "a") as file:
        file.write(json.dumps({"check": number, "case": "", "status": status, "figures": more, "why": ""}) + "\\n")
for number in map(int, numbers):
    say(number, "begins")
    if number == 1:
        time.sleep(60)
    if number == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    say(number, "passed")
    say(number, "ends", seconds=0)
    if number == 4:
        sys.exit(3)
"""


def _supervise(folder: Path, child: str, seconds: float = 60.0) -> tuple[int, list[dict[str, Any]]]:
    script, path, trace = folder / "child.py", folder / "lines.jsonl", folder / "trace"
    script.write_text(textwrap.dedent(child))
    path.write_text("")
    checks = [Check(number, f"check {number}", 1.0, "") for number in range(6)]
    code = Supervisor([sys.executable, str(script), str(path), str(trace)], path, trace, checks, seconds).run()
    return code, read_lines(path)


def test_a_check_that_hangs_or_dies_does_not_stop_the_others(tmp_path: Path) -> None:
    code, lines = _supervise(tmp_path, CHILD)
    assert code == 1
    assert [line["check"] for line in lines if line["status"] == "passed"] == [0, 2, 4, 5]
    (hung,), (dead,) = ([line for line in lines if line["status"] == status] for status in ("timeout", "error"))
    assert hung["check"] == 1 and hung["why"] == "not done after 1 s, in child.py:11 <module>"
    assert dead["check"] == 3 and "signal 11" in dead["why"]
    assert "1 timeout" in final_report(lines)


def test_what_the_time_does_not_suffice_for_is_named(tmp_path: Path) -> None:
    code, lines = _supervise(tmp_path, CHILD, seconds=0.9)
    assert code == 1
    assert [line["check"] for line in lines if line["status"] == "skipped"] == [2, 3, 4, 5]
    assert all("--checks" in line["why"] for line in lines if line["status"] == "skipped")


def test_checks_that_the_time_left_out_were_not_done(tmp_path: Path) -> None:
    code, lines = _supervise(tmp_path, CHILD, seconds=0)
    assert code == 1 and [line["status"] for line in lines] == ["skipped"] * 6


def test_a_process_that_hangs_at_its_end_loses_no_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "BETWEEN", 0.5)
    hangs = CHILD.replace("sys.exit(3)", "time.sleep(60)").replace("number == 1", "0").replace("number == 3", "0")
    code, lines = _supervise(tmp_path, hangs)
    assert code == 0 and {line["status"] for line in lines} == {BEGINS, "passed", ENDS}
    assert [line["check"] for line in lines if line["status"] == ENDS] == list(range(6))


def test_a_later_process_that_cannot_run_keeps_what_was_found(tmp_path: Path) -> None:
    starts_once = CHILD.replace("def say", "if numbers[0] != '0':\n    sys.exit(2)\ndef say")
    code, lines = _supervise(tmp_path, starts_once)
    assert code == 1
    assert [line["check"] for line in lines if line["status"] == "passed"] == [0]
    assert [line["check"] for line in lines if line["why"] == "the process ended with exit code 2"] == [2, 3, 4, 5]


def test_a_process_that_never_starts_ends_the_run(tmp_path: Path) -> None:
    assert _supervise(tmp_path, "import sys; sys.exit(2)") == (2, [])
    code, lines = _supervise(tmp_path, "import sys; sys.exit(7)")
    assert code == 1 and [line["why"] for line in lines] == ["the process ended with exit code 7"] * 6


# ------------------------------------------------------------------ what the machine lacks


def _gpu_script() -> Any:
    import gpu

    return gpu


def test_missing_modules_are_named_in_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    gpu = _gpu_script()
    monkeypatch.setitem(gpu.MODULES, "no_such_module", "no-such-package")
    assert gpu.main(["--device", "cpu", "--small"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "lacks no-such-package" in said and "--wheels" in said


def test_options_that_cannot_be_used_are_told_first(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    gpu = _gpu_script()
    monkeypatch.setattr(gpu, "Supervisor", None)
    for options, words in (
        (["--json", str(tmp_path / "none" / "out.jsonl")], "--json"),
        (["--json", str(tmp_path)], "--json"),
        *((["--minutes", minutes], "--minutes") for minutes in ("0", "-1", "nan", "inf")),
    ):
        assert gpu.main(["--device", "cpu", "--small", *options]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith("error: " + words)


def test_wheels_are_installed_from_the_folder_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu, commands = _gpu_script(), []
    monkeypatch.setitem(gpu.MODULES, "no_such_module", "no-such-package")

    def pip(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(gpu.subprocess, "run", pip)
    problem = gpu.provide(str(tmp_path))
    assert "could not install no-such-package" in problem
    (command,) = commands
    assert command[0] == sys.executable and command[-1] == "no-such-package"
    assert {"--no-index", "--no-deps"} < set(command) and str(tmp_path) in command


def test_without_a_gpu_it_says_so_and_leaves(tmp_path: Path) -> None:
    if torch.cuda.device_count():
        pytest.skip("there is a GPU")
    command = [sys.executable, "benchmarks/gpu.py", "--checks", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert "sees no CUDA device" in done.stderr and "Traceback" not in done.stderr
