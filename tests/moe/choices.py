"""What the MoE layers of a small model choose, for tests of routers that go by tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.models import transformer
from vqmoe_ds.models.transformer import MoETransformer

VOCAB, LENGTH, EXPERTS, LAYERS = 40, 16, 5, 3


def config_of(name: str, top_k: int, **sections: dict[str, Any]) -> RunConfig:
    model = {"vocab_size": VOCAB, "layers": LAYERS, "width": 24, "heads": 2, "sequence_length": LENGTH}
    moe = {"router": name, "num_experts": EXPERTS, "expert_hidden": 12, "top_k": top_k}
    return RunConfig(model=model, moe=moe, **sections)


def experts_of(model: MoETransformer, tokens_BS: Tensor, **more: Any) -> list[Tensor]:
    """What each MoE layer chose, ``[T, R]``."""
    seen: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _m, _i, out: seen.append(out[2])) for layer in model.moe_layers()]
    with torch.no_grad():
        model.eval().states(tokens_BS, **more)
    for hook in hooks:
        hook.remove()
    return seen


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


def check_pieces(config: RunConfig, pieces: list[int]) -> None:
    """A text read piece by piece goes to the same experts."""
    model, tokens_BS = MoETransformer(config).eval(), tokens()
    with torch.no_grad():
        whole_BSV, cache = model(tokens_BS)[0], model.new_cache()
        parts = [model(part_BS, cache=cache)[0] for part_BS in tokens_BS.split(pieces, dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), whole_BSV, atol=1e-5)


def check_padding(config: RunConfig) -> None:
    """Padding changes no expert."""
    model, tokens_BS = MoETransformer(config), tokens()
    real_BS = torch.ones(2, LENGTH, dtype=torch.bool)
    real_BS[0, 9:] = False
    whole = experts_of(model, tokens_BS)
    for kept, experts_TR in zip(experts_of(model, tokens_BS, real_BS=real_BS), whole, strict=True):
        assert torch.equal(kept, experts_TR[real_BS.flatten()])


def check_planned_ahead(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole dispatch is planned before the first block."""
    model, planned = MoETransformer(config), []
    make_plans = transformer.make_plans
    monkeypatch.setattr(transformer, "make_plans", lambda ids, *rest: planned.append(ids) or make_plans(ids, *rest))
    chosen = experts_of(model, tokens())
    (experts_LTR,) = planned
    assert torch.equal(experts_LTR, torch.stack(chosen))
