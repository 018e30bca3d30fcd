"""A hash of the token beside its code in a whole model: both known before the first block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.models import transformer
from vqmoe_ds.models.transformer import MoETransformer

VOCAB, LENGTH, EXPERTS, LAYERS = 40, 16, 5, 3


def _config(router: str = "hash_and_code", top_k: int = 1, **codebook: Any) -> RunConfig:
    model = {"vocab_size": VOCAB, "layers": LAYERS, "width": 24, "heads": 2, "sequence_length": LENGTH}
    moe = {"router": router, "num_experts": EXPERTS, "expert_hidden": 12, "top_k": top_k}
    return RunConfig(model=model, moe=moe, codebook=codebook)


def _experts(model: MoETransformer, tokens_BS: Tensor, **more: Any) -> list[Tensor]:
    """What each MoE layer chose, ``[T, R]``."""
    seen: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _m, _i, out: seen.append(out[2])) for layer in model.moe_layers()]
    with torch.no_grad():
        model.eval().states(tokens_BS, **more)
    for hook in hooks:
        hook.remove()
    return seen


def _tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("source", ["context", "token_embedding", "position_embedding"])
def test_one_expert_is_that_of_hash_token_and_the_other_that_of_codes(source: str) -> None:
    both, tokens_BS = MoETransformer(_config(source=source)), _tokens()
    hashed, coded = MoETransformer(_config("hash_token")), MoETransformer(_config("vq", top_k=0, source=source))
    chosen = zip(_experts(both, tokens_BS), _experts(hashed, tokens_BS), _experts(coded, tokens_BS), strict=True)
    assert all(torch.equal(two_TR, torch.cat([one_TR, other_TR], dim=1)) for two_TR, one_TR, other_TR in chosen)


def test_the_whole_dispatch_is_planned_before_the_first_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model, planned = MoETransformer(_config()), []
    make_plans = transformer.make_plans
    monkeypatch.setattr(transformer, "make_plans", lambda ids, *rest: planned.append(ids) or make_plans(ids, *rest))
    chosen = _experts(model, _tokens())
    (experts_LTR,) = planned
    assert torch.equal(experts_LTR, torch.stack(chosen))


@pytest.mark.parametrize("pieces", [[1] * LENGTH, [5, 1, 10]])
def test_a_text_read_piece_by_piece_goes_to_the_same_experts(pieces: list[int]) -> None:
    model, tokens_BS = MoETransformer(_config()).eval(), _tokens()
    with torch.no_grad():
        whole_BSV, cache = model(tokens_BS)[0], model.new_cache()
        parts = [model(part_BS, cache=cache)[0] for part_BS in tokens_BS.split(pieces, dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), whole_BSV, atol=1e-5)


def test_padding_changes_no_expert() -> None:
    model, tokens_BS = MoETransformer(_config()), _tokens()
    real_BS = torch.ones(2, LENGTH, dtype=torch.bool)
    real_BS[0, 9:] = False
    whole = _experts(model, tokens_BS)
    for kept, experts_TR in zip(_experts(model, tokens_BS, real_BS=real_BS), whole, strict=True):
        assert torch.equal(kept, experts_TR[real_BS.flatten()])


@pytest.mark.parametrize(
    "codebook, sentence",
    [
        ({"source": "layer_state"}, "codebook.source=layer_state looks at what comes later"),
        ({"source": "early_block"}, "codebook.source=early_block looks at what comes later"),
        ({"groups": 5, "num_codes": 25}, "codebook.groups=5 puts all experts of a token into one group"),
    ],
)
def test_what_is_not_known_ahead_is_refused(codebook: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        _config(**codebook)
