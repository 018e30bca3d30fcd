"""Frozen experts in a bounded memory: losses, checkpoints and resumed runs are those of experts in memory, exactly."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.layouts import MODEL, Layout, write_one
from tests.distributed import run_ranks
from tests.fake_gpu import fake_gpus
from tests.finetune.small import Finetuning, finetune_config, tensors, texts
from vqmoe_ds.checkpoint.open import open_checkpoint
from vqmoe_ds.config.deepspeed_json import EngineConfig
from vqmoe_ds.finetune.cli import build_parser
from vqmoe_ds.finetune.config import check_can_run, starting_config
from vqmoe_ds.planning.host import check_host_memory
from vqmoe_ds.runtime.errors import ConfigError

EXPERT = 3 * MODEL["model.width"] * MODEL["moe.expert_hidden"] * 4
LORA = {"finetune.trainable": "head", "finetune.lora_rank": 2}
STEPS = 4
Case = tuple[Layout, dict[str, Any]]
CASES: dict[str, Case] = {
    "codes known ahead, ZeRO 2": (Layout(2, 1, 2), LORA),
    "both paths, recomputed": (
        Layout(0, 1, 2),
        {**LORA, "finetune.discrete": False, "train.activation_checkpointing": True},
    ),
    "bf16": (Layout(1, 1, 2, "bf16"), LORA),
    "the head alone": (Layout(1, 1, 2), {"finetune.trainable": "head"}),
}


def _finetune(rank: int, world: int, folder: str, cases: list[Case]) -> list[list[dict[str, Any]]]:
    from vqmoe_ds.evaluation.classification import classify

    path, found = Path(folder), []
    (path / "source").mkdir(exist_ok=True)
    write_one(rank, world, str(path / "source"), Layout(0, 1, world), {})
    for number, (layout, changes) in enumerate(cases):
        pair = []
        for memory in (None, f"{2 * EXPERT}B"):
            more = {**changes, "finetune.expert_memory": memory, "run.run_dir": str(path / "run")}
            tuning = Finetuning(path, layout, rank, path / "source", **more)
            losses = tuning.train(STEPS)
            reader = tuning.save(path / f"{number}-{memory}")
            score = classify(tuning.session, texts(40, seed=1))
            tuning.resume(reader.path)
            losses += tuning.train(2)
            store = tuning.session.model.expert_store
            held = None if store is None else (store.most_bytes_held, store.uses)
            pair.append({"losses": losses, "score": score.loss, "weights": tensors(reader), "held": held})
            tuning.session.engine.destroy()
            if store is not None:
                store.close()
        found.append(pair)
    return found


def test_losses_and_checkpoints_are_those_of_experts_in_memory_to_the_bit(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    for answer in run_ranks(2, _finetune, str(tmp_path), list(CASES.values())):
        for case, (whole, stored) in zip(CASES, answer, strict=True):
            assert stored["losses"] == whole["losses"] and stored["score"] == whole["score"], case
            assert len(set(whole["losses"])) == STEPS + 2, "something was learned"
            assert stored["weights"].keys() == whole["weights"].keys()
            for name, weights in whole["weights"].items():
                assert torch.equal(stored["weights"][name], weights), (case, name)
            most, uses = stored["held"]
            assert 0 < most <= 2 * EXPERT and uses > 8 and whole["held"] is None
    assert not list((tmp_path / "run").iterdir()), "the file has no name"


# ------------------------------------------------------------------ refusals


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    run_ranks(1, write_one, str(folder), Layout(0, 1, 1), {})
    return folder


def _config(source: Path, **changes: Any) -> EngineConfig:
    loaded = finetune_config(open_checkpoint(source), **{**LORA, "finetune.expert_memory": "1MiB", **changes})
    return EngineConfig({}, loaded.config, 1, 1, 2, 4)


def test_the_option_sets_the_field(source: Path) -> None:
    line = ["--checkpoint", str(source), "--task", "sst2", "--set", "finetune.trainable=head"]
    for more in (["--expert_memory", "9MiB"], ["--set", "finetune.expert_memory=9MiB"]):
        args = build_parser("", "").parse_args([*line, *more])
        assert starting_config(args, open_checkpoint(source)).config.finetune.expert_memory == "9MiB"


def test_it_is_refused_where_it_would_serve_nothing(source: Path) -> None:
    check_can_run(_config(source))
    for changes, sentence in (
        ({"finetune.trainable": "experts"}, "is for frozen experts, and finetune.trainable=experts trains them; set"),
        ({"finetune.expert_memory": "much"}, "--expert_memory 'much' is no size"),
    ):
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            check_can_run(_config(source, **changes))
    with pytest.raises(ConfigError, match="holds all experts on one rank"):
        check_can_run(dataclasses.replace(_config(source), ep_size=2))
    with fake_gpus(1), pytest.raises(ConfigError, match="leave it out on a GPU"):
        check_can_run(_config(source))


def test_experts_in_a_file_need_no_memory_of_the_machine(source: Path, monkeypatch) -> None:
    from vqmoe_ds.planning import parameters
    from vqmoe_ds.runtime.ranks import Place

    config, place = _config(source), Place(0, 1, 0, 1)
    there = parameters.least_bytes(config.run) - 4 * EXPERT
    monkeypatch.setattr("vqmoe_ds.planning.host.total_bytes", lambda: there)
    small = config.run.finetune.model_copy(update={"expert_memory": f"{2 * EXPERT}B"})
    check_host_memory(dataclasses.replace(config, run=config.run.model_copy(update={"finetune": small})), place)
    with pytest.raises(ConfigError, match="this rank needs at least"):
        check_host_memory(config, place)


def test_a_folder_without_room_is_one_sentence(tmp_path: Path) -> None:
    from vqmoe_ds.moe import LayerConfig, MoEConfig
    from vqmoe_ds.moe.expert_file import experts_in_file
    from vqmoe_ds.moe.expert_store import StoredMoELayer

    (tmp_path / "file").write_text("")
    layer = StoredMoELayer(LayerConfig(16, MoEConfig(router="topk", num_experts=2, expert_hidden=16)))
    with pytest.raises(ConfigError, match=r"keeps 6,144 bytes of frozen experts in a file in .* make room, or") as it:
        experts_in_file([layer], tmp_path / "file", torch.float32, 1 << 20)
    assert it.value.local, "each rank makes its own"
