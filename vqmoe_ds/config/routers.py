"""Routers by name: their options, and what the rest of the package must know of one without building it.

A router is one class in one file, registered by ``register_router``. Built-in ones live in ``vqmoe_ds/moe/routers``;
others come from installed packages (entry points of the group ``vqmoe_ds.routers``) and from files (``--plugin``).
docs/add-a-router.md shows how to write one.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from pydantic import ValidationError

from vqmoe_ds.config.fields import Section
from vqmoe_ds.config.meanings import nearest_key
from vqmoe_ds.config.problems import first_problem
from vqmoe_ds.runtime.errors import ConfigError, shown
from vqmoe_ds.runtime.importing import quickly

if TYPE_CHECKING:
    from vqmoe_ds.config.schema import MoEConfig, RunConfig

BUILT_IN = "vqmoe_ds.moe.routers"
"""Imported by name at the first question for a router: the configuration does not depend on the room above it."""
ENTRY_POINTS = "vqmoe_ds.routers"
PLUGINS = "VQMOE_PLUGINS"
"""Environment variable: plug-in files, separated as in PATH; ``--plugin`` adds to it for the processes it starts."""


class RouterOptions(Section):
    """Options of the router that ``moe.router`` names; those of other routers are checked and left out.

    A router declares its own as the class ``Options``; a layer takes them as a dict:

    Examples:
        >>> from vqmoe_ds.moe import LayerConfig, MoEConfig
        >>> LayerConfig(16, MoEConfig(router="xmoe"), options={"low_dim": 8}).options.low_dim
        8
    """


class LooksAhead(NamedTuple):
    """The reason for which a router is not causal, and the remedy."""

    reason: str
    """A clause: "router.statistics=batch looks at all tokens of a batch, later ones included"."""
    remedy: str = "use another"


class RouterFacts:
    """Answers of a router's class to configuration, planning, checkpoints, exports and reports."""

    name: ClassVar[str] = ""
    """Value of ``moe.router``; set by ``register_router``."""
    Options: ClassVar[type[RouterOptions]] = RouterOptions
    structure: ClassVar[tuple[str, ...]] = ()
    """Options that decide whether a checkpoint fits a model, beside those of every router."""
    has_experts: ClassVar[bool] = True
    needs_top_k: ClassVar[bool] = True
    """Whether ``moe.top_k=0`` would leave tokens without experts."""
    uses_codebook: ClassVar[bool] = False
    has_discrete_path: ClassVar[bool] = False
    """Whether the codes' experts alone are a model of their own (``finetune.discrete``, ``--to discrete-only``)."""
    told_by: ClassVar[str] = "its layer of experts_of(token_table(run, layers), token_ids, num_experts) of the class"
    """Where a layer on its own gets the experts that are known ahead."""
    reads_source: ClassVar[bool] = False
    """Whether it reads the vectors of ``codebook.source`` (``RoutingContext.source_TD``), though it has no codes."""
    uses_token_table: ClassVar[bool] = False
    """Whether ``token_table`` of its class names the experts of every token."""
    needs_token_ids: ClassVar[bool] = False
    """Whether experts follow from the ids of tokens, which patches of images do not have."""
    is_stock: ClassVar[bool] = False
    """Whether it is the linear router that stock formats (Mixtral, Megatron) compute."""
    exported_as: ClassVar[str | None] = None
    """Router of the Hugging Face model that computes it; None: there is none."""

    @classmethod
    def check(cls, run: RunConfig) -> None:
        """Look for contradictions.

        Raises:
            ValueError: one sentence with the fields that contradict and the remedy.
        """

    @classmethod
    def hint(cls, run: RunConfig) -> str | None:
        """What a training is told at its start that would suit its data better; None: nothing."""
        return None

    @classmethod
    def looks_ahead(cls, options: Any) -> LooksAhead | None:
        """The reason for which the experts of a token may depend on later tokens; None where they do not."""
        return None

    @classmethod
    def needs_whole_sequences(cls, options: Any) -> bool:
        """Whether the experts of a token depend on other tokens, which other ranks hold under sequence parallelism."""
        return cls.looks_ahead(options) is not None

    @classmethod
    def rows_per_token(cls, moe: MoEConfig, options: Any) -> int:
        """Expert calls of a token in one layer; the mean over the run, rounded up, where that varies."""
        return max(1, moe.top_k)

    @classmethod
    def told_rows(cls, options: Any) -> int:
        """Rows per token whose experts it is told where they are known ahead (``RoutingContext.expert_ids_TR``)."""
        return 1

    @classmethod
    def calls_per_token(cls, run: RunConfig) -> int:
        """``rows_per_token``, where it also goes by the length of sequences."""
        return cls.rows_per_token(run.moe, run.router)

    @classmethod
    def weights_rows(cls, run: RunConfig) -> bool:
        """Whether expert outputs are weighted; else each counts as 1."""
        return True

    @classmethod
    def flops(cls, run: RunConfig, layer: int) -> int:
        """Operations per token of the matrix products of one layer's router."""
        return 2 * run.model.width * run.moe.num_experts

    @classmethod
    def known_ahead(cls, run: RunConfig) -> bool:
        """Whether the experts of all layers are known before the first block."""
        return False

    @classmethod
    def looks_back(cls, run: RunConfig) -> int:
        """Tokens before a token on which its expert by ``token_table`` depends."""
        return 0

    @classmethod
    def token_table(cls, run: RunConfig, layers: int) -> Any:
        """Experts of all tokens of the vocabulary where they are known before training: a tensor, int64 ``[L, V]``.

        Of a router that looks back it is whatever its ``experts_of`` reads.
        """
        return None

    @classmethod
    def table_shape(cls, run: RunConfig, layers: int) -> tuple[int, ...]:
        """Shape of ``token_table``."""
        return layers, run.model.vocab_size

    @classmethod
    def experts_of(cls, table: Any, ids_BS: Any, num_experts: int, positions_BS: Any = None) -> Any:
        """Experts of tokens by ``token_table``, int64 ``[L, B, S, R]``.

        A router that looks back must look at no more tokens than ``positions_BS``, those of the same document before a
        token; None: the whole sequence is one document.
        """
        return table[:, ids_BS].unsqueeze(-1)

    @classmethod
    def check_start(cls, run: RunConfig, layers: int) -> None:
        """Look for what a training from scratch reads, of L MoE layers; a resumed one has it in its checkpoint.

        Raises:
            ConfigError: it is missing, or not of this model.
        """

    @classmethod
    def linear_gate(cls, moe: MoEConfig) -> str | None:
        """Name of the weight ``[N, D]`` of a plain linear router within it, which stock formats have too."""
        return None

    @classmethod
    def with_schedules(cls, options: Any, steps: int) -> Any:
        """Options in which schedules that go by the steps of the run are written out for a run of so many steps."""
        return options


