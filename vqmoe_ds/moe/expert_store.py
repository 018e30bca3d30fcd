"""Experts that stay in a file and are brought into a bounded memory before their layer needs them.

Legend: P rows sorted by expert, E experts of a layer, L layers, T tokens, D model width, H expert hidden width.

Reading threads bring in what is *expected*, in the order of use: layers in order, and within a layer the experts with
most rows first, as they are computed. Where routes are known ahead, the experts of all layers are expected before the
first block and reading goes on beside computing; of a learned router a layer's experts are expected once it has routed
(on demand). Nothing is guessed, so nothing is read in vain.

A brought-in expert stays until its room is needed. Then goes the least often used of those that nobody expects (of
several, the least recently used); if all are expected, the one that is used last, provided that this is later than what
is to be read. So the next expert in the order of use always finds room, and one room is enough.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vqmoe_ds.moe.derivatives import first_derivative_only
from vqmoe_ds.moe.experts import StackedExperts, run_on_cpu
from vqmoe_ds.moe.kernels.experts import check_counts
from vqmoe_ds.moe.layer import MoELayer
from vqmoe_ds.moe.workers import run_experts
from vqmoe_ds.runtime.errors import ConfigError

READERS = 4
"""Reading threads; a disk answers several requests at once faster than one after the other."""
PARTS = ("w1", "w2", "w3")
"""Matrices of an expert, each read on its own, so that even a single expert is read by several threads."""
Key = tuple[int, int]
"""(MoE layer, expert)."""


def part_shapes(width: int, hidden: int) -> dict[str, tuple[int, int]]:
    """Shape of each of an expert's matrices."""
    return {"w1": (hidden, width), "w2": (width, hidden), "w3": (hidden, width)}


class Source(NamedTuple):
    """The experts of a model in their files.

    Attributes:
        name: of the model, for sentences.
        layers: MoE layers.
        experts: experts E of each.
        width, hidden: D and H.
        dtype: of the weights in memory.
        fetch: ``fetch(layer, expert, part, out)`` fills one of ``PARTS``, in any thread; its errors reach the forward
            pass that waits for the expert.
    """

    name: str
    layers: int
    experts: int
    width: int
    hidden: int
    dtype: torch.dtype
    fetch: Callable[[int, int, str, Tensor], None]

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert in memory."""
        return 3 * self.hidden * self.width * self.dtype.itemsize


class Room:
    """One expert's weights in memory, and who needs them."""

    def __init__(self, key: Key, weights: dict[str, Tensor]) -> None:
        self.key, self.weights = key, weights
        self.unread, self.users = len(PARTS), 0


