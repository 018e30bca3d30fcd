"""Raw text -> Megatron's indexed files, alone, with workers, or under mpirun."""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from vqmoe_ds.data import spread
from vqmoe_ds.data.documents import plan_units
from vqmoe_ds.data.parts import Counts, Parts, disk_errors, merge
from vqmoe_ds.data.tokenizers import load_tokenizer
from vqmoe_ds.data.units import Document, OnError, SourceOptions, Unit
from vqmoe_ds.runtime.errors import DataError, UserError
from vqmoe_ds.runtime.files import make_folder
from vqmoe_ds.runtime.terminal import aligned, exit_code_of

_ENOUGH = 1_000_000  # tokens after which the share of unknown symbols is known well enough to stop early


def build_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="files (.txt, .jsonl, .parquet; also .gz, .bz2, .xz, .zst), folders, globs, recipe:NAME, "
        "hub:NAME[:CONFIG[:SPLIT]]",
    )
    parser.add_argument(
        "--tokenizer",
        default="bytes",
        help="bytes, a *.tokenizer or Hugging Face folder, .model, .json or word list .txt",
    )
    parser.add_argument("--output", metavar="PREFIX", help="makes PREFIX.bin, .idx, .json and .tokenizer/")
    parser.add_argument("--workers", type=int, default=1, help="processes of this machine (not under mpirun)")
    parser.add_argument("--text_key", default="text", help="JSON key or table column that holds the text")
    parser.add_argument(
        "--document", choices=get_args(Document), default="file", help="what is one document in plain text"
    )
    parser.add_argument(
        "--on_error", choices=get_args(OnError), default="fail", help="what happens to text that cannot be read"
    )
    parser.add_argument(
        "--max_unknown", type=float, default=1.0, help="refuse more than this %% of tokens for unknown symbols"
    )
    parser.add_argument("--max_tokens", type=int, help="stop after so many tokens (default: everything)")
    parser.add_argument("--streaming", action="store_true", help="read hub sources without keeping them on disk")
    parser.add_argument("--cache_dir", help="where recipes and hub sources are kept")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at PREFIX, once the new is whole")
    parser.add_argument("--list_recipes", action="store_true", help="names, sizes and licences of recipe:NAME")
    return parser


def main(options: argparse.Namespace) -> int:
    """Prepare, or say in one sentence why not; the exit code."""
    comm = None
    try:
        if options.list_recipes:
            print(recipes_table())
            return 0
        ranks = spread.launched_ranks()
        comm = spread.world(ranks) if ranks > 1 else None
        if comm is not None and comm.rank:
            follow(comm)
        else:
            prepare(options, comm)
        return 0
    except UserError as error:
        message, code = f"error: {error}", error.exit_code
    except KeyboardInterrupt as stop:
        message = "interrupted; give the same command again: it goes on from the parts that are finished"
        code = exit_code_of(stop)
    print(message, file=sys.stderr, flush=True)
    if comm is not None:
        # Whichever rank this is: the others would wait for it without end.
        comm.Abort(code)
    return code


def recipes_table() -> str:
    from vqmoe_ds.data.recipes import list_recipes

    return "\n".join(aligned([("recipe", "from", "text", "licence"), *list_recipes()]))


def prepare(options: argparse.Namespace, comm: Any = None) -> Counts:
    """The whole preparation; under MPI this is rank 0, and the others are in ``follow``.

    Raises:
        DataError: bad input, a full disk, a worker that died.
    """
    _check(options, comm)
    started = time.monotonic()
    parts = Parts(f"{options.output}.parts", load_tokenizer(options.tokenizer))
    _check_free(options, parts)
    how = SourceOptions(options.text_key, options.document, options.on_error, options.streaming, options.cache_dir)
    # After what can be refused at once, as recipes are fetched here.
    units = plan_units(options.sources, how)
    with disk_errors(str(parts.folder.parent)):
        make_folder(parts.folder)
    # The lock before clean, which would take away what another preparation is making.
    with _locked(parts.folder):
        parts.clean()
        try:
            if options.max_tokens is None:
                new = _make_parts(options, comm, parts, units)
            else:
                units, new = _first_parts(options, parts, units)
        except KeyboardInterrupt:
            parts.clean()  # of workers that were ended
            raise
        total = Counts()
        for unit in units:
            total.add(_counts(parts, unit))
        _check_total(total, options)
        limit = {} if options.max_tokens is None else {"max_tokens": options.max_tokens}
        about = {"sources": options.sources, "on_error": options.on_error, **limit}
        merge(parts, units, total, options.output, about)
        # Not before the .idx is in its place: a run that is killed in the merge goes on from the parts.
        shutil.rmtree(parts.folder, ignore_errors=True)
    # On NFS the lock stays in it, under another name, until it is closed.
    with suppress(OSError):
        parts.folder.rmdir()
    if comm is not None:
        spread.dismiss(comm)
    print(report(options.output, parts, total, new, time.monotonic() - started), flush=True)
    return total


