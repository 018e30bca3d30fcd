"""Representation collapse and likeness of experts.

Legend: T tokens, D width, N experts or other classes, E experts compared, H expert hidden width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vqmoe_ds.moe.experts import StackedExperts


def effective_rank(spectrum_D: Tensor) -> float:
    """``exp`` of the entropy of the singular values, scaled to sum 1 (Roy and Vetterli 2007); 0 of a zero matrix."""
    spectrum_D = spectrum_D.double()
    total = spectrum_D.sum()
    return float(torch.special.entr(spectrum_D / total).sum().exp()) if total > 0 else 0.0


def numerical_rank(spectrum_D: Tensor, threshold: float) -> int:
    """Singular values above ``threshold`` times the largest."""
    return int((spectrum_D > threshold * spectrum_D.max()).sum()) if len(spectrum_D) else 0


def centred_spectrum(x_TD: Tensor) -> Tensor:
    """Singular values of the vectors less their mean, largest first, float64 ``[min(T, D)]``, divided by sqrt(T)."""
    x_TD = x_TD.double()
    # Not by eigenvalues of the covariance: squared, small values would drown in rounding.
    return torch.linalg.svdvals(x_TD - x_TD.mean(dim=0)) / len(x_TD) ** 0.5


class Scatter(NamedTuple):
    """Scatter between classes and within them."""

    within: float
    """``tr S_W``: mean squared distance of a vector from the mean of its class."""
    between: float
    """``tr S_B``: mean squared distance of a vector's class mean from the mean of all; the two sum to the variance."""
    collapse: float | None
    """``tr(S_W S_B^+) / classes``, the variability collapse NC1 of Papyan 2020: 0 where every class is one point."""

    @property
    def between_share(self) -> float:
        """``tr S_B / (tr S_W + tr S_B)``: 0 if classes mean nothing, 1 where every class is one point."""
        total = self.within + self.between
        return self.between / total if total > 0 else 0.0


def class_scatter(x_TD: Tensor, classes_T: Tensor) -> Scatter:
    """Within- and between-class scatter of vectors; those of class -1 are left out.

    Args:
        x_TD: vectors.
        classes_T: the class of each, int64 (the expert or code it was sent to).
    """
    known_T = classes_T >= 0
    # Numbered anew: a class without vectors would have a mean of 0 / 0, and count among the classes of NC1.
    x_TD, classes_T = x_TD[known_T].double(), torch.unique(classes_T[known_T], return_inverse=True)[1]
    counts_N = torch.bincount(classes_T)
    means_ND = x_TD.new_zeros(len(counts_N), x_TD.shape[1]).index_add_(0, classes_T, x_TD) / counts_N.unsqueeze(1)
    apart_TD = x_TD - means_ND[classes_T]
    offset_ND = (means_ND - x_TD.mean(dim=0)) * (counts_N / len(x_TD)).sqrt().unsqueeze(1)
    within_DD, between_DD = apart_TD.t() @ apart_TD / len(x_TD), offset_ND.t() @ offset_ND
    collapse = None
    if len(counts_N) > 1:
        # Rank N - 1 at the most: what is under 1e-10 of the largest eigenvalue is rounding.
        inverse_DD = torch.linalg.pinv(between_DD, rtol=1e-10, hermitian=True)
        collapse = float((within_DD * inverse_DD).sum()) / len(counts_N)
    return Scatter(float(within_DD.trace()), float(between_DD.trace()), collapse)


class Likeness(NamedTuple):
    """Mean and largest cosine over all pairs of different experts."""

    mean: float
    largest: float


def weight_likeness(experts: StackedExperts) -> Likeness:
    """Cosines of experts' weights, all three matrices as one vector.

    Hidden units have no order, so two experts of one function may look unlike here; ``output_likeness`` does not care.
    """
    flat_EW = torch.cat([w.detach().flatten(1) for w in (experts.w1, experts.w2, experts.w3)], dim=1)
    unit_EW = F.normalize(flat_EW.float(), dim=1)
    return _pairs(unit_EW @ unit_EW.t())


@torch.no_grad()
def output_likeness(experts: StackedExperts, x_TD: Tensor) -> Likeness:
    """Cosines of ``E_i(x)`` and ``E_j(x)``, mean over tokens: every expert runs on every token, its own or not."""
    cosines_EE = x_TD.new_zeros(experts.num_local, experts.num_local, dtype=torch.float64)
    # A few tokens at a time: the outputs of all experts are E times as large as the states.
    for chunk_TD in x_TD.split(64):
        outputs_TED = torch.stack([run_expert(experts, e, chunk_TD) for e in range(experts.num_local)], dim=1)
        unit_TED = F.normalize(outputs_TED, dim=-1)
        cosines_EE += (unit_TED @ unit_TED.transpose(1, 2)).sum(dim=0)
    return _pairs(cosines_EE / len(x_TD))


def run_expert(experts: StackedExperts, expert: int, x_TD: Tensor) -> Tensor:
    """One expert by plain PyTorch: ``W2 (silu(W1 x) * W3 x)``."""
    # Must agree with what ``StackedExperts`` computes, and its derivative with ``experiments/jacobian.py: _slopes``.
    hidden_TH = F.silu(x_TD @ experts.w1[expert].t()) * (x_TD @ experts.w3[expert].t())
    return hidden_TH @ experts.w2[expert].t()


def _pairs(cosines_EE: Tensor) -> Likeness:
    count = len(cosines_EE)
    others = cosines_EE[~torch.eye(count, dtype=torch.bool, device=cosines_EE.device)]
    return Likeness(float(others.mean()), float(others.max())) if count > 1 else Likeness(1.0, 1.0)
