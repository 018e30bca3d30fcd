#!/usr/bin/env python
"""Generation with experts that stay on disk: all in memory, read on demand, read ahead (docs/expert-memory.md).

nice python benchmarks/expert_memory.py --folder /fast/disk      # 4 GB of experts
python benchmarks/expert_memory.py --small                       # seconds; shows that it works, not how fast

A model with random weights is written to a folder; every row is a process of its own that draws the same tokens, with
frequencies as in text (Zipf). The processes step in turns, so that other work on the machine slows them alike. The page
cache of the model's files is dropped before each step (posix_fadvise DONTNEED), so whatever is not in the budget comes
from the disk, or from what lies below it (a virtual disk may have a cache of its own). Times are medians over steps,
without that of the prompt.

`bound` is the larger of the time of a step in memory and the bytes read over the bandwidth of the disk: the best of
three measurements on the same files, with as many threads and reads as large. `grown` is the largest resident size less
that of the loaded model before its first pass: the budget, activations and buffers.

Experts are read as on a machine without memory for them. With --limit (as root) each process that reads experts is in a
cgroup of so much memory; `of limit` is the most that it held, cached pages among it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import vqmoe_ds  # noqa: F401  before torch: it sets how long idle OpenMP threads spin

# isort: split

import torch
from measuring import peak_bytes, table, write_json
from torch import Tensor

from vqmoe_ds.checkpoint import load_experts
from vqmoe_ds.checkpoint.formats.portable import write_portable
from vqmoe_ds.checkpoint.load_model import LoadedModel, load_model
from vqmoe_ds.checkpoint.reader import Piece, WeightsReader
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.evaluation.generate import Sampling
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.moe.expert_store import READERS, StoredMoELayer
from vqmoe_ds.runtime.files import new_folder
from vqmoe_ds.runtime.memory import parse_memory

MODES = ("in memory", "on demand", "read ahead")
PROMPT = 4
MIB, PAGE = 1 << 20, os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    options = parse()
    if options.child:
        CHILDREN[options.child[0]](*options.child[1:])
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        model = str(Path(folder) / "model")
        print(f"{write_model(options, model) / 1e9:.2f} GB of experts, {options.expert_memory} of memory for them")
        with Child("disk", model) as child:
            bandwidth = max(child.told() for _ in range(3))
        print(f"disk: {bandwidth / 1e6:,.0f} MB/s with {READERS} threads")
        with ExitStack() as stack:
            limits = [None, options.limit, options.limit]
            children = [
                stack.enter_context(Child("generate", model, mode, options.expert_memory, limit=limit))
                for mode, limit in zip(MODES, limits, strict=True)
            ]
            sizes = zip(options.batch, options.steps, strict=False)
            rows = [row for batch, steps in sizes for row in compare(children, batch, steps, bandwidth)]
    columns = ["batch", "experts", "tokens/s", "ms a step", "MB read a step", "/ bound", "peak RSS MiB", "grown MiB"]
    columns += ["of limit MiB"] * (options.limit is not None)
    print(table(columns, [row.pop("cells") for row in rows]))
    write_json(options.json, rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--width", type=int, default=1024)
    add("--hidden", type=int, default=512, help="hidden width of an expert")
    add("--layers", type=int, default=16)
    add("--experts", type=int, default=40)
    add("--expert_memory", default="256MiB")
    add("--batch", type=int, nargs="+", default=[1, 16])
    add("--steps", type=int, nargs="+", default=[48, 8], help="new tokens of each row, for each batch")
    add("--limit", metavar="SIZE", help="memory of each process that reads experts, such as 1100MiB (needs root)")
    add("--folder", help="where the model is written (default: the system's temporary folder)")
    add("--small", action="store_true", help="a model of 3 MB")
    add("--json", help="write the figures to a file, or to the terminal with -")
    add("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.small:
        options.width, options.hidden, options.layers, options.experts = 64, 64, 4, 16
        options.expert_memory = "400KB"
    return options


def compare(children: list[Child], batch: int, steps: int, bandwidth: float) -> list[dict[str, Any]]:
    """Measurements of the three ways at one batch size; their tokens must be equal."""
    for child in children:
        child.told(f"begin {batch}")
    turns = [[child.told() for child in children] for _ in range(1 + steps)]
    ends = [child.told("end") for child in children]
    if len({end["ids"] for end in ends}) != 1:
        raise SystemExit(f"batch {batch}: the ways draw different tokens")
    rows, compute = [], 0.0
    for child, mode, told, end in zip(children, MODES, zip(*turns[1:], strict=True), ends, strict=True):
        step, read = statistics.median(one["seconds"] for one in told), statistics.mean(one["read"] for one in told)
        compute = compute or step  # of the first, in memory
        row = {"mode": mode, "batch": batch, "turns": told, "bandwidth": bandwidth, **end}
        row["cells"] = [str(batch), mode, f"{batch / step:.1f}", f"{1e3 * step:.1f}", f"{read / 1e6:.1f}"]
        row["cells"] += [f"{step / max(compute, read / bandwidth):.2f}"]
        row["cells"] += [f"{end[size] / MIB:,.0f}" for size in ("peak", "grown")]
        if any(one.group for one in children):
            held = child.group.most() if child.group else None
            row |= {"held": held}
            row["cells"] += ["" if held is None else f"{held / MIB:,.0f}"]
        rows.append(row)
    return rows


class Child:
    """A process of its own that answers each line in JSON."""

    def __init__(self, *arguments: str, limit: str | None = None) -> None:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        size = parse_memory(limit, "--limit")
        self.group = None if size is None else Group(size)
        enter = None if self.group is None else self.group.enter
        line = [sys.executable, __file__, "--child", *arguments]
        self.process = subprocess.Popen(line, preexec_fn=enter, **pipes)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        if self.group is not None:
            self.group.folder.rmdir()

    def told(self, line: str = "") -> Any:
        print(line, file=self.process.stdin, flush=True)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("answer "):  # libraries may say something, too
                return json.loads(line.removeprefix("answer "))
        raise SystemExit(f"a process ended with {self.process.wait()}")


class Group:
    """A cgroup of bounded memory, of version 1 or 2."""

    def __init__(self, size: int) -> None:
        first = Path("/sys/fs/cgroup/memory")
        limit, self._most = "memory.max", "memory.peak"
        if first.is_dir():
            limit, self._most = "memory.limit_in_bytes", "memory.max_usage_in_bytes"
        self.folder = Path(tempfile.mkdtemp(prefix="expert_memory.", dir=first if first.is_dir() else first.parent))
        (self.folder / limit).write_text(str(size), encoding="ascii")

    def enter(self) -> None:
        (self.folder / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")

    def most(self) -> int:
        """Bytes that it held at most."""
        return int((self.folder / self._most).read_text(encoding="ascii"))


def answer(value: Any) -> None:
    print("answer", json.dumps(value), flush=True)


# ---------------------------------------------------------------- processes


def generate(path: str, mode: str, memory: str) -> None:
    """Draw tokens of several texts side by side, one of each at a line."""
    if mode == "in memory":
        with patch.object(torch.Tensor, "normal_", lambda tensor, *_, **__: tensor):  # the file has other values
            loaded = load_model(path)
    else:
        loaded = load_stored(path, parse_memory(memory, "--expert_memory"))
    if mode == "on demand":
        loaded.model.expert_store = None  # nobody tells of layers ahead
    for line in sys.stdin:
        if line.startswith("begin"):
            texts = Texts(path, loaded, int(line.split()[1]))
            answer("begun")
        else:
            answer(texts.end() if line.startswith("end") else texts.step())
    loaded.close()


def load_stored(path: str, memory: int) -> LoadedModel:
    """A model with its experts on disk, as on a machine that has no memory left to cache them."""
    with patch.object(load_experts, "free_bytes", lambda: 0):
        return load_model(path, expert_memory=memory)


class Texts:
    """Texts of a model that grow by one token each at a step."""

    def __init__(self, path: str, loaded: LoadedModel, batch: int) -> None:
        self.path, self.loaded, self.cache = path, loaded, loaded.model.new_cache()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak from here on
        held = 0 if loaded.store is None else loaded.store.most_bytes_held  # by an earlier batch
        self.start = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE - held
        prompts, self.random = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
        self.tokens_BS = torch.randint(0, loaded.config.model.vocab_size, (batch, PROMPT), generator=prompts)
        self.drawn = hashlib.sha256()
        self.zipf_V = -torch.arange(1.0, loaded.config.model.vocab_size + 1).log()

    def step(self) -> dict[str, float]:
        drop_pages(self.path)
        since, before = time.perf_counter(), self._bytes_read()
        with torch.no_grad():
            logits_BV = self.loaded.model(self.tokens_BS, cache=self.cache)[0][:, -1]
        self.tokens_BS = torch.tensor(
            [[Sampling(1.0).draw(logits_V, self.random)] for logits_V in logits_BV + self.zipf_V]
        )
        seconds = time.perf_counter() - since
        self.drawn.update(self.tokens_BS.numpy().tobytes() + logits_BV.numpy().tobytes())
        return {"seconds": seconds, "read": self._bytes_read() - before}

    def end(self) -> dict[str, Any]:
        return {"peak": peak_bytes(), "grown": peak_bytes() - self.start, "ids": self.drawn.hexdigest()}

    def _bytes_read(self) -> int:
        return 0 if self.loaded.store is None else self.loaded.store.bytes_read


def disk(path: str) -> None:
    """Bandwidth of reads as large as an expert's matrices, at places in no order, in bytes per second."""
    loaded = load_stored(path, 1 << 40)
    assert loaded.store is not None
    source, random = loaded.store.source, torch.Generator().manual_seed(3)
    for _ in sys.stdin:
        order = iter(torch.randperm(source.layers * source.experts, generator=random).tolist()[:128])
        done: list[int] = []

        def read(order: Iterator[int] = order, done: list[int] = done) -> None:
            out = torch.empty(source.hidden, source.width)
            for number in order:
                for part in ("w1", "w3"):
                    source.fetch(*divmod(number, source.experts), part, out)
                    done.append(out.nbytes)

        drop_pages(path)
        start = time.perf_counter()
        with ThreadPoolExecutor(READERS) as pool:
            for reader in [pool.submit(read) for _ in range(READERS)]:
                reader.result()
        answer(sum(done) / (time.perf_counter() - start))


