"""The codebook bank on one rank: lookup, statistics, learning, initialization and the rescue of dead codes."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqmoe_ds.checkpoint.formats.huggingface.folder import settled_codebook
from vqmoe_ds.checkpoint.resume.restore import fill_buffers
from vqmoe_ds.config.schema import CodebookConfig, RunConfig
from vqmoe_ds.moe import placement
from vqmoe_ds.moe.clustering import kmeans, split_overused
from vqmoe_ds.moe.codebook import CodebookBank
from vqmoe_ds.moe.state_sync import StateSync

WIDTH = 16


def _bank(num_layers: int = 2, num_experts: int = 4, seed: int = 7, **options: object) -> CodebookBank:
    return CodebookBank(CodebookConfig(**options), num_layers, num_experts, WIDTH, seed)


def _observe(bank: CodebookBank, source_TD: Tensor) -> list[Tensor]:
    """What a model does in forward: look up and observe in every layer."""
    z_TC = bank.prepare(source_TD)
    codes = [bank.lookup(layer, z_TC) for layer in range(bank.num_layers)]
    for layer, codes_T in enumerate(codes):
        bank.observe(layer, z_TC, codes_T)
    return codes


# ------------------------------------------------------------------------ lookup


@pytest.mark.parametrize("options", [{}, {"distance": "cosine"}, {"code_dim": 4}, {"num_codes": 33}])
def test_lookup_is_the_nearest_code_in_float64(options: dict) -> None:
    bank = _bank(**options)
    source_TD = torch.randn(200, WIDTH)
    z_TC = bank.prepare(source_TD)
    for layer in range(2):
        distances_TK = torch.cdist(z_TC.double(), bank.codes_LKC[layer].double())
        assert torch.equal(bank.lookup(layer, z_TC), distances_TK.argmin(dim=1))
    assert torch.equal(bank.lookup_all(z_TC), torch.stack([bank.lookup(layer, z_TC) for layer in range(2)]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        looked_up = bank.lookup_all(bank.prepare(source_TD))
    assert torch.equal(looked_up, bank.lookup_all(z_TC))


def test_a_token_is_looked_up_once_where_its_vector_follows_from_it() -> None:
    bank, table_VD, tokens_T = _bank(), torch.randn(9, WIDTH), torch.tensor([8, 3, 3, 0, 8, 8, 5])
    z_TC = bank.prepare(table_VD[tokens_T])
    assert torch.equal(bank.lookup_all(z_TC, tokens_T), bank.lookup_all(z_TC))
    looked_up = bank.lookup_all(bank.prepare(torch.randn(7, WIDTH)), tokens_T)  # vectors that do not follow: one counts
    assert (looked_up[:, tokens_T == 8] == looked_up[:, :1]).all()


def test_ties_go_to_the_lowest_index() -> None:
    bank = _bank(num_codes=6)
    bank.codes_LKC[0, 4] = bank.codes_LKC[0, 1]
    bank.codes_LKC[0, 5] = bank.codes_LKC[0, 1]
    z_TC = bank.codes_LKC[0, [1, 4, 5]].clone()
    assert bank.lookup(0, z_TC).tolist() == [1, 1, 1]
    assert bank.lookup_all(z_TC)[0].tolist() == [1, 1, 1]


def test_prepared_vectors() -> None:
    source_TD = (5 * torch.randn(50, WIDTH)).to(torch.bfloat16).requires_grad_()
    raw, unit_rms = _bank(normalize_source=False), _bank()
    projected, cosine = _bank(code_dim=5, normalize_source=False), _bank(distance="cosine")
    assert torch.equal(raw.prepare(source_TD), source_TD.float())
    z_TC = unit_rms.prepare(source_TD)
    assert z_TC.dtype == torch.float32 and not z_TC.requires_grad
    assert (z_TC.square().mean(dim=1) - 1).abs().max() < 1e-3
    assert (cosine.prepare(source_TD).norm(dim=1) - 1).abs().max() < 1e-5
    projection_DC = projected.projection_DC
    assert projected.prepare(source_TD).shape == (50, 5)
    assert (projection_DC.t() @ projection_DC - torch.eye(5)).abs().max() < 1e-5


def test_codes_depend_on_the_seed_and_the_layer_alone() -> None:
    torch.manual_seed(1)
    first = _bank(code_dim=4)
    torch.manual_seed(2)
    second = _bank(code_dim=4)
    for name, buffer in first.named_buffers():
        assert torch.equal(buffer, dict(second.named_buffers())[name]), name
    assert not torch.equal(first.codes_LKC, _bank(code_dim=4, seed=8).codes_LKC)
    assert not torch.equal(first.codes_LKC[0], first.codes_LKC[1])
    assert not list(first.parameters()), "codes must be buffers: DeepSpeed casts, shards and averages parameters"


def test_hash_map_is_k_mod_n() -> None:
    assert _bank(num_codes=10).code_map_LK.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 0, 1]] * 2
    assert _bank(num_codes=3).code_map_LK[0].tolist() == [0, 1, 2]


# -------------------------------------------------------------------- statistics


def test_pending_holds_sums_and_counts() -> None:
    bank = _bank()
    first_TD, second_TD = torch.randn(30, WIDTH), torch.randn(20, WIDTH)
    codes = torch.cat([_observe(bank, first_TD)[1], _observe(bank, second_TD)[1]])
    z_TC = bank.prepare(torch.cat([first_TD, second_TD])).double()
    for k in range(bank.num_codes):
        assert bank.pending[1, k, -1] == (codes == k).sum()
        assert torch.allclose(bank.pending[1, k, :-1], z_TC[codes == k].sum(0), atol=1e-5)
    assert bank.pending.dtype == torch.float64


def test_samples_outlive_what_they_were_taken_from() -> None:
    bank, source_TD = _bank(normalize_source=False), torch.randn(30, WIDTH)
    want_TD = source_TD.clone()
    _observe(bank, source_TD)
    source_TD.zero_()
    assert torch.equal(bank.samples(0, 30)[0], want_TD)


@pytest.mark.parametrize("layers", [slice(0, 3), slice(1, 3), slice(2, 3)])
def test_layers_of_one_source_are_observed_together(layers: slice) -> None:
    together, one_by_one = (_bank(num_layers=3, kmeans_samples=16) for _ in range(2))
    for _ in range(2):
        z_TC = together.prepare(torch.randn(30, WIDTH))
        codes_LT = together.lookup_all(z_TC)
        together.observe_all(layers, z_TC, codes_LT[layers])
        for layer in range(3)[layers]:
            one_by_one.observe(layer, z_TC, codes_LT[layer])
    assert torch.equal(together.pending, one_by_one.pending)
    assert together.pending[..., -1].sum(dim=1).tolist() == [60 * (layer in range(3)[layers]) for layer in range(3)]
    if layers.start == 0:
        assert torch.equal(together.samples(1, 16), one_by_one.samples(1, 16))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_is_not_counted(reentrant: bool) -> None:
    bank = _bank()
    x_TD = torch.randn(12, WIDTH, requires_grad=True)
    calls = []

    def block(x_TD: Tensor) -> Tensor:
        calls.append(1)
        _observe(bank, x_TD)
        return (x_TD**2).tanh()

    checkpoint(block, x_TD, use_reentrant=reentrant).sum().backward()
    assert len(calls) == 2, "nothing was recomputed"
    assert bank.pending[..., -1].sum(dim=1).tolist() == [12, 12]


def test_samples_are_spread_over_the_micro_batch() -> None:
    bank = _bank(normalize_source=False, kmeans_samples=64)
    ramp_TD = torch.arange(64.0).unsqueeze(1).expand(-1, WIDTH)
    _observe(bank, ramp_TD)
    _observe(bank, ramp_TD + 100)
    samples_LSC = bank.samples(1, 8)
    assert samples_LSC.shape == (2, 8, WIDTH)
    assert samples_LSC[0, :, 0].tolist() == [100, 109, 118, 127, 136, 145, 154, 163]
    assert bank.samples(0, 100).shape == (2, 100, WIDTH), "fewer tokens than asked for are repeated"


def test_no_samples_are_kept_for_steps_that_need_none() -> None:
    bank = _bank(dead_below=0.2, reseed_until=3, kmeans_samples=64, overused_above=0.0)
    sync, kept = StateSync(bank), []
    for _ in range(5):
        _observe(bank, torch.randn(40, WIDTH))
        kept.append(len(bank._samples[0]))
        sync.step()
    assert kept == [1, 1, 1, 0, 0]


# ---------------------------------------------------------------- what the host waits for


def _without_memory(bank: CodebookBank, updates: int, born_at: int) -> CodebookBank:
    """The bank on the meta device, where reading any number back is an error, at a step that the host knows of."""
    bank = bank.to("meta")
    bank._updates.write(bank.updates, updates)
    bank._born_at.write(bank.born_at, born_at)
    return bank


@pytest.mark.parametrize("options", [{}, {"distance": "cosine"}, {"code_dim": 4}, {"learning": "frozen"}])
@pytest.mark.parametrize(("updates", "born_at"), [(0, -1), (19, 0), (500, 0)])
def test_a_forward_reads_nothing_back(options: dict, updates: int, born_at: int) -> None:
    bank = _without_memory(_bank(kmeans_samples=16, **options), updates, born_at)
    z_TC = bank.prepare(torch.randn(30, WIDTH, device="meta"))
    bank.observe_all(slice(None), z_TC, bank.lookup_all(z_TC, torch.zeros(30, dtype=torch.int64, device="meta")))
    bank.observe(1, z_TC, bank.lookup(1, z_TC))
    assert bank.pending.shape == (2, 4, z_TC.shape[1] + 1)
    with pytest.raises(RuntimeError):
        int(bank.pending.sum())


IDLE = [{"dead_below": 0.0}, {"reseed_until": 500}, {"freeze_step": 400}, {"freeze_step": 501}, {"learning": "frozen"}]


@pytest.mark.parametrize("options", [*IDLE, {"learning": "gradient", "dead_below": 0.0}])
def test_a_step_that_looks_for_no_codes_reads_nothing_back(options: dict) -> None:
    bank = _without_memory(_bank(**options), 500, 0)
    _observe(bank, torch.randn(30, WIDTH, device="meta"))
    StateSync(bank).step()
    assert bank.steps_taken == 501


@pytest.mark.parametrize(("dead", "moved"), [(0, []), (3, [3])])
def test_a_step_reads_one_small_tensor_back(dead: int, moved: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where dead codes are moved. Step 19 looks for overused codes too."""
    bank = _without_memory(_bank(), 19, 0)
    read: list[Tensor] = []
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: (read.append(tensor), [0, dead])[1])
    reseeded, original = [], bank.reseed
    bank.reseed = lambda dead_LK, new_LSC: (reseeded.append(new_LSC.shape[1]), original(dead_LK, new_LSC))
    _observe(bank, torch.randn(30, WIDTH, device="meta"))
    StateSync(bank).step()
    assert [tensor.numel() for tensor in read] == [2]
    assert reseeded == moved


