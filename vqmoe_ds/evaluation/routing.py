"""Health of routing: load, code perplexity, dead codes, and fluctuation on a fixed probe.

Legend: L MoE layers, K codes, N experts, T tokens, R routed rows per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vqmoe_ds.data.batches import Windows
from vqmoe_ds.evaluation.balance import busiest, gini, perplexity, variation
from vqmoe_ds.models.session import Session


class RoutingHealth:
    """Reads and resets the counters of a session's MoE layers and codebooks.

    Args:
        session: the running session.
        probe: windows on which fluctuation is measured.
        probe_tokens: tokens of them to use; 0 switches fluctuation off.
    """

    def __init__(self, session: Session, probe: Windows, probe_tokens: int) -> None:
        self.session = session
        layers = session.model.moe_layers()
        length = probe.sequence_length
        rows = min(len(probe), -(-probe_tokens // length)) if layers else 0
        self._probe_BS: Tensor | None = None
        if rows:
            batch = probe.read(np.linspace(0, len(probe) - 1, rows).astype(int))
            self._probe_BS = torch.from_numpy(batch.inputs_BS.copy()).to(session.device)
            self._documents = session.documents_of(batch)
        self._last_LTR: Tensor | None = None
        self.last_counts_LN = torch.zeros(0)
        self.last_usage_LK: Tensor | None = None

    def measure(self) -> dict[str, Any]:
        """Per-layer lists since the last call; counts are of all ranks.

        ``busiest_expert``: load of the busiest expert over the mean. ``load_variation``, ``load_gini``: coefficient of
        variation and Gini coefficient of all loads. ``code_perplexity`` and ``dead_codes``: use of codes.
        ``fluctuation``: share of probe tokens that changed an expert since the last call; ``code_fluctuation``: that
        changed the expert of their code.
        """
        model = self.session.model
        report: dict[str, Any] = {}
        layers = model.moe_layers()
        if not layers:
            return {}
        # Each rank counts the rows that it sends, over all N experts, so the sum is the load of the whole model.
        counts_LN = self.session.sum_over_ranks(torch.stack([layer.tokens_per_expert for layer in layers]))
        for layer in layers:
            layer.tokens_per_expert.zero_()
        for name, measure in (("busiest_expert", busiest), ("load_variation", variation), ("load_gini", gini)):
            report[name] = _rounded(measure(counts_LN))
        if model.bank is not None:
            usage_LK = model.bank.usage_LK  # already summed over ranks by StateSync
            report["code_perplexity"] = [round(v, 3) for v in perplexity(usage_LK)]
            report["dead_codes"] = [int(n) for n in usage_LK.eq(0).sum(dim=1)]
        report.update(self._fluctuation())
        self.last_counts_LN = counts_LN.cpu()
        # A copy: on a CPU ``cpu()`` is the buffer itself, which is zeroed below.
        self.last_usage_LK = model.bank.usage_LK.cpu().clone() if model.bank is not None else None
        if model.bank is not None:
            model.bank.usage_LK.zero_()
        return report

    @torch.no_grad()
    def _fluctuation(self) -> dict[str, list[float]]:
        if self._probe_BS is None:
            return {}
        engine, layers = self.session.engine, self.session.model.moe_layers()
        # All ranks read the whole probe at the same step, as a forward pass exchanges rows. In evaluation it counts
        # neither for loads nor for codes.
        engine.eval()
        with heard(layers, lambda _layer, _inputs, outputs: outputs[2]) as seen:
            engine(self._probe_BS, **self._documents)
        engine.train()
        # Of one shape over the whole run, also where tokens have any number of rows (``Router.experts_of_tokens``).
        routes_LTR = torch.stack(seen)
        last, self._last_LTR = self._last_LTR, routes_LTR
        if last is None:
            return {}
        report = {"fluctuation": self._share_of(differing(last, routes_LTR))}
        if self.session.model.bank is not None:  # the discrete row is the last
            report["code_fluctuation"] = self._share_of(last[..., -1] != routes_LTR[..., -1])
        return report

    def _share_of(self, changed_LT: Tensor) -> list[float]:
        """Share of each layer's probe tokens, those of other ranks included where ranks share sequences."""
        changed_L, sharing = changed_LT.double().sum(dim=1), self.session.model.share
        tokens_L = torch.full_like(changed_L, changed_LT.shape[1])
        if sharing is not None:
            changed_L, tokens_L = sharing.total(torch.stack([changed_L, tokens_L]))
        return _rounded(changed_L / tokens_L)


def _rounded(values: Tensor) -> list[float]:
    return [round(float(v), 4) for v in values]


@contextmanager
def heard(layers: list[Any], pick: Callable[[Any, Any, Any], Tensor]) -> Iterator[list[Tensor]]:
    """In this context what ``pick`` takes of each layer, its inputs and outputs, is kept of every call, in order."""
    seen: list[Tensor] = []

    def keep(layer: nn.Module, inputs: Any, outputs: Any) -> None:
        seen.append(pick(layer, inputs, outputs).clone())

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def differing(one_LTR: Tensor, other_LTR: Tensor) -> Tensor:
    """Where two routes differ, as sets of experts: bool ``[L, T]``."""
    return (one_LTR.sort(dim=-1).values != other_LTR.sort(dim=-1).values).any(dim=-1)
