#!/usr/bin/env python
"""Routers compared at the learning rate that is best for each: rates are tried on two seeds, the best on fresh ones.

    nice python benchmarks/best_rates.py --out runs/rates --jobs 2 > rates.log 2>&1 &

trains ``benchmarks/grids/rates.yaml`` in ``OUT/tried``, chooses for every router the rate with the least mean loss over
corpora and seeds, writes the grid of these to ``OUT/best.yaml`` and trains it in ``OUT/best``, whose report is the
comparison. Seeds that chose a rate take no part in it; the damage of the grid's ``evaluate`` is scored in this round
alone. Interrupted, the same command goes on. Options that this command does not have go to
``tools/compare_routers.py``, in both rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vqmoe_ds.config.fields import LARGEST_SEED
from vqmoe_ds.experiments import compare
from vqmoe_ds.experiments.grid import Grid, read_grid
from vqmoe_ds.experiments.measures import CLEAN
from vqmoe_ds.runtime.errors import ConfigError, reports_errors
from vqmoe_ds.runtime.files import make_folder, write_json

GRID = Path(__file__).resolve().parent / "grids/rates.yaml"
FIELD = "train.learning_rate"
FRESH = [4, 5, 6]
"""Seeds of the comparison, by default: neither those of the grids that try rates nor those of controls.yaml."""
Tried = dict[str, dict[float, list[float]]]
"""Router -> learning rate -> losses of its finished runs, over corpora and seeds."""


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Try, choose, compare; returns the exit code of ``tools/compare_routers.py``."""
    options, rest = parse(argv)
    out = Path(options.out)
    grid = read_grid(options.grid)
    # All that may be refused comes before the first run: the first round takes hours.
    check(grid, options.seeds)
    code = compare_in(out / "tried", write(grid.model_copy(update={"evaluate": None}), out / "tried.yaml"), rest)
    report = out / "tried/report.json"
    if code not in (0, 1) or not report.exists():  # 1: a run failed, as one that diverges does
        return code
    best = choose(losses_of(grid, json.loads(report.read_text("utf-8"))))
    chosen = write(grid_of_the_best(grid, best, options.seeds), out / "best.yaml")
    ends = {choice(overrides[FIELD] for overrides in grid.corpora.values()) for choice in (min, max)}
    for name, rate in best.items():
        print(f"{name}: {rate:g}{', an end of the rates tried' if rate in ends else ''}")
    return compare_in(out / "best", chosen, rest)


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--grid", default=str(GRID), metavar="YAML", help="with corpora TEXT at RATE")
    parser.add_argument("--out", required=True, metavar="DIR", help="both rounds, and the grid of the second")
    parser.add_argument("--seeds", type=int, nargs="+", default=FRESH, metavar="N", help="fresh ones (default 4 5 6)")
    return parser.parse_known_args(argv)


def write(grid: Grid, path: Path) -> str:
    """Write a grid, and return its path."""
    try:
        make_folder(path.parent)
        write_json(path, grid.model_dump(by_alias=True, exclude_defaults=True))  # which is YAML too
    except OSError as error:
        raise ConfigError(f"--out {path.parent} cannot be written ({error.strerror}); name another") from None
    return str(path)


def compare_in(folder: Path, grid: str, rest: list[str]) -> int:
    return compare.main(compare.build_parser("").parse_args([grid, "--out", str(folder), *rest]))


def losses_of(grid: Grid, sections: list[dict[str, Any]]) -> Tried:
    """Losses in a report of a grid whose corpora name a learning rate; ``--list`` may find that of another grid."""
    names = {entry.name for entry in grid.entries}
    tried: Tried = {}
    for section in sections:
        rate = grid.corpora.get(section["corpus"], {}).get(FIELD)
        for name, entry in section["entries"].items():
            if rate is None or name not in names:
                continue
            tried.setdefault(name, {}).setdefault(rate, []).extend(entry["by_seed"][CLEAN].values())
    return tried


def choose(tried: Tried) -> dict[str, float]:
    """The rate of each router with the least mean loss; rates at which runs failed or diverged are left out.

    Raises:
        ConfigError: a router of which no rate has all its runs.
    """
    best = {}
    runs = max((len(losses) for rates in tried.values() for losses in rates.values()), default=0)
    for name, rates in tried.items():
        means = {r: sum(v) / runs for r, v in rates.items() if len(v) == runs and all(map(math.isfinite, v))}
        if not means:
            raise ConfigError(f"{name} has no learning rate with {runs} finished runs; look at the logs of its runs")
        best[name] = min(means, key=means.__getitem__)
    return best


def check(grid: Grid, seeds: list[int]) -> None:
    """Refuse what cannot choose rates, or compare at them.

    Raises:
        ConfigError: a seed that chooses the rates, an entry that is not tried as the others are, or as ``by_name``.
    """
    known = ", ".join(map(str, grid.seeds))
    for seed in seeds:
        if seed in grid.seeds or seeds.count(seed) > 1 or not 0 <= seed <= LARGEST_SEED:
            raise ConfigError(
                f"--seeds {seed}: give distinct ones from 0 on, other than {known}, which choose the rates"
            )
    for entry in grid.entries:
        if entry.seeds is not None or entry.corpora is not None or FIELD in entry.overrides:
            raise ConfigError(
                f"entry {entry.name} has seeds, corpora or a {FIELD} of its own, and every router is tried on those of "
                "the grid; leave them out"
            )
    by_name(grid)


def by_name(grid: Grid) -> dict[str, dict[str, Any]]:
    """The corpora without their rates: those named ``TEXT at RATE`` are one.

    Raises:
        ConfigError: a corpus without a rate, or of another setting than others of its name.
    """
    found: dict[str, dict[str, Any]] = {}
    for corpus, overrides in grid.corpora.items():
        name, at, _ = corpus.partition(" at ")
        others = {field: value for field, value in overrides.items() if field != FIELD}
        if not at or FIELD not in overrides or found.setdefault(name, others) != others:
            raise ConfigError(
                f"corpus {corpus}: name corpora TEXT at RATE, set their {FIELD}, and let those of one TEXT differ in "
                "nothing else"
            )
    return found


def grid_of_the_best(grid: Grid, best: dict[str, float], seeds: list[int]) -> Grid:
    """The grid with fresh seeds, the rate of each entry in its settings, and each corpus once.

    Raises:
        ConfigError: an entry without a rate.
    """
    missing = [entry.name for entry in grid.entries if entry.name not in best]
    if missing:
        raise ConfigError(f"{missing[0]} has no finished run, so no rate can be chosen for it; run the whole grid")
    entries = [e.model_copy(update={"overrides": {**e.overrides, FIELD: best[e.name]}}) for e in grid.entries]
    return grid.model_copy(update={"seeds": seeds, "corpora": by_name(grid), "entries": entries})


if __name__ == "__main__":
    sys.exit(main())