def test_numbers_on_the_host_follow_the_buffers() -> None:
    bank, other = _bank(freeze_step=5), _bank(freeze_step=5)
    assert (bank.steps_taken, bank.initialized, bank.moving) == (0, False, True)
    bank.updates.fill_(7)
    bank.born_at.zero_()
    assert (bank.steps_taken, bank.initialized, bank.moving) == (7, True, False)
    other.load_state_dict(bank.state_dict())
    assert (other.steps_taken, other.initialized) == (7, True)
    bank.count(torch.zeros(2, 4, dtype=torch.float64))
    assert bank.steps_taken == int(bank.updates) == 8
    bank.updates -= 4
    assert bank.moving
    moved = copy.deepcopy(bank).to(torch.device("cpu"))
    assert moved.steps_taken == 4 and moved.initialized


# ---------------------------------------------------------------------- learning


def test_decay_rises_linearly() -> None:
    bank = _bank(decay=0.5, decay_final=0.9, decay_steps=4)
    seen = []
    for _ in range(6):
        seen.append(bank.decay())
        bank.updates += 1
    assert seen == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 0.9])


def test_unused_code_keeps_its_place_for_ever() -> None:
    bank = _bank(num_layers=1, init_step=10**6, dead_below=0.0, decay=0.5, decay_final=0.5)
    sync = StateSync(bank)
    bank.codes_LKC[0, 3] = bank.ema_sum_LKC[0, 3] = 100.0
    for _ in range(150):  # 0.5^150 is far below the smallest float32
        _observe(bank, torch.randn(40, WIDTH))
        sync.step()
    assert bank.usage_LK[0, 3] == 0
    assert torch.isfinite(bank.codes_LKC).all()
    assert (bank.codes_LKC[0, 3] - 100).abs().max() < 1e-2


