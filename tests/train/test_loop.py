"""Bad steps are skipped and counted, on every ZeRO stage, and training gives up with a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed import run_ranks
from tests.prepared import write_texts
from vqmoe_ds.config.deepspeed_json import resolve
from vqmoe_ds.config.load import load_config
from vqmoe_ds.config.schema import TrainConfig
from vqmoe_ds.data.batches import MASKED
from vqmoe_ds.data.corpus import open_corpus
from vqmoe_ds.data.raw_text import TrainingBatches, split_corpus
from vqmoe_ds.evaluation.perplexity import validate
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.runtime.errors import TrainingHalted
from vqmoe_ds.train.schedule import learning_rate

SMALL = {
    **{"model.layers": 1, "model.width": 16, "model.heads": 2, "model.sequence_length": 16},
    **{"moe.num_experts": 4, "moe.expert_hidden": 16, "moe.top_k": 1, "codebook.num_codes": 4},
    **{"train.batch_size": 8, "train.steps": 20, "train.max_bad_steps": 2},
}


def _train_with_poison(rank: int, world: int, folder: str, stage: int, bf16: bool) -> dict[str, Any]:
    """Poison the loss of rank 1 at steps 2, and of all at 4 and 5; report what moved."""
    from vqmoe_ds.runtime.ranks import Place
    from vqmoe_ds.train.engine import build_session
    from vqmoe_ds.train.loop import Trainer

    json_path = f"{folder}/zero{stage}.json"
    loaded = load_config("tiny", None, {**SMALL, "data.path": f"{folder}/text.txt"})
    config = resolve(json_path, loaded, world)
    session = build_session(config, Place(rank, world, rank, world), json_path)
    train, _ = split_corpus(open_corpus(config.run.data.path), 16, 10)
    trainer = Trainer(session, TrainingBatches(train, 8, 0), [])
    poison = {"on": False}
    session.model.head.register_forward_hook(lambda m, i, out: out * float("nan") if poison["on"] else None)
    report: dict[str, Any] = {"taken": [], "moved": [], "codes_moved": []}
    for step in range(6):
        poison["on"] = step in (4, 5) or (step == 2 and rank == world - 1)
        weights, codes = _weights(session), session.model.bank.codes_LKC.clone()
        result = trainer.train_step()
        report["taken"].append(result.taken)
        report["moved"].append(not torch.equal(weights, _weights(session)))
        report["codes_moved"].append(not torch.equal(codes, session.model.bank.codes_LKC))
        report["finite"] = bool(torch.isfinite(_weights(session)).all())
    report["bad_steps"] = trainer.bad_steps
    trainer.last_checkpoint = "runs/x/global_step4"
    try:
        trainer._give_up_if_hopeless()
    except TrainingHalted as error:
        report["sentence"] = str(error)
    return report


def _weights(session: Any) -> torch.Tensor:
    import deepspeed

    params = list(session.model.parameters())
    with deepspeed.zero.GatheredParameters(params):
        return torch.cat([p.detach().float().flatten().clone() for p in params])


@pytest.mark.parametrize(("stage", "bf16"), [(0, False), (0, True), (2, False), (2, True), (3, False)])
def test_a_nan_on_one_rank_skips_the_step_on_all_and_two_in_a_row_end_training(tmp_path, stage, bf16):
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 122)) * 200)
    values = {"zero_optimization": {"stage": stage}, "optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    (tmp_path / f"zero{stage}.json").write_text(json.dumps({**values, "bf16": {"enabled": bf16}}))
    for report in run_ranks(2, _train_with_poison, str(tmp_path), stage, bf16):
        assert report["taken"] == [True, True, False, True, False, False]
        assert report["moved"] == report["taken"]
        assert report["codes_moved"] == report["taken"]
        assert report["finite"]
        assert report["bad_steps"] == 3
        assert "2 steps in a row up to step 6" in report["sentence"]
        assert "runs/x/global_step4" in report["sentence"]


def test_schedule_warms_up_and_falls_to_its_floor():
    config = TrainConfig(steps=100, warmup_steps=10, learning_rate=1.0, min_learning_rate_ratio=0.1)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) in (9, 10)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def _codes_of_the_release(rank: int, world: int, folder: str) -> list[tuple[float, float]]:
    """The learning rate of each step, and the furthest that a number of a code moved in it."""
    from vqmoe_ds.runtime.ranks import Place
    from vqmoe_ds.train.engine import build_session
    from vqmoe_ds.train.loop import Trainer

    small = {**SMALL, "model.head_width": 8, "train.warmup_steps": 2, "train.learning_rate": 0.01}
    loaded = load_config("released", None, {**small, "data.path": f"{folder}/text.txt"})
    config = resolve(f"{folder}/zero0.json", loaded, world)
    session = build_session(config, Place(rank, world, rank, world), f"{folder}/zero0.json")
    trainer = Trainer(session, TrainingBatches(split_corpus(open_corpus(config.run.data.path), 16, 10)[0], 8, 0), [])
    moves = []
    for _ in range(4):
        before = session.model.bank.codes_LKC.clone()
        rate = trainer.train_step().learning_rate
        moves.append((rate, float((session.model.bank.codes_LKC - before).abs().max())))
    assert session.sync.in_step()
    return moves


def test_codes_of_the_release_move_at_the_rate_of_the_step(tmp_path):
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 122)) * 200)
    adam = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}, "zero_optimization": {"stage": 0}}
    (tmp_path / "zero0.json").write_text(json.dumps(adam))
    first, second = run_ranks(2, _codes_of_the_release, str(tmp_path))
    assert first == second
    assert [rate for rate, _ in first][:2] == pytest.approx([0.005, 0.01]), "warm-up"
    assert first[0][1] == pytest.approx(0.005, rel=1e-3), "Adam's first step is the rate itself"
    assert first[0][1] < first[1][1] < 1.1 * first[1][0]


# ------------------------------------------------------------------ masked targets

FROZEN = {
    "codebook.learning": "frozen",
    "moe.balance_weight": 0.0,
    "train.learning_rate": 0.01,
    "train.warmup_steps": 0,
}
"""What depends on the micro-batch is out of the way: only the loss is left."""


def _train_on_documents(rank: int, world: int, folder: str, micro: int) -> dict[str, Any]:
    from vqmoe_ds.data.indexed import open_indexed_text
    from vqmoe_ds.runtime.ranks import Place
    from vqmoe_ds.train.engine import build_session
    from vqmoe_ds.train.loop import Trainer

    values = {"zero_optimization": {"stage": 0}, "optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    json_path = f"{folder}/rank{rank}.json"
    Path(json_path).write_text(json.dumps({**values, "train_micro_batch_size_per_gpu": micro}))
    overrides = {**SMALL, **FROZEN, "data.path": f"{folder}/text", "model.vocab_size": 257}
    config = resolve(json_path, load_config("tiny", None, overrides), world)
    session = build_session(config, Place(rank, world, rank, world), json_path)
    batches, windows = open_indexed_text(config.run).open(config.run, Path(folder) / "cache")
    trainer = Trainer(session, batches, [])
    by_hand = _mean_loss(session.model, batches.micro_batches(0, 0, 1, 8)[0])
    score = validate(session, windows)
    everything = windows.read(np.arange(len(windows)))
    results = [trainer.train_step() for _ in range(5)]
    return {
        "by_hand": by_hand,
        "losses": [result.loss for result in results],
        "bytes": [result.bytes_per_token for result in results],
        "weights": _weights(session),
        "score": score,
        "bytes_by_hand": everything.bytes_B.sum() / (everything.targets_BS != MASKED).sum(),
    }


@torch.no_grad()
def _mean_loss(model: Any, batch: Any) -> float:
    logits, _ = model.eval()(torch.from_numpy(batch.inputs_BS))
    model.train()
    targets = torch.from_numpy(batch.targets_BS).flatten()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, ignore_index=MASKED, reduction="none")
    return float(losses.sum() / (targets != MASKED).sum())


def test_the_loss_is_the_mean_over_all_targets_that_are_not_masked_however_the_batch_is_shared(tmp_path):
    texts = ["a" * (1 + i % 3) if i % 2 else "much longer documents, with ü, " * 4 for i in range(200)]
    write_texts(tmp_path / "text", texts)
    one = run_ranks(1, _train_on_documents, str(tmp_path), 8)
    many = [*run_ranks(2, _train_on_documents, str(tmp_path), 1), *run_ranks(4, _train_on_documents, str(tmp_path), 2)]
    assert one[0]["losses"][0] == pytest.approx(one[0]["by_hand"], abs=1e-5)
    assert 0.5 < one[0]["bytes"][0] < 1, "ends of documents are targets of no byte"
    assert one[0]["score"].bytes_per_token == pytest.approx(one[0]["bytes_by_hand"])
    for report in many:
        assert report["losses"] == pytest.approx(one[0]["losses"], abs=1e-5)
        assert report["bytes"] == pytest.approx(one[0]["bytes"], rel=1e-12)
        assert torch.allclose(report["weights"], one[0]["weights"], atol=1e-4)
        assert report["score"].loss == pytest.approx(one[0]["score"].loss, abs=1e-6)
        assert report["score"].bytes_per_token == pytest.approx(one[0]["score"].bytes_per_token, rel=1e-12)


def test_a_batch_without_any_target_has_no_loss_and_no_gradient():
    config = load_config("tiny", None, {**SMALL, "model.vocab_size": 257}).config
    model = MoETransformer(config)
    loss, _ = model(torch.zeros(2, 16, dtype=torch.int64), torch.full((2, 16), MASKED))
    loss.backward()
    assert float(loss.detach()) == 0
    assert float(model.embed.weight.grad.abs().max()) == 0
