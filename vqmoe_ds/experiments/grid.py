"""A grid of runs: entries (variations of one configuration) x seeds x corpora, read from YAML and checked.

docs/results.md shows one; the keys are the fields of the classes here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vqmoe_ds.config.fields import LARGEST_SEED, MOST_TOKENS
from vqmoe_ds.config.meanings import nearest_key
from vqmoe_ds.config.problems import first_problem
from vqmoe_ds.config.reading import read_yaml
from vqmoe_ds.runtime.errors import ConfigError, shown

MOST_RUNS = 100_000
"""Runs of a grid, at most; each has a folder and a line of the report."""
LONGEST_NAME = 200
"""Characters of a name, at most; names become folders, and a file system takes 255 bytes."""

Name = Annotated[str, Field(max_length=LONGEST_NAME, pattern="[A-Za-z0-9]")]
"""A name that becomes a folder, for which it must hold a letter or a digit."""
Seeds = Annotated[list[Annotated[int, Field(ge=0, le=LARGEST_SEED)]], Field(max_length=MOST_RUNS)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Entry(_Part):
    """One variation: its overrides, and the entries it is compared with."""

    name: Name
    group: str = "all"
    overrides: dict[str, Any] = Field(default={}, alias="set")
    preset: str | None = None
    """Preset to start from, in place of the grid's."""
    seeds: Seeds | None = None
    corpora: list[str] | None = None
    """Corpora of the grid that it runs on; None: all."""


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
    """Scoring of the run's held-out data with ``launchers/evaluate.py``, damaged as it says."""

    corrupt: list[str] = []
    """Corruptions, each KIND or KIND:RATE, of images KIND or KIND:SEVERITY; ``all``: every kind."""
    seeds: int = Field(default=3, ge=1, le=10_000)
    """Draws of each damage to text."""
    stride: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    """Tokens of text scored per window; None: half the context."""
    max_tokens: int | None = Field(default=None, ge=2, le=MOST_TOKENS)
    """Tokens read, at most; None: all that is held out."""
    shift: list[str] = []
    """Texts of other domains, or prepared prefixes, that are scored as well."""
    attacks: list[str] = []
    """Attacks on classifiers of images."""
    eps: list[float] = Field(default=[1.0, 2.0], min_length=1)
    """Largest change of a value by an attack, in 255ths."""


class Grid(_Part):
    """The whole file."""

    preset: str = "tiny"
    ds_config: str
    overrides: dict[str, Any] = Field(default={}, alias="set")
    seeds: Seeds
    corpora: dict[Name, dict[str, Any]]
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
        values = read_yaml(path, "grid")
        if not isinstance(values, dict):
            raise ConfigError(f"grid {path} has no keys; give ds_config, seeds, corpora and entries (docs/results.md)")
        grid = Grid.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"grid {path}: {_sentence(error)}") from None
    for check in (_check_size, _check_seeds, _check_names, _check_groups):
        check(grid, path)
    return grid


def runs_of(grid: Grid, out: Path) -> list[Run]:
    """All runs in the order of their indices: corpus by corpus, seed by seed, so that pairs are complete early."""
    # Indices follow from the grid alone, never from what is there: the tasks of a job array read it one after another.
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
        # Last, so that no entry has another seed or folder than those by which it is paired and found.
        "train.seed": run.seed,
        "run.run_dir": str(run.folder),
    }


def group_of(grid: Grid, entry: Entry) -> Group:
    return grid.groups.get(entry.group, Group())


def _check_size(grid: Grid, path: str) -> None:
    runs = sum(
        len(entry.seeds or grid.seeds) * (len(grid.corpora) if entry.corpora is None else len(entry.corpora))
        for entry in grid.entries
    )
    if runs > MOST_RUNS:
        raise ConfigError(f"grid {path} has {runs:,} runs, and {MOST_RUNS:,} are the most; split it")


def _check_seeds(grid: Grid, path: str) -> None:
    for name, seeds in [("the grid", grid.seeds), *((f"entry {e.name}", e.seeds) for e in grid.entries)]:
        if seeds is not None and (not seeds or len(set(seeds)) < len(seeds)):
            problem = f"names seed {_twice(seeds)} twice" if seeds else "has no seeds"
            raise ConfigError(f"grid {path}: {name} {problem}; give distinct ones, such as seeds: [1, 2, 3]")


def _check_names(grid: Grid, path: str) -> None:
    for kind, names in (("entry", [entry.name for entry in grid.entries]), ("corpus", list(grid.corpora))):
        if not names:
            raise ConfigError(f"grid {path} has no {kind}; there is nothing to run")
        slugs = Counter(_slug(name) for name in names)
        for name in names:
            if slugs[_slug(name)] > 1:
                folder = _slug(name)
                raise ConfigError(f"grid {path}: more than one {kind} is named {name} (folder {folder}); rename one")
    for entry in grid.entries:
        if entry.corpora == []:
            raise ConfigError(f"grid {path}: entry {entry.name} has no corpora; leave the key out for all of the grid")
        for corpus in entry.corpora or []:
            if corpus not in grid.corpora:
                near = nearest_key(corpus, list(grid.corpora))
                raise ConfigError(f"grid {path}: entry {entry.name} names the corpus {shown(corpus)}; {near}")


def _check_groups(grid: Grid, path: str) -> None:
    used = {entry.group for entry in grid.entries}
    for name in grid.groups:
        if name not in used:
            raise ConfigError(f"grid {path}: group {shown(name)} has no entry; {nearest_key(name, sorted(used))}")
    for entry in grid.entries:
        if grid.groups and entry.group not in grid.groups:
            near = nearest_key(entry.group, list(grid.groups))
            raise ConfigError(f"grid {path}: entry {entry.name} is in the unknown group {shown(entry.group)}; {near}")
    for name, group in grid.groups.items():
        members = [entry.name for entry in grid.entries if entry.group == name]
        others = [entry.name for entry in grid.entries if entry.group != name]
        for baselines, known, where in ((group.baselines, members, "of"), (group.other_budgets, others, "outside")):
            if len(set(baselines)) < len(baselines):
                raise ConfigError(f"grid {path}: group {shown(name)} names a baseline twice; name each once")
            for baseline in baselines:
                if baseline not in known:
                    near = nearest_key(baseline, known)
                    raise ConfigError(
                        f"grid {path}: baseline {shown(baseline)} is no entry {where} group {shown(name)}; {near}"
                    )


def _slug(name: str) -> str:
    # Without dots at its ends no name is ``..`` or a hidden folder.
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")


def _twice(seeds: Iterable[int]) -> int:
    return Counter(seeds).most_common(1)[0][0]


def _sentence(error: ValidationError) -> str:
    first = first_problem(error)
    if first.kind == "extra_forbidden":
        place = tuple(error.errors()[0]["loc"])
        return f"unknown key {first.where}; {nearest_key(str(place[-1]), _known_keys(place))}"
    return f"{first.where or 'the file'}: {first.message[0].lower()}{first.message[1:]}"


def _known_keys(place: tuple[int | str, ...]) -> list[str]:
    parts: dict[str, type[_Part]] = {"entries": Entry, "groups": Group, "evaluate": Evaluation}
    part = parts.get(str(place[0]), Grid) if len(place) > 1 else Grid
    return [info.alias or name for name, info in part.model_fields.items()]