@pytest.mark.parametrize("learning", ["ema", "gradient"])
def test_cosine_codes_stay_on_the_sphere(learning: str) -> None:
    bank = _bank(distance="cosine", learning=learning, learning_rate=0.1, kmeans_samples=64)
    sync = StateSync(bank)
    for _ in range(10):
        _observe(bank, torch.randn(40, WIDTH))
        sync.step()
    assert bool(bank.initialized)
    assert (bank.codes_LKC.norm(dim=-1) - 1).abs().max() < 1e-5


def test_freezing_stops_the_codes_but_not_the_count() -> None:
    bank = _bank(freeze_step=4, kmeans_samples=64)
    sync = StateSync(bank)
    history = []
    for _ in range(7):
        _observe(bank, torch.randn(40, WIDTH))
        sync.step()
        history.append(bank.codes_LKC.clone())
    moved = [not torch.equal(a, b) for a, b in zip(history, history[1:], strict=False)]
    assert moved == [True, True, True, False, False, False]
    assert bank.usage_LK.sum(dim=1).tolist() == [7 * 40, 7 * 40]
    assert int(bank.updates) == 7


def test_frozen_codes_never_move_nor_are_initialized() -> None:
    bank = _bank(learning="frozen")
    before, sync = bank.codes_LKC.clone(), StateSync(bank)
    for _ in range(3):
        _observe(bank, torch.randn(40, WIDTH))
        sync.step()
    assert torch.equal(bank.codes_LKC, before) and not bool(bank.initialized)
    assert bank.usage_LK.sum() == 2 * 3 * 40


