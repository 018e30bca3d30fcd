"""Problems that pydantic finds, in few words."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ValidationError

from vqmoe_ds.runtime.errors import one_line, shown


@dataclass(frozen=True)
class Problem:
    """One wrong value; as text ``where=value: message``."""

    where: str
    """Dotted name; empty for the whole."""
    kind: str
    """pydantic's, such as ``extra_forbidden``; ``value_error`` is a validator of ours, which says everything."""
    message: str
    value: str
    """The value as a sentence quotes it."""

    def __str__(self) -> str:
        return f"{self.where or 'the whole'}={self.value}: {self.message[0].lower()}{self.message[1:]}"


def first_problem(error: ValidationError) -> Problem:
    """The first problem of a validation."""
    first = error.errors(include_url=False, include_context=False)[0]
    message = one_line(str(first["msg"]).removeprefix("Value error, "), 700)
    return Problem(one_line(".".join(map(str, first["loc"])), 200), first["type"], message, shown(first["input"]))