Facts = TypeVar("Facts", bound=type[RouterFacts])
_ROUTERS: dict[str, type[RouterFacts]] = {}
_loaded = False


def register_router(name: str) -> Callable[[Facts], Facts]:
    """Class decorator: make a router known as ``moe.router=name``.

    Examples:
        >>> import torch
        >>> from vqmoe_ds.moe import LayerConfig, MoEConfig, MoELayer, Router, Routing, register_router
        >>> @register_router("example_first")
        ... class FirstExpertRouter(Router):
        ...     def route(self, x_TD, context):
        ...         return Routing(torch.zeros(len(x_TD), 1, dtype=torch.int64))
        >>> layer = MoELayer(LayerConfig(16, MoEConfig(router="example_first", num_experts=4)))
        >>> layer(torch.randn(2, 3, 16))[2].tolist()
        [[0], [0], [0], [0], [0], [0]]

    Raises:
        ValueError: the name is no lower-case word or taken, the class has another, or its options cannot be.
        TypeError: it is no router, or this is no name.
    """
    if not isinstance(name, str):
        raise TypeError('write @register_router("name")')

    def register(kind: Facts) -> Facts:
        if not (isinstance(kind, type) and issubclass(kind, RouterFacts)):
            raise TypeError(f"router {name!r}: {kind!r} is no subclass of vqmoe_ds.moe.Router")
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name):
            raise ValueError(f"router {shown(name)}: a name is lower-case letters, digits and _, as in my_router")
        known = _ROUTERS.get(name)
        # By name: a plug-in that is run a second time defines its class anew, and that is no other router.
        if known is not None and (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
            raise ValueError(f"router {name!r} is {known.__module__}.{known.__qualname__} already; choose another name")
        if kind.name != name and _ROUTERS.get(kind.name) is kind:
            raise ValueError(f"router {name!r} is the router {kind.name!r} already; register a subclass of it")
        _check_options(name, kind)
        kind.name = name
        _ROUTERS[name] = kind
        return kind

    return register


def _check_options(name: str, kind: type[RouterFacts]) -> None:
    """Look for options that configurations, ``--help`` and checkpoints could not read.

    Raises:
        ValueError: a default is missing or refused by its own bounds, or ``structure`` names no option.
        TypeError: ``Options`` is no class of options.
    """
    if not (isinstance(kind.Options, type) and issubclass(kind.Options, RouterOptions)):
        raise TypeError(f"router {name!r}: its Options are no subclass of vqmoe_ds.moe.RouterOptions")
    fields = kind.Options.model_fields
    bare = next((field for field, info in fields.items() if info.is_required()), None)
    if bare is not None:
        raise ValueError(f"router {name!r}: its option {bare} has no default; write option(default, meaning)")
    try:
        kind.Options.model_validate(dict(kind.Options()))
    except ValidationError as error:
        found = first_problem(error)
        what = f"default of its option {found.where} is {found.value}" if found.where else "defaults of its options"
        raise ValueError(f"router {name!r}: the {what}: {found.message[0].lower()}{found.message[1:]}") from None
    if not isinstance(kind.structure, (tuple, list)) or not set(kind.structure) <= fields.keys():
        raise ValueError(
            f"router {name!r}: structure={shown(kind.structure)} must be a tuple of names of its options, which are: "
            f"{', '.join(fields) or 'none'}"
        )


def routers() -> Mapping[str, type[RouterFacts]]:
    """All registered routers by name.

    Raises:
        ConfigError: a plug-in cannot be imported.
    """
    global _loaded
    if not _loaded:
        _loaded = True  # at once, for a plug-in may ask for routers while it is loaded
        try:
            _load_all()
        except BaseException:
            _loaded = False
            raise
    return MappingProxyType(_ROUTERS)


def _load_all() -> None:
    with quickly():
        importlib.import_module(BUILT_IN)
    for point in entry_points(group=ENTRY_POINTS):
        _guarded(f"entry point {point.name} = {point.value}", point.load)
    for path in filter(None, os.environ.get(PLUGINS, "").split(os.pathsep)):
        _import_file(Path(path))


def router_class(name: str) -> type[RouterFacts]:
    """The router of a name.

    Raises:
        ValueError: there is none; the sentence has the nearest one, and how plug-ins are given.
    """
    known = routers()
    if name not in known:
        raise ValueError(
            f"moe.router={shown(name)} is unknown; {nearest_key(str(name), list(known))} (others come with "
            "--plugin FILE.py or an installed package)"
        )
    return known[name]


def load_plugin(path: str | Path) -> None:
    """Run a Python file that registers routers, here and in the processes that this one starts.

    Raises:
        ConfigError: it cannot be read or run, or a name is taken.
    """
    if not os.fspath(path):
        raise ConfigError("--plugin is empty; give it a Python file")
    routers()
    # Absolute, for the processes that read PLUGINS may work in other folders.
    file = Path(path).absolute()
    if os.pathsep in str(file):
        raise ConfigError(f"plug-in {file}: {os.pathsep!r} separates files in {PLUGINS}; rename the file or its folder")
    _import_file(file)
    others = [known for known in os.environ.get(PLUGINS, "").split(os.pathsep) if known not in ("", str(file))]
    os.environ[PLUGINS] = os.pathsep.join([*others, str(file)])


def add_plugin_option(parser: Any) -> None:
    """Give a command the option ``--plugin FILE.py``, which is loaded as it is read."""
    parser.add_argument(
        "--plugin",
        action=_LoadPlugin,
        metavar="FILE.py",
        help=f"Python file that registers routers, for this command and those it starts (or {PLUGINS}=FILE.py)",
    )


class _LoadPlugin(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        try:
            load_plugin(values)
        except ConfigError as error:
            parser.error(str(error))


def _import_file(path: Path) -> None:
    if not os.path.isfile(path):
        state = "is a folder" if os.path.isdir(path) else "is no file" if os.path.exists(path) else "does not exist"
        raise ConfigError(f"plug-in {path} {state}; --plugin takes a Python file")
    name = f"vqmoe_plugin_{path.stem}"
    if getattr(sys.modules.get(name), "__file__", None) == str(path):
        return
    spec = importlib.util.spec_from_file_location(name, path)
    loader = None if spec is None else spec.loader
    if spec is None or loader is None:
        raise ConfigError(f"plug-in {path} is no Python file; --plugin takes FILE.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where pydantic looks up the names of annotations
    _guarded(f"plug-in {path}", lambda: loader.exec_module(module), name)


def _guarded(what: str, work: Callable[[], Any], module: str | None = None) -> None:
    try:
        work()
    except (Exception, SystemExit) as error:  # anybody's code
        # Else _import_file would take what is left of it for loaded.
        sys.modules.pop(module or "", None)
        raise ConfigError(f"{what} cannot be imported: {type(error).__name__}: {error}") from error


def options_for(name: str, given: Any) -> RouterOptions:
    """Options of a router from a section ``router``, in which fields of other routers are checked and left out.

    Raises:
        ValueError: no such router, or a field that no router has (pydantic's ``ValidationError``).
    """
    kind = router_class(name).Options
    if isinstance(given, RouterOptions):
        if type(given) is kind:
            return given
        given = given.model_dump()
    if isinstance(given, dict):
        given = {field: value for field, value in given.items() if not _is_foreign(kind, field, value)}
    return kind.model_validate(given)


def _is_foreign(kind: type[RouterOptions], field: str, value: Any) -> bool:
    """Whether a field is one of other routers alone.

    Raises:
        ValueError: all of them refuse the value (the ``ValidationError`` of the first).
    """
    if field in kind.model_fields:
        return False
    # All: a plug-in may name an option as another router does, and mean something else.
    others = [other.Options for other in routers().values() if field in other.Options.model_fields]
    refusals: list[ValidationError] = []
    for other in others:
        try:
            other.model_validate({field: value})
            return True
        except ValidationError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]
    return False