def test_state_continues_bit_for_bit_from_a_state_dict() -> None:
    for learning in ("ema", "gradient"):
        banks = [_bank(learning=learning, learning_rate=0.05, kmeans_samples=64, seed=seed) for seed in (1, 2)]
        syncs = [StateSync(bank) for bank in banks]
        for step in range(8):
            if step == 4:
                banks[1].load_state_dict(banks[0].state_dict())
            source_TD = torch.randn(40, WIDTH)
            for bank, sync in zip(banks, syncs, strict=True):
                _observe(bank, source_TD)
                sync.step()
        assert torch.equal(banks[0].codes_LKC, banks[1].codes_LKC)
        assert torch.equal(banks[0].code_map_LK, banks[1].code_map_LK)


def test_a_state_of_earlier_versions_goes_on_with_adams_steps_as_they_were_counted_there() -> None:
    bank = _bank(learning="gradient")
    bank.updates.fill_(7)
    state = {name: tensor for name, tensor in bank.state_dict().items() if name != "adam_steps_LK"}
    other = _bank(learning="gradient")
    other.load_state_dict(state)
    assert (other.adam_steps_LK == 7).all()
    other.adam_steps_LK.zero_()
    saved = {f"bank.{name}": tensor for name, tensor in state.items()}
    fill_buffers(nn.ModuleDict({"bank": other}), SimpleNamespace(path="earlier", buffers=lambda: saved))
    assert (other.adam_steps_LK == 7).all()


# ---------------------------------------------------- initialization and rescue


