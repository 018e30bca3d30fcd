"""Seeded damage to bytes and to structured values (what JSON and YAML hold)."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

PIECES: list[bytes] = [
    *(
        b"",
        b"\x00",
        b"\xff",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\xc3",
        b"\x1b[2J",
        b"\r",
        b"\n",
        b"\t",
        b"\x7f",
        b"\xed\xa0\x80",
    ),
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b"'",
        b":",
        b",",
        b"-",
        b"#",
        b"&a",
        b"*a",
        b"<<",
        b"!!python/name:os.system",
        b"!!int x",
    ),
    *(
        b"null",
        b"true",
        b"[]",
        b"{}",
        b'""',
        b"~",
        b"0x_",
        b"2001-99-99",
        b"190:20:30",
        b"!!binary x",
        b"!!timestamp 1",
    ),
    *(b"NaN", b"Infinity", b"-Infinity", b".inf", b"1e999", b"-1", b"0", b"0.5", b"9" * 25, b"9" * 10_000, b"1e308"),
    *(b"[" * 3000, b"{" * 3000, b'{"a":' * 3000, b"- " * 3000, b"A" * 5000, b"\\u0000", b"\\ud800", b"0" * 5000),
]
"""What readers stumble over, in place of a few bytes."""
WHOLE: list[bytes] = [(2**bits - 1).to_bytes(8, "little") for bits in (7, 8, 15, 16, 31, 32, 63, 64)]
"""Largest numbers of the usual widths, as binary formats store them."""
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        [],
        {},
        "",
        "auto",
        "null",
        [[]],
        [None],
        {"a": {}},
        {"": 1},
        [1, 2],
        "x" * 5000,
        "\x00",
        "\x1b[2J\n",
    ),
    *(0, 1, -1, 2, 0.5, -0.5, 10**9, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**5000, 1e308, -1e308, 5e-324),
    *(
        float("nan"),
        float("inf"),
        float("-inf"),
        "nan",
        "1e3",
        "0x10",
        "1_000",
        "\ud800",
        "é",
        "/dev/zero",
        "../..",
        "none",
    ),
]
"""What stands where something else is expected."""


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to three random damages: bits, bytes, spans, cuts, and pieces that readers stumble over."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(_DAMAGES)(data, rng)
    return data


def _span(data: bytes, rng: random.Random, most: int = 64) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.randrange(1, most))


def _flip(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return b"\x01"
    at, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
    return data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _drop(data: bytes, rng: random.Random) -> bytes:
    start, end = _span(data, rng)
    return data[:start] + data[end:]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    start, end = _span(data, rng)
    return data[:end] + data[start:end] * rng.choice((1, 1, 2, 50)) + data[end:]


def _insert(data: bytes, rng: random.Random) -> bytes:
    start, end = _span(data, rng, 8)
    return data[:start] + rng.choice(PIECES) + data[rng.choice((start, end)) :]


def _largest(data: bytes, rng: random.Random) -> bytes:
    start, number = rng.randrange(len(data) + 1), rng.choice(WHOLE)[: rng.choice((1, 2, 4, 8))]
    return data[:start] + number + data[start + len(number) :]


def _token(data: bytes, rng: random.Random) -> bytes:
    """A word or number of a text in another's place."""
    words = data.split()
    if len(words) < 2:
        return _insert(data, rng)
    old, new = rng.choice(words), rng.choice([*words, *PIECES])
    at = data.index(old)
    return data[:at] + new + data[at + len(old) :]


_DAMAGES: list[Callable[[bytes, random.Random], bytes]] = [
    _flip,
    _cut,
    _drop,
    _repeat,
    _insert,
    _insert,
    _largest,
    _token,
]


def mutated_value(value: Any, rng: random.Random) -> Any:
    """A copy with one to three nodes replaced, removed, renamed, nested or repeated."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        holders = _holders(value)
        if not holders:
            return copy.deepcopy(rng.choice(VALUES))
        _damage(*rng.choice(holders), rng)
    return value


def _holders(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below ``value``."""
    found: list[tuple[Any, Any]] = []
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    for key in keys:
        found += [(value, key), *_holders(value[key])]
    return found


def _damage(holder: Any, key: Any, rng: random.Random) -> None:
    kind = rng.randrange(10)
    if kind < 6:
        holder[key] = copy.deepcopy(rng.choice(VALUES))
    elif kind == 6:
        del holder[key]
    elif kind == 7 and isinstance(holder, dict):
        holder[rng.choice(("x", "", "é\n", "train", "lr", f"{key}_", str(key).upper(), "y" * 3000))] = holder.pop(key)
    elif kind == 8:
        holder[key] = _deep(holder[key], rng.choice((1, 30, 200)))
    else:
        holder[key] = [copy.deepcopy(holder[key])] * rng.choice((0, 2, 1000))


def _deep(value: Any, levels: int) -> Any:
    for level in range(levels):
        value = {"a": value} if level % 2 else [value]
    return value
