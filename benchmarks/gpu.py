#!/usr/bin/env python
"""All that a GPU alone can show, in one command: ten checks of what is right and how fast it is (docs/gpu.md).

    python3 benchmarks/gpu.py                            # all ten, at most 8 minutes
    python3 benchmarks/gpu.py --checks 0 7 8 --json out.jsonl
    python3 benchmarks/gpu.py --wheels wheels/           # first install from there what this Python lacks
    python3 benchmarks/gpu.py --device cpu --small       # the same code on a CPU, in a minute; says nothing of speed

Every result is a line of JSON, printed and written as it comes; tables stand at the end. The checks run one after the
other in one process over NCCL. Each has a deadline: where a check hangs or dies, that process is ended and the next
check starts in a new one. Exit code 0: nothing failed (aims for speed may be missed), 1: something did, 2: it cannot
run here.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import importlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpu_checks.report import BEGINS, CHECKS, ENDS, ERROR, MEASURED, Check, Line, final_report
from gpu_checks.supervise import Supervisor, read_lines

from vqmoe_ds.runtime.errors import UserError

MODULES = {
    "torch": "torch",
    "numpy": "numpy",
    "yaml": "pyyaml",
    "deepspeed": "deepspeed",
    "hjson": "hjson",
    "cpuinfo": "py-cpuinfo",
    "pydantic": "pydantic",
    "pydantic_core": "pydantic-core",
    "annotated_types": "annotated-types",
    "typing_inspection": "typing-inspection",
    "typing_extensions": "typing-extensions",
    "tqdm": "tqdm",
    "psutil": "psutil",
    "packaging": "packaging",
    "einops": "einops",
    "msgpack": "msgpack",
    "ninja": "ninja",
}
"""Modules that are imported, and the packages that hold them."""


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.child:
        return run_checks(options, [check for check in CHECKS if check.number in options.checks])
    problem = unusable(options) or provide(options.wheels)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        path = Path(options.json or Path(folder) / "results.jsonl").absolute()
        path.write_text("", encoding="utf-8")
        trace = Path(folder) / "trace"
        command = [sys.executable, __file__, "--child", str(trace), "--json", str(path), "--device", options.device]
        command += ["--small"] if options.small else []
        chosen = [check for check in CHECKS if check.number in options.checks]
        code = Supervisor(command, path, trace, chosen, 60 * options.minutes).run()
        if code != 2:
            print(final_report(read_lines(path)), flush=True)
    return code


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = [check.number for check in CHECKS]
    table = ", ".join(f"{check.number} {check.title}" for check in CHECKS)
    parser.add_argument("--checks", type=int, nargs="+", default=numbers, choices=numbers, metavar="N", help=table)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that a CPU passes in seconds")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all checks together (default 8)")
    parser.add_argument("--json", help="also write the lines to a file")
    parser.add_argument("--wheels", metavar="DIR", help="install missing packages from this folder")
    parser.add_argument("--child", metavar="TRACE", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def unusable(options: argparse.Namespace) -> str | None:
    """A sentence if the options cannot be used; a file for ``--json`` is made where there is none."""
    if not 0 < options.minutes < math.inf:
        return f"--minutes {options.minutes:g}: give a finite number above 0"
    try:
        if options.json:
            Path(options.json).open("a", encoding="utf-8").close()
    except OSError as error:
        return f"--json {options.json} cannot be written ({error.strerror}); name a file in a folder that can be"
    return None


# ---------------------------------------------------------------- what the machine lacks


def provide(wheels: str | None) -> str | None:
    """Install what is missing from a folder of wheels; a sentence if something is still missing."""
    missing = [package for module, package in MODULES.items() if importlib.util.find_spec(module) is None]
    if missing and wheels:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--find-links", wheels]
        done = subprocess.run([*pip, *missing], stdout=sys.stderr)
        importlib.invalidate_caches()
        missing = [package for module, package in MODULES.items() if importlib.util.find_spec(module) is None]
        if done.returncode or missing:
            return f"pip could not install {', '.join(missing) or 'all packages'} from {wheels}; its words stand above"
    if not missing:
        return None
    return (
        f"this Python lacks {', '.join(missing)}: fetch the wheels where there is a network (sh tools/gpu_wheels.sh "
        "DIR) and give their folder with --wheels DIR"
    )


# ---------------------------------------------------------------- the process that runs the checks


def run_checks(options: argparse.Namespace, checks: list[Check]) -> int:
    """Run the checks and append what they find to the file; returns 3 where the rest needs a new process.

    At SIGUSR1 the place where it stands is written to the file ``options.child``, even from inside a CUDA call.
    """
    path = Path(options.json)
    faulthandler.register(signal.SIGUSR1, file=open(options.child, "w", encoding="utf-8"), all_threads=False)  # noqa: SIM115
    os.environ.update(DS_ACCELERATOR=options.device, CUBLAS_WORKSPACE_CONFIG=":4096:8")
    os.environ.pop("TRITON_INTERPRET", None)
    # It can be written, and a process that takes over finds there what is compiled already.
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path(options.child).absolute().parent / "triton"))
    started = time.time()

    def write(number: int | None, case: str, status: str, figures: dict[str, Any], why: str = "") -> None:
        line = {"check": number, "case": case, "status": status, "figures": figures, "why": why}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, "at": round(time.time() - started, 2)}) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        try:
            bench = open_bench(options, Path(folder), read_lines(path), write)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        for check in checks:
            if not run_check(check, bench, write):
                return 3
    return 0


def open_bench(options: argparse.Namespace, folder: Path, lines: list[Line], write: Callable[..., None]) -> Any:
    """Device and process group as a training sets them up, and the rates that an earlier process measured.

    Raises:
        UserError: there is no such device, or the process group does not start.
    """
    import vqmoe_ds  # noqa: F401  before torch: it sets how long idle OpenMP threads spin

    # isort: split

    import torch
    from gpu_checks.frame import Bench, Rates
    from gpu_checks.machine import facts

    from vqmoe_ds.runtime.errors import ConfigError
    from vqmoe_ds.runtime.ranks import find_place
    from vqmoe_ds.runtime.torch_setup import set_up_torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"PyTorch {torch.__version__} sees no CUDA device; run this on a machine with one, or the same code with "
            "--device cpu --small"
        )
    place = find_place()
    device = set_up_torch(place)
    if not any(line["case"] == "facts" for line in lines):
        write(None, "facts", MEASURED, facts(device))
    measured = [line["figures"] for line in lines if line["case"] == "rates"]
    known = Rates(measured[0]["copy_GB_s"] * 1e9, measured[0]["product_TFLOP_s"] * 1e12) if measured else None
    gc.collect()
    gc.freeze()  # engines and the frees between cases collect garbage often: what stands here need not be walked again
    return Bench(device, options.small, folder, place, known)


def run_check(check: Check, bench: Any, write: Callable[..., None]) -> bool:
    """Whether the process can go on after it: an error of CUDA stays."""
    from gpu_checks.frame import one_line, poisons

    write(check.number, check.title, BEGINS, {})
    started, usable = time.perf_counter(), True
    try:
        for finding in importlib.import_module(f"gpu_checks.{check.module}").run(bench):
            write(check.number, finding.case, finding.status, finding.figures, finding.why)
        bench.synchronize()
    except Exception as error:
        import traceback

        traceback.print_exc()
        write(check.number, check.title, ERROR, {}, one_line(error))
        usable = not poisons(error)
    write(check.number, check.title, ENDS, {"seconds": round(time.perf_counter() - started, 1)})
    if usable:
        bench.free()
    return usable


if __name__ == "__main__":
    code = main()
    if "--child" in sys.argv:  # NCCL and CUDA may hang as they are taken down
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
