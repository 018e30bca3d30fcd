"""Reads JSON and YAML that a person wrote: any bytes become plain values in little time and memory, or one sentence.

YAML is read as YAML 1.2 means numbers: no dates, no base 60 (``1:30`` is text), ``010`` is ten, ``3e-4`` is a number.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import yaml

from vqmoe_ds.runtime.errors import ConfigError, one_line, shown
from vqmoe_ds.runtime.files import read_small

LARGEST = 1 << 20
"""Bytes of a file; presets have one thousand, and a megabyte holds the names of ten thousand files."""
EXPANDED = 4 << 20
"""Characters of a YAML text once its aliases are followed."""
DEEPEST = 20
"""Levels of nesting: DeepSpeed's own options have five, and recursive code takes a thousand."""
_TOO_DEEP = f"it is nested deeper than {DEEPEST} levels"
_UNDECODED = re.compile("[\udc80-\udcff]")
"""How Python keeps bytes of a command line that are not in the locale's encoding (PEP 383)."""
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
# libyaml's parser is many times faster, and PyYAML may have been built without it.
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INTEGER = re.compile(r"^[-+]?[0-9][0-9_]*$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9][0-9_]*|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


class _Refused(ValueError):
    """A problem that this file itself finds, with the sentence for it."""


class _Loader(_Base):
    """Mappings with distinct keys, sequences, text, numbers, true, false and null; nothing else."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # PyYAML takes the last of equal keys without a word.
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            _refuse_twice(keys)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


class _Dumper(yaml.SafeDumper):
    """Quotes text that ``_Loader`` would take for a number."""


def _adapt() -> None:
    known = {"null", "bool", "str", "seq", "map"}
    tags = {f"tag:yaml.org,2002:{name}" for name in (*known, "merge")}
    # New tables for the subclass: those of the base class serve every other user of PyYAML in this process.
    resolvers = _Base.yaml_implicit_resolvers
    _Loader.yaml_implicit_resolvers = {
        letter: [(tag, pattern) for tag, pattern in pairs if tag in tags] for letter, pairs in resolvers.items()
    }
    # The constructor under None is the one that refuses unknown tags.
    made = {tag: make for tag, make in _Base.yaml_constructors.items() if tag is None or tag in tags}
    _Loader.yaml_constructors = made
    for name, pattern, kind in (("int", _INTEGER, _whole), ("float", _FLOAT, float)):
        for user in (_Loader, _Dumper):
            user.add_implicit_resolver(f"tag:yaml.org,2002:{name}", pattern, list("-+.0123456789"))
        _Loader.add_constructor(f"tag:yaml.org,2002:{name}", _number_of(kind))


def _number_of(kind: Callable[[str], Any]) -> Any:
    def construct(loader: Any, node: yaml.ScalarNode) -> Any:
        text = str(loader.construct_scalar(node)).replace("_", "").lower()
        return kind(text.replace(".inf", "inf").replace(".nan", "nan"))

    return construct


def _whole(text: str) -> int:
    if len(text) > 1000:  # Python itself stops at 4,300
        raise _Refused(f"a number of {len(text):,} digits is more than 64 bits hold; give a smaller number")
    return int(text)


_adapt()


def read_yaml(path: str, what: str) -> Any:
    """The values of a YAML file, as ``parse_yaml`` gives them.

    Args:
        what: the name of the file's kind in error sentences.

    Raises:
        ConfigError: it cannot be read, or as ``parse_yaml``.
    """
    return parse_yaml(_text(path, what), f"{what} {path}")


def parse_yaml(text: str, name: str) -> Any:
    """Plain values (dictionaries, lists, text, finite numbers, truth values, None) of a YAML text.

    Args:
        name: of the text in error sentences.

    Raises:
        ConfigError: it is no YAML, a key stands twice, a number is no number of 64 bits, it is nested deeper than
            ``DEEPEST``, refers to itself, or grows past ``EXPANDED`` where its aliases are followed.
    """
    if _UNDECODED.search(text):  # which YAML's own reader cannot encode
        raise ConfigError(f"{name} holds text {_undecoded()}")
    try:
        # Before loading, on single events: loaded values share what aliases name, and who walks them meets it again.
        _check_growth(yaml.parse(text, Loader=_Base))
        values = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        if "nesting depth" in str(error):  # PyYAML's own limit, since 6.0.4, which its scanner meets before any event
            raise ConfigError(f"{name}: {_TOO_DEEP}") from None
        place = str(error).replace('in "<unicode string>", ', "at ")
        raise ConfigError(f"{name} is not valid YAML: {' '.join(place[:2000].split())}") from None
    except _Refused as error:
        raise ConfigError(f"{name}: {error}") from None
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        raise ConfigError(f"{name} is not valid YAML: a value is not of the type that it is marked with (!!)") from None
    check_plain(values, name)
    return values


def read_json(path: str, what: str) -> Any:
    """The values of a JSON file.

    Raises:
        ConfigError: it cannot be read, is no JSON (NaN and Infinity are none), a key stands twice, a number is no
            number of 64 bits, or it is nested deeper than ``DEEPEST``.
    """
    name, text = f"{what} {path}", _text(path, what)
    try:
        values = json.loads(text, object_pairs_hook=_distinct, parse_int=_whole, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name} is not valid JSON: {error.msg} at line {error.lineno}") from None
    except RecursionError:
        raise ConfigError(f"{name} is nested too deeply; the limit is {DEEPEST} levels") from None
    except _Refused as error:
        raise ConfigError(f"{name}: {error}") from None
    check_plain(values, name)
    return values


def to_yaml_text(values: Any) -> str:
    """YAML that ``parse_yaml`` reads as the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def check_plain(values: Any, name: str) -> None:
    """Refuse numbers and text that nothing could use, whatever key they stand at.

    Raises:
        ConfigError: a whole number past 64 bits, an infinite one or NaN, text with control characters, or nesting
            deeper than ``DEEPEST``; with the dotted key.
    """
    rows: list[tuple[tuple[Any, ...], Any]] = [((), values)]
    while rows:
        place, value = rows.pop()
        problem = _problem(value) or (f"nested deeper than {DEEPEST} levels" if len(place) > DEEPEST else None)
        if problem is not None:
            where = one_line(".".join(map(str, place)), 200)
            raise ConfigError(f"{name}: {f'{where} is ' if where else 'it is '}{problem}")
        if isinstance(value, dict):
            rows += [((*place, key), inner) for key, inner in value.items()]
            rows += [((*place, shown(key), "(a key)"), key) for key in value if _problem(key)]
        elif isinstance(value, list):
            rows += [((*place, index), inner) for index, inner in enumerate(value)]


def _problem(value: Any) -> str | None:
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return f"{shown(value)}, more than 64 bits hold; give a smaller number"
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return f"{value}, which is no finite number"
    if isinstance(value, str) and _UNDECODED.search(value):
        return f"{shown(value)}, {_undecoded()}"
    if isinstance(value, str) and _UNPRINTABLE.search(value):
        return f"{shown(value)}, which has characters in it that no name or path can have"
    return None


def _undecoded() -> str:
    """The end of a sentence on words of a command line with bytes that Python could not decode."""
    encoding = sys.getfilesystemencoding()
    if encoding == "utf-8":
        return "which is no UTF-8; rename what is called so"
    return f"which the encoding of this locale ({encoding}) does not have; set LC_ALL=C.UTF-8 (or PYTHONUTF8=1)"


def _text(path: str, what: str) -> str:
    try:
        return read_small(path, LARGEST).decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} {path} is not UTF-8 text: byte {error.start} cannot be; save it as UTF-8") from None


