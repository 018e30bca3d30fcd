"""The routers beside vq as their papers write them: float64, one token and one expert at a time. Slow, to be read.

Nothing of ``vqmoe_ds`` is imported, so that an error there cannot repeat itself here. A router's answer is, for every
token, its experts with their weights. Legend: T tokens, D width, N experts, k experts chosen, K clusters.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Rows = list[list[tuple[int, Tensor]]]
"""For every token: (expert, weight)."""


def expert(w1_NHD: Tensor, w2_NDH: Tensor, w3_NHD: Tensor, e: int, x_D: Tensor) -> Tensor:
    """SwiGLU: ``W2 (silu(W1 x) * W3 x)``."""
    return w2_NDH[e] @ (F.silu(w1_NHD[e] @ x_D) * (w3_NHD[e] @ x_D))


def largest(numbers: list[float], count: int) -> list[int]:
    """Places of the largest numbers, the largest first; of equals the first."""
    return sorted(range(len(numbers)), key=lambda i: (-numbers[i], i))[:count]


def softmax_rows(scores_TN: list[Tensor], k: int, over_all: bool) -> Rows:
    """TopK of the scores, weighted by their softmax over all experts or over the chosen."""
    rows = []
    for scores_N in scores_TN:
        chosen = largest(scores_N.tolist(), k)
        among = range(len(scores_N)) if over_all else chosen
        total = sum(scores_N[e].exp() for e in among)
        rows.append([(e, scores_N[e].exp() / total) for e in chosen])
    return rows


def auxiliary(scores_TN: list[Tensor], rows: Rows, balance_weight: float, z_weight: float = 0.0) -> Tensor:
    """Switch Transformer Eq. 4, ``N sum_e f_e P_e``, and ST-MoE Eq. 5, ``mean(logsumexp^2)``."""
    experts, loss = len(scores_TN[0]), torch.zeros((), dtype=torch.float64)
    picks = [e for row in rows for e, _ in row]
    for e in range(experts):
        share = picks.count(e) / len(picks)
        mean = sum(scores_N.softmax(0)[e] for scores_N in scores_TN) / len(scores_TN)
        loss = loss + balance_weight * experts * share * mean
    z = sum(scores_N.exp().sum().log() ** 2 for scores_N in scores_TN) / len(scores_TN)
    return loss + z_weight * z


def linear_scores(x_TD: Tensor, gate_ND: Tensor) -> list[Tensor]:
    return [torch.stack([gate_D @ x_D for gate_D in gate_ND]) for x_D in x_TD]


def context_source(embedded_SD: Tensor, window: int, decay: float) -> list[Tensor]:
    """What codes look at: embeddings of the last tokens at unit root mean square, mixed, and their sum at unit size."""

    def unit(x_D: Tensor) -> Tensor:
        return x_D / (x_D.square().mean() + 1e-6).sqrt()

    mixed = []
    for t in range(len(embedded_SD)):
        parts = [decay**back * unit(embedded_SD[t - back]).roll(back) for back in range(min(window, t + 1))]
        mixed.append(unit(sum(parts, torch.zeros_like(embedded_SD[0]))))
    return mixed


def expert_bias(x_TD: Tensor, gate_ND: Tensor, bias_N: list[float], k: int) -> Rows:
    """DeepSeek-V3 Eq. 12 to 16: chosen by ``sigmoid + bias``, weighted by sigmoid alone."""
    rows = []
    for scores_N in linear_scores(x_TD, gate_ND):
        affinity = [1 / (1 + (-s).exp()) for s in scores_N]
        chosen = largest([a.item() + b for a, b in zip(affinity, bias_N, strict=True)], k)
        total = sum(affinity[e] for e in chosen) if k > 1 else 1.0
        rows.append([(e, affinity[e] / total) for e in chosen])
    return rows


def expert_bias_step(bias_N: list[float], loads_N: list[int], rate: float) -> list[float]:
    mean = sum(loads_N) / len(loads_N)
    return [b + rate * ((mean > load) - (mean < load)) for b, load in zip(bias_N, loads_N, strict=True)]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b) / (a.norm() * b.norm())


def xmoe_scores(x_TD: Tensor, projection_PD: Tensor, experts_NP: Tensor, log_temperature: Tensor) -> list[Tensor]:
    temperature = log_temperature.exp().squeeze()
    return [torch.stack([cosine(projection_PD @ x_D, e_P) / temperature for e_P in experts_NP]) for x_D in x_TD]


def stablemoe(
    x_TD: Tensor, ids_T: list[int], gate_ND: Tensor, words_VP: Tensor, light_NP: Tensor, k: int, stage: int
) -> tuple[Rows, list[Tensor], Tensor]:
    """Rows, stage-1 scores, and the distillation loss."""
    rows, loss = [], torch.zeros((), dtype=torch.float64)
    scores_TN = linear_scores(x_TD, gate_ND)
    for scores_N, token in zip(scores_TN, ids_T, strict=True):
        light_N = torch.stack([words_VP[token] @ c_P for c_P in light_NP])
        chosen = largest((scores_N if stage == 1 else light_N).tolist(), k)
        rows.append([(e, 1 / (1 + (-scores_N[e]).exp())) for e in chosen])
        for e in chosen:
            loss = loss - (light_N[e].exp() / light_N.exp().sum()).log() / (k * len(ids_T))
    return rows, scores_TN, loss


def hash_of_context(ids_S: list[int], tables_WV: list[list[int]], experts: int) -> list[int]:
    """Expert of each token of one sequence: a sum of one table's entry per token of its window, modulo N."""
    chosen = []
    for t in range(len(ids_S)):
        window = [(table_V, ids_S[t - back]) for back, table_V in enumerate(tables_WV) if back <= t]
        chosen.append(sum(table_V[token] for table_V, token in window) % experts)
    return chosen