def _clusters(count: int = 4, per_cluster: int = 20) -> Tensor:
    return (4 * torch.eye(count, WIDTH)).repeat(per_cluster, 1) + 0.05 * torch.randn(count * per_cluster, WIDTH)


@pytest.mark.parametrize("init_step", [1, 3])
def test_codes_are_initialized_on_the_data(init_step: int) -> None:
    bank = _bank(normalize_source=False, init_step=init_step, kmeans_samples=80, dead_below=0.0)
    sync = StateSync(bank)
    for step in range(1, 5):
        _observe(bank, _clusters())
        sync.step()
        assert bool(bank.initialized) == (step >= init_step)
    nearest = torch.cdist(4 * torch.eye(4, WIDTH), bank.codes_LKC[0]).amin(dim=1)
    assert nearest.max() < 0.2
    assert int(bank.updates) == 4


def test_random_initialization_takes_samples_as_they_are() -> None:
    bank = _bank(init="random", normalize_source=False, kmeans_samples=80)
    source_TD = _clusters()
    _observe(bank, source_TD)
    StateSync(bank).step()
    assert all((source_TD == code_C).all(dim=1).any() for code_C in bank.codes_LKC.flatten(0, 1))


def test_initialization_gives_codes_the_weight_of_their_clusters() -> None:
    bank = _bank(normalize_source=False, kmeans_samples=80)
    weights = torch.tensor([7, 6, 4, 3])  # none overused, so none is split
    source_TD = 4 * torch.eye(4, WIDTH).repeat_interleave(weights, dim=0).repeat(4, 1)
    source_TD = source_TD + 0.01 * torch.randn_like(source_TD)
    _observe(bank, source_TD)
    StateSync(bank).step()
    counts_K = bank.ema_count_LK[0]
    assert sorted(counts_K.tolist()) == pytest.approx([12.0, 16.0, 24.0, 28.0])
    means_KC = bank.ema_sum_LKC[0] / counts_K.unsqueeze(1)
    assert torch.allclose(means_KC, bank.codes_LKC[0], atol=1e-5)


def test_balanced_map_is_drawn_when_codes_are_initialized() -> None:
    bank = _bank(num_codes=8, normalize_source=False, kmeans_samples=400, code_map="balanced", num_experts=2)
    weights = torch.tensor([130, 110, 50, 40, 30, 20, 10, 10])
    source_TD = 4 * torch.eye(8, WIDTH).repeat_interleave(weights, dim=0) + 0.01 * torch.randn(400, WIDTH)
    _observe(bank, source_TD)
    StateSync(bank).step()
    counts_K = torch.bincount(_observe(bank, source_TD)[0], minlength=8)
    by_code = torch.arange(8) % 2
    balanced, hashed = (int((counts_K * (table == 0)).sum()) for table in (bank.code_map_LK[0], by_code))
    assert abs(balanced - 200) <= 8
    assert abs(hashed - 200) > 15, "k mod N would have done as well"


@pytest.mark.parametrize(("overused_above", "split"), [(0.0, False), (3.0, True)])
def test_a_code_that_becomes_overused_after_the_initialization_is_split(overused_above: float, split: bool) -> None:
    """The first batch may be unlike the text: a place that was rare then may hold half of all tokens later."""
    options = {"num_layers": 1, "normalize_source": False, "dead_below": 0.0, "overused_above": overused_above}
    bank, places = _bank(num_codes=8, kmeans_samples=400, **options), 4 * torch.eye(8, WIDTH)
    sync = StateSync(bank)
    _observe(bank, places.repeat(50, 1) + 0.2 * torch.randn(400, WIDTH))
    sync.step()
    weights = torch.tensor([200] + 7 * [30])
    for _ in range(20):
        load_K = torch.bincount(_observe(bank, _scattered(places, weights))[0], minlength=8)
        sync.step()
    assert (int(load_K.max()) > 190) != split
    assert torch.allclose(bank.codes_LKC * bank.ema_count_LK.unsqueeze(-1), bank.ema_sum_LKC, atol=1e-3)