def _check_growth(events: Iterable[yaml.Event]) -> None:
    """Follow aliases in count only; raises ``_Refused``."""
    sizes: dict[str, int] = {}
    open_: list[list[Any]] = [[None, 0]]
    for event in events:
        size, anchor = 1, getattr(event, "anchor", None)
        if isinstance(event, yaml.CollectionStartEvent):
            open_.append([anchor, 1])
            if len(open_) - 1 > DEEPEST:
                raise _Refused(_TOO_DEEP)
            continue
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == outer for outer, _ in open_):
                raise _Refused(f"*{anchor} stands within what it names")
            size = sizes.get(str(anchor), 1)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_.pop()
        elif isinstance(event, yaml.ScalarEvent):
            size = 1 + len(event.value)
        if anchor is not None and not isinstance(event, yaml.AliasEvent):
            sizes[anchor] = size
        open_[-1][1] += size
        if open_[-1][1] > EXPANDED:
            raise _Refused(f"it grows past {EXPANDED:,} characters where its aliases (*name) are followed")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        _refuse_twice([key for key, _ in pairs])
    return values


def _refuse_twice(keys: list[str]) -> NoReturn:
    seen: set[str] = set()
    twice = next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    raise _Refused(f"the key {shown(twice)} stands twice in one place; leave one of them out")


def _no_number(text: str) -> NoReturn:
    raise _Refused(f"{text} is no number in JSON; write a finite one")
