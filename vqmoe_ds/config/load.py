"""Joins preset, YAML file and ``--set`` overrides into one ``RunConfig``, with errors a person can act on."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from vqmoe_ds.config.fields import RENAMED, deprecation, with_current_names
from vqmoe_ds.config.meanings import elsewhere, nearest_key
from vqmoe_ds.config.problems import Problem, first_problem
from vqmoe_ds.config.reading import LARGEST, check_plain, parse_yaml, read_yaml, to_yaml_text
from vqmoe_ds.config.routers import RouterOptions, router_class, routers
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.runtime.errors import ConfigError, shown


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration and which of its fields the user set by file or command line (dotted names)."""

    config: RunConfig
    explicit: frozenset[str]
    notes: tuple[str, ...] = ()
    """Sentences for the user on names of fields that are deprecated."""

    def print_notes(self) -> None:
        """Tell the user, beside what a command prints."""
        for note in self.notes:
            print(note, file=sys.stderr)


class FieldRow(NamedTuple):
    """One field, as help and pages show it."""

    name: str
    """Dotted."""
    default: str
    unit: str
    meaning: str
    choices: tuple[str, ...]
    """All values there are, where they are few."""

    @property
    def told(self) -> str:
        """The meaning, with the choices that it does not name."""
        if all(choice in self.meaning for choice in self.choices):
            return self.meaning
        return f"{self.meaning} (choices: {', '.join(self.choices)})"


def preset_names() -> list[str]:
    """Names for ``--preset``."""
    folder = resources.files("vqmoe_ds.config").joinpath("presets")
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_config(
    preset: str = "tiny",
    file: str | None = None,
    overrides: dict[str, Any] | None = None,
    base: dict[str, Any] | None = None,
) -> LoadedConfig:
    """Fill a ``RunConfig``: preset first, then the YAML file, then overrides (dotted name -> value).

    Args:
        base: sections to start from instead of a preset.

    Raises:
        ConfigError: unknown preset or key (the nearest known one is named), wrong type, contradiction.
    """
    values = _read_preset(preset) if base is None else base
    explicit: set[str] = set()
    given = {} if file is None else _read_sections(file)
    named = [f"{section}.{name}" for section, part in given.items() if isinstance(part, dict) for name in part]
    notes = tuple(deprecation(name) for name in dict.fromkeys([*named, *(overrides or {})]) if name in RENAMED)
    values = _merge(values, given, explicit)
    known = _fields() if overrides else []
    nested: dict[str, dict[str, Any]] = {}
    for name, value in (overrides or {}).items():
        if RENAMED.get(name, name) not in known:
            if name.startswith("router."):
                _check_router(overrides or {}, values)
            raise ConfigError(f"--set {shown(name)[1:-1]}: no such field; {_meant(name, known)}")
        section, _, field = name.partition(".")
        nested.setdefault(section, {})[field] = value
    values = _merge(values, nested, explicit)
    # Files and --set have been checked; values of short names (--lr, --run_dir) come from argparse as they were given.
    check_plain(values, "configuration")
    try:
        return LoadedConfig(RunConfig.model_validate(values), frozenset(explicit), notes)
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from None


def _check_router(overrides: dict[str, Any], values: dict[str, Any]) -> None:
    """Refuse an unknown router: its options are no fields, and their names lead nowhere."""
    moe = values.get("moe")
    name = overrides.get("moe.router", moe.get("router") if isinstance(moe, dict) else None)
    try:
        if isinstance(name, str):
            router_class(name)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _read_preset(preset: str) -> dict[str, Any]:
    if preset not in preset_names():
        raise ConfigError(f"preset {shown(preset)} is unknown; {nearest_key(preset, preset_names())}")
    text = resources.files("vqmoe_ds.config").joinpath("presets", f"{preset}.yaml").read_text("utf-8")
    return parse_yaml(text, f"preset {preset}") or {}


def parse_override(text: str) -> tuple[str, Any]:
    """``section.field=value`` -> (name, value as YAML reads it)."""
    name, separator, value = text.partition("=")
    if not separator or "." not in name:
        raise ConfigError(
            f"--set {shown(text)} is not of the form section.field=value, for example moe.num_experts=64"
            + (_without_section(name.strip()) or elsewhere(name.strip(), "; "))
        )
    name = name.strip()
    if len(value) > LARGEST:
        raise ConfigError(f"--set {name}: the value is longer than {LARGEST:,} characters")
    return name, parse_yaml(value, f"--set {shown(text)[1:-1]}")


