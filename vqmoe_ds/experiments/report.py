"""The report of a grid's finished runs, as data, as Markdown and as one HTML page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vqmoe_ds.evaluation.plots import drawing, plot_curves, plot_differences
from vqmoe_ds.evaluation.statistics import LEVEL, Difference, Mean, holm, mean_of, paired_difference
from vqmoe_ds.experiments import measures
from vqmoe_ds.experiments.budget import Budget
from vqmoe_ds.experiments.grid import Grid, group_of
from vqmoe_ds.experiments.page import Heading, Page, Picture, Table
from vqmoe_ds.experiments.runs import Job
from vqmoe_ds.runtime.files import write_atomically, write_json

METHOD = (
    "Mean ± standard error over seeds; less is better. Runs of one seed start from the same weights outside the "
    "router and see the same batches in the same order, so differences are taken seed by seed: mean and 95 % "
    "confidence interval (Student's t over the pairs). Where an interval contains zero, or is shown as ending there, "
    "nothing is said to be better. One in twenty intervals misses the truth by chance, so verdicts are corrected for "
    "their number as the caption of their table says. Rise: over the same data undamaged."
)
FAMILY = (
    "Intervals stand each for itself; verdicts stand together: Holm's correction at 5 % over the {family}, the family "
    "of each kind of loss. An entry whose interval leaves zero out, but whose corrected p-value does not stay under "
    "0.05, is among those of whom it cannot be told."
)
POOLED = (
    "Over all pairs of one corpus and one seed. Runs of one seed on two corpora start from the same weights, so pairs "
    "are not quite independent; the interval takes them to be."
)
HEALTH_NOTE = (
    "Tokens a second are the median of the run's intervals, whatever else the machine did. The rest is of the layer "
    "where it is worst, over the second half of training: load of the busiest expert over the mean, coefficient of "
    "variation of all loads, codes in effective use, and the share of a held-out probe's tokens that changed an expert "
    "between two measurements."
)


def collect(grid: Grid, jobs: list[Job], budgets: dict[str, dict[str, Budget]]) -> list[dict[str, Any]]:
    """One section for each corpus and group that has a finished run: everything the report shows, as plain data.

    Args:
        budgets: corpus -> entry -> budget.
    """
    sections = []
    for corpus in grid.corpora:
        for group in dict.fromkeys(entry.group for entry in grid.entries):
            wanted = [job for job in jobs if job.run.corpus == corpus and job.run.entry.group == group]
            finished = [job for job in wanted if job.finished]
            if finished:
                others = group_of(grid, finished[0].run.entry).other_budgets
                beside = [job for job in jobs if job.run.corpus == corpus and job.run.entry.name in others]
                section = _section(grid, finished, [job for job in beside if job.finished], budgets[corpus])
                sections.append({"corpus": corpus, "group": group, "wanted": len(wanted), **section})
    return sections


def _section(grid: Grid, jobs: list[Job], beside: list[Job], budgets: dict[str, Budget]) -> dict[str, Any]:
    """The finished runs of a group on a corpus; ``beside`` are those of other groups that they are held against."""
    by_entry = _folders(jobs)
    losses, unit = _losses(by_entry | _folders(beside))
    settings, train = group_of(grid, jobs[0].run.entry), jobs[0].config.run.train
    baselines = [name for name in [*settings.baselines, *settings.other_budgets] if name in losses]
    differences = _all_differences(by_entry, baselines, losses)
    return {
        "unit": unit,
        "baselines": baselines,
        "other_budgets": settings.other_budgets,
        "finished": len(jobs),
        "steps": train.steps,
        "tokens": train.steps * train.batch_size * jobs[0].config.run.model.sequence_length,
        "entries": {
            name: {
                "budget": asdict(budgets[name]),
                "seeds": sorted(folders),
                "losses": {kind: asdict(mean_of(list(by_seed.values()))) for kind, by_seed in losses[name].items()},
                "by_seed": losses[name],
                "health": _health(folders),
                "differences": differences[name],
                "curve": _curve(folders, unit == "bits/byte"),
            }
            for name, folders in by_entry.items()
        },
    }


def pool(sections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Differences over all pairs of one corpus and one seed, for each group that ran on several corpora."""
    values: dict[str, dict[str, dict[tuple[str, int], float]]] = {}
    for section in sections:
        for name, entry in section["entries"].items():
            for kind, by_seed in entry["by_seed"].items():
                found = {(section["corpus"], seed): value for seed, value in by_seed.items()}
                values.setdefault(name, {}).setdefault(kind, {}).update(found)
    pooled = []
    for group in dict.fromkeys(section["group"] for section in sections):
        parts = [section for section in sections if section["group"] == group]
        bases = [base for base in parts[0]["baselines"] if base in values]
        # Bits per byte and nats per token have no common mean.
        if len(parts) > 1 and len({part["unit"] for part in parts}) == 1:
            names = list(dict.fromkeys(name for part in parts for name in part["entries"]))
            differences = _all_differences(names, bases, values)
            entries = {
                name: {
                    "losses": {kind: asdict(mean_of(list(pairs.values()))) for kind, pairs in values[name].items()},
                    "differences": differences[name],
                }
                for name in names
            }
            about = {"group": group, "corpora": [part["corpus"] for part in parts], "baselines": bases}
            pooled.append({**about, "other_budgets": parts[0]["other_budgets"], "entries": entries})
    return pooled


