"""Experts in a bounded memory: what is read, when, what is kept, and what happens when reading fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch

from vqmoe_ds.moe import expert_store
from vqmoe_ds.moe.expert_store import PARTS, ExpertStore, Source, StoredExperts, part_shapes
from vqmoe_ds.moe.experts import StackedExperts, run_on_cpu
from vqmoe_ds.runtime.errors import CheckpointError, ConfigError

WIDTH, HIDDEN, EXPERTS, LAYERS = 32, 48, 6, 3
SIZE = 3 * WIDTH * HIDDEN * 4


class Files:
    """Experts whose reading is recorded, may be slow, held back, or fail."""

    def __init__(self, width: int = WIDTH, hidden: int = HIDDEN, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(3)
        self.stacks = [
            {
                part: torch.randn(EXPERTS, *shape, generator=generator).mul(0.2).to(dtype)
                for part, shape in part_shapes(width, hidden).items()
            }
            for _ in range(LAYERS)
        ]
        self.source = Source("the model", LAYERS, EXPERTS, width, hidden, dtype, self.fetch)
        self.begun: list[tuple[int, int, str]] = []
        self.missing: set[tuple[int, int]] = set()
        self.open = threading.Event()
        self.open.set()

    def fetch(self, layer: int, expert: int, part: str, out: torch.Tensor) -> None:
        self.begun.append((layer, expert, part))
        self.open.wait(20)
        if (layer, expert) in self.missing:
            raise CheckpointError("experts.safetensors is cut short")
        out.copy_(self.stacks[layer][part][expert])

    @property
    def experts_begun(self) -> list[tuple[int, int]]:
        """In the order in which they were begun."""
        return list(dict.fromkeys((layer, expert) for layer, expert, _ in self.begun))


@contextmanager
def opened(files: Files, rooms: int, readers: int = expert_store.READERS) -> Iterator[ExpertStore]:
    """A store; one reader begins experts in the order in which several take them."""
    store = ExpertStore(files.source, rooms * files.source.expert_bytes)
    try:
        with patch.object(expert_store, "READERS", readers):
            yield store
    finally:
        files.open.set()
        store.close()
        assert not reading()


def reading() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "expert reader"]


def until(true) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def use(store: ExpertStore, files: Files, layer: int, expert: int) -> None:
    with store.lent(layer, expert) as weights:
        for part in PARTS:
            assert torch.equal(weights[part], files.stacks[layer][part][expert])


def rows_of(*experts: int) -> list[int]:
    """One row less for each expert that is named later, so that this is the order of use."""
    rows = [0] * EXPERTS
    for place, expert in enumerate(experts):
        rows[expert] = 20 - place
    return rows


# ---------------------------------------------------------------- what is read, and in what order


def test_what_is_known_ahead_is_read_before_anybody_waits_in_the_order_of_use_and_once() -> None:
    files = Files()
    with opened(files, rooms=8, readers=1) as store:
        store.expect(0, rows_of(4, 1))
        store.expect(1, rows_of(2))
        store.expect(2, rows_of(5, 0))
        until(lambda: store.reads == 5)
        assert files.experts_begun == [(0, 4), (0, 1), (1, 2), (2, 5), (2, 0)]
        assert sorted(files.begun) == sorted((*key, part) for key in files.experts_begun for part in PARTS)
        for layer, expert in [(0, 4), (0, 1), (1, 2), (2, 5), (2, 0)]:
            use(store, files, layer, expert)
        assert (store.reads, store.uses, store.bytes_read) == (5, 5, 5 * SIZE)


def test_reading_stops_where_the_budget_ends_and_goes_on_when_experts_were_used() -> None:
    files = Files()
    with opened(files, rooms=2, readers=1) as store:
        for layer in range(LAYERS):
            store.expect(layer, rows_of(3, 4))
        until(lambda: store.reads == 2)
        time.sleep(0.02)
        assert files.experts_begun == [(0, 3), (0, 4)]
        use(store, files, 0, 3)
        until(lambda: store.reads == 3)
        assert files.experts_begun[2:] == [(1, 3)]
        for layer, expert in [(0, 4), (1, 3), (1, 4), (2, 3), (2, 4)]:
            use(store, files, layer, expert)
        assert store.reads == 6 and store.most_bytes_held == 2 * SIZE


def test_of_experts_used_alike_the_one_used_last_stays() -> None:
    files = Files()
    with opened(files, rooms=3) as store:
        for expert in (0, 1, 2, 0, 3, 0, 2, 1):
            store.expect(0, rows_of(expert))
            use(store, files, 0, expert)
            store.forget(0)
        assert files.experts_begun[:4] == [(0, 0), (0, 1), (0, 2), (0, 3)]
        assert store.reads == 5, "3 replaced 1, which was read again"


def test_an_expert_in_frequent_use_outlives_a_series_of_others() -> None:
    files = Files()
    with opened(files, rooms=2) as store:
        for expert in (0, 0, 1, 2, 3, 0, 4, 5, 0):
            store.expect(0, rows_of(expert))
            use(store, files, 0, expert)
            store.forget(0)
        assert store.reads == 6 and files.experts_begun.count((0, 0)) == 1 and len(files.begun) == 18


def test_an_expert_that_is_expected_soon_outlives_one_that_is_not() -> None:
    files = Files()
    with opened(files, rooms=2) as store:
        for expert in (0, 1):
            store.expect(0, rows_of(expert))
            use(store, files, 0, expert)
        store.expect(0, rows_of(2, 0))  # by last use 0 would go, and come again
        until(lambda: store.reads == 3)
        use(store, files, 0, 2)
        use(store, files, 0, 0)
        assert store.reads == 3


def test_what_is_needed_now_takes_the_room_of_what_is_needed_later() -> None:
    """A layer with routes of both kinds: its codes are known ahead, its learned routes are not."""
    files = Files()
    with opened(files, rooms=2) as store:
        for layer in range(LAYERS):
            store.expect(layer, rows_of(0))
        until(lambda: store.reads == 2)
        store.expect(0, rows_of(5, 4, 0))
        for layer, expert in [(0, 5), (0, 4), (0, 0), (1, 0), (2, 0)]:
            use(store, files, layer, expert)
        assert store.most_held == 2


def test_the_order_may_change_with_one_room() -> None:
    files = Files()
    with opened(files, rooms=1) as store:
        store.expect(0, rows_of(1, 2))
        until(lambda: store.reads == 1)
        store.expect(0, rows_of(2, 1))
        use(store, files, 0, 2)
        use(store, files, 0, 1)
        assert store.most_held == 1


def test_a_lent_expert_is_not_replaced() -> None:
    files = Files()
    with opened(files, rooms=1) as store:
        store.expect(0, rows_of(1, 2))
        with store.lent(0, 1) as weights:
            time.sleep(0.02)
            assert files.experts_begun == [(0, 1)] and torch.equal(weights["w2"], files.stacks[0]["w2"][1])
        use(store, files, 0, 2)


# ---------------------------------------------------------------- failures


def test_an_expert_that_cannot_be_read_is_an_error_of_whoever_waits_and_ends_the_threads() -> None:
    files = Files()
    files.missing = {(1, 2)}
    with opened(files, rooms=4) as store:
        store.expect(0, rows_of(0))
        use(store, files, 0, 0)
        store.expect(1, rows_of(2))
        for _ in range(2):
            with pytest.raises(CheckpointError, match="cut short"), store.lent(1, 2):
                pass
        until(lambda: not reading())


def test_closing_frees_whoever_waits() -> None:
    files = Files()
    store = ExpertStore(files.source, 2 * SIZE)
    store._expected[0] = {0: 0}  # and no thread reads it
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            with store.lent(0, 0):
                pass
        except RuntimeError as error:
            raised.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    store.close()
    waiting.join(20)
    assert "closed" in str(raised[0])


def test_a_budget_below_one_expert_is_refused_with_the_smallest_that_works() -> None:
    files = Files()
    with pytest.raises(
        ConfigError, match=f"less than one expert of the model takes; give {SIZE:,} or more, such as .*18KiB"
    ):
        ExpertStore(files.source, SIZE - 1)
    assert ExpertStore(files.source, SIZE).rooms == 1
    assert ExpertStore(files.source, 1 << 40).rooms == LAYERS * EXPERTS, "no memory for what does not exist"


# ---------------------------------------------------------------- the experts of a layer


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "hidden"), [(WIDTH, HIDDEN), (12, 10)])
@pytest.mark.parametrize("counts", [[0, 0, 1, 0, 0, 0], [3, 0, 200, 7, 1, 0], [9] * 6, [0] * 6])
@pytest.mark.parametrize("rooms", [1, 2, 9])
def test_rows_come_out_as_from_experts_in_memory_to_the_bit(width, hidden, dtype, threads, counts, rooms) -> None:
    files, before = Files(width, hidden, dtype), torch.get_num_threads()
    stacked, stored = (kind(width, hidden, EXPERTS, layer=1) for kind in (StackedExperts, StoredExperts))
    for part in PARTS:
        getattr(stacked, part).data = files.stacks[1][part]
    x_PD = torch.randn(sum(counts), width, generator=torch.Generator().manual_seed(1)).to(dtype)
    ends_E = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    torch.set_num_threads(threads)
    try:
        with opened(files, rooms) as store, torch.no_grad():
            stored.store = store
            for _ in range(2):
                assert torch.equal(stored(x_PD, ends_E), stacked(x_PD, ends_E))
            needed = sum(count > 0 for count in counts)
            assert store.uses == 2 * needed and store.most_held <= rooms
            if rooms >= needed:
                assert store.reads == needed
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "hidden"), [(WIDTH, HIDDEN), (12, 10)])
@pytest.mark.parametrize("counts", [[0, 0, 1, 0, 0, 0], [3, 0, 200, 7, 1, 0], [0] * 6])
def test_rows_have_the_gradients_of_experts_in_memory_to_the_bit(width, hidden, dtype, threads, counts) -> None:
    files, before = Files(width, hidden, dtype), torch.get_num_threads()
    stacked, stored = (kind(width, hidden, EXPERTS, layer=1) for kind in (StackedExperts, StoredExperts))
    for part in PARTS:
        getattr(stacked, part).data = files.stacks[1][part]
    stacked.requires_grad_(False)
    x_PD = torch.randn(sum(counts), width, generator=torch.Generator().manual_seed(1)).to(dtype)
    ends_E, gradients = torch.tensor(counts).cumsum(0, dtype=torch.int32), []
    torch.set_num_threads(threads)
    try:
        with opened(files, rooms=1) as store:
            stored.store = store
            for experts in (stacked, stored):
                rows = x_PD.clone().requires_grad_()
                experts(rows * 1, ends_E).square().sum().backward()
                gradients.append(rows.grad)
            assert store.uses == 2 * sum(count > 0 for count in counts) and store.most_held <= 1
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*gradients)


def test_an_expert_that_is_read_meanwhile_is_none_that_autograd_computes_with() -> None:
    files = Files()
    with opened(files, 2) as store:
        store.expect(0, rows_of(0))
        with store.lent(0, 0) as weights:
            rows = torch.randn(3, WIDTH).requires_grad_()
            out = run_on_cpu(rows, *(weights[part].unsqueeze(0) for part in PARTS), [3])
            store.expect(1, rows_of(1))
            until(lambda: store.reads == 2)
            torch.autograd.grad(out.sum(), rows)


@pytest.mark.parametrize("threads", [1, 3])
def test_autocast_reaches_every_thread(threads: int) -> None:
    files, before = Files(), torch.get_num_threads()
    stacked, stored = (kind(WIDTH, HIDDEN, EXPERTS, layer=1) for kind in (StackedExperts, StoredExperts))
    for part in PARTS:
        getattr(stacked, part).data = files.stacks[1][part]
    stacked.requires_grad_(False)
    counts = [3, 0, 200, 7, 1, 0]
    x_PD = torch.randn(sum(counts), WIDTH, generator=torch.Generator().manual_seed(1))
    ends_E, found = torch.tensor(counts).cumsum(0, dtype=torch.int32), []
    torch.set_num_threads(threads)
    try:
        with opened(files, 2) as store:
            stored.store = store
            for experts in (stacked, stored):
                rows = x_PD.clone().requires_grad_()
                with torch.autocast("cpu", torch.bfloat16):
                    out = experts(rows * 1, ends_E)
                out.float().square().sum().backward()
                found.append((out, rows.grad))
    finally:
        torch.set_num_threads(before)
    (out, gradient), (others, theirs) = found
    assert out.dtype == torch.bfloat16 and torch.equal(out, others) and torch.equal(gradient, theirs)


def test_rows_of_no_expert_are_refused() -> None:
    files, stored = Files(), StoredExperts(WIDTH, HIDDEN, EXPERTS)
    with opened(files, 2) as store:
        stored.store = store
        with pytest.raises(IndexError, match="rows were given"):
            stored(torch.zeros(3, WIDTH), torch.tensor([1] * EXPERTS))
        assert not files.begun


def test_a_failed_forward_leaves_nothing_expected() -> None:
    files, stored = Files(), StoredExperts(WIDTH, HIDDEN, EXPERTS)
    files.missing = {(0, 3)}
    with opened(files, 2) as store:
        stored.store = store
        with pytest.raises(CheckpointError, match="cut short"):
            stored(torch.ones(4, WIDTH), torch.tensor([2, 2, 2, 4, 4, 4]))
        assert not store._expected


def test_an_error_in_one_thread_leaves_no_other_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    files, stored, caller = Files(), StoredExperts(WIDTH, HIDDEN, EXPERTS), threading.get_ident()
    began = threading.Event()

    def run(*given: Any) -> torch.Tensor:
        if threading.get_ident() == caller:
            began.wait(5)
            raise MemoryError
        began.set()
        time.sleep(0.05)
        return run_on_cpu(*given)

    monkeypatch.setattr(expert_store, "run_on_cpu", run)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with opened(files, 2) as store:
        stored.store = store
        with pytest.raises(MemoryError):
            stored(torch.ones(6, WIDTH), torch.tensor([1, 2, 3, 4, 5, 6]))
        assert not any(room.users for room in store._held.values()) and store.uses == 2
        with pytest.raises(RuntimeError, match="expert 5 of layer 0 is not expected"), store.lent(0, 5):
            pass
