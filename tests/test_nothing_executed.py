"""Whatever could run what a file says, here and in the libraries that are handed files, is on a list with a reason.

The lists are exact: a new use fails until somebody writes down what guards it, and so does an entry without a use.
"""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("vqmoe_ds", "launchers", "tools")

MODULES = {
    *("pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "ctypes", "cffi", "subprocess"),
    *("runpy", "imp", "code", "codeop", "zipimport", "pty"),
}
"""Whose import alone is a use."""
CALLS = {
    *("torch.load", "torch.serialization.load", "torch.jit.load", "torch.package", "torch.hub", "torch.export.load"),
    *("torch.ops.load_library", "torch.classes.load_library", "torch.utils.cpp_extension"),
    *("np.load", "numpy.load", "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.Loader"),
    *("yaml.safe_load", "os.system", "os.popen", "os.posix_spawn", "os.startfile", "sys.settrace"),
}
"""As they are written, with the module's name; and whatever of ``os`` begins with ``exec`` or ``spawn``."""
BUILTINS = {"eval", "exec", "compile", "__import__", "breakpoint"}
KEYWORDS = {"allow_pickle", "weights_only", "trust_remote_code", "shell", "pickle_module"}
COLLECTIVES = {"broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "recv_object_list"}
"""They unpickle what other ranks send."""
LIBRARIES = {
    *("load_checkpoint", "load_state_dict_from_zero_checkpoint", "BlendedMegatronDatasetBuilder", "open_memmap"),
    *("memmap", "fromfile", "load_dataset", "load_from_disk", "from_pretrained", "snapshot_download", "ParquetFile"),
    *("input_stream", "SentencePieceProcessor", "FromString", "from_file", "from_str", "cli_evaluate", "load_file"),
    *("import_module", "spec_from_file_location", "CDLL"),
}
"""Functions of libraries that are handed a path, or what a file holds."""

RANKS = "unpickles what the ranks of this job send each other; docs/security.md says who can reach their ports"
ALLOWED = {
    (
        "vqmoe_ds/checkpoint/io/archive.py",
        "pickle",
    ): "a subclass of the unpickler, with listed opcodes and names",
    ("vqmoe_ds/checkpoint/resume/restricted.py", "pickle"): "catches the refusals of PyTorch's restricted unpickler",
    ("vqmoe_ds/checkpoint/resume/sealing.py", "all_gather_object"): RANKS,
    ("vqmoe_ds/checkpoint/resume/restore.py", "all_gather_object"): RANKS,
    ("vqmoe_ds/runtime/ranks.py", "broadcast_object_list"): RANKS,
    ("vqmoe_ds/runtime/watchdog.py", "all_gather_object"): RANKS,
    ("vqmoe_ds/moe/kernels/build.py", "ctypes"): "loads a library that nobody else can have put there (why_unsafe)",
    ("vqmoe_ds/moe/kernels/build.py", "CDLL"): "as above",
    ("vqmoe_ds/moe/kernels/build.py", "subprocess"): "the compiler, from the user's own CXX or PATH, on our own source",
    ("vqmoe_ds/moe/kernels/experts.py", "ctypes"): "types of arguments",
    ("vqmoe_ds/runtime/allocator.py", "ctypes"): "the C library of this process: no path",
    ("vqmoe_ds/runtime/allocator.py", "CDLL"): "as above",
    ("vqmoe_ds/runtime/ranks.py", "subprocess"): "scontrol with the node list in one word; no shell",
    ("vqmoe_ds/experiments/runs.py", "subprocess"): "this Python with our launchers; words from the user's command",
    (
        "vqmoe_ds/data/image_pickles.py",
        "pickle",
    ): "an unpickler with listed opcodes, whose three names are inert stand-ins (tests/data/test_image_files.py)",
    ("vqmoe_ds/data/image_files.py", "np.load"): "arrays of objects, which are pickles, are refused unless asked for",
    ("vqmoe_ds/data/recipes.py", "subprocess"): "the clients of registries with package names of our own",
    ("launchers/slurm/submit.py", "subprocess"): "sbatch and sinfo; the script holds checked words only (_check_words)",
    ("vqmoe_ds/config/reading.py", "yaml.load"): "a loader with some of SafeLoader's constructors: plain values only",
    (
        "vqmoe_ds/runtime/watchdog.py",
        "subprocess",
    ): "kill with the number of a process that was looked up",
}
"""(file, use) -> why nothing of a file is run there."""

GUARDED = {
    "load_checkpoint": (
        ["vqmoe_ds/checkpoint/resume/session.py"],
        "DeepSpeed's torch.load(weights_only=False): restricted.without_pickles (tests/checkpoint/test_restricted.py)",
    ),
    "BlendedMegatronDatasetBuilder": (
        ["vqmoe_ds/data/epochs.py"],
        "megatron-core's numpy.load(allow_pickle=True): read_array in its place (tests/data/test_index_cache.py)",
    ),
    "open_memmap": (
        ["vqmoe_ds/data/arrays.py", "vqmoe_ds/data/image_cache.py"],
        "numpy refuses object arrays to map; there is no pickle in it",
    ),
    "memmap": (
        ["vqmoe_ds/data/index_files.py"],
        "raw numbers of a type and a shape that were checked against the file's size",
    ),
    "load_dataset": (
        [
            "vqmoe_ds/data/tables.py",
            "vqmoe_ds/data/labelled.py",
            "vqmoe_ds/data/recipes.py",
            "vqmoe_ds/data/image_tables.py",
        ],
        "datasets 5 runs no scripts of a data set and reads no pickles; the user names the data set",
    ),
    "ParquetFile": (["vqmoe_ds/data/tables.py"], "columns of plain types"),
    "input_stream": (["vqmoe_ds/data/compressed.py"], "decompresses in stretches of a bounded size"),
    "SentencePieceProcessor": (["vqmoe_ds/data/tokenizers.py"], "a protocol buffer, from bytes"),
    "FromString": (["vqmoe_ds/data/tokenizers.py"], "as above"),
    "from_str": (
        ["vqmoe_ds/checkpoint/formats/huggingface/tokenizer.py", "vqmoe_ds/data/json_tokenizer.py"],
        "JSON, parsed in Rust",
    ),
    "cli_evaluate": (
        ["vqmoe_ds/evaluation/harness.py"],
        "lm-evaluation-harness's own command: its tasks are code (!function), and the user's to choose",
    ),
    "from_pretrained": (
        ["vqmoe_ds/experiments/routes.py"],
        "a folder that this process has exported a moment before, in safetensors, into our class or stock Mixtral",
    ),
    "import_module": (
        [
            "vqmoe_ds/commands/__init__.py",
            "vqmoe_ds/commands/completion.py",
            "vqmoe_ds/config/routers.py",
            "vqmoe_ds/runtime/extras.py",
        ],
        "modules of ours and installed packages, by names that stand in the source",
    ),
    "spec_from_file_location": (
        ["vqmoe_ds/config/routers.py"],
        "the file of --plugin or VQMOE_PLUGINS: the user's own; no checkpoint or configuration names one",
    ),
}
"""Function of a library -> (the files that use it, what keeps it from running what it reads)."""


def _uses(tree: ast.AST) -> Iterator[str]:
    """Everything in a module that is on one of the lists."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (MODULES & {part for alias in node.names for part in _prefixes(alias.name)})
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = {alias.name for alias in node.names}
            yield from (MODULES & set(_prefixes(node.module)))
            yield from (CALLS & {f"{node.module}.{name}" for name in names})
            yield from (LIBRARIES | COLLECTIVES) & names
        elif isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            yield from CALLS & {text}
            yield from (LIBRARIES | COLLECTIVES) & {node.attr}
            if text.startswith(("os.exec", "os.spawn")):
                yield text
        elif isinstance(node, ast.Name):
            yield from (BUILTINS | LIBRARIES) & {node.id}
        elif isinstance(node, ast.keyword) and node.arg is not None:
            yield from KEYWORDS & {node.arg}


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _found() -> set[tuple[str, str]]:
    return {
        (path.relative_to(ROOT).as_posix(), use)
        for folder in OURS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for use in _uses(ast.parse(path.read_text()))
    }


def test_every_use_in_this_package_is_allowed_for_a_reason() -> None:
    libraries = {(file, name) for name, (files, _) in GUARDED.items() for file in files}
    found = _found()
    assert found - libraries - ALLOWED.keys() == set(), "a use without a reason: guard it, then list it"
    assert (libraries | ALLOWED.keys()) - found == set(), "a reason without a use: take it out"


def test_the_walk_sees_what_it_is_for() -> None:
    source = """
import pickle, os, torch, numpy as np, yaml
from subprocess import run
from torch import load
from torch.distributed import all_gather_object
def f(path):
    torch.load(path, weights_only=False); np.load(path, allow_pickle=True); yaml.load(path); os.execv(path, [])
    exec(path); __import__(path); run(path, shell=True); engine.load_checkpoint(path); ctypes = None
    from ctypes import CDLL
"""
    assert set(_uses(ast.parse(source))) == {
        *("pickle", "subprocess", "torch.load", "all_gather_object", "weights_only", "np.load", "allow_pickle"),
        *("yaml.load", "os.execv", "exec", "__import__", "shell", "load_checkpoint", "ctypes", "CDLL"),
    }


# ------------------------------------------------------------------ the libraries that are handed paths


def _loads(package: str) -> dict[str, set[str]]:
    """Files of an installed package -> what in them reads pickles."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    folder = Path(next(iter(spec.submodule_search_locations)))
    loads = {"torch.load", "np.load", "numpy.load", "pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.load"}
    found: dict[str, set[str]] = {}
    for path in folder.rglob("*.py"):
        text = path.read_text(errors="replace")
        if "load" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            read = isinstance(node, ast.Attribute) and node.attr in ("load", "loads", "Unpickler")
            use = ast.unparse(node) if read else ""
            if isinstance(node, ast.ImportFrom) and node.module in ("torch", "pickle", "numpy", "torch.serialization"):
                use = next((f"{node.module}.{alias.name}" for alias in node.names if alias.name.startswith("load")), "")
            if use in loads:
                found.setdefault(path.relative_to(folder).as_posix(), set()).add(use)
    return found


def test_all_of_deepspeeds_reading_goes_through_the_switch() -> None:
    """``TORCH_FORCE_WEIGHTS_ONLY_LOAD`` rules every ``torch.load``; what reads otherwise is not on our way."""
    others = {file for file, uses in _loads("deepspeed").items() if uses != {"torch.load"}}
    assert others == {
        "inference/v2/engine_factory.py",  # snapshots of its inference engine
        "ops/transformer/inference/triton/matmul_ext.py",  # tuned sizes of its inference kernels
    }


def test_all_of_megatrons_reading_on_our_way_goes_through_read_array() -> None:
    script = "import sys, vqmoe_ds.data.epochs as e; from vqmoe_ds.data.index_cache import read_array as r; "
    script += "assert e.gpt_dataset.numpy.load is e.blended_dataset.numpy.load is r; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    found = {file for file, uses in _loads("megatron").items() if uses & {"numpy.load", "np.load"}}
    names = {file: "megatron." + file.removesuffix(".py").replace("/", ".") for file in found}
    imported = {file for file, name in names.items() if name in done.stdout.split()}
    assert imported == {"core/datasets/gpt_dataset.py", "core/datasets/blended_dataset.py"}


@pytest.mark.parametrize(
    "file", sorted({file for file, _ in ALLOWED} | {f for files, _ in GUARDED.values() for f in files})
)
def test_the_files_on_the_lists_are_there(file: str) -> None:
    assert (ROOT / file).is_file()


def test_deepspeeds_loading_stands_behind_the_switch() -> None:
    tree = ast.parse((ROOT / "vqmoe_ds/checkpoint/resume/session.py").read_text())
    guards = [n for n in ast.walk(tree) if isinstance(n, ast.With) and "without_pickles" in ast.unparse(n.items[0])]
    inside = [n for guard in guards for n in ast.walk(guard)]
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "load_checkpoint"]
    assert calls and all(call in inside for call in calls)
