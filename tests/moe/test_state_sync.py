"""Codebooks of four ranks: bit-identical at every step, and those of one rank with the same batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed import run_ranks
from vqmoe_ds.config.schema import CodebookConfig, MoEConfig
from vqmoe_ds.moe import state_sync
from vqmoe_ds.moe.codebook import CodebookBank
from vqmoe_ds.moe.config import LayerConfig
from vqmoe_ds.moe.routers.base import StatefulRouter
from vqmoe_ds.moe.state_sync import StateSync, fingerprint
from vqmoe_ds.runtime.errors import ConfigError

WIDTH, EXPERTS, TOKENS, STEPS = 12, 4, 48, 50

RULES: dict[str, dict[str, Any]] = {
    "ema": {"learning": "ema"},
    "gradient": {"learning": "gradient", "learning_rate": 0.02},
    "cosine, balanced": {"distance": "cosine", "code_map": "balanced", "num_codes": 10},
    "late initialization, random": {"init_step": 4, "init": "random", "code_dim": 5},
    "frozen later": {"freeze_step": 20, "dead_below": 0.6},
    "overused split": {"overused_above": 1.5, "decay_steps": 40},
}


def _config(rule: str) -> CodebookConfig:
    return CodebookConfig(**{"kmeans_samples": 96, "dead_below": 0.3, "num_codes": 8, **RULES[rule]})


def _micro_batch(step: int, number: int) -> Tensor:
    """Drifting clusters of unlike sizes, so that codes die and are re-seeded on the way."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    drift = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(step // 10))
    member_T = (torch.rand(TOKENS, generator=generator) ** 3 * 12).long()
    return drift[member_T] + 0.05 * torch.randn(TOKENS, WIDTH, generator=generator)


def _observe(bank: CodebookBank, source_TD: Tensor) -> None:
    z_TC = bank.prepare(source_TD)
    for layer in range(bank.num_layers):
        bank.observe(layer, z_TC, bank.lookup(layer, z_TC))


def _identical(bank: CodebookBank) -> bool:
    """Every buffer equal bit by bit on all ranks, without the fingerprint."""
    mine = torch.cat([buffer.reshape(-1).view(torch.uint8) for buffer in bank.buffers()])
    all_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(all_ranks, mine)
    return all(torch.equal(mine, other) for other in all_ranks)


def _train(rank: int, world: int, accumulation: int, rule: str, seed: int) -> dict[str, Any]:
    bank = CodebookBank(_config(rule), 2, EXPERTS, WIDTH, seed=seed)
    sync = StateSync(bank, accumulation)
    reseeded, original = [], bank.reseed
    bank.reseed = lambda dead_LK, candidates: (reseeded.append(int(dead_LK.sum())), original(dead_LK, candidates))
    splits, split = [], state_sync.split_overused_codes
    state_sync.split_overused_codes = lambda *args: (splits.append(1), split(*args))
    started_equal = world == 1 or _identical(bank)
    sync.broadcast()
    identical = True
    for step in range(STEPS):
        for micro in range(accumulation):
            _observe(bank, _micro_batch(step, micro * world + rank))
        sync.step()
        if world > 1 and (step < 12 or step % 6 == 0 or step == STEPS - 1):
            identical &= _identical(bank) and sync.in_step()
    state_sync.split_overused_codes = split
    state = {name: buffer.clone() for name, buffer in bank.named_buffers()}
    counts = {"reseeded": sum(reseeded), "split": sum(splits)}
    return {"started_equal": started_equal, "identical": identical, **counts, "state": state}


def _train_all(rank: int, world: int, accumulation: int, own_seeds: bool) -> dict[str, dict[str, Any]]:
    return {rule: _train(rank, world, accumulation, rule, 5 + rank * own_seeds) for rule in RULES}


@pytest.fixture(scope="module")
def four_ranks() -> list[dict[str, dict[str, Any]]]:
    return run_ranks(4, _train_all, 1, True)


@pytest.mark.parametrize("rule", RULES)
def test_ranks_hold_the_same_bits_through_initialization_learning_and_rescue(four_ranks: list, rule: str) -> None:
    for answer in four_ranks:
        assert not answer[rule]["started_equal"], "the ranks must start apart for this to say anything"
        assert answer[rule]["identical"]
        tried = "split" if rule == "overused split" else "reseeded"
        assert answer[rule][tried] > 0, f"no code was {tried}, so this says nothing about it"
        assert int(answer[rule]["state"]["born_at"]) >= 0