def follow(comm: Any) -> None:
    """Work of a rank other than 0: take the plan, make a share of its parts."""
    folder, tokenizer, units = spread.receive_plan(comm)
    if not Path(folder).is_dir():
        print(
            f"error: rank {comm.rank} does not see {folder}; --output must be on a file system that all nodes share",
            file=sys.stderr,
            flush=True,
        )
        comm.Abort(2)
    spread.run_ranks(comm, Parts(folder, load_tokenizer(tokenizer)), units, lambda unit, counts: None)


def _make_parts(options: argparse.Namespace, comm: Any, parts: Parts, units: list[Unit]) -> Counts:
    """Make the parts that are missing; returns what they hold."""
    by_path = {parts.path(unit): unit for unit in units}  # the same source given twice is read once
    missing = [unit for unit in by_path.values() if parts.counts(unit, verify=True) is None]
    with Progress(sum(unit.size for unit in by_path.values()), sum(unit.size for unit in missing)) as progress:
        return _make(options, comm, parts, missing, lambda unit, counts: progress.add(unit.size))


def _make(options: argparse.Namespace, comm: Any, parts: Parts, missing: list[Unit], tell: spread.Done) -> Counts:
    new = Counts()

    def done(unit: Unit, counts: Counts) -> None:
        new.add(counts)
        tell(unit, counts)
        if new.tokens >= _ENOUGH:
            _check_unknown(new, options)

    if comm is not None:
        spread.send_plan(comm, (str(parts.folder), options.tokenizer, missing))
        spread.run_ranks(comm, parts, missing, done)
    elif options.workers > 1 and len(missing) > 1:
        spread.run_workers(parts, missing, done, options.workers, options.tokenizer)
    else:
        spread.run_alone(parts, missing, done)
    return new


def _first_parts(options: argparse.Namespace, parts: Parts, units: list[Unit]) -> tuple[list[Unit], Counts]:
    """(the first units that have ``--max_tokens`` together, the last of them cut, what was made for them).

    As many as there are workers are made at a time, each with the limit that is left before all of them, so that no
    more is read or kept than that; the one that turns out to have less room is made again.
    """
    taken: list[Unit] = []
    new, left = Counts(), int(options.max_tokens)

    def part(unit: Unit) -> Unit:
        whole = parts.counts(unit)
        return unit if whole is not None and whole.tokens < left else replace(unit, limit=left)

    with Progress(left, left, " tokens") as progress:

        def make(units: list[Unit], verify: bool = False) -> None:
            missing = {parts.path(unit): unit for unit in units if parts.counts(unit, verify) is None}
            new.add(_make(options, None, parts, [*missing.values()], lambda _, counts: progress.add(counts.tokens)))

        for start in range(0, len(units), options.workers):
            wave = units[start : start + options.workers]
            make([part(unit) for unit in wave], verify=True)
            for unit in wave:
                make([part(unit)])
                taken.append(part(unit))
                counts = _counts(parts, taken[-1])
                if counts.cut or counts.tokens >= left:
                    return taken, new
                left -= counts.tokens
    return taken, new


def _counts(parts: Parts, unit: Unit) -> Counts:
    counts = parts.counts(unit)
    if counts is None:
        raise DataError(f"part {parts.path(unit)} has gone or changed; give the same command again")
    return counts


# ---------------------------------------------------------------- checks


def _check(options: argparse.Namespace, comm: Any) -> None:
    if not options.sources:
        raise DataError("no source given; name files, folders, globs, recipe:NAME or hub:NAME (see --list_recipes)")
    if not options.output:
        raise DataError("no --output PREFIX given; it names the files to make")
    if os.path.isdir(options.output) or not Path(options.output).name:
        raise DataError(f"--output {options.output} is a folder; add the name that the files begin with")
    if options.workers < 1:
        raise DataError(f"--workers {options.workers} must be at least 1")
    if options.max_tokens is not None and options.max_tokens < 1:
        raise DataError(f"--max_tokens {options.max_tokens} must be at least 1")
    if comm is not None and options.max_tokens is not None:
        raise DataError("--max_tokens does not go with mpirun; give --workers on one machine instead")
    if comm is not None and options.workers > 1:
        raise DataError("--workers does not go with mpirun; give more ranks (mpirun -n) instead")