def _without_section(name: str) -> str:
    """The end of a sentence on a name of ours that lacks its section; else nothing."""
    meant = [field for field in _fields() if field.partition(".")[2] == name]
    return f"; did you mean {' or '.join(meant)}?" if meant else ""


def field_table(config: RunConfig | None = None) -> list[FieldRow]:
    """Every field, in the order of the schema, with its value in ``config`` for the default (None: the schema's)."""
    config = config or RunConfig()
    rows = []
    for section in RunConfig.model_fields:
        values: BaseModel = getattr(config, section)
        if isinstance(values, RouterOptions):
            rows += _router_rows(values)
            continue
        for name, info in type(values).model_fields.items():
            rows.append(_row(f"{section}.{name}", info, getattr(values, name)))
    return rows


def _router_rows(values: RouterOptions) -> list[FieldRow]:
    """Fields of all routers, each once, with the routers that read it."""
    readers: dict[str, dict[str, list[str]]] = {}
    infos: dict[str, tuple[FieldInfo, Any]] = {}
    for router, kind in routers().items():
        for name, info in kind.Options.model_fields.items():
            readers.setdefault(name, {}).setdefault(info.description or "", []).append(router)
            infos.setdefault(name, (info, info.get_default(call_default_factory=True)))
    rows = []
    for name, (info, default) in infos.items():
        told = "; ".join(f"{', '.join(names)}: {meaning}" for meaning, names in readers[name].items())
        row = _row(f"router.{name}", info, getattr(values, name, default))
        rows.append(row._replace(meaning=told))
    return rows


def _row(name: str, info: FieldInfo, value: Any) -> FieldRow:
    extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
    choices = tuple(routers()) if name == "moe.router" else _choices(info.annotation)
    return FieldRow(name, _written(value), str(extra.get("unit", "")), info.description or "", choices)


def _written(value: Any) -> str:
    """A value as ``--set`` takes it; none where there is nothing."""
    if value is None or value == ():
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(getattr(value, "value", value))


def _choices(annotation: Any) -> tuple[str, ...]:
    if get_origin(annotation) is Literal:
        return tuple(map(_written, get_args(annotation)))
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return tuple(annotation)
    return ()


def to_yaml(config: RunConfig) -> str:
    """The whole configuration as YAML, ready for ``--config``."""
    return to_yaml_text(config.model_dump(mode="json"))


def _read_sections(file: str) -> dict[str, Any]:
    values = read_yaml(file, "config file")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"config file {file} must hold sections such as model: and moe:, not a {type(values).__name__}"
        )
    # A section whose fields are all commented out is empty, not wrong.
    return {name: {} if part is None and name in RunConfig.model_fields else part for name, part in values.items()}


def _merge(base: dict[str, Any], extra: dict[str, Any], explicit: set[str]) -> dict[str, Any]:
    merged = dict(base)
    for section, fields in extra.items():
        if isinstance(fields, dict):
            try:
                fields = with_current_names(section, fields)
            except ValueError as error:
                raise ConfigError(str(error)) from None
            below = merged.get(section, {})
            if isinstance(below, dict):  # else it stays, to be refused
                merged[section] = {**below, **fields}
            explicit.update(f"{section}.{name}" for name in fields)
        else:
            merged[section] = fields
    return merged


def _sentence(error: ValidationError) -> str:
    first = first_problem(error)
    if first.kind == "extra_forbidden":
        return f"configuration key {first.where} is unknown; {_meant(first.where, _known_beside(first))}"
    if first.kind == "model_type":
        fields = "fields (name: value, one a line)"
        return f"section {first.where} of the configuration must hold {fields}, not {first.value}"
    return first.message if first.kind == "value_error" else f"configuration field {first}"


def _known_beside(problem: Problem) -> list[str]:
    return _fields() if "." in problem.where else list(RunConfig.model_fields)


def _fields() -> list[str]:
    return [row[0] for row in field_table()]


def _meant(name: str, known: list[str]) -> str:
    """The end of a sentence on an unknown key: where its meaning is written, or else the nearest one by letters."""
    return elsewhere(name) or nearest_key(name, known)