@pytest.mark.parametrize("rule", RULES)
def test_accumulating_is_sharing(four_ranks: list, rule: str) -> None:
    """One rank with four micro-batches a step, two with two, four with one: one codebook."""
    for other in (_one_rank()[rule], _two_ranks()[rule]):
        for name, wanted in four_ranks[0][rule]["state"].items():
            got, want = other["state"][name].double(), wanted.double()
            assert (got - want).abs().max() <= 1e-6 * max(1.0, want.abs().max().item()), name
        assert other["reseeded"] == four_ranks[0][rule]["reseeded"]


_cache: dict[int, Any] = {}


def _one_rank() -> dict[str, Any]:
    if 1 not in _cache:
        _cache[1] = _train_all(0, 1, 4, False)
    return _cache[1]


def _two_ranks() -> dict[str, Any]:
    if 2 not in _cache:
        _cache[2] = run_ranks(2, _train_all, 2, False)[0]
    return _cache[2]


def _fingerprints(rank: int, world: int) -> dict[str, bool]:
    bank = CodebookBank(_config("ema"), 2, EXPERTS, WIDTH, seed=5)
    sync = StateSync(bank)
    found = {"equal": sync.in_step()}
    bits = bank.codes_LKC.view(torch.int32)
    for place in ((0, 0, 0), (1, 7, 11), (1, 3, 2)):
        if rank == 2:
            bits[place] ^= 1
        found[f"bit {place}"] = sync.in_step()
        if rank == 2:
            bits[place] ^= 1
    if rank == 3:
        bank.code_map_LK[1, 3] ^= 1
    found["table"] = sync.in_step()
    if rank == 3:
        bank.code_map_LK[1, 3] ^= 1
    found["repaired"] = sync.in_step()
    _observe(bank, _micro_batch(rank, 0))
    sync.skip()
    found["skipped"] = sync.in_step() and bank.pending.abs().sum().item() == 0
    return found


def test_in_step_notices_one_bit() -> None:
    for found in run_ranks(4, _fingerprints):
        expected = dict.fromkeys(found, False) | dict.fromkeys(("equal", "repaired", "skipped"), True)
        assert found == expected


