"""Places codes on data, on the host: initializes all of them, and splits overused ones.

Legend: L MoE layers, K codes, C code width, S samples.

Clustering reads thousands of numbers one after another, for each of which a GPU would be waited for: samples and codes
are copied to the host and the new codes back, once each. ``layers`` leaves the others to other ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vqmoe_ds.moe.clustering import balanced_map, kmeans, split_overused
from vqmoe_ds.moe.codebook import CodebookBank

ALL_LAYERS = slice(None)


def placed(bank: CodebookBank) -> list[Tensor]:
    """The buffers that placing changes: codes, running sums and counts, tables, Adam's; all ``[L, ...]``."""
    return [bank.codes_LKC, bank.ema_sum_LKC, bank.ema_count_LK, bank.code_map_LK, *bank.adam]


@torch.no_grad()
def initialize_codes(bank: CodebookBank, samples_LSC: Tensor, layers: slice = ALL_LAYERS) -> None:
    """Place all codes by k-means (or at random samples) and, for the balanced map, draw the table."""
    book = bank.config
    iterations = book.kmeans_iterations if book.init == "kmeans" else 0
    codes_LKC, sums_LKC, counts_LK, tables_LK, *adam = host = _on_host(bank, layers)
    mean_counts_L = (bank.pending[layers][..., -1].sum(dim=1) / bank.num_codes).clamp_min(1.0).cpu()
    for i, (layer, samples_SC) in enumerate(_numbered(bank, samples_LSC, layers)):
        # Seeded by the layer and not by the rank: whoever clusters a layer draws the same.
        generator = torch.Generator().manual_seed(1000003 * (layer + 1))
        codes_KC, sizes_K = kmeans(samples_SC, bank.num_codes, iterations, generator)
        codes_LKC[i] = F.normalize(codes_KC, dim=-1) if book.distance == "cosine" else codes_KC
        # Weighted as if these codes had run for long: else the first EMA step would count for more than all samples.
        counts_LK[i] = sizes_K / sizes_K.sum() * bank.num_codes * mean_counts_L[i]
        sums_LKC[i] = codes_LKC[i] * counts_LK[i].unsqueeze(-1)
        if book.code_map == "balanced":
            tables_LK[i] = balanced_map(sizes_K, bank.num_experts)
        for state in adam:
            state[i] = 0  # gathered on random codes
    _from_host(bank, layers, host)
    # Also on a rank that placed no layer: every rank's next step depends on it.
    bank.mark_initialized()


@torch.no_grad()
def split_overused_codes(bank: CodebookBank, samples_LSC: Tensor, layers: slice = ALL_LAYERS) -> None:
    """Split overused codes as the initialization does; codes that moved start with the weight of their new clusters.

    Rare tokens gather round codes near the middle of all codes, which no decay undoes.
    """
    overused_L = bank.overused_codes()[layers].any(dim=1).tolist()
    codes_LKC, sums_LKC, counts_LK, _, *adam = host = _on_host(bank, layers)
    for i, (_, samples_SC) in enumerate(_numbered(bank, samples_LSC, layers)):
        if not overused_L[i]:
            continue
        codes_KC, sizes_K = split_overused(samples_SC, codes_LKC[i], bank.config.overused_above)
        # Codes that stayed keep their running sums: samples are fewer than the tokens that they have seen.
        moved_K = (codes_KC != codes_LKC[i]).any(dim=1)
        weight = counts_LK[i].sum() / sizes_K.sum()
        codes_LKC[i] = codes_KC
        counts_LK[i, moved_K] = sizes_K[moved_K].to(counts_LK.dtype) * weight
        sums_LKC[i, moved_K] = codes_KC[moved_K] * counts_LK[i, moved_K].unsqueeze(-1)
        for state in adam:
            state[i, moved_K] = 0
    _from_host(bank, layers, host)


def _numbered(bank: CodebookBank, samples_LSC: Tensor, layers: slice) -> list[tuple[int, Tensor]]:
    """Layers by number with their samples on the host, in the type of the codes."""
    return list(zip(range(bank.num_layers)[layers], samples_LSC[layers].cpu().to(bank.codes_LKC.dtype), strict=True))


def _on_host(bank: CodebookBank, layers: slice) -> list[Tensor]:
    return [tensor[layers].cpu() for tensor in placed(bank)]


def _from_host(bank: CodebookBank, layers: slice, host: list[Tensor]) -> None:
    for tensor, changed in zip(placed(bank), host, strict=True):
        tensor[layers] = changed  # on the CPU they are the same memory