CHILDREN: dict[str, Callable[..., None]] = {"generate": generate, "disk": disk}


def drop_pages(path: str) -> None:
    """Let the system forget what it cached of the weights; written pages must be on disk already."""
    for file in Path(path).glob("model*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


# ---------------------------------------------------------------- the model


def write_model(options: argparse.Namespace, folder: str) -> int:
    """A model with codes of tokens and no other router; bytes of its experts."""
    shape = {"vocab_size": 8192, "layers": options.layers, "width": options.width, "heads": options.width // 64}
    sections: dict[str, Any] = {
        "model": {**shape, "sequence_length": 128},
        "moe": {"router": "vq", "num_experts": options.experts, "expert_hidden": options.hidden, "top_k": 0},
        "codebook": {"source": "token_embedding", "num_codes": 4 * options.experts},
    }
    config = RunConfig(**sections)
    reader = RandomExperts(MoETransformer(config, layer_class=StoredMoELayer))
    with new_folder(Path(folder), False) as into:
        write_portable(reader, into)
    return sum(4 * math.prod(shape) for name, shape in reader.shapes.items() if ".experts." in name)


class RandomExperts(WeightsReader):
    """A model without experts as a checkpoint that has some, of the same few numbers over and over."""

    kind, path, step = "memory", Path("memory"), 1

    def __init__(self, model: MoETransformer) -> None:
        super().__init__()
        self.config = model.config.model_dump(mode="json")
        self._parameters = dict(model.named_parameters())
        self._shapes = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        self._buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in self._shapes}
        self._numbers = torch.randn((1 << 22) + 4097, generator=torch.Generator().manual_seed(0))
        self._numbers *= model.config.model.width**-0.5

    def buffers(self) -> dict[str, Tensor]:
        return self._buffers

    def pieces(self, name: str, kind: str = "fp32") -> list[Piece]:
        raise NotImplementedError

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        parameter = self._parameters[name]
        if not parameter.is_meta:
            return parameter.detach().view(-1)[start : start + count]
        first = (start + len(name) * 7919) % len(self._numbers)
        return torch.cat([self._numbers[first:], *[self._numbers] * (1 + count // len(self._numbers))])[:count]


if __name__ == "__main__":
    main()
