"""Whatever a person may write into a DeepSpeed JSON, a run YAML, ``--set``, a grid or a command line."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from launchers.slurm import submit
from tests.fuzz.mutate import VALUES, mutated, mutated_value
from tests.fuzz.running import fuzz
from vqmoe_ds.config import cli
from vqmoe_ds.config.deepspeed_json import resolve
from vqmoe_ds.config.load import field_table, load_config, parse_override, to_yaml
from vqmoe_ds.config.reading import parse_yaml
from vqmoe_ds.experiments.grid import overrides_of, read_grid, runs_of
from vqmoe_ds.finetune import cli as finetune_cli
from vqmoe_ds.planning import command, layouts  # torch now, not within an input's time
from vqmoe_ds.runtime.errors import UserError

assert layouts
pytestmark = pytest.mark.timeout(0)  # each input has its own limit

ROOT = Path(__file__).resolve().parents[2]
JSONS = [path.read_bytes() for path in sorted((ROOT / "ds_configs").glob("*.json"))]
YAMLS = [path.read_bytes() for path in sorted((ROOT / "vqmoe_ds/config/presets").glob("*.yaml"))]
YAMLS.append(b"model: &m {layers: 2, width: 32}\ntrain: {steps: 5, learning_rate: 1e-3}\nrun: {run_dir: 'x'}\n")
GRID: dict[str, Any] = {
    "ds_config": "ds_configs/zero0.json",
    "set": {"model.layers": 2, "train.steps": 4},
    "seeds": [1, 2],
    "corpora": {"words": {"data.path": "words.txt"}, "more": {}},
    "groups": {"all": {"baselines": ["top-2"], "tolerance": 0.1}, "b": {"other_budgets": ["top-2"]}},
    "entries": [
        {"name": "top-2", "set": {"moe.router": "topk", "moe.top_k": 2}, "seeds": [1]},
        {"name": "codes", "group": "b", "set": {"moe.router": "vq"}, "corpora": ["words"]},
    ],
    "evaluate": {"corrupt": ["word_swap:0.1"], "seeds": 2, "stride": 5},
}
REFUSED = (UserError,)


class Refused(Exception):
    """A command ended with code 2 and this on standard error."""


def read_deepspeed(tmp_path: Path) -> Any:
    path = tmp_path / "ds.json"

    def read(content: bytes | dict[str, Any]) -> None:
        path.write_bytes(content if isinstance(content, bytes) else _json(content))
        config = resolve(str(path), load_config(), 1, gpu=False)
        json.dumps(config.deepspeed, allow_nan=False).encode()

    return read


def _json(value: Any) -> bytes:
    """As Python writes it, numbers of any length too."""
    huge = f'"{10**400}"'
    text = json.dumps(_writable(value), ensure_ascii=True)
    return text.replace(huge, "9" * 5000).encode()


def _writable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _writable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_writable(inner) for inner in value]
    return str(10**400) if isinstance(value, int) and value.bit_length() > 10_000 else value


def test_bytes_of_a_deepspeed_json(tmp_path):
    fuzz("DeepSpeed JSON", JSONS, mutated, read_deepspeed(tmp_path), REFUSED)


def test_values_of_a_deepspeed_json(tmp_path):
    corpus = [json.loads(content) for content in JSONS]
    extra = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3}}, "tensorboard": {"enabled": False}}
    corpus += [{**values, **copy.deepcopy(extra), "expert_parallel": {"autoep_size": 1}} for values in corpus]
    fuzz("DeepSpeed values", corpus, mutated_value, read_deepspeed(tmp_path), REFUSED)


def _round_trip(config: Any) -> None:
    text = to_yaml(config)
    assert parse_yaml(text, "what we wrote") == config.model_dump(mode="json")


def test_bytes_of_a_run_yaml(tmp_path):
    path = tmp_path / "run.yaml"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        _round_trip(load_config(file=str(path)).config)

    fuzz("run YAML", YAMLS, mutated, read, REFUSED)


def test_values_of_a_run_configuration():
    corpus = [load_config(name).config.model_dump(mode="json") for name in ("tiny", "base", "64e")]
    fuzz(
        "run values",
        corpus,
        mutated_value,
        lambda v: _round_trip(load_config(base={}, overrides=_flat(v)).config),
        REFUSED,
    )


def _flat(values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        return {"model": values}
    return {
        f"{section}.{name}": value
        for section, fields in values.items()
        for name, value in (fields.items() if isinstance(fields, dict) else [("x", fields)])
    }


def test_set(tmp_path):
    corpus = [f"{name}={default}".encode() for name, default, *_ in field_table()]

    def read(text: bytes) -> None:
        name, value = parse_override(text.decode(errors="surrogateescape"))
        _round_trip(load_config(overrides={name: value}).config)

    fuzz("--set", corpus, mutated, read, REFUSED, count=500)


def test_bytes_and_values_of_a_grid(tmp_path):
    path = tmp_path / "grid.yaml"

    def read(content: bytes | dict[str, Any]) -> None:
        path.write_bytes(content if isinstance(content, bytes) else _json(content))  # JSON is YAML
        grid = read_grid(str(path))
        for run in runs_of(grid, tmp_path)[:20]:
            load_config(run.entry.preset or grid.preset, None, overrides_of(grid, run))

    fuzz("grid", [yaml.safe_dump(GRID).encode()], mutated, read, REFUSED)
    fuzz("grid values", [GRID], mutated_value, read, REFUSED)


WORDS = [
    *(
        "",
        "-1",
        "0",
        "1",
        "1e9",
        "nan",
        "inf",
        "9" * 30,
        "9" * 5000,
        "x" * 3000,
        "\x1b[2J",
        "é",
        "\udcff",
        "a\nb",
        "/dev/zero",
    ),
    *(
        "/dev/null",
        ".",
        "auto",
        "never",
        "tiny",
        "--",
        "-h=",
        "--set",
        "moe.num_experts=999",
        "model.layers=99999999",
        "1,2",
    ),
    *("0-35%8", "2:3", "=", "%", "$(id)", "'", "../.."),
]


def mutated_words(words: list[str], rng: random.Random) -> list[str]:
    words = list(words)
    for _ in range(rng.choice((1, 1, 2, 3))):
        place = rng.randrange(len(words) + 1)
        kind = rng.randrange(4)
        if kind < 2:
            words[place : place + 1] = [rng.choice(WORDS)]
        elif kind == 2:
            del words[place : place + 1]
        else:
            words.insert(place, rng.choice([*words, *WORDS]))
    return words


def _run(main: Any, words: list[str]) -> None:
    """A command in process; code 2 is an exception with what it said."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as leave:
            code = leave.code
    out.getvalue().encode()
    if code:
        assert code == 2, (code, err.getvalue())
        raise Refused(err.getvalue().strip().splitlines()[-1])