def _subgroup(rank: int, world: int) -> tuple[bool, bool]:
    """Two data-parallel groups of two ranks: each keeps to itself."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = groups[rank // 2]
    bank = CodebookBank(_config("ema"), 1, EXPERTS, WIDTH, seed=rank)
    sync = StateSync(bank, group=group)
    sync.broadcast()
    for step in range(12):
        _observe(bank, _micro_batch(step, rank))
        sync.step()
    return sync.in_step(), StateSync(bank).in_step()


def test_groups_keep_to_themselves() -> None:
    assert run_ranks(4, _subgroup) == [(True, False)] * 4


def _one_all_reduce(rank: int, world: int) -> list[int]:
    bank = CodebookBank(_config("ema").model_copy(update={"dead_below": 0.0}), 6, EXPERTS, WIDTH, seed=5)
    sync, counts, original = StateSync(bank), [], dist.all_reduce
    for step in range(3):
        _observe(bank, _micro_batch(step, rank))
        calls: list[int] = []
        dist.all_reduce = lambda *args, calls=calls, **kwargs: (calls.append(1), original(*args, **kwargs))[1]
        sync.step()
        dist.all_reduce = original
        counts.append(len(calls))
    return counts


def test_all_layers_share_one_all_reduce() -> None:
    assert run_ranks(2, _one_all_reduce) == [[1, 1, 1]] * 2


# ------------------------------------------------------------- empty batches


def _with_empty_batches(rank: int, world: int, rule: str) -> dict[str, Any]:
    """Of two micro-batches per step, the second is often empty; in steps 0 and 20 both are."""
    accumulation = 2 // world
    bank = CodebookBank(_config(rule), 2, EXPERTS, WIDTH, seed=5)
    sync, original = StateSync(bank, accumulation), bank.reseed
    moved: list[int] = []
    bank.reseed = lambda dead_LK, candidates: (moved.append(int(dead_LK.sum())), original(dead_LK, candidates))
    identical = True
    for step in range(30):
        for micro in range(accumulation):
            number = micro * world + rank
            empty = step % 20 == 0 or (number == 1 and step != 21)
            _observe(bank, _micro_batch(step, number)[: 0 if empty else None])
        sync.step()
        identical &= world == 1 or _identical(bank)
    state = {name: buffer.clone() for name, buffer in bank.named_buffers()}
    return {"identical": identical, "moved": moved, "state": state}


def test_samples_have_one_type_whatever_the_codes() -> None:
    """Ranks broadcast them to each other, and one of them may have had no tokens."""
    bank = CodebookBank(_config("ema"), 2, EXPERTS, WIDTH, seed=5).double()
    StateSync(bank, 2)
    for batch in (_micro_batch(0, 0), _micro_batch(0, 0)[:0]):
        _observe(bank, batch)
    assert bank.codes_LKC.dtype == torch.float64
    assert bank.samples(0, 3).dtype == bank.samples(1, 3).dtype == torch.float32


@pytest.mark.parametrize("rule", ["ema", "cosine, balanced", "overused split"])
def test_empty_batches_give_no_samples_and_stop_nobody(rule: str) -> None:
    alone = _with_empty_batches(0, 1, rule)
    assert alone["state"]["updates"] == 29, "the first step placed nothing and does not count"
    assert any(alone["moved"])
    assert rule != "ema" or 0 in alone["moved"], "no empty batch's turn came while codes were dead"
    for found in run_ranks(2, _with_empty_batches, rule):
        assert found["identical"] and found["moved"] == alone["moved"]
        for name, wanted in alone["state"].items():
            assert torch.allclose(found["state"][name].double(), wanted.double(), atol=1e-5), name


def _only_rank_0_has_tokens(rank: int, world: int) -> Tensor:
    bank = CodebookBank(_config("ema"), 2, EXPERTS, WIDTH, seed=5)
    _observe(bank, _micro_batch(0, 0)[: None if rank == 0 else 0])
    StateSync(bank).step()
    return bank.codes_LKC


def test_codes_are_placed_on_the_samples_that_there_are() -> None:
    book = _config("ema").model_copy(update={"kmeans_samples": 48})  # the share of one of two ranks
    alone = CodebookBank(book, 2, EXPERTS, WIDTH, seed=5)
    _observe(alone, _micro_batch(0, 0))
    StateSync(alone).step()
    for codes_LKC in run_ranks(2, _only_rank_0_has_tokens):
        assert torch.equal(codes_LKC, alone.codes_LKC)


def _one_rank_ran_nothing(rank: int, world: int) -> str:
    bank = CodebookBank(_config("ema"), 2, EXPERTS, WIDTH, seed=5)
    if rank == 0:
        _observe(bank, _micro_batch(0, 0))
    with pytest.raises(ConfigError) as refusal:
        StateSync(bank).step()
    return str(refusal.value)


def test_a_rank_without_a_micro_batch_is_refused_on_all_ranks() -> None:
    others, own = run_ranks(2, _one_rank_ran_nothing)
    assert "another rank has seen no tokens in one of accumulation_steps=1 micro-batches" in others
    assert "layer 0 has seen no tokens in micro-batch 0" in own


def _unlike_processors(rank: int, world: int) -> tuple[bool, Tensor]:
    original = state_sync.initialize_codes

    def initialization_with_rounding(bank: CodebookBank, *args: Any) -> None:
        original(bank, *args)
        bank.codes_LKC.mul_(1 + 1e-3 * rank)
        bank.ema_sum_LKC.mul_(1 + 1e-3 * rank)

    state_sync.initialize_codes = initialization_with_rounding
    bank = CodebookBank(_config("ema"), 3, EXPERTS, WIDTH, seed=5)
    _observe(bank, _micro_batch(0, rank))
    StateSync(bank).step()
    return bank.initialized and _identical(bank), bank.codes_LKC


def test_ranks_share_out_the_layers_and_survive_unlike_rounding() -> None:
    alone = CodebookBank(_config("ema"), 3, EXPERTS, WIDTH, seed=5)
    for number in range(2):
        _observe(alone, _micro_batch(0, number))
    StateSync(alone, accumulation_steps=2).step()
    alone.codes_LKC[1] *= 1.001  # the layer that rank 1 placed
    for identical, codes_LKC in run_ranks(2, _unlike_processors):
        assert identical
        assert (codes_LKC - alone.codes_LKC).abs().max() < 1e-5


# ------------------------------------------------------------- begun early, waited for late


class _Means(StatefulRouter):
    """Remembers all that it was told."""

    def __init__(self) -> None:
        super().__init__(LayerConfig(4, MoEConfig(router="expert_bias")), 5)
        self.register_buffer("sums", torch.zeros(5, dtype=torch.float64))

    def learn(self, statistics: Tensor) -> None:
        self.sums += statistics


def _early_and_late(rank: int, world: int, rule: str) -> dict[str, bool]:
    """Two banks and two routers with equal batches; the all-reduce of the second is on its way through backward."""
    banks = [CodebookBank(_config(rule), 2, EXPERTS, WIDTH, seed=5) for _ in range(2)]
    routers = [_Means() for _ in range(2)]
    syncs = [StateSync(bank) for bank in banks]
    router_syncs = [StateSync(router) for router in routers]
    found = dict.fromkeys(("codes", "routers", "gradients", "skipped"), True)
    for step in range(30):
        source_TD = _micro_batch(step, rank)
        for bank, router in zip(banks, routers, strict=True):
            _observe(bank, source_TD)
            router.observe(source_TD[:5, 0] / 3)
        for early in (syncs[1], router_syncs[1], syncs[1]):  # twice is once
            early.start()
        gradient = torch.full((1000,), float(rank + step))
        dist.all_reduce(gradient)  # backward's own, on the same group
        found["gradients"] &= bool((gradient == world * step + sum(range(world))).all())
        taken = step % 5 != 3
        both: list[StateSync] = [*syncs, *router_syncs]
        for sync in both:
            sync.step() if taken else sync.skip()
        pending = [banks[1].pending, routers[1].pending]
        if not taken:
            found["skipped"] &= not any(bool(p.any()) for p in pending) and banks[1]._samples == [[], []]
        equal = [torch.equal(*pair) for pair in zip(*(bank.buffers() for bank in banks), strict=True)]
        found["codes"] &= all(equal) and _identical(banks[1])
        found["routers"] &= torch.equal(routers[0].sums, routers[1].sums) and router_syncs[1].in_step()
    found["moved"] = banks[1].steps_taken == 24 and bool(routers[1].sums.any())
    return found


@pytest.mark.parametrize("rule", ["ema", "frozen later", "overused split"])
def test_an_early_start_changes_no_bit_and_a_skip_leaves_nothing(rule: str) -> None:
    for found in run_ranks(2, _early_and_late, rule):
        assert all(found.values()), found


def _begins(rank: int, world: int) -> list[bool]:
    """Whether the all-reduce has begun: before start, after it, after step; after another start, after skip."""
    bank = CodebookBank(_config("ema"), 2, EXPERTS, WIDTH, seed=5)
    sync, begun = StateSync(bank), []
    _observe(bank, _micro_batch(0, rank))
    for action in (lambda: None, sync.start, sync.step, sync.start, sync.skip):
        action()
        begun.append(sync._sum.begun)
    return begun


def test_start_begins_and_step_and_skip_end() -> None:
    assert run_ranks(2, _begins) == [[False, True, False, True, False]] * 2


def _numbers_after_broadcast(rank: int, world: int) -> tuple[int, bool, int]:
    bank, router = CodebookBank(_config("ema"), 1, EXPERTS, WIDTH, seed=5), _Means()
    assert bank.steps_taken == router.steps_taken == 0  # now known on the host
    if rank == 0:
        bank.updates.fill_(9)
        bank.born_at.fill_(2)
        router.updates.fill_(4)
    StateSync(bank).broadcast()
    StateSync(router).broadcast()
    return bank.steps_taken, bank.initialized, router.steps_taken


def test_numbers_on_the_host_follow_a_broadcast() -> None:
    assert run_ranks(2, _numbers_after_broadcast) == [(9, True, 4)] * 2


def test_fingerprint_sees_one_bit_and_any_exchange() -> None:
    codes_LKC, marks = torch.randn(2, 4, WIDTH), []
    marks.append(fingerprint(codes_LKC))
    codes_LKC.view(torch.int32)[1, 2, 3] ^= 1
    marks.append(fingerprint(codes_LKC))
    codes_LKC.view(torch.int32)[1, 2, 3] ^= 1
    codes_LKC[0, [0, 1]] = codes_LKC[0, [1, 0]]
    marks.append(fingerprint(codes_LKC))
    codes_LKC[0, [0, 1]] = codes_LKC[0, [1, 0]]
    assert len({int(mark) for mark in marks}) == 3
    assert torch.equal(fingerprint(codes_LKC), marks[0])
    table_LK = torch.arange(8).view(2, 4)
    assert int(fingerprint(table_LK)) != int(fingerprint(table_LK[:, [1, 0, 2, 3]]))


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_fingerprint_sees_every_bit_of_every_type(dtype: torch.dtype) -> None:
    assert int(fingerprint(torch.zeros((), dtype=dtype))) == 0
    whole = torch.zeros(4, dtype=dtype)
    bits = whole.view(torch.uint8)
    for byte in range(len(bits)):
        for bit in range(1 if dtype is torch.bool else 8):
            bits[byte] = 1 << bit
            assert int(fingerprint(whole)) != 0
            bits[byte] = 0
