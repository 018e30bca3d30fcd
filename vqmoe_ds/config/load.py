"""From preset, YAML file and ``--set`` overrides to one ``RunConfig``, with errors a person can act on."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.errors import ConfigError


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration and which of its fields the user set by file or command line (dotted names)."""

    config: RunConfig
    explicit: frozenset[str]


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
    if file is not None:
        values = _merge(values, _read_sections(file), explicit)
    for name, value in (overrides or {}).items():
        _check_key(name)
        nested: Any = value
        for part in reversed(name.split(".")):
            nested = {part: nested}
        values = _merge(values, nested, explicit)
    try:
        return LoadedConfig(RunConfig.model_validate(values), frozenset(explicit))
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from None


def _read_preset(preset: str) -> dict[str, Any]:
    if preset not in preset_names():
        raise ConfigError(f"preset {preset!r} is unknown; {_nearest(preset, preset_names())}")
    text = resources.files("vqmoe_ds.config").joinpath("presets", f"{preset}.yaml").read_text()
    return yaml.safe_load(text) or {}


def parse_override(text: str) -> tuple[str, Any]:
    """``section.field=value`` -> (name, value as YAML reads it)."""
    name, separator, value = text.partition("=")
    if not separator or "." not in name:
        raise ConfigError(f"--set {text} is not of the form section.field=value, for example moe.num_experts=64")
    try:
        return name.strip(), _number(yaml.safe_load(value))
    except yaml.YAMLError:
        raise ConfigError(f"--set {text}: the value is not valid YAML; quote it") from None


def field_table() -> list[tuple[str, str, str, str]]:
    """Every field as (dotted name, default, unit, meaning), in the order of the schema."""
    rows = []
    for section, field in RunConfig.model_fields.items():
        model = field.annotation
        assert isinstance(model, type) and issubclass(model, BaseModel)
        for name, info in model.model_fields.items():
            extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
            default = getattr(info.default, "value", info.default)
            rows.append((f"{section}.{name}", str(default), str(extra.get("unit", "")), info.description or ""))
    return rows


def to_yaml(config: RunConfig) -> str:
    """The whole configuration as YAML, ready for ``--config``."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def nearest_key(name: str, known: list[str]) -> str:
    """The end of an error sentence that names the nearest known key."""
    return _nearest(name, known)


def read_yaml(path: str, what: str) -> Any:
    """What a YAML file holds; ``what`` it is called in error sentences.

    Raises:
        ConfigError: it cannot be read or is not YAML.
    """
    try:
        return yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{what} {path} is not valid YAML: {' '.join(str(error).split())}") from None


def _read_sections(file: str) -> dict[str, Any]:
    values = read_yaml(file, "config file")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"config file {file} must hold sections such as model: and moe:, not a {type(values).__name__}"
        )
    return values


def _merge(base: dict[str, Any], extra: dict[str, Any], explicit: set[str]) -> dict[str, Any]:
    merged = dict(base)
    for section, fields in extra.items():
        if isinstance(fields, dict):
            merged[section] = {**(merged.get(section) or {}), **{k: _number(v) for k, v in fields.items()}}
            explicit.update(f"{section}.{name}" for name in fields)
        else:
            merged[section] = fields
    return merged


def _number(value: Any) -> Any:
    """YAML 1.1 reads 3e-4 as text; take it as the number that was meant."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _check_key(name: str) -> None:
    known = [row[0] for row in field_table()]
    if name not in known:
        raise ConfigError(f"--set {name}: no such field; {_nearest(name, known)}")


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        sections = list(RunConfig.model_fields)
        known = sections if len(first["loc"]) == 1 else [row[0] for row in field_table()]
        return f"configuration key {where} is unknown; {_nearest(where, known)}"
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "value_error":
        return message
    return f"configuration field {where}={first['input']!r}: {message[0].lower()}{message[1:]}"


def _nearest(name: str, known: list[str]) -> str:
    last = {key.rsplit(".", 1)[-1]: key for key in reversed(known)}
    close = difflib.get_close_matches(name, known, 1, 0.5)
    if not close:
        close = [last[m] for m in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(last), 1, 0.5)]
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
