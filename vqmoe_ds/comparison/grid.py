"""A grid of runs: entries (variations of one configuration) x seeds x corpora, read from YAML and checked.

docs/results.md shows one; the keys are the fields of the classes here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vqmoe_ds.config.load import nearest_key, read_yaml
from vqmoe_ds.errors import ConfigError
from vqmoe_ds.evaluation.corruption import parse_corruption


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Entry(_Part):
    """One variation: what it overrides, and with whom it is compared."""

    name: str
    group: str = "all"
    overrides: dict[str, Any] = Field(default={}, alias="set")
    preset: str | None = None
    """Another starting point than the grid's."""
    seeds: list[int] | None = None
    corpora: list[str] | None = None
    """Those of the grid it runs on; None: all."""


class Group(_Part):
    """Entries that are compared with each other, so of one budget."""

    baselines: list[str] = []
    """Entries from which the others' paired differences are taken; the first one is the budget's yardstick too."""
    other_budgets: list[str] = []
    """Entries of other groups that they are held against as well; the report says that their budget is another."""
    tolerance: float = Field(default=0.0, ge=0)
    """Largest difference of stored numbers and of FLOPs from the yardstick's, as a share."""
    noncausal: bool = False
    """Whether its routers may look at later tokens, so that its losses are no language-model losses."""


class Evaluation(_Part):
    """Scoring of the run's held-out text with ``launchers/evaluate.py``, damaged as it says."""

    corrupt: list[str]
    """Each KIND or KIND:RATE."""
    seeds: int = Field(default=3, ge=1)
    """Draws of each damage."""
    stride: int | None = Field(default=None, ge=1)
    """Tokens a window scores; None: half the context."""


class Grid(_Part):
    """The whole file."""

    preset: str = "tiny"
    ds_config: str
    overrides: dict[str, Any] = Field(default={}, alias="set")
    seeds: list[int]
    corpora: dict[str, dict[str, Any]]
    """Name -> overrides, ``data.path`` among them."""
    groups: dict[str, Group] = {}
    entries: list[Entry]
    evaluate: Evaluation | None = None


@dataclass(frozen=True)
class Run:
    """One training: an entry on a corpus with a seed."""

    index: int
    corpus: str
    entry: Entry
    seed: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.corpus} | {self.entry.name} | seed {self.seed}"


def read_grid(path: str) -> Grid:
    """The grid of a YAML file.

    Raises:
        ConfigError: unreadable, an unknown key (the nearest is named), nothing to run, a name twice or unknown.
    """
    try:
        grid = Grid.model_validate(read_yaml(path, "grid"))
    except ValidationError as error:
        raise ConfigError(f"grid {path}: {_sentence(error)}") from None
    for check in (_check_seeds, _check_names, _check_groups):
        check(grid, path)
    for spec in grid.evaluate.corrupt if grid.evaluate else []:
        parse_corruption(spec)
    return grid


def runs_of(grid: Grid, out: Path) -> list[Run]:
    """All runs in the order of their indices: corpus by corpus, seed by seed, so that pairs are complete early."""
    runs: list[Run] = []
    for corpus in grid.corpora:
        here = [entry for entry in grid.entries if entry.corpora is None or corpus in entry.corpora]
        for seed in sorted({seed for entry in here for seed in entry.seeds or grid.seeds}):
            for entry in here:
                if seed in (entry.seeds or grid.seeds):
                    folder = out / _slug(corpus) / _slug(entry.name) / f"seed-{seed}"
                    runs.append(Run(len(runs), corpus, entry, seed, folder))
    return runs


def overrides_of(grid: Grid, run: Run) -> dict[str, Any]:
    """The overrides of one run, the more special ones last."""
    return {
        **grid.overrides,
        **grid.corpora[run.corpus],
        **run.entry.overrides,
        "train.seed": run.seed,
        "run.run_dir": str(run.folder),
    }


def group_of(grid: Grid, entry: Entry) -> Group:
    return grid.groups.get(entry.group, Group())


def _check_seeds(grid: Grid, path: str) -> None:
    for name, seeds in [("the grid", grid.seeds), *((f"entry {e.name}", e.seeds) for e in grid.entries)]:
        if seeds is not None and (not seeds or len(set(seeds)) < len(seeds)):
            problem = f"names seed {max(seeds, key=seeds.count)} twice" if seeds else "has no seeds"
            raise ConfigError(f"grid {path}: {name} {problem}; give distinct ones, such as seeds: [1, 2, 3]")


def _check_names(grid: Grid, path: str) -> None:
    for kind, names in (("entry", [entry.name for entry in grid.entries]), ("corpus", list(grid.corpora))):
        if not names:
            raise ConfigError(f"grid {path} has no {kind}; there is nothing to run")
        slugs = [_slug(name) for name in names]
        for name, slug in zip(names, slugs, strict=True):
            if slugs.count(slug) > 1:
                raise ConfigError(f"grid {path}: more than one {kind} is named {name} (folder {slug}); rename one")
    for entry in grid.entries:
        for corpus in entry.corpora or []:
            if corpus not in grid.corpora:
                near = nearest_key(corpus, list(grid.corpora))
                raise ConfigError(f"grid {path}: entry {entry.name} names the corpus {corpus!r}; {near}")


def _check_groups(grid: Grid, path: str) -> None:
    used = {entry.group for entry in grid.entries}
    for name in grid.groups:
        if name not in used:
            raise ConfigError(f"grid {path}: group {name!r} has no entry; {nearest_key(name, sorted(used))}")
    for entry in grid.entries:
        if grid.groups and entry.group not in grid.groups:
            near = nearest_key(entry.group, list(grid.groups))
            raise ConfigError(f"grid {path}: entry {entry.name} is in the unknown group {entry.group!r}; {near}")
    for name, group in grid.groups.items():
        members = [entry.name for entry in grid.entries if entry.group == name]
        others = [entry.name for entry in grid.entries if entry.group != name]
        for baselines, known, where in ((group.baselines, members, "of"), (group.other_budgets, others, "outside")):
            for baseline in baselines:
                if baseline not in known:
                    near = nearest_key(baseline, known)
                    raise ConfigError(f"grid {path}: baseline {baseline!r} is no entry {where} group {name!r}; {near}")


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key {where}; {nearest_key(str(first['loc'][-1]), _known_keys(first['loc']))}"
    return f"{where or 'the file'}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _known_keys(place: tuple[int | str, ...]) -> list[str]:
    parts: dict[str, type[_Part]] = {"entries": Entry, "groups": Group, "evaluate": Evaluation}
    part = parts.get(str(place[0]), Grid) if len(place) > 1 else Grid
    return [info.alias or name for name, info in part.model_fields.items()]