def _folders(jobs: list[Job]) -> dict[str, dict[int, Path]]:
    """Entry -> seed -> run folder."""
    folders: dict[str, dict[int, Path]] = {}
    for job in jobs:
        folders.setdefault(job.run.entry.name, {})[job.run.seed] = job.run.folder
    return folders


def _losses(by_entry: dict[str, dict[int, Path]]) -> tuple[dict[str, dict[str, dict[int, float]]], str]:
    """Entry -> kind of loss -> seed -> value, and the unit."""
    table: dict[str, dict[str, dict[int, float]]] = {}
    unit = ""
    for name, folders in by_entry.items():
        table[name] = {}
        for seed, folder in folders.items():
            values, unit = measures.losses(folder)
            for kind, value in values.items():
                table[name].setdefault(kind, {})[seed] = value
    return table, unit


Losses = Mapping[str, Mapping[str, Mapping[Any, float]]]
"""Entry -> kind of loss -> seed, or corpus and seed -> value."""


def _all_differences(names: Iterable[str], baselines: list[str], losses: Losses) -> dict[str, dict[str, Any]]:
    """Entry -> baseline -> kind of loss -> difference and verdict, corrected over all of the kind."""
    found = {
        name: {base: _differences(losses[name], losses[base]) for base in baselines if base != name} for name in names
    }
    families: dict[str, list[dict[str, Any]]] = {}
    for of_entry in found.values():
        for of_base in of_entry.values():
            for kind, difference in of_base.items():
                families.setdefault(kind, []).append(difference)
    for family in families.values():
        # One pair alone has no p-value: it is no test, and must not make the others' correction harder.
        _correct([difference for difference in family if difference["p"] is not None])
    return found


def _correct(family: list[dict[str, Any]]) -> None:
    """Add Holm's p-value to each difference of a family, and take back the verdict that it does not bear."""
    for difference, p in zip(family, holm([difference["p"] for difference in family]), strict=True):
        difference["p_holm"] = p
        if p >= LEVEL:
            difference["verdict"] = "cannot be told"


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    found = {kind: paired_difference(ours[kind], theirs[kind]) for kind in ours if kind in theirs}
    return {kind: {**asdict(d), "verdict": d.verdict} for kind, d in found.items() if d is not None}


def _health(folders: dict[int, Path]) -> dict[str, Any]:
    runs = [measures.health(folder) for folder in folders.values()]
    names = [name for name in measures.HEALTH if all(name in run for run in runs)]
    return {name: asdict(mean_of([run[name] for run in runs])) for name in names}


def _curve(folders: dict[int, Path], in_bits: bool) -> list[tuple[int, float, float]]:
    """Step, mean over seeds, standard error."""
    curves = [measures.curve(folder, in_bits) for folder in folders.values()]
    # Where some seeds are further than others, a mean over those alone would bend the curve.
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    means = [mean_of([curve[step] for curve in curves]) for step in steps]
    return [(step, mean.mean, mean.error or 0.0) for step, mean in zip(steps, means, strict=True)]


# -------------------------------------------------------------------- pages


def write_report(folder: Path, title: str, sections: list[dict[str, Any]]) -> None:
    """``report.json``, ``report.md``, ``report.html`` (one file, figures inside) and the figures as PNG."""
    page = Page(title)
    page.add(METHOD)
    for number, section in enumerate(sections):
        _show(page, section, folder, number)
    for section in pool(sections):
        _show_pooled(page, section)
    # After all of ``_show``: the HTML page takes in the figures that it has drawn.
    write_json(folder / "report.json", sections)
    write_atomically(folder / "report.md", page.markdown())
    write_atomically(folder / "report.html", page.html(folder))


def _show_pooled(page: Page, section: dict[str, Any]) -> None:
    page.add(Heading(f"{' and '.join(section['corpora'])} together: {section['group']}"))
    page.add(POOLED)
    _show_differences(page, section)


def _show_differences(page: Page, section: dict[str, Any]) -> None:
    if section["baselines"]:
        page.add(FAMILY.format(family=_family(section)))
    for baseline in section["baselines"]:
        page.add(_difference_table(section, baseline))
        for sentence in _verdicts(section, baseline):
            page.add(sentence)


