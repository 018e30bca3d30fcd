"""Fields of configuration sections: what they have in common, and the bounds of their values with reasons."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

LONGEST_PATH = 4096
"""Characters of a text: what Linux takes for a path (``PATH_MAX``)."""
MOST_LAYERS = 1024
"""The deepest published transformers have a thousand blocks; a plan looks at every one."""
MOST_EXPERTS = 1 << 14
"""Per layer; the largest published count is 2,048. Each is an object of its own, with a name in checkpoints."""
MOST_EXPERTS_IN_ALL = 1 << 17
"""Over all layers; naming one takes some 0.3 ms of every start."""
MOST_CODES = 1 << 20
"""Per layer; distances of every token to every code are computed."""
MOST_FEATURES = 1 << 20
"""Limit of any width; the widest published models have some 20,000."""
MOST_TOKENS = 1 << 24
"""Per sequence; positions are kept as float32, which counts to 2^24."""
MOST_CORPUS = 1 << 50
"""Tokens of a corpus; the largest published have some 2^45."""
MOST_IDS = 1 << 31
"""Ids of tokens are kept in 32 bits."""
MOST_STEPS = 10**12
"""Steps, and intervals of them: thirty years at a thousand a second. Counters have 64 bits."""
MOST_TOGETHER = 1 << 30
"""Sequences of a batch, vectors of a sample and the like: indices into them have 32 bits."""
LARGEST_SEED = (1 << 32) - 1
"""NumPy's and most libraries' generators take 32 bits."""
LONGEST_WAIT = 7 * 86400.0
"""Seconds; no queue or network needs a week, and libraries take no more than 292 years."""
LARGEST_WEIGHT = 1e6
"""Limit of factors, weights and temperatures; low-precision sums of losses overflow past it."""


RENAMED = {
    "train.min_learning_rate": "train.min_learning_rate_ratio",
    "codebook.birth_step": "codebook.init_step",
    "codebook.crowded_above": "codebook.overused_above",
}
"""Former names of fields; files and checkpoints that have them are read as if they had the names of today."""


def with_current_names(section: str, fields: dict[Any, Any]) -> dict[Any, Any]:
    """Fields of a section under their names of today.

    Raises:
        ValueError: one is there under its former name as well.
    """
    found: dict[Any, Any] = {}
    for former, value in fields.items():
        name = RENAMED.get(f"{section}.{former}", "").partition(".")[2] or former
        if name in found or (name != former and name in fields):
            raise ValueError(f"{section}.{former} and {section}.{name} are the same field; give one of them")
        found[name] = value
    return found


def deprecation(former: str) -> str:
    """A sentence for who uses the former name of a field (dotted)."""
    return f"{former} is deprecated: write {RENAMED[former]}"


class Section(BaseModel):
    """Options with bounds; unknown names are refused, and nothing changes after it was checked."""

    # Frozen, for configurations share sections: model_copy copies only the outermost level.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, str_max_length=LONGEST_PATH)

    section: ClassVar[str] = ""
    """Its name in the run configuration, where fields of it have former names."""

    @model_validator(mode="before")
    @classmethod
    def _current_names(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for former in (f"{cls.section}.{name}" for name in values):
            if former in RENAMED:
                warnings.warn(deprecation(former), DeprecationWarning, stacklevel=3)
        return with_current_names(cls.section, values)

    @field_validator("*", mode="before")
    @classmethod
    def _none_as_shown(cls, value: Any, info: ValidationInfo) -> Any:
        """``none``, as ``--help`` shows the value of a field that has none."""
        # The list is what run.log_to makes of the word: before-validators of a subclass come before these.
        optional = type(None) in get_args(cls.model_fields[info.field_name or ""].annotation)
        return None if optional and value in ("none", ["none"]) else value

    @field_validator("*", mode="before")
    @classmethod
    def _no_flag_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name or ""].annotation
        # pydantic takes true for 1.
        if isinstance(value, bool) and not {int, float}.isdisjoint((kind, *get_args(kind))):
            raise PydanticCustomError("number", "Input should be a number")
        return value


def option(default: Any, meaning: str, unit: str = "", **bounds: Any) -> Any:
    """A field of a section, as of a router's ``Options``.

    Examples:
        >>> from vqmoe_ds.moe import RouterOptions, option
        >>> class Options(RouterOptions):
        ...     rate: float = option(0.001, "how far the bias of an expert moves per step", gt=0, le=1)
        >>> Options(rate=0.5).rate
        0.5

    Args:
        meaning: its description in ``--help`` and docs/config.md.
        unit: of its value.
        bounds: as pydantic's ``Field`` takes them (``ge``, ``gt``, ``le``, ``lt``).
    """
    return Field(default, description=meaning, json_schema_extra={"unit": unit} if unit else None, **bounds)