class ExpertStore:
    """A budget of memory for experts, and the threads that fill it.

    Args:
        source: where experts come from.
        budget: bytes of experts held at once, at most. Threads that convert what they read need a few MiB beside it.

    Raises:
        ConfigError: the budget is smaller than one expert.
    """

    def __init__(self, source: Source, budget: int) -> None:
        size = source.expert_bytes
        if budget < size:
            raise ConfigError(
                f"--expert_memory of {budget:,} bytes is less than one expert of {source.name} takes; give {size:,} "
                f"or more, such as --expert_memory {-(-size // 1024)}KiB"
            )
        self.source = source
        self.rooms = min(budget // size, source.layers * source.experts)
        # In one piece and once, so that the budget holds whatever comes and goes.
        memory = torch.empty(self.rooms, len(PARTS), source.hidden * source.width, dtype=source.dtype)
        shapes = part_shapes(source.width, source.hidden).items()
        # Views are made here: each later call of PyTorch by a reading thread may wait for all others (the GIL).
        self._free = [
            {part: row.view(shape) for row, (part, shape) in zip(room, shapes, strict=True)} for room in memory
        ]
        self._held: OrderedDict[Key, Room] = OrderedDict()  # the least recently used first
        self._expected: dict[int, dict[int, int]] = {}  # layer -> its experts that are still to be used -> place
        self._parts: list[tuple[Key, str]] = []  # begun and not yet taken by a thread
        self._lock = threading.Lock()
        # One lock, two conditions: a `notify` of readers must not be spent on a thread that waits for an expert.
        self._work, self._ready = threading.Condition(self._lock), threading.Condition(self._lock)
        self._threads: list[threading.Thread] = []
        self._error: BaseException | None = None
        self._closed = False
        self._used: Counter[Key] = Counter()
        self.reads = self.most_held = 0

    @property
    def uses(self) -> int:
        """Experts lent so far, each as often as it was."""
        return self._used.total()

    @property
    def bytes_read(self) -> int:
        """Bytes of experts brought in so far."""
        return self.reads * self.source.expert_bytes

    @property
    def most_bytes_held(self) -> int:
        """Bytes of experts held at once so far, at most."""
        return self.most_held * self.source.expert_bytes

    def summary(self) -> str:
        """What was read and held so far, in one line."""
        held, size = self.most_bytes_held / 2**20, self.source.expert_bytes / 2**20
        return (
            f"experts: {self.uses:,} used, {self.reads:,} of them read ({self.bytes_read / 2**20:,.1f} MiB); at most "
            f"{held:,.1f} MiB held of {size:,.2f} MiB each"
        )

    # ------------------------------------------------------------ what a model calls

    def expect(self, layer: int, rows_E: list[int]) -> None:
        """Read the experts of a layer that have rows, those with most first; replaces what was expected of it."""
        order = in_order_of_use(rows_E)
        with self._lock:
            self._expected[layer] = {expert: place for place, expert in enumerate(order)}
            self._start()
            self._work.notify_all()

    def expect_ahead(self, first: int, experts_LT: Tensor) -> None:
        """``expect`` for consecutive layers from ``first`` on, by the experts of their tokens, int64 ``[L, T]``."""
        for layer, experts_T in enumerate(experts_LT, first):
            self.expect(layer, experts_T.bincount(minlength=self.source.experts).tolist())

    def forget(self, layer: int) -> None:
        """Expect nothing more of a layer."""
        with self._lock:
            self._expected.pop(layer, None)
            # One reader is enough: whoever begins an expert wakes the others for its parts.
            self._work.notify()

    @contextmanager
    def lent(self, layer: int, expert: int) -> Iterator[dict[str, Tensor]]:
        """The weights of an expected expert, by the names of ``PARTS``; they stay as they are inside.

        Raises:
            CheckpointError: they, or others that were expected, could not be read.
        """
        key = layer, expert
        with self._lock:
            while (room := self._held.get(key)) is None or room.unread:
                self._check()
                # Readers bring in what is expected and nothing else.
                if expert not in self._expected.get(layer, {}):
                    raise RuntimeError(f"expert {expert} of layer {layer} is not expected: call expect() first")
                self._ready.wait()
            room.users += 1
        try:
            yield room.weights
        finally:
            with self._lock:
                room.users -= 1
                self._used[key] += 1
                self._held.move_to_end(key)
                self._expected.get(layer, {}).pop(expert, None)
                self._work.notify()

    def close(self) -> None:
        """End the threads; whoever waits for an expert gets an error."""
        with self._lock:
            self._closed = True
            self._work.notify_all()
            self._ready.notify_all()
        for thread in self._threads:
            thread.join()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closed:
            raise RuntimeError("the store of experts is closed")

    # ------------------------------------------------------------ reading threads

    def _start(self) -> None:
        if not self._threads and not self._closed:
            # Daemons: a store that nobody closes must not keep the process from ending.
            self._threads = [
                threading.Thread(target=self._read, name="expert reader", daemon=True) for _ in range(READERS)
            ]
            for thread in self._threads:
                thread.start()

    def _read(self) -> None:
        try:
            while (job := self._next()) is not None:
                (layer, expert), part, room = job
                # Outside the lock, as it takes long; a room with unread parts is given to nobody else. As data: rooms
                # are views of one tensor, by whose count of versions autograd would take all of them for changed.
                self.source.fetch(layer, expert, part, room.weights[part].data)
                with self._lock:
                    room.unread -= 1
                    if not room.unread:
                        self.reads += 1
                        self._ready.notify_all()
        except BaseException as error:  # whoever waits for an expert raises it
            with self._lock:
                self._error = error
                self._work.notify_all()
                self._ready.notify_all()

    def _next(self) -> tuple[Key, str, Room] | None:
        """The part to be read next, when there is one; None: it is over."""
        with self._lock:
            while not self._closed and self._error is None:
                if not self._parts and (key := self._unread()) is not None and self._make_room(key):
                    self._parts = [(key, part) for part in reversed(PARTS)]
                    self._work.notify_all()  # the other threads take the other parts
                if self._parts:
                    key, part = self._parts.pop()
                    return key, part, self._held[key]
                self._work.wait()
            return None

    def _unread(self) -> Key | None:
        """The first expected expert, in the order of use, that is neither held nor being read."""
        for layer in sorted(self._expected):
            for expert in self._expected[layer]:
                if (layer, expert) not in self._held:
                    return layer, expert
        return None

    def _make_room(self, key: Key) -> bool:
        """Give an expected expert a room; False where all are taken by what is used before it, or at this moment."""
        if self._free:
            weights = self._free.pop()
        else:
            # What is being read or is lent out keeps its room: somebody writes to it or computes with it.
            idle = [room for room in self._held.values() if not room.unread | room.users]
            unexpected = [room for room in idle if room.key[1] not in self._expected.get(room.key[0], ())]
            if unexpected:
                # By use and not by recency: a pass over all layers would sweep the frequent ones away. min() takes the
                # first of equals, and the first held is the least recently used.
                gone = min(unexpected, key=lambda room: self._used[room.key]).key
            else:
                gone = max((room.key for room in idle), key=self._place, default=key)
                if self._place(gone) <= self._place(key):
                    return False
            weights = self._held.pop(gone).weights
        self._held[key] = Room(key, weights)
        self.most_held = max(self.most_held, len(self._held))
        return True

    def _place(self, key: Key) -> Key:
        """Layer and place of an expected expert in the order of use."""
        layer, expert = key
        return layer, self._expected[layer][expert]


def in_order_of_use(rows_E: list[int]) -> list[int]:
    """Experts with rows, as ``run_experts`` computes them: those with most rows first."""
    # Must be the order of run_experts: with a single room, an expert brought in before its turn would keep out the one
    # that is waited for, and both sides would wait without end.
    return sorted((e for e, rows in enumerate(rows_E) if rows), key=lambda e: -rows_E[e])


class StoredExperts(StackedExperts):
    """The experts of one layer in an ``ExpertStore``; computes what ``StackedExperts`` of the same weights computes.

    To the bit: the same kernels get the same rows of each expert, and experts share the threads by the same rule.
    Its parameters have the right shapes and no values (device "meta"), unless ``moe/expert_file.py`` gives them some.
    They do not learn, and backward asks for each expert once more.

    Args:
        width, hidden, num_local: as of ``StackedExperts``; those of one rank alone.
        layer: index of the MoE layer.
        unused: how values would be drawn.
    """

    store: ExpertStore
    """Of the model; set before the first forward pass (``bind_store``)."""

    def __init__(self, width: int, hidden: int, num_local: int, layer: int = 0, **unused: Any) -> None:
        # Not super(), which would allocate and draw all experts.
        nn.Module.__init__(self)
        self.width, self.hidden, self.num_local, self.layer = width, hidden, num_local, layer
        for part, shape in part_shapes(width, hidden).items():
            setattr(self, part, nn.Parameter(torch.empty(num_local, *shape, device="meta")))

    def forward(self, x_PD: Tensor, ends_E: Tensor) -> Tensor:
        """Run row ``p`` through its expert, ``[P, D]`` -> ``[P, D]``; see ``StackedExperts.forward``.

        Raises:
            CheckpointError: an expert could not be read.
        """
        rows_E = [end - start for start, end in pairwise([0, *ends_E.tolist()])]
        check_counts(rows_E, self.num_local, len(x_PD))
        out_PD: Tensor = _StoredRows.apply(x_PD.contiguous(), self, rows_E)
        return out_PD

    def each(
        self, rows_E: list[int], job: Callable[[slice, Callable[[Tensor], Tensor]], None], cast: torch.dtype | None
    ) -> None:
        """Call ``job(mine, expert)`` with the rows of every expert that has any, and the expert as a function.

        Args:
            rows_E: rows of each expert.
            job: called on several threads.
            cast: type that autocast has for products; None where it is off.

        Raises:
            CheckpointError: an expert could not be read.
        """
        ends = [0, *accumulate(rows_E)]
        needed = [e for e, rows in enumerate(rows_E) if rows]

        def run(index: int) -> None:
            e = needed[index]
            with self.store.lent(self.layer, e) as weights:
                w1, w2, w3 = (weights[part].unsqueeze(0) for part in PARTS)
                # It belongs to a thread, and this may be a helper's or autograd's.
                with torch.autocast("cpu", cast, enabled=cast is not None):
                    job(slice(ends[e], ends[e + 1]), lambda rows: run_on_cpu(rows, w1, w2, w3, [rows_E[e]]))

        self.store.expect(self.layer, rows_E)
        try:
            run_experts(run, [rows_E[e] for e in needed])
        finally:
            # Also after an error: what stays expected defends its room against all later layers.
            self.store.forget(self.layer)


class _StoredRows(torch.autograd.Function):
    """Rows through their experts; what an expert keeps for backward would be its weights, so it is run again there."""

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, experts: StoredExperts, rows_E: list[int]) -> Tensor:
        cast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        out_PD = torch.empty_like(x_PD, dtype=cast)

        def run(mine: slice, expert: Callable[[Tensor], Tensor]) -> None:
            out_PD[mine] = expert(x_PD[mine])

        experts.each(rows_E, run, cast)
        ctx.save_for_backward(x_PD)
        ctx.experts, ctx.rows_E, ctx.cast = experts, rows_E, cast
        return out_PD

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x_PD,), g_PD = ctx.saved_tensors, grads[0].contiguous()
        gx_PD = torch.empty_like(x_PD)

        def run(mine: slice, expert: Callable[[Tensor], Tensor]) -> None:
            with torch.enable_grad():  # of this thread
                rows = x_PD[mine].detach().requires_grad_()
                (gx_PD[mine],) = torch.autograd.grad(expert(rows), rows, g_PD[mine])

        ctx.experts.each(ctx.rows_E, run, ctx.cast)
        return gx_PD, None, None


class StoredMoELayer(MoELayer):
    """A ``MoELayer`` whose experts lie in an ``ExpertStore``, on a CPU."""

    experts_class = StoredExperts


def bind_store(layers: Iterable[MoELayer], store: ExpertStore) -> None:
    """Give the ``StoredExperts`` of a model their store."""
    for layer in layers:
        assert isinstance(layer.experts, StoredExperts)
        layer.experts.store = store