def _show(page: Page, section: dict[str, Any], folder: Path, number: int) -> None:
    page.add(Heading(f"{section['corpus']}: {section['group']}"))
    page.add(
        f"{section['finished']} of {section['wanted']} runs are finished; {section['steps']:,} steps, "
        f"{section['tokens']:,} tokens each. Losses in {section['unit']}."
    )
    page.add(_loss_table(section))
    _show_differences(page, section)
    page.add(HEALTH_NOTE)
    page.add(_health_table(section))
    with drawing(page.add):
        _draw(page, section, folder, number)


def _draw(page: Page, section: dict[str, Any], folder: Path, number: int) -> None:
    curves, forest = f"curves-{number}.png", f"differences-{number}.png"
    entries = section["entries"]
    unit = "nats" if section["unit"] == measures.ERRORS else section["unit"]
    plot_curves(folder / curves, {name: entry["curve"] for name, entry in entries.items()}, unit)
    page.add(Picture(curves, f"Training loss, {section['corpus']}, {section['group']}"))
    for baseline in section["baselines"][:1]:
        found = {name: e["differences"][baseline] for name, e in entries.items() if baseline in e["differences"]}
        rows = {name: d[measures.CLEAN] for name, d in found.items() if measures.CLEAN in d}
        if rows:
            plot_differences(folder / forest, rows, f"{section['unit']} against {baseline}")
            page.add(Picture(forest, f"Paired differences to {baseline} with 95 % intervals"))


def _loss_table(section: dict[str, Any]) -> Table:
    kinds = _kinds(section)
    head = ["entry", "stored", "FLOPs/token", "of the router", "expert calls", "seeds"]
    head += kinds
    rows = []
    for name, entry in _ranked(section):
        cost = entry["budget"]
        row = [name, f"{cost['stored']:,}", f"{cost['flops']:,}", f"{cost['router_flops']:,}"]
        row += [str(cost["expert_calls"]), str(len(entry["seeds"]))]
        row += [_mean(entry["losses"].get(kind), 4) for kind in kinds]
        rows.append(row)
    return Table(head, rows)


def _difference_table(section: dict[str, Any], baseline: str) -> Table:
    kinds = _kinds(section)
    rows = [
        [name, *(_difference(entry["differences"][baseline].get(kind)) for kind in kinds)]
        for name, entry in _ranked(section)
        if baseline in entry["differences"]
    ]
    other = " (another budget)" if baseline in section["other_budgets"] else ""
    return Table([f"difference to {baseline}{other}", *kinds], rows)


def _family(section: dict[str, Any]) -> str:
    """The largest family in words: the differences of every entry to every baseline that have an interval."""
    found = [d for entry in section["entries"].values() for d in entry["differences"].values()]
    sizes = [sum(kind in d and d[kind]["p"] is not None for d in found) for kind in _kinds(section)]
    bases = ", ".join(section["baselines"])
    return f"{max(sizes)} difference(s) of this section's entries to {bases}"


def _kinds(section: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(kind for entry in section["entries"].values() for kind in entry["losses"]))


def _ranked(section: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Entries by their clean loss, the least first."""
    return sorted(section["entries"].items(), key=lambda item: item[1]["losses"][measures.CLEAN]["mean"])


def _health_table(section: dict[str, Any]) -> Table:
    names = [n for n in measures.HEALTH if any(n in entry["health"] for entry in section["entries"].values())]
    digits = {"tokens_per_second": 0, "code_perplexity": 1}
    rows = [
        [name, *(_mean(entry["health"].get(measure), digits.get(measure, 3)) for measure in names)]
        for name, entry in _ranked(section)
    ]
    return Table(["entry", *(name.replace("_", " ") for name in names)], rows)


def _verdicts(section: dict[str, Any], baseline: str) -> list[str]:
    """A sentence for each kind of loss: who is better or worse than the baseline, and of whom it cannot be told; one
    for all kinds in which it can be told of nobody."""
    sentences, undecided = [], []
    for kind in _kinds(section):
        groups: dict[str, list[str]] = {"better": [], "worse": [], "cannot be told": []}
        for name, entry in _ranked(section):
            found = entry["differences"].get(baseline, {}).get(kind)
            if found is not None:
                groups[found["verdict"]].append(name)
        parts = [f"{verdict}: {', '.join(names)}" for verdict, names in groups.items() if names]
        if groups["better"] or groups["worse"]:
            sentences.append(f"Against {baseline}, {kind}: {'; '.join(parts)}.")
        elif parts:
            undecided.append(kind)
    if undecided:
        sentences.append(f"Against {baseline}, it cannot be told of any entry: {'; '.join(undecided)}.")
    return sentences or [f"Nothing to compare with {baseline} yet."]


def _mean(value: dict[str, Any] | None, digits: int) -> str:
    return "–" if value is None else Mean(**value).show(f",.{digits}f")


def _difference(value: dict[str, Any] | None) -> str:
    return "–" if value is None else Difference(**{key: value[key] for key in ("mean", "low", "high", "pairs")}).show()
