"""Preparation of text when a run starts: sources that are named together with a tokenizer become prepared data.

One process of each machine prepares, or one of all where they see the same folder; the others wait for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vqmoe_ds.config.schema import DataConfig, RunConfig
from vqmoe_ds.config.training import hub_source
from vqmoe_ds.data import prepare
from vqmoe_ds.data.documents import files_of
from vqmoe_ds.data.indexed import is_indexed, weighted_entry, with_changed, without_ending
from vqmoe_ds.data.parts import disk_errors
from vqmoe_ds.data.tokenizers import load_tokenizer
from vqmoe_ds.data.units import SourceOptions
from vqmoe_ds.runtime.errors import ConfigError, DataError, UserError
from vqmoe_ds.runtime.files import make_folder, read_small
from vqmoe_ds.runtime.lock import BEAT, PATIENCE, Heartbeat, has_ended, identity, parsed
from vqmoe_ds.runtime.ranks import Place

TEXT_KEY = SourceOptions.text_key
SAY_EVERY = 10.0
"""Seconds between lines that say what is waited for."""


def to_prepare(config: RunConfig) -> bool:
    """Whether a source of the run is to be prepared: it is no prepared data, and a tokenizer is named for it."""
    data = config.data
    return data.tokenizer is not None and not config.model.image_size and not all(map(_is_prepared, _entries(data)))


def check_at_start(config: RunConfig, prepares: bool) -> None:
    """Refuse fields of text that is prepared at the start where none is.

    Args:
        prepares: whether some is (``to_prepare``, and never in a fine-tuning).

    Raises:
        ConfigError: they are set.
    """
    data = config.data
    for name, default in (("max_tokens", None), ("text_key", TEXT_KEY)):
        if getattr(data, name) != default and not prepares:
            raise ConfigError(
                f"data.{name}={getattr(data, name)} is of text that is prepared when a pretraining starts, and there "
                "is none; name the tokenizer of the text (--tokenizer), or leave the field out"
            )


def prepared(config: RunConfig, folder: Path, place: Place, say: Callable[[str], None]) -> RunConfig:
    """The configuration with prepared data in place of its sources.

    What is there already is taken: names hold what the text, the tokenizer and the limit were. Every rank calls it,
    without a process group.

    Args:
        folder: where the prepared data go.
        say: prints a line for the user, on rank 0.

    Raises:
        DataError: a source, the tokenizer or the disk is at fault.
    """
    data = config.data
    checksum = load_tokenizer(str(data.tokenizer)).checksum

    def each(source: str, most: int | None) -> str:
        if _is_prepared(source):
            return source
        # Spelled in one way before it is hashed: hf:NAME and hub:NAME share what was prepared of them.
        source = hub_source(source)
        prefix = folder / f"{_stem(source)}-{_key(source, checksum, data.text_key, most)}"
        _prepare_once(_arguments(source, prefix, data, most), prefix, place, say)
        return str(prefix)

    paths = {
        "path": with_changed(data.path, lambda source: each(source, data.max_tokens)),
        "valid_path": with_changed(data.valid_path, lambda source: each(source, None)),
    }
    others = any(map(_is_prepared, _entries(data)))
    # The corpora have their tokenizer beside them, and are as long as they were asked to be.
    made = {**paths, "tokenizer": data.tokenizer if others else None, "max_tokens": None, "text_key": TEXT_KEY}
    return config.model_copy(update={"data": data.model_copy(update=made)})


def _entries(data: DataConfig) -> list[str]:
    paths = (data.path, data.valid_path)
    return [entry for path in paths if path is not None for entry in ([path] if isinstance(path, str) else path)]


def _is_prepared(spec: str) -> bool:
    return is_indexed(without_ending(weighted_entry(spec)[0]))


def _stem(source: str) -> str:
    """A name for the files of a source, of letters that every file system takes."""
    words = re.findall(r"[A-Za-z0-9]+", source.removeprefix("hub:").rstrip("/").rpartition("/")[2])
    return "-".join(words)[:40] or "text"


def _key(source: str, checksum: str, text_key: str, most: int | None) -> str:
    """Twelve digits for the text, as far as sizes and times of files tell, and how it is prepared."""
    files = [] if source.startswith(("hub:", "recipe:")) else files_of(source, SourceOptions())
    # Absolute, as the same relative name may mean other files where another run with this cache was started.
    stamps = [(os.path.abspath(path), os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in files]
    facts = json.dumps([source if not files else "", stamps, checksum, text_key, most])
    return hashlib.sha256(facts.encode()).hexdigest()[:12]


def _arguments(source: str, prefix: Path, data: DataConfig, most: int | None) -> list[str]:
    # Of a hub's set no more is read than is wanted, and nothing of it kept but the ids.
    limit = [] if most is None else ["--max_tokens", str(most)]
    given = ["--tokenizer", str(data.tokenizer), "--text_key", data.text_key, "--output", str(prefix), *limit]
    # Behind the -- a source whose name begins with a dash is no option.
    return [*given, "--streaming", "--", source]


def _prepare_once(arguments: list[str], prefix: Path, place: Place, say: Callable[[str], None]) -> None:
    """Prepare unless somebody has or does; return when it is whole."""
    lock, beat = Path(f"{prefix}.lock"), None
    said = heard = time.monotonic()
    while not Path(f"{prefix}.idx").exists():  # which is written last
        with _turn(lock, place) as mine:
            # Looked for once more: another process may have finished between the look above and the lock.
            if mine and not Path(f"{prefix}.idx").exists():
                say(f"preparing {arguments[-1]} as {prefix}")
                try:
                    prepare.prepare(prepare.build_parser("").parse_args(arguments))
                except UserError as error:
                    # Console prints errors of rank 0 and local ones, and rank 0 may have no part in this one.
                    raise DataError(_in_words_of_a_run(str(error)), local=place.rank != 0) from error
        if place.local_rank or beat != (beat := _last_beat(lock)):
            heard = time.monotonic()
        # Of whoever was killed. Rank 0 first: if all did so at once, one would remove the lock that another just made.
        elif _left_behind(lock) or time.monotonic() - heard > PATIENCE * (2 if place.rank else 1):
            lock.unlink(missing_ok=True)
        if time.monotonic() - said > SAY_EVERY:
            say(f"waiting for {prefix}, which another process prepares")
            said = time.monotonic()
        time.sleep(0.1)


def _in_words_of_a_run(sentence: str) -> str:
    """A sentence of ``tools/prepare_data.py`` with the names that its options have in a run."""
    sentence = sentence.replace("--text_key", "data.text_key").replace("--max_tokens ", "data.max_tokens=")
    return f"{sentence} (an option of tools/prepare_data.py)" if " --" in sentence else sentence


@contextmanager
def _turn(lock: Path, place: Place) -> Iterator[bool]:
    """Whether this process is the one to prepare; it is no other's turn within. A failure leaves no empty folder."""
    if place.local_rank:
        yield False
        return
    with disk_errors(str(lock.parent)):
        make_folder(lock.parent)
        try:
            # Made, not locked: some file systems know no locks, or keep them to one host.
            file = os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            file = -1
    if file < 0:
        yield False
        return
    heartbeat = Heartbeat(file, BEAT)
    try:
        with suppress(OSError):  # of a full disk the preparation has the sentence
            os.write(file, json.dumps(identity()).encode())
        yield True
    finally:
        heartbeat.stop()
        os.close(file)
        with suppress(OSError):
            lock.unlink(missing_ok=True)
            # The folder of prepared data and the run folder around it; rmdir takes a folder only if nothing is in it.
            for folder in lock.parents[:2]:
                folder.rmdir()


def _left_behind(lock: Path) -> bool:
    """Whether a process of this host made the lock and was killed."""
    with suppress(OSError):
        return has_ended(parsed(read_small(lock)))
    return False


def _last_beat(lock: Path) -> int | None:
    with suppress(OSError):
        return lock.stat().st_mtime_ns
    return None