def _scattered(places_KD: Tensor, weights_K: Tensor) -> Tensor:
    rows_TD = places_KD.repeat_interleave(weights_K, dim=0)
    return rows_TD + 0.2 * torch.randn_like(rows_TD)


@pytest.mark.parametrize("learning", ["ema", "gradient"])
def test_dead_codes_are_moved_onto_tokens_and_stay_there(learning: str) -> None:
    bank = _bank(learning=learning, normalize_source=False, kmeans_samples=80, dead_below=0.2, num_layers=1)
    sync = StateSync(bank)
    for _ in range(3):
        _observe(bank, _clusters())
        sync.step()
    bank.codes_LKC[0, 2] = 1000.0  # out of every token's reach
    bank.ema_sum_LKC[0, 2] = 1000.0 * bank.ema_count_LK[0, 2]
    for _ in range(120):
        _observe(bank, _clusters())
        sync.step()
        if bank.codes_LKC.abs().max() < 100:
            break
    else:
        pytest.fail("the dead code was never moved")
    used_before, again = bank.usage_LK[0].clone(), []
    bank.reseed = lambda *args: again.append(args)
    for _ in range(5):
        _observe(bank, _clusters())
        sync.step()
    assert ((bank.usage_LK[0] - used_before) > 0).all()
    assert bank.codes_LKC.abs().max() < 10, "stale sums pulled the code back"
    assert not again, "without a running count of its own it is dead again at once"


def test_dead_codes_take_the_candidates_in_turn() -> None:
    bank = _bank(num_layers=3, num_codes=6)
    bank.ema_count_LK.copy_(torch.rand(3, 6))
    codes_LKC, counts_LK, sums_LKC = (t.clone() for t in (bank.codes_LKC, bank.ema_count_LK, bank.ema_sum_LKC))
    dead = {(0, 1): 0, (0, 2): 1, (0, 5): None, (2, 4): 0}  # candidate; the third dead code of a layer finds none
    dead_LK = torch.zeros(3, 6, dtype=torch.bool)
    for place in dead:
        dead_LK[place] = True
    candidates_LSC, mean_L = torch.randn(3, 2, WIDTH), counts_LK.mean(dim=1)
    bank.reseed(dead_LK, candidates_LSC)
    for (layer, code), candidate in dead.items():
        if candidate is not None:
            fresh_C, mean = candidates_LSC[layer, candidate], mean_L[layer]
            codes_LKC[layer, code], counts_LK[layer, code], sums_LKC[layer, code] = fresh_C, mean, fresh_C * mean
    for got, wanted in ((bank.codes_LKC, codes_LKC), (bank.ema_count_LK, counts_LK), (bank.ema_sum_LKC, sums_LKC)):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("place", ["initialize", "split", "reseed", "settle"])
def test_adam_begins_anew_for_codes_that_are_placed_and_for_no_others(place: str) -> None:
    """The first step of Adam has the length of the rate, whatever the gradient."""
    options = {"learning": "gradient", "learning_rate": 1e-3, "normalize_source": False, "overused_above": 2.0}
    bank, source_TD = _bank(num_layers=1, init_step=10**6, **options), torch.randn(60, WIDTH)

    def learn() -> Tensor:
        before_LKC = bank.codes_LKC.clone()
        stats_LKC1 = torch.cat([torch.zeros(1, 4, WIDTH), torch.ones(1, 4, 1)], dim=2)  # of zeros, one for each code
        bank.update(stats_LKC1.double())
        return (bank.codes_LKC - before_LKC).abs()

    for _ in range(50):
        learn()
    before, moved_K = copy.deepcopy(bank), torch.ones(4, dtype=torch.bool)
    if place == "initialize":
        placement.initialize_codes(bank, source_TD.unsqueeze(0))
    elif place == "split":
        bank.ema_count_LK[0, 0] += 100
        near_TD = bank.codes_LKC[0, :1] + 0.5 * torch.randn(200, WIDTH)
        placement.split_overused_codes(bank, torch.cat([source_TD, near_TD]).unsqueeze(0))
        moved_K = (bank.codes_LKC != before.codes_LKC).any(dim=2)[0]
        assert moved_K.any() and not moved_K.all()
    elif place == "reseed":
        moved_K = torch.tensor([False, True, False, False])
        bank.reseed(moved_K.unsqueeze(0), source_TD[None, :1])
    else:
        run = RunConfig(model={"width": WIDTH}, moe={"num_experts": 4}, codebook=bank.config)
        buffers = settled_codebook(run, bank.codes_LKC, bank.code_map_LK)
        bank.load_state_dict({name: buffers[f"bank.{name}"] for name in bank.state_dict()})
        assert bank.steps_taken > 200
    for name in ("adam_mean_LKC", "adam_square_LKC"):
        assert torch.equal(getattr(bank, name)[0, ~moved_K], getattr(before, name)[0, ~moved_K])
    assert torch.allclose(learn()[0, moved_K], torch.full((int(moved_K.sum()), WIDTH), 1e-3), rtol=1e-2)