def dual(x_TD: Tensor, chosen_T: list[int], gate_ND: Tensor, paths_2D: Tensor, bias_2: Tensor, k: int) -> Rows:
    """VQMoE Eq. 4 around any discrete expert: TopK of ``W x`` at ``g_c``, then the expert of the token at ``g_d``."""
    rows = []
    for row, x_D, discrete in zip(softmax_rows(linear_scores(x_TD, gate_ND), k, k == 1), x_TD, chosen_T, strict=True):
        continuous, other = (paths_2D @ x_D + bias_2).softmax(0)
        rows.append([*((e, continuous * w) for e, w in row), (discrete, other)])
    return rows


def online_kmeans_scores(x_TD: Tensor, means_ND: Tensor, temperature: float) -> list[Tensor]:
    return [torch.stack([cosine(x_D, c_D) / temperature for c_D in means_ND]) for x_D in x_TD]


def online_kmeans_step(means_ND: Tensor, x_TD: Tensor, rows: Rows, decay: float) -> Tensor:
    moved = means_ND.clone()
    for e in range(len(means_ND)):
        members = [x_D for x_D, row in zip(x_TD, rows, strict=True) if e in [expert for expert, _ in row]]
        if members:
            moved[e] = decay * means_ND[e] + (1 - decay) * sum(members, torch.zeros_like(means_ND[e]))
    return moved


def expert_choice(x_TD: Tensor, gate_ND: Tensor, k: int, length: int) -> Rows:
    """Zhou 2022, section 3.2, within each sequence of ``length`` tokens."""
    rows: Rows = [[] for _ in x_TD]
    probs_TN = [scores_N.softmax(0) for scores_N in linear_scores(x_TD, gate_ND)]
    capacity = math.ceil(length * k / len(gate_ND))
    for start in range(0, len(x_TD), length):
        for e in range(len(gate_ND)):
            column = [probs_TN[start + t][e].item() for t in range(length)]
            for t in largest(column, capacity):
                rows[start + t].append((e, probs_TN[start + t][e]))
    return rows


