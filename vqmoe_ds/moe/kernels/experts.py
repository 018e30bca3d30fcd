"""The autograd function over ``experts.cpp``.

Legend: P rows sorted by expert, E local experts, D model width, H expert hidden width.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqmoe_ds.moe.derivatives import first_derivative_only
from vqmoe_ds.moe.kernels.build import load_kernel
from vqmoe_ds.moe.workers import run_shared

# As LANES of experts.cpp: D and H must be multiples of it, which the kernel does not check.
_MULTIPLE = 16  # of D and H, by the width of a vector
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def supports(dtype: torch.dtype, width: int, hidden: int) -> bool:
    """Whether the compiled kernel runs experts of this number type and these widths on this machine."""
    fits = dtype in _NAMES and width % _MULTIPLE == 0 and hidden % _MULTIPLE == 0
    # FlopCounterMode and its like see PyTorch's own products only.
    return fits and torch._C._len_torch_dispatch_stack() == 0 and load_kernel() is not None


class Piece(NamedTuple):
    """Rows ``first`` to ``end`` of all P, which belong to one expert; ``whole`` if they are all it has."""

    expert: int
    first: int
    end: int
    whole: bool


class CompiledExperts(torch.autograd.Function):
    """SwiGLU of every expert's slice of the rows, ``[P, D]`` -> ``[P, D]``; stacked weights as in ``StackedExperts``.

    Each expert is the work of one thread, for rows of one expert share its weights in cache. Only experts with much
    more than their share of the rows are cut: their rows, then the columns of their weight gradients.
    """

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, counts_E: list[int]) -> Tensor:
        _check_shapes(x_PD, w1, w2, w3)
        # The kernel gets bare addresses: a wrong count would write past the end of memory instead of raising.
        check_counts(counts_E, len(w1), len(x_PD))
        x_PD, w1, w2, w3 = (t.contiguous() for t in (x_PD, w1, w2, w3))
        out_PD = torch.empty_like(x_PD)
        training = any(ctx.needs_input_grad)
        gate_PH, up_PH = (x_PD.new_empty(len(x_PD) if training else 0, w1.shape[1]) for _ in range(2))
        run = _function("forward", x_PD.dtype)
        hidden, width = w1.shape[1:]
        pieces = _pieces(counts_E)

        def job(index: int) -> None:
            e, first, end, _ = pieces[index]
            saved = (_at(gate_PH, first), _at(up_PH, first)) if training else (None, None)
            weights = (_at(w1, e), _at(w2, e), _at(w3, e))
            run(end - first, width, hidden, _at(x_PD, first), *weights, _at(out_PD, first), *saved)

        # Side by side, for ctypes releases the GIL during a call.
        run_shared(job, [piece.end - piece.first for piece in pieces])
        ctx.save_for_backward(x_PD, w1, w2, w3, gate_PH, up_PH)
        ctx.counts_E = counts_E
        return out_PD

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *_Backward(ctx.counts_E, grads[0].contiguous(), *ctx.saved_tensors).run(), None


class _Backward:
    """One backward pass: the gradients of rows, and of the weights of each expert as soon as its rows are done."""

    def __init__(
        self,
        counts_E: list[int],
        g_PD: Tensor,
        x_PD: Tensor,
        w1: Tensor,
        w2: Tensor,
        w3: Tensor,
        gate_PH: Tensor,
        up_PH: Tensor,
    ) -> None:
        self.x_PD, self.g_PD, self.gate_PH, self.up_PH = x_PD, g_PD, gate_PH, up_PH
        self.weights = (w1, w2, w3)
        self.gx_PD = torch.empty_like(x_PD)
        # New tensors, which PyTorch aligns to 64 bytes: the kernel's streaming stores fault at other addresses.
        self.g_weights = tuple(torch.empty_like(w) for w in self.weights)
        self.counts_E, self.pieces = counts_E, _pieces(counts_E)
        self.hidden, self.width = w1.shape[1:]
        self._rows = _function("backward_rows", x_PD.dtype)
        self._weights = _function("backward_weights", x_PD.dtype)

    def run(self) -> tuple[Tensor, ...]:
        starts_E = [sum(self.counts_E[:e]) for e in range(len(self.counts_E))]
        for e, count in enumerate(self.counts_E):
            # An expert without rows is in no piece, and still all ranks reduce its gradients.
            if not count:
                for gradient in self.g_weights:
                    gradient[e].zero_()
        cut = {piece.expert: self._scratch(self.counts_E[piece.expert]) for piece in self.pieces if not piece.whole}

        def rows(index: int) -> None:
            e, first, end, whole = self.pieces[index]
            if whole:
                scratch = self._scratch(end - first)
                self._run_rows(e, first, end, *scratch)
                self._run_weights(e, first, end, 0, self.hidden, *scratch)
            else:
                own = slice(first - starts_E[e], end - starts_E[e])
                self._run_rows(e, first, end, *(t[own] for t in cut[e]))

        run_shared(rows, [piece.end - piece.first for piece in self.pieces])
        # Only now, for a column reads all rows of its expert. One thread sums each entry, in the order of the rows.
        columns = [(e, c) for e in cut for c in range(0, self.hidden, _COLUMNS)]

        def weights(index: int) -> None:
            e, column = columns[index]
            first, last = starts_E[e], min(column + _COLUMNS, self.hidden)
            self._run_weights(e, first, first + self.counts_E[e], column, last, *cut[e])

        run_shared(weights, [self.counts_E[e] for e, _ in columns])
        return self.gx_PD, *self.g_weights

    def _scratch(self, rows: int) -> tuple[Tensor, Tensor]:
        """Gradients of both projections ``[rows, 2 H]`` and hidden activations ``[rows, H]``."""
        return self.x_PD.new_empty(rows, 2 * self.hidden), self.x_PD.new_empty(rows, self.hidden)

    def _run_rows(self, e: int, first: int, end: int, g_projections: Tensor, hidden: Tensor) -> None:
        saved = (_at(t, first) for t in (self.g_PD, self.gate_PH, self.up_PH))
        weights = (_at(w, e) for w in self.weights)
        outputs = (_at(self.gx_PD, first), _at(g_projections, 0), _at(hidden, 0))
        self._rows(end - first, self.width, self.hidden, *saved, *weights, *outputs)

    def _run_weights(
        self, e: int, first: int, end: int, column: int, last: int, g_projections: Tensor, hidden: Tensor
    ) -> None:
        inputs = (_at(self.x_PD, first), _at(self.g_PD, first), _at(g_projections, 0), _at(hidden, 0))
        gradients = (_at(g, e) for g in self.g_weights)
        self._weights(end - first, self.width, self.hidden, column, last, *inputs, *gradients)


def check_counts(counts_E: list[int], experts: int, rows: int) -> None:
    """Raises: IndexError: rows that are of no expert, or counted twice."""
    if len(counts_E) != experts or sum(counts_E) != rows or min(counts_E, default=0) < 0:
        raise IndexError(
            f"{rows} rows were given to {experts} experts, but the rows of each are counted as {counts_E}: some are of "
            "no expert; their router is wrong, or its table by code or token is damaged or of another model"
        )


def _check_shapes(x_PD: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> None:
    """Check, with ``check_counts``, everything that addresses follow from: the kernel itself checks nothing.

    Raises:
        ValueError: tensors that do not belong together.
    """
    experts, hidden, width = w1.shape
    shapes = (x_PD.shape[1:], w2.shape, w3.shape) == ((width,), (experts, width, hidden), (experts, hidden, width))
    alike = all(t.dtype == x_PD.dtype and t.is_cpu for t in (x_PD, w1, w2, w3))
    if not shapes or not alike or width % _MULTIPLE or hidden % _MULTIPLE:
        have = ", ".join(f"{list(t.shape)} of {t.dtype}" for t in (x_PD, w1, w2, w3))
        raise ValueError(f"rows and experts {have} do not fit each other or the kernel")


# A multiple of _MULTIPLE: the kernel packs and stores whole vectors of columns.
_COLUMNS = 256  # hidden columns of a weight gradient that are one thread's work


def _pieces(counts_E: list[int]) -> list[Piece]:
    """The rows of every expert that has any; cut where one expert would keep a thread busy long after the others."""
    # The number of threads decides the cuts and no result: the kernel adds in one order however rows are cut.
    share = max(64, sum(counts_E) // (4 * torch.get_num_threads()))
    pieces, start = [], 0
    for expert, count in enumerate(counts_E):
        parts = 1 if count <= 2 * share else -(-count // share)
        edges = [start + count * part // parts for part in range(parts + 1)]
        pieces += [Piece(expert, a, b, parts == 1) for a, b in zip(edges, edges[1:], strict=False) if b > a]
        start += count
    return pieces


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Any:
    kernel = load_kernel()
    assert kernel is not None  # supports() was asked
    function = getattr(kernel, f"expert_{name}_{_NAMES[dtype]}")
    # As EXPORT in experts.cpp declares them. Without types ctypes passes 32 bits of an address.
    integers = {"forward": 3, "backward_rows": 3, "backward_weights": 5}[name]
    pointers = {"forward": 7, "backward_rows": 9, "backward_weights": 7}[name]
    function.argtypes = [ctypes.c_long] * integers + [ctypes.c_void_p] * pointers
    function.restype = None
    return function


def _at(tensor: Tensor, index: int) -> int:
    """Address of ``tensor[index]``, contiguous from there on."""
    return tensor.data_ptr() + index * tensor.stride(0) * tensor.element_size()
