"""The ten checks by name, and the tables at the end. Standard library alone."""

from __future__ import annotations

from typing import Any, NamedTuple

from measuring import table

BEGINS, ENDS = "begins", "ends"
"""Events of a check; all other words are of a finding."""
PASSED, FAILED, MEASURED, SKIPPED, ERROR, TIMEOUT = "passed", "failed", "measured", "skipped", "error", "timeout"
MET, MISSED = "met", "missed"
"""Findings on aims for speed and memory; to miss one is no failure."""
BAD = (FAILED, ERROR, TIMEOUT)
STATUSES = (PASSED, MET, MEASURED, SKIPPED, MISSED, *BAD)


class Check(NamedTuple):
    number: int
    title: str
    seconds: float
    """Its deadline."""
    module: str


CHECKS = (
    Check(0, "machine and its rates", 60, "machine"),
    Check(1, "grouped products and experts", 45, "grouped"),
    Check(2, "layers against oracles", 60, "oracles"),
    Check(3, "host waits", 60, "syncs"),
    Check(4, "ZeRO stages and precisions", 80, "stages"),
    Check(5, "equal to the last bit", 70, "exact"),
    Check(6, "checkpoints to the CPU and back", 45, "across"),
    Check(7, "time of a layer", 150, "layers"),
    Check(8, "time of a step", 120, "steps"),
    Check(9, "profile of a step", 45, "profiling"),
)

Line = dict[str, Any]


def final_report(lines: list[Line]) -> str:
    """Tables of the checks, of layers and steps, and of the aims, as far as there are any."""
    parts = [_summary(lines), _layers(lines), _steps(lines), _aims(lines)]
    return "\n\n".join(["", *filter(None, parts)])


def _summary(lines: list[Line]) -> str:
    rows = []
    for check in CHECKS:
        mine = [line for line in lines if line["check"] == check.number]
        if not mine:
            continue
        counts = {status: sum(line["status"] == status for line in mine) for status in STATUSES}
        told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        seconds = next((f"{line['figures']['seconds']:g}" for line in mine if line["status"] == ENDS), "")
        first = next((f"{line['case']}: {line['why']}"[:140] for line in mine if line["status"] in BAD), "")
        rows.append([str(check.number), check.title, seconds, told, first])
    return table(["#", "check", "s", "results", "first failure"], rows)


def _layers(lines: list[Line]) -> str:
    names = ("tokens", "hidden", "variant", "ms", "TFLOP_s", "GB_s", "of_roofline", "activations_MiB", "peak_MiB")
    rows = [_cells(line, names) for line in lines if line["check"] == 7 and "variant" in line["figures"]]
    return table([name.replace("_", " ") for name in names], rows) if rows else ""


def _steps(lines: list[Line]) -> str:
    names = ("tokens", "variant", "ms", "forward_ms", "backward_ms", "optimizer_ms", "codebook_sync_ms", "peak_MiB")
    rows = [_cells(line, names) for line in lines if line["check"] == 8 and "variant" in line["figures"]]
    return table([name.replace("_", " ") for name in names], rows) if rows else ""


def _aims(lines: list[Line]) -> str:
    aims = [line for line in lines if line["status"] in (MET, MISSED)]
    rows = [
        [line["case"].removeprefix("aim: "), _number(value(line)), _number(line["figures"]["aim"]), line["status"]]
        for line in aims
    ]
    return table(["aim", "found", "at most", ""], rows) if rows else ""


def value(line: Line) -> float:
    """The figure of an aim: a ratio of two times, or a share."""
    figures = line["figures"]
    return float(figures["ratio"] if "ratio" in figures else figures["share"])


def _cells(line: Line, names: tuple[str, ...]) -> list[str]:
    return [_number(line["figures"].get(name, "")) for name in names]


def _number(cell: Any) -> str:
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:.3g}" if abs(cell) < 1000 else f"{cell:.0f}"