def softmoe(
    x_TD: Tensor, experts: tuple[Tensor, Tensor, Tensor], phi_CD: Tensor, scale: Tensor, length: int, seen_TD: Tensor
) -> list[Tensor]:
    """Puigcerver 2023, algorithm 1 with section 2.3, sequence by sequence: outputs of all tokens.

    ``seen_TD`` multiplies both the directions that are compared and the states that are mixed (1: plain Soft MoE).
    """
    slots, outputs = len(phi_CD) // len(experts[0]), []
    for start in range(0, len(x_TD), length):
        tokens = range(start, start + length)
        logits = {}
        for t in tokens:
            for c, phi_D in enumerate(phi_CD):
                logits[t, c] = scale.squeeze() * (seen_TD[t] * x_TD[t] / x_TD[t].norm()) @ (phi_D / phi_D.norm())
        rows = []
        for c in range(len(phi_CD)):
            total = sum(logits[t, c].exp() for t in tokens)
            slot_D = sum((logits[t, c].exp() / total * seen_TD[t] * x_TD[t] for t in tokens), torch.zeros_like(x_TD[0]))
            rows.append(expert(*experts, c // slots, slot_D))
        for t in tokens:
            total = sum(logits[t, c].exp() for c in range(len(phi_CD)))
            outputs.append(
                sum((logits[t, c].exp() / total * row for c, row in enumerate(rows)), torch.zeros_like(rows[0]))
            )
    return outputs


def ac_scores(x_TD: Tensor, clusters_T: list[int], weights_KD: Tensor, experts_ND: Tensor) -> list[Tensor]:
    """ACMoE definition 2: ``h^T M_c e / ||e||`` with M diagonal."""
    scores = []
    for x_D, cluster in zip(x_TD, clusters_T, strict=True):
        scores.append(torch.stack([(x_D * weights_KD[cluster]) @ (e_D / e_D.norm()) for e_D in experts_ND]))
    return scores


def ac_deviations(x_TD: Tensor, clusters_T: list[int], clusters: int) -> tuple[Tensor, list[int]]:
    """ACMoE definition 1: mean absolute deviation in each cluster and feature, ``[K, D]``; tokens of each."""
    deviations_KD, counts = torch.zeros(clusters, x_TD.shape[1], dtype=torch.float64), []
    for k in range(clusters):
        members = [x_D for x_D, cluster in zip(x_TD, clusters_T, strict=True) if cluster == k]
        counts.append(len(members))
        for q in range(x_TD.shape[1]):
            values = [member[q].item() for member in members]
            if values:
                mean = sum(values) / len(values)
                deviations_KD[k, q] = sum(abs(v - mean) for v in values) / len(values)
    return deviations_KD, counts


def ac_weights(
    deviations_KD: Tensor, counts_K: list[float], scaling: str, clip: float, smallest: float = 1e-4
) -> Tensor:
    """The released scaling, without clusters of fewer than two tokens or of equal tokens, which weigh 1."""
    weights_KD = torch.ones_like(deviations_KD)
    usable = [k for k, count in enumerate(counts_K) if count >= 2 and deviations_KD[k].mean() > 1e-4]
    inverse = {(k, q): 1 / (s.item() + smallest) for k in usable for q, s in enumerate(deviations_KD[k])}
    if not inverse:
        return weights_KD
    mean = sum(inverse.values()) / len(inverse)
    for k, q in inverse:
        scale = mean
        if scaling == "per_feature":
            scale = sum(min(inverse[other, q], clip * mean) for other in usable) / len(usable)
        weights_KD[k, q] = min(inverse[k, q], clip * mean) / scale
    return weights_KD


class RunningClusters:
    """Running statistics of AC: all decayed sums, the deviations taken from the running mean of earlier steps."""

    def __init__(self, clusters: int, width: int) -> None:
        self.tokens = [0.0] * clusters
        self.sums = torch.zeros(clusters, width, dtype=torch.float64)
        self.measured = [0.0] * clusters
        self.apart = torch.zeros(clusters, width, dtype=torch.float64)

    def step(self, x_TD: Tensor, clusters_T: list[int], decay: float) -> None:
        for k in range(len(self.tokens)):
            members = [x_D for x_D, cluster in zip(x_TD, clusters_T, strict=True) if cluster == k]
            known = self.tokens[k] > 0
            mean_D = self.sums[k] / self.tokens[k] if known else None
            apart_D = sum(((m - mean_D).abs() for m in members if known), torch.zeros_like(self.apart[k]))
            self.apart[k] = decay * self.apart[k] + (1 - decay) * apart_D
            self.measured[k] = decay * self.measured[k] + (1 - decay) * (len(members) if known else 0)
            self.sums[k] = decay * self.sums[k] + (1 - decay) * sum(members, torch.zeros_like(self.sums[k]))
            self.tokens[k] = decay * self.tokens[k] + (1 - decay) * len(members)

    def weights(self, scaling: str, clip: float, smallest: float = 1e-4) -> Tensor:
        divisor = torch.tensor(self.measured, dtype=torch.float64).clamp_min(1e-12).unsqueeze(1)
        return ac_weights(self.apart / divisor, self.measured, scaling, clip, smallest)
