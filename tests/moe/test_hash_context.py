"""The hash of the last tokens in a whole model: against loops, in texts read piece by piece, and beside padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import router_oracle as oracle
from vqmoe_ds.config.load import load_config
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.runtime.errors import CheckpointError

VOCAB, LENGTH, EXPERTS, LAYERS = 40, 16, 5, 3


def _config(router: str = "hash_context", top_k: int = 0, **options: Any) -> RunConfig:
    model = {"vocab_size": VOCAB, "layers": LAYERS, "width": 24, "heads": 2, "sequence_length": LENGTH}
    moe = {"router": router, "num_experts": EXPERTS, "expert_hidden": 12, "top_k": top_k}
    return RunConfig(model=model, moe=moe, router=options)


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


@pytest.mark.parametrize("window", [1, 2, 3, 30])
@pytest.mark.parametrize("top_k", [0, 1])
def test_experts_are_the_hash_of_the_window(window: int, top_k: int) -> None:
    model, tokens_BS = MoETransformer(_config(top_k=top_k, window=window)), _tokens()
    chosen = _experts(model, tokens_BS)
    for experts_TR, table_WV in zip(chosen, model.token_table_LV.tolist(), strict=True):
        rows = [oracle.hash_of_context(ids_S, table_WV, EXPERTS) for ids_S in tokens_BS.tolist()]
        assert experts_TR[:, -1].tolist() == [e for row in rows for e in row]
        assert experts_TR.shape[1] == top_k + 1


def test_a_window_of_one_is_the_hash_of_tokens() -> None:
    one, plain = (
        MoETransformer(_config(name, **o)) for name, o in (("hash_context", {"window": 1}), ("hash_token", {}))
    )
    assert torch.equal(one.token_table_LV.squeeze(1), plain.token_table_LV)
    assert torch.equal(one(_tokens())[0], plain(_tokens())[0])


def test_experts_depend_on_every_token_of_the_window_and_on_no_other() -> None:
    model, tokens_BS = MoETransformer(_config(window=3)), _tokens()
    before = torch.stack([experts_TR.view(2, LENGTH) for experts_TR in _experts(model, tokens_BS)])
    for place in (0, 5, LENGTH - 1):
        seen = torch.zeros(LENGTH, dtype=torch.bool)
        for other in range(VOCAB):
            changed_BS = tokens_BS.clone()
            changed_BS[:, place] = other
            after = torch.stack([experts_TR.view(2, LENGTH) for experts_TR in _experts(model, changed_BS)])
            seen |= (before != after).any(dim=0).any(dim=0)
        assert seen.nonzero().flatten().tolist() == [t for t in range(place, place + 3) if t < LENGTH]


def test_contexts_spread_evenly_over_experts() -> None:
    table = MoETransformer(_config(window=3)).token_table_LV
    ids_BS = torch.cartesian_prod(*[torch.arange(VOCAB)] * 3)
    experts_LT = _config().moe.facts.experts_of(table, ids_BS, EXPERTS)[..., -1]
    for experts_T in experts_LT:
        assert experts_T.bincount(minlength=EXPERTS).tolist() == [VOCAB**3 // EXPERTS] * EXPERTS


@pytest.mark.parametrize("pieces", [[1] * LENGTH, [5, 1, 10]])
def test_a_text_read_piece_by_piece_goes_to_the_same_experts(pieces: list[int]) -> None:
    model, tokens_BS = MoETransformer(_config(top_k=1)).eval(), _tokens()
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


def test_it_makes_no_table_of_tokens() -> None:
    from vqmoe_ds.experiments.token_table import table_of_codes

    with pytest.raises(CheckpointError, match="this model has router hash_context"):
        table_of_codes(MoETransformer(_config()))


def test_the_dual_path_starts_with_the_weights_of_codes() -> None:
    ours, codes = (MoETransformer(_config(name, 1)) for name in ("hash_context", "vq"))
    weights = dict(codes.named_parameters())
    assert dict(ours.named_parameters()).keys() == weights.keys()
    assert all(torch.equal(p, weights[name]) for name, p in ours.named_parameters())
    assert load_config("tiny", None, {"moe.router": "hash_context"}).config.rows_per_token == 2
