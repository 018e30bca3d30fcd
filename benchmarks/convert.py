"""Speed and peak memory of conversions, beside a copy of the same bytes.

    python benchmarks/convert.py                    # a ZeRO-2 tag of 4 GB in a temporary folder; needs 12 GB there
    python benchmarks/convert.py --layers 2 --dir /scratch

The tag is of a model of nothing but experts (32 of hidden width 1024 at width 256: 302 MB of weights and moments a
layer), written for four ranks and expert-parallel size 2.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vqmoe_ds.checkpoint.formats.deepspeed.writer import write_tag
from vqmoe_ds.checkpoint.formats.deepspeed.zero import TagLayout
from vqmoe_ds.checkpoint.reader import KINDS, CheckpointReader, Piece
from vqmoe_ds.config.load import load_config

ROOT = Path(__file__).resolve().parent.parent
CASES = {
    "cp and sync": [],
    "import torch": [],
    "portable": ["--to", "portable"],
    "ZeRO-3, EP 4, 8 ranks": ["--to", "deepspeed", "--zero", "3", "--ep", "4", "--world", "8"],
    "ZeRO-0, one rank": ["--to", "deepspeed", "--zero", "0", "--ep", "1", "--world", "1"],
}


class Grown(CheckpointReader):
    """A checkpoint of any size out of nothing, to be written by ``write_tag``."""

    has_optimizer = True

    def __init__(self, layers: int, width: int, hidden: int, experts: int) -> None:
        self.path, self.kind, self.step = Path("grown"), "grown", 1
        self.layout, self.client_state, self.counters = {}, {}, {}
        changes: dict[str, Any] = {"model.layers": layers, "model.width": width, "model.heads": 2}
        changes.update({"moe.router": "hash_token", "moe.expert_hidden": hidden, "moe.num_experts": experts})
        self.config = load_config("tiny", None, changes).config.model_dump(mode="json")
        self._shapes: dict[str, tuple[int, ...]] = {"embed.weight": (256, width)}
        for block in range(layers):
            self._shapes[f"blocks.{block}.mlp_norm.weight"] = (width,)
            for name, shape in (("w1", (hidden, width)), ("w2", (width, hidden)), ("w3", (hidden, width))):
                self._shapes[f"blocks.{block}.mlp.experts.{name}"] = (experts, *shape)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def optimizer_step(self) -> int:
        return 1

    def buffers(self) -> dict[str, Tensor]:
        return {}

    def pieces(self, name: str, kind: str = "fp32") -> list[Piece]:
        raise NotImplementedError

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        return torch.arange(start, start + count, dtype=torch.float32).remainder_(1009 + KINDS.index(kind))


def timed(command: list[str]) -> tuple[float, int]:
    """Seconds, and megabytes of peak memory."""
    script = (
        "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode; "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024); sys.exit(code)"
    )
    started = time.perf_counter()
    answer = subprocess.run([sys.executable, "-c", script, *command], check=True, capture_output=True, text=True)
    return time.perf_counter() - started, int(answer.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--dir", help="where to write; default: the system's temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        source, target = Path(folder) / "source", Path(folder) / "target"
        tag = source / "global_step0000001"
        tag.mkdir(parents=True)
        write_tag(Grown(options.layers, 256, 1024, 32), tag, TagLayout(2, 2, 4))
        size = sum(file.stat().st_size for file in tag.iterdir())
        print(f"source: {size / 1e9:.2f} GB")
        convert = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py"), str(tag), str(target)]
        for name, arguments in CASES.items():
            command = [*convert, *arguments]
            if name == "cp and sync":
                command = ["sh", "-c", f"cp -r {source} {target} && sync -f {target}"]
            elif name == "import torch":
                command = [sys.executable, "-c", "import torch"]
            seconds, megabytes = timed(command)
            print(f"{name:24} {seconds:6.1f} s   peak {megabytes} MB")
            shutil.rmtree(target, ignore_errors=True)


if __name__ == "__main__":
    main()
