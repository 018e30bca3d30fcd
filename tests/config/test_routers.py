"""Routers by name: what registration refuses, broken plug-ins, and options of routers that a run does not use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from vqmoe_ds.config import routers as registry
from vqmoe_ds.config.fields import option
from vqmoe_ds.config.load import field_table, load_config
from vqmoe_ds.config.routers import RouterFacts, RouterOptions, load_plugin, register_router, routers
from vqmoe_ds.runtime.errors import ConfigError


@pytest.fixture(autouse=True)
def _routers_of_tests_are_forgotten() -> Iterator[None]:
    known = dict(routers())
    yield
    registry._ROUTERS.clear()
    registry._ROUTERS.update(known)


def _router(options: Any = RouterOptions, names: Any = ()) -> type[RouterFacts]:
    class Mine(RouterFacts):
        Options: ClassVar[type[RouterOptions]] = options
        structure: ClassVar[tuple[str, ...]] = names

    return Mine


class _Rate(RouterOptions):
    rate: float = option(0.5, "a rate", gt=0, le=1)


class _TooLarge(RouterOptions):
    rate: float = option(5.0, "a rate", gt=0, le=1)


class _NoNumber(RouterOptions):
    steps: int = option("many", "steps")


class _Bare(RouterOptions):
    rate: float


class _Plain:
    rate = 0.5


@pytest.mark.parametrize(
    ("options", "names", "sentence"),
    [
        (_TooLarge, (), "the default of its option rate is 5.0: input should be less than or equal to 1"),
        (_NoNumber, (), "the default of its option steps is 'many': input should be a valid integer"),
        (_Bare, (), "its option rate has no default; write option(default, meaning)"),
        (_Plain, (), "its Options are no subclass of vqmoe_ds.moe.RouterOptions"),
        (_Rate, ("rates",), "structure=('rates',) must be a tuple of names of its options, which are: rate"),
        (_Rate, "rate", "structure='rate' must be a tuple of names"),
        (RouterOptions, ("rate",), "which are: none"),
    ],
)
def test_options_that_cannot_be_are_refused_when_a_router_registers(options: Any, names: Any, sentence: str) -> None:
    with pytest.raises((TypeError, ValueError)) as refusal:
        register_router("mine")(_router(options, names))
    assert str(refusal.value).startswith("router 'mine': ") and sentence in str(refusal.value)
    assert "mine" not in routers()
    assert register_router("mine")(_router(_Rate, ("rate",))).name == "mine"


def test_a_class_has_one_name() -> None:
    mine = register_router("mine")(_router())
    assert register_router("mine")(mine) is mine
    with pytest.raises(ValueError, match="router 'other' is the router 'mine' already; register a subclass of it"):
        register_router("other")(mine)
    assert mine.name == "mine" and "other" not in routers()

    class Heir(mine):  # type: ignore[valid-type]
        pass

    assert (register_router("other")(Heir).name, mine.name) == ("other", "mine")


@pytest.mark.parametrize("name", [_router(), None, 3])
def test_registering_without_a_name_says_how_it_is_written(name: Any) -> None:
    with pytest.raises(TypeError, match=r'write @register_router\("name"\)'):
        register_router(name)


def test_an_option_of_a_plug_in_may_have_the_name_of_a_built_in_one() -> None:
    class Options(RouterOptions):
        temperature: str = option("warm", "a word")

    built_in = {field for kind in routers().values() for field in kind.Options.model_fields}
    assert "temperature" in built_in
    register_router("mine")(_router(Options))
    for value in (0.5, "warm"):  # of a built-in one and of the plug-in's
        load_config("tiny", None, {"moe.router": "vq", "router.temperature": value})
    with pytest.raises(ConfigError, match=r"router\.temperature=\[1\]: input should be a valid number"):
        load_config("tiny", None, {"moe.router": "vq", "router.temperature": [1]})


def test_help_shows_the_default_that_a_function_makes() -> None:
    from pydantic import Field

    class Options(RouterOptions):
        levels: tuple[int, ...] = Field(default_factory=lambda: (1, 2), description="of the tree")

    register_router("mine")(_router(Options))
    assert next(row for row in field_table() if row.name == "router.levels").default == "(1, 2)"


def test_a_failed_load_fails_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(registry, "_loaded", False)
    monkeypatch.setenv(registry.PLUGINS, str(tmp_path / "none.py"))
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"none\.py does not exist"):
            routers()
    monkeypatch.setenv(registry.PLUGINS, "")
    assert "vq" in routers()


def test_what_is_no_file_is_called_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(registry.PLUGINS, "")
    (tmp_path / "a:b").mkdir()
    (tmp_path / "a:b/mine.py").write_text("")
    for path, sentence in (
        (tmp_path, f"plug-in {tmp_path} is a folder; --plugin takes a Python file"),
        ("/dev/null", "plug-in /dev/null is no file; --plugin takes a Python file"),
        ("", "--plugin is empty; give it a Python file"),
        # The processes that a comparison starts would look for two files.
        (tmp_path / "a:b/mine.py", f"{tmp_path}/a:b/mine.py: ':' separates files in VQMOE_PLUGINS; rename the file"),
    ):
        with pytest.raises(ConfigError) as refusal:
            load_plugin(path)
        assert sentence in str(refusal.value)
