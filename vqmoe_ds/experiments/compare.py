"""The command of ``tools/compare_routers.py``: check the whole grid, run what is missing, write the report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from vqmoe_ds.config.load import parse_override
from vqmoe_ds.config.meanings import nearest_key
from vqmoe_ds.config.routers import add_plugin_option
from vqmoe_ds.experiments.grid import Grid, group_of, read_grid, runs_of
from vqmoe_ds.experiments.runs import Job, Runner, check_folders, jobs_of
from vqmoe_ds.runtime.errors import TRY_AGAIN, ConfigError, reports_errors
from vqmoe_ds.runtime.files import make_folder


def build_parser(description: str) -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=form)
    add = parser.add_argument
    add("grid", metavar="GRID.yaml", help="entries, seeds, corpora, groups (docs/results.md)")
    add("--out", required=True, metavar="DIR", help="run folders and report")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="override a setting that the entries share")
    add("--only", nargs="+", metavar="NAME", help="run only these entries (the report shows all)")
    add("--index", type=int, metavar="I", help="run only the run of this index of --list, without a report")
    add("--list", action="store_true", help="print the index, state and folder of every run, and stop")
    add("--report_only", action="store_true", help="write the report of what is finished, and stop")
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time (default 1)")
    add("--prefix", default="", metavar="WORDS", help="put before every command, such as 'nice -n 10' or 'srun -n 1'")
    add(
        "--changed",
        choices=("refuse", "rerun"),
        default="refuse",
        help="what to do with a run that was made with another configuration (rerun throws it away)",
    )
    add_plugin_option(parser)
    return parser


@reports_errors
def main(args: argparse.Namespace) -> int:
    """Run a grid; returns the exit code: 0 done, 1 a run failed, 2 bad input, 75 interrupted."""
    if args.jobs < 1:
        raise ConfigError(f"--jobs {args.jobs}: give 1 or more")
    try:
        grid = read_grid(args.grid)
        shared = {**grid.overrides, **dict(parse_override(text) for text in args.set)}
        grid = grid.model_copy(update={"overrides": shared})
        jobs = jobs_of(grid, runs_of(grid, Path(args.out)))
        if args.list:
            # A tab, by which scripts tell the folder, whatever spaces it has.
            print("\n".join(f"{job.run.index} {job.state():<10} {job.run}\t{job.run.folder}" for job in jobs))
            return 0
        # All that may be refused comes before the first run: a grid may take days.
        _check_causality(grid, jobs)
        budgets = _budgets(grid, jobs)
        chosen = _chosen(jobs, args)
        if not args.report_only:
            rerun = args.changed == "rerun"
            check_folders(chosen, rerun)
            _make_out(Path(args.out))
            failures = Runner(chosen, args.jobs, args.prefix, rerun, lambda line: print(line, flush=True)).run()
        else:
            failures = []
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return TRY_AGAIN
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    # Tasks of a job array write no report: each would be one of part of the runs, under the same names.
    if args.index is None:
        try:
            _report(grid, jobs, budgets, Path(args.out), Path(args.grid).stem)
        except OSError as error:
            raise ConfigError(f"the report cannot be written to {args.out} ({error.strerror}); name another") from None
    return 1 if failures else 0


def _make_out(folder: Path) -> None:
    try:
        make_folder(folder)
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be made ({error.strerror}); name another") from None


def _chosen(jobs: list[Job], args: argparse.Namespace) -> list[Job]:
    if args.index is not None:
        if not 0 <= args.index < len(jobs):
            raise ConfigError(f"--index {args.index}: the grid has runs 0 to {len(jobs) - 1}")
        return [jobs[args.index]]
    names = list(dict.fromkeys(job.run.entry.name for job in jobs))
    for name in args.only or []:
        if name not in names:
            raise ConfigError(f"--only {name}: the grid has no such entry; {nearest_key(name, names)}")
    return [job for job in jobs if not args.only or job.run.entry.name in args.only]


def _check_causality(grid: Grid, jobs: list[Job]) -> None:
    """Refuse to compare routers that look ahead with causal ones, or to have them generate text."""
    for job in jobs:
        run, entry = job.config.run, job.run.entry
        if run.model.image_size:
            continue  # every classifier of images looks at all of an image
        if not group_of(grid, entry).noncausal:
            run.require_causal(f"entry {entry.name} in group {entry.group!r}, which is not marked noncausal: true,")
        # A run whose router looks ahead leaves the default's sample out (``FinalReport``); one that is asked for is
        # refused.
        if run.run.sample_tokens and "run.sample_tokens" in {**grid.overrides, **entry.overrides}:
            run.require_causal(f"entry {entry.name} with run.sample_tokens={run.run.sample_tokens}, generating text,")


def _budgets(grid: Grid, jobs: list[Job]) -> dict[str, dict[str, Any]]:
    """Corpus -> entry -> budget, for a corpus may set the size of models; printed, and checked group by group."""
    from vqmoe_ds.experiments.budget import Budget, budget_of, check_group

    budgets: dict[str, dict[str, Budget]] = {}
    for job in jobs:
        of_corpus = budgets.setdefault(job.run.corpus, {})
        if job.run.entry.name not in of_corpus:
            of_corpus[job.run.entry.name] = budget_of(job.config.run)
    print(f"{len(jobs)} runs; stored numbers and FLOPs a token of every entry:")
    for entry in grid.entries:
        found: dict[Budget, list[str]] = {}
        for corpus, of_corpus in budgets.items():
            if entry.name in of_corpus:
                found.setdefault(of_corpus[entry.name], []).append(corpus)
        for budget, corpora in found.items():
            name = entry.name if len(found) == 1 else f"{entry.name} on {', '.join(corpora)}"
            print(f"  {entry.group} | {name}: {budget.stored:,} | {budget.flops:,} ({budget.router_flops:,} routing)")
    for of_corpus in budgets.values():
        for group in dict.fromkeys(entry.group for entry in grid.entries):
            names = [entry.name for entry in grid.entries if entry.group == group and entry.name in of_corpus]
            if names:
                settings = group_of(grid, next(entry for entry in grid.entries if entry.group == group))
                yardstick = next((name for name in settings.baselines if name in names), names[0])
                check_group(group, {name: of_corpus[name] for name in names}, yardstick, settings.tolerance)
    return budgets


def _report(grid: Grid, jobs: list[Job], budgets: dict[str, dict[str, Any]], out: Path, name: str) -> None:
    from vqmoe_ds.experiments.report import collect, write_report

    sections = collect(grid, jobs, budgets)
    if not sections:
        print("no run is finished; there is nothing to report")
        return
    write_report(out, f"Comparison: {name}", sections)
    print(f"report: {out / 'report.html'}, report.md, report.json")
