#!/usr/bin/env python
"""Text to indexed files: ours beside the loop of Megatron-LM's preprocessing, in turns, with the same tokenizer.

    python benchmarks/data.py                                        # bytes, unigram and BPE, two workers
    python benchmarks/data.py --recipe sotu --tokenizer unigram --workers 1 2
    python benchmarks/data.py --memory 20 100 --tokenizer unigram    # peak memory by size of the corpus

The peer is written from megatron-core's published interface the way Megatron-LM's tool uses it: a pool of processes,
JSON lines through ``imap`` in chunks of 32, every document a list of ids, ``IndexedDatasetBuilder.add_document`` one by
one. Imports are outside the measured time (megatron-core's take seconds); starting the workers is inside. Both make
the same files, which is checked. *CPU s* counts all processes and the smallest of the repetitions is shown; it says
more than the wall clock on a machine with other work, where the peer gains by having one process more.

The text is the documentation of Python's standard library, its paragraphs drawn again and again in another order, in
documents of about 1 kB; or that of a recipe.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from measuring import table, write_json

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

KINDS = ("bytes", "unigram", "bpe")


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    if options.alone:
        print(json.dumps({"ours": run_ours, "peer": run_peer}[options.alone](options)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        text = make_text(Path(folder) / "text.jsonl", max([options.mb, *options.memory]), options.recipe)
        tokenizers = {name: make_tokenizer(name, text, Path(folder)) for name in options.tokenizer}
        part = first_megabytes(text, options.mb)
        runs = [measure(options, part, name, tokenizers[name], n) for name in tokenizers for n in options.workers]
        peaks = [peak(options, text, size, *item) for item in tokenizers.items() for size in options.memory]

    columns = ["tokenizer", "workers", "ours MB/s", "peer MB/s", "ratio", "ours CPU s", "peer CPU s", "ratio"]
    print(table(columns, [row(run) for run in runs]))
    if peaks:
        rows = [[p["tokenizer"], str(p["mb"]), f"{p['peak_MiB']:.0f}"] for p in peaks]
        print("\n" + table(["tokenizer", "text MB", "peak MiB of the largest process"], rows))
    write_json(options.json, runs + peaks)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=20, help="MB of text")
    parser.add_argument("--recipe", help="text of a recipe (tools/prepare_data.py --list_recipes)")
    parser.add_argument("--tokenizer", nargs="+", choices=KINDS, default=list(KINDS), help="of 8,192 where trained")
    parser.add_argument("--workers", nargs="+", type=int, default=[2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", nargs="*", type=int, default=[20, 100], help="MB of text to take peak memory at")
    parser.add_argument("--folder", help="where to work; default the system's temporary folder")
    parser.add_argument("--json", help="write the figures to a file, or to the terminal with -")
    parser.add_argument("--alone", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--input", help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    parser.add_argument("--tokenizer_path", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


# ---------------------------------------------------------------- text and tokenizers


def make_text(path: Path, megabytes: int, recipe: str | None) -> Path:
    """JSON lines with at least that much text, as far as there is."""
    left = megabytes * 10**6
    with path.open("w", encoding="utf-8") as stream:
        for document in _documents(recipe):
            stream.write(json.dumps({"text": document}) + "\n")
            left -= len(document)
            if left <= 0:
                break
    return path


def _documents(recipe: str | None) -> Iterator[str]:
    if recipe:
        from vqmoe_ds.data.documents import plan_units, read_unit
        from vqmoe_ds.data.units import SourceOptions

        for unit in plan_units([f"recipe:{recipe}"], SourceOptions()):
            yield from (piece.text for piece in read_unit(unit))
        return
    from vqmoe_ds.data.stdlib_text import stdlib_text

    paragraphs, rng = stdlib_text().decode().split("\n\n"), random.Random(0)
    while True:
        rng.shuffle(paragraphs)
        for start in range(0, len(paragraphs), 8):
            yield "\n\n".join(paragraphs[start : start + 8])


def first_megabytes(path: Path, megabytes: int) -> Path:
    """The first lines of a file, until they hold that much."""
    part = path.with_name(f"{megabytes}.jsonl")
    left = megabytes * 10**6
    with path.open(encoding="utf-8") as source, part.open("w", encoding="utf-8") as target:
        for line in source:
            target.write(line)
            left -= len(line)
            if left <= 0:
                break
    return part


def make_tokenizer(name: str, text: Path, folder: Path) -> str:
    if name == "bytes":
        return name
    output = str(folder / f"{name}.tokenizer")
    command = [sys.executable, str(ROOT / "tools/train_tokenizer.py"), str(text), "--output", output]
    command += ["--kind", name, "--vocab_size", "8192", "--sample_mb", "5"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return output


# ---------------------------------------------------------------- measuring


def measure(options: argparse.Namespace, text: Path, name: str, tokenizer: str, workers: int) -> dict[str, Any]:
    """Both in turns, in processes of their own."""
    results: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    for _ in range(options.repeats):
        for which, found in results.items():
            found.append(alone(which, text, tokenizer, workers))
    assert len({result["sha256"] for found in results.values() for result in found}) == 1, "the files differ"
    run: dict[str, Any] = {"tokenizer": name, "workers": workers, "text_MB": results["ours"][0]["text_MB"]}
    for which, found in results.items():
        seconds = [result["seconds"] for result in found]
        run[which] = {"best_s": min(seconds), "median_s": statistics.median(seconds)}
        run[which]["cpu_s"] = min(result["cpu_s"] for result in found)
    return run


def alone(which: str, text: Path, tokenizer: str, workers: int) -> dict[str, Any]:
    """One run in a process of its own: seconds, CPU seconds and the peak of its largest process."""
    with tempfile.TemporaryDirectory(dir=text.parent) as folder:
        command = [sys.executable, __file__, "--alone", which, "--input", str(text), "--output", f"{folder}/data"]
        command += [f"--tokenizer_path={tokenizer}", f"--workers={workers}"]
        log = subprocess.DEVNULL if which == "peer" else None  # megatron-core warns of what it does not find
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"error: {which} failed")
        result: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    result["peak_MiB"] = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return result


def peak(options: argparse.Namespace, text: Path, megabytes: int, name: str, tokenizer: str) -> dict[str, Any]:
    part, workers = first_megabytes(text, megabytes), options.workers[-1]
    return {"mb": megabytes, "tokenizer": name, "workers": workers, **alone("ours", part, tokenizer, workers)}


def row(run: dict[str, Any]) -> list[str]:
    ours, peer = run["ours"], run["peer"]
    speeds = [run["text_MB"] / each["best_s"] for each in (ours, peer)]
    cells = [
        run["tokenizer"],
        str(run["workers"]),
        *(f"{speed:.1f}" for speed in speeds),
        f"{speeds[0] / speeds[1]:.2f}",
    ]
    return [*cells, f"{ours['cpu_s']:.2f}", f"{peer['cpu_s']:.2f}", f"{peer['cpu_s'] / ours['cpu_s']:.2f}"]


def cpu_seconds() -> float:
    """Processor time of this process and of the children it has waited for."""
    return sum(os.times()[:4])


# ---------------------------------------------------------------- the two


def run_ours(options: argparse.Namespace) -> dict[str, Any]:
    from vqmoe_ds.data.prepare import build_parser, prepare

    arguments = [options.input, "--output", options.output, "--tokenizer", options.tokenizer_path]
    parsed = build_parser("").parse_args([*arguments, "--workers", str(options.workers[0])])
    start, before = time.perf_counter(), cpu_seconds()
    total = prepare(parsed)
    return figures(options, time.perf_counter() - start, cpu_seconds() - before, total.bytes)


def run_peer(options: argparse.Namespace) -> dict[str, Any]:
    import multiprocessing

    import numpy as np
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    from vqmoe_ds.data.tokenizers import load_tokenizer

    size = load_tokenizer(options.tokenizer_path).vocab_size
    start, before, text_bytes = time.perf_counter(), cpu_seconds(), 0
    builder = IndexedDatasetBuilder(f"{options.output}.bin", dtype=DType.optimal_dtype(size))
    with open(options.input, encoding="utf-8") as lines:
        pool = multiprocessing.Pool(options.workers[0], _start_peer, [options.tokenizer_path])
        for ids, length, read in pool.imap(_encode, lines, 32):
            builder.add_document(np.array(ids), length)
            text_bytes += read
        pool.close()
        pool.join()
    builder.finalize(f"{options.output}.idx")
    return figures(options, time.perf_counter() - start, cpu_seconds() - before, text_bytes)


_tokenizer: Any = None


def _start_peer(path: str) -> None:
    global _tokenizer
    from vqmoe_ds.data.tokenizers import load_tokenizer

    _tokenizer = load_tokenizer(path)


def _encode(line: str) -> tuple[list[int], list[int], int]:
    text = json.loads(line)["text"]
    ids: list[int] = []
    ids.extend(_tokenizer.encode(text).tolist())
    ids.append(_tokenizer.eod)
    return ids, [len(ids)], len(text.encode())


def figures(options: argparse.Namespace, seconds: float, cpu: float, text_bytes: int) -> dict[str, Any]:
    from vqmoe_ds.runtime.files import sha256_of

    digests = [sha256_of(f"{options.output}.{name}") for name in ("bin", "idx")]
    return {"seconds": seconds, "cpu_s": cpu, "text_MB": text_bytes / 1e6, "sha256": " ".join(digests)}


if __name__ == "__main__":
    main()
