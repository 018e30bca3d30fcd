"""Documents that are packed into one window and kept apart: each is read as if it stood alone, whatever routes it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.evaluation.routed_models import CASES, LENGTH, tokens_of
from tests.models.test_cache import MORE, build
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.data.batches import positions_in_documents
from vqmoe_ds.models.transformer import MoETransformer

LOOKS_AHEAD = "expert_choice"  # its experts choose among the tokens of the whole window
SIZES = (5, 1, 7, 3)


def positions_of(sizes: tuple[int, ...], rows: int) -> Tensor:
    return torch.cat([torch.arange(size) for size in sizes]).expand(rows, -1)


@torch.no_grad()
@pytest.mark.parametrize("case", [case for case in [*CASES, *MORE] if case != LOOKS_AHEAD])
def test_a_packed_document_has_the_logits_of_the_document_alone(case: str) -> None:
    model, tokens_BS = build(case), tokens_of(rows=3)
    packed_BSV = model(tokens_BS, positions_BS=positions_of(SIZES, 3))[0]
    alone_BSV = torch.cat([model(part_BS)[0] for part_BS in tokens_BS.split(SIZES, dim=1)], dim=1)
    assert packed_BSV.sub(alone_BSV).norm() < 1e-6 * alone_BSV.norm()
    # Models with noise in their weights magnify what kernels with and without a mask round in other ways.
    assert packed_BSV.sub(alone_BSV).abs().max() < (1e-6 if case in MORE else 1e-5)
    joined_BSV = model(tokens_BS)[0]
    assert packed_BSV.sub(joined_BSV)[:, : SIZES[0]].abs().max() < 1e-5
    assert packed_BSV.sub(joined_BSV)[:, SIZES[0] :].abs().max() > 1e-2, "nothing was kept apart"


@torch.no_grad()
@pytest.mark.parametrize(
    "case", ["vq", "hash_context", "hash_and_code", "hash_ngrams", "topk_context", "position embedding", "topk"]
)
def test_every_row_has_documents_of_its_own(case: str) -> None:
    model, tokens_BS = build(case), tokens_of(rows=2)
    rows = [SIZES, (2, LENGTH - 2)]
    positions_BS = torch.cat([positions_of(sizes, 1) for sizes in rows])
    packed_BSV = model(tokens_BS, positions_BS=positions_BS)[0]
    for row, sizes in enumerate(rows):
        parts = [model(part_BS)[0] for part_BS in tokens_BS[row : row + 1].split(sizes, dim=1)]
        assert packed_BSV[row].sub(torch.cat(parts, dim=1)[0]).abs().max() < 1e-5


def _trained(recompute: bool, router: str) -> tuple[float, dict[str, Tensor]]:
    shape = {"vocab_size": 40, "layers": 3, "width": 16, "heads": 2, "sequence_length": LENGTH}
    moe = {"router": router, "num_experts": 4, "expert_hidden": 8, "top_k": 1}
    config = RunConfig(model=shape, moe=moe, train={"activation_checkpointing": recompute})
    model, tokens_BS = MoETransformer(config).train(), tokens_of(vocab=40)
    loss, aux = model(tokens_BS, tokens_BS.roll(-1, 1), positions_BS=positions_of(SIZES, 2))
    (loss + aux).backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("router", ["vq", "topk", "hash_context"])
def test_recomputation_sees_the_same_documents(router: str) -> None:
    (kept, gradients), (again, others) = _trained(False, router), _trained(True, router)
    assert kept == again
    assert gradients and all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())


def test_no_gradient_crosses_the_start_of_a_document() -> None:
    model, tokens_BS = build("topk"), tokens_of(rows=1)
    seen: list[Tensor] = []

    def keep(_module: torch.nn.Module, _args: object, x_BSD: Tensor) -> Tensor:
        seen.append(x_BSD.requires_grad_())
        return x_BSD

    model.embed.register_forward_hook(keep)
    model(tokens_BS, positions_BS=positions_of(SIZES, 1))[0][0, -1].sum().backward()
    touched_S = seen[0].grad[0].abs().sum(dim=-1) > 0
    assert touched_S.tolist() == [place >= LENGTH - SIZES[-1] for place in range(LENGTH)]


def test_positions_beside_a_cache_are_refused() -> None:
    model, tokens_BS = build("topk"), tokens_of(rows=1)
    with pytest.raises(ValueError, match="read packed documents without it"):
        model(tokens_BS, cache=model.new_cache(), positions_BS=positions_of(SIZES, 1))


def test_positions_count_from_the_last_start_and_before_it_from_that_of_the_window() -> None:
    starts_BS = np.array([[0, 0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1]], dtype=bool)
    expected = [[0, 1, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 0]]
    assert positions_in_documents(starts_BS).tolist() == expected


def test_images_are_refused() -> None:
    with pytest.raises(ValueError, match="data.separate_documents is for text, not for images"):
        RunConfig(model={"image_size": 8, "patch_size": 4}, moe={"router": "topk"}, data={"separate_documents": True})