@pytest.mark.parametrize("layers", [slice(None), slice(1, None, 2)])
def test_initializing_and_splitting_by_copies_on_the_host(layers: slice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are one with the bank on the CPU: here they are apart, as on a GPU, and bits are those of each layer."""
    monkeypatch.setattr(Tensor, "cpu", Tensor.clone)
    bank = _bank(num_layers=4, num_codes=8, distance="cosine", overused_above=2.0)
    before, samples_LSC = copy.deepcopy(bank), torch.randn(4, 60, WIDTH) ** 3
    _observe(bank, torch.randn(40, WIDTH))
    placement.initialize_codes(bank, samples_LSC, layers)
    for layer in range(4):
        assert torch.equal(bank.codes_LKC[layer], before.codes_LKC[layer]) != (layer in range(4)[layers])
    for layer in range(4)[layers]:
        generator = torch.Generator().manual_seed(1000003 * (layer + 1))
        codes_KC, sizes_K = kmeans(samples_LSC[layer], 8, 10, generator)
        assert torch.equal(bank.codes_LKC[layer], F.normalize(codes_KC, dim=-1))
        assert torch.equal(bank.ema_count_LK[layer], sizes_K / sizes_K.sum() * 8 * 5.0)
        assert torch.equal(bank.ema_sum_LKC[layer], bank.codes_LKC[layer] * bank.ema_count_LK[layer].unsqueeze(-1))
    bank.ema_count_LK[:, 0] += 100
    samples_LSC = torch.cat([samples_LSC, bank.codes_LKC[:, :1] + 0.1 * torch.randn(4, 60, WIDTH)], dim=1)
    initialized = copy.deepcopy(bank)
    placement.split_overused_codes(bank, samples_LSC, layers)
    for layer in range(4):
        codes_KC, counts_K = initialized.codes_LKC[layer], initialized.ema_count_LK[layer]
        if layer in range(4)[layers]:
            codes_KC, sizes_K = split_overused(samples_LSC[layer], codes_KC, 2.0)
            moved_K = (codes_KC != initialized.codes_LKC[layer]).any(dim=1)
            assert moved_K.any() and not moved_K.all()
            counts_K = torch.where(moved_K, sizes_K * (counts_K.sum() / sizes_K.sum()), counts_K)
            assert torch.equal(bank.ema_sum_LKC[layer, moved_K], (codes_KC * counts_K.unsqueeze(-1))[moved_K])
        assert torch.equal(bank.codes_LKC[layer], codes_KC)
        assert torch.equal(bank.ema_count_LK[layer], counts_K)


def test_reseeding_stops_when_told() -> None:
    bank = _bank(normalize_source=False, kmeans_samples=80, dead_below=0.2, num_layers=1, reseed_until=2)
    sync = StateSync(bank)
    for step in range(60):
        _observe(bank, _clusters())
        sync.step()
        if step == 3:
            bank.codes_LKC[0, 2] = 1000.0
            bank.ema_sum_LKC[0, 2] = 1000.0 * bank.ema_count_LK[0, 2]
    assert bool(bank.dead_codes()[0, 2])
    assert bank.codes_LKC[0, 2].min() > 900