def _check_free(options: argparse.Namespace, parts: Parts) -> None:
    if options.overwrite:
        return
    found = [name for name in ("idx", "bin", "json") if os.path.exists(f"{options.output}.{name}")]
    # Parts go after the .idx has come: what is beside them without one is of a merge that was ended in its renames.
    unfinished = "idx" not in found and parts.folder.is_dir()
    own = f"{options.output}.tokenizer"
    try:
        # The tokenizer may have been trained into PREFIX.tokenizer: the same one is no output that would be lost.
        other = os.path.exists(own) and load_tokenizer(own).checksum != parts.tokenizer.checksum
    except DataError:
        other = not unfinished
    lost = ([] if unfinished else found) + ["tokenizer"] * other
    if lost:
        raise DataError(f"{options.output}.{lost[0]} exists; give another --output, or --overwrite to replace it")


def _check_total(total: Counts, options: argparse.Namespace) -> None:
    if total.documents == 0 and total.cut:
        raise DataError(f"--max_tokens {options.max_tokens} is less than the first text takes; give more")
    if total.documents == 0:
        skipped = ", ".join(f"{count:,} {reason}" for reason, count in total.skipped.items()) or "empty"
        raise DataError(f"the sources {' '.join(options.sources)} hold no document ({skipped}); nothing is written")
    _check_unknown(total, options)


def _check_unknown(counts: Counts, options: argparse.Namespace) -> None:
    share = 100 * counts.unknown / max(1, counts.tokens)
    if share > options.max_unknown:
        raise DataError(
            f"tokenizer {options.tokenizer} lacks the symbols of {share:.1f} % of the tokens, more than --max_unknown "
            f"{options.max_unknown:g}; train one on this text (tools/train_tokenizer.py, with byte fallback it lacks "
            "none) or raise the limit"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock that lets one process prepare a corpus at a time; it goes with the process."""
    with disk_errors(str(folder)):  # a FIFO in its place would be waited for
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    with open(descriptor, "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"another preparation is writing {folder}; wait for it or choose another --output"
            ) from error
        except OSError:  # a file system without locks
            pass
        yield


# ---------------------------------------------------------------- what the user sees


class Progress:
    """A bar on a terminal, a plain line every ten seconds elsewhere: MB of the sources, MB/s, time left.

    Args:
        total: of the sources.
        missing: of it, what is still to be made.
        unit: of both.
    """

    def __init__(self, total: int, missing: int, unit: str = "B") -> None:
        self.live, self.every, self.unit = sys.stderr.isatty(), 10.0, f"M{unit}"
        done = total - missing
        if done:
            print(f"going on: {done / 1e6:,.1f} of {total / 1e6:,.1f} MB are finished", file=sys.stderr, flush=True)
        tqdm.monitor_interval = 0  # no thread of its own: workers may be forked from here
        self.bar: Any = tqdm(
            total=total, initial=done, unit=unit, unit_scale=True, desc="preparing", disable=not self.live
        )
        self.total, self.begun, self.now = total, done, done
        self.start = self.said = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def add(self, size: int) -> None:
        # Parts that are made side by side may have more tokens together than are taken of them.
        size = min(size, self.total - self.now)
        self.bar.update(size)
        self.now += size
        if self.live or time.monotonic() - self.said < self.every:
            return
        self.said = time.monotonic()
        rate = (self.now - self.begun) / (self.said - self.start)
        # Parts of empty documents hold no token.
        left = tqdm.format_interval((self.total - self.now) / rate) if rate else "?"
        print(
            f"preparing: {self.now / 1e6:,.1f} of {self.total / 1e6:,.1f} {self.unit}, {rate / 1e6:.1f} {self.unit}/s, "
            f"{left} left",
            file=sys.stderr,
            flush=True,
        )


def report(prefix: str, parts: Parts, total: Counts, new: Counts, seconds: float) -> str:
    """Summary of what was made, in a few lines."""
    lines = [
        f"{prefix}: {total.documents:,} documents, {total.tokens:,} tokens ({parts.dtype}), {total.bytes:,} bytes of "
        f"text, {total.bytes / total.tokens:.2f} bytes/token",
        f"read {new.bytes / 1e6:,.1f} MB of text in {seconds:.1f} s: {new.bytes / 1e6 / seconds:.1f} MB/s",
    ]
    lines += [f"left out: {n:,} x {reason} (first: {total.first[reason]})" for reason, n in total.skipped.items()]
    if total.unknown:
        share = 100 * total.unknown / total.tokens
        lines.append(f"unknown symbols: {total.unknown:,} tokens ({share:.3f} %) stand for symbols the tokenizer lacks")
    return "\n".join(lines)