LINES = {
    "pretrain": [
        "--ds_config ds_configs/zero2.json --preset base --set moe.num_experts=8 --run_dir r --train_steps 9 --seed 3",
        "--ds_config ds_configs/zero2.json --data a b --ep_size 1 --resume never --local_rank 0 --print_config",
    ],
    "finetune": [
        "--checkpoint . --task sst2 --seeds 3 --shots 1,4 --set finetune.trainable=all",
        "--checkpoint . --task lm --data x",
    ],
    "submit": [
        "--nodes 2 --tasks_per_node 1 --dry_run --time 01:00:00 pretrain --ds_config ds_configs/zero2.json --run_dir r",
        "--dry_run --chain 2 --save_before 60 --sbatch --qos=x finetune --checkpoint . --task sst2 --run_dir r",
        "--dry_run --array 0-3%2 compare grid.yaml --out runs/c",
    ],
    "plan": ["--preset tiny --nodes 1 --gpus_per_node 2 --gpu cpu --micro_batch 4 --ep_size 2 --imbalance 1.2 --top 3"],
}


def _pretrain(words: list[str]) -> None:
    args = cli.build_parser("").parse_args(words)
    resolve(args.ds_config, cli.config_from_args(args), 1, args.ep_size, gpu=False)


def _finetune(words: list[str]) -> None:
    args = finetune_cli.build_parser("", "ds_configs/zero2.json").parse_args(words)
    finetune_cli.check_options(args)
    finetune_cli.shots_of(args)
    load_config(overrides=cli.overrides_from_args(args))


def _plan(words: list[str]) -> None:
    args = command.build_parser("").parse_args(words)
    args.json, args.figure = None, None  # their files would be written anywhere
    command.main(args) and _refuse()


def _refuse() -> None:
    raise SystemExit(2)


@pytest.mark.parametrize("name", LINES)
def test_command_lines(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    main = {"pretrain": _pretrain, "finetune": _finetune, "submit": submit.main, "plan": _plan}[name]
    corpus = [shlex.split(line) for line in LINES[name]]
    fuzz(
        f"command line of {name}",
        corpus,
        mutated_words,
        lambda words: _run(main, words),
        (*REFUSED, Refused),
        count=50,
    )


def test_values_of_nothing_but_trouble(tmp_path):
    """Every value where each field stands, not by chance."""
    for section in ("model", "train"):
        for name, *_ in [row for row in field_table() if row[0].startswith(section)]:
            for value in VALUES:
                with contextlib.suppress(UserError):
                    _round_trip(load_config(overrides={name: value}).config)
