"""Samples of ranks that share sequences add up to those of one rank that sees them whole."""

from __future__ import annotations

import pytest
import torch

from vqmoe_ds.moe.codebook import _evenly
from vqmoe_ds.moe.sequence import SequenceShare

BATCH, LENGTH, WIDTH = 3, 8, 5


@pytest.mark.parametrize("most", [7, 23, 24, 100])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_samples_of_the_parts_are_those_of_the_whole(size: int, most: int) -> None:
    whole_BSC = torch.randn(BATCH, LENGTH, WIDTH)
    shares = [SequenceShare(None, rank, size, LENGTH) for rank in range(size)]
    parts = [share.sample(whole_BSC[:, share.span].flatten(0, 1), most) for share in shares]
    whole_TC = whole_BSC.flatten(0, 1)
    wanted_MC = _evenly(whole_TC, most) if len(whole_TC) > most else whole_TC
    assert torch.equal(torch.stack(parts).sum(0), wanted_MC)
    assert int((torch.stack(parts) != 0).any(dim=-1).sum(dim=0).max()) == 1, "a vector is of one rank"


@pytest.mark.parametrize("most", [5, 100])
@pytest.mark.parametrize("size", [2, 4])
def test_padding_is_in_no_sample(size: int, most: int) -> None:
    real_BS = torch.arange(LENGTH) < torch.tensor([[LENGTH], [1], [3]])
    whole_BSC = torch.randn(BATCH, LENGTH, WIDTH)
    shares = [SequenceShare(None, rank, size, 100 * size).of(real_BS) for rank in range(size)]
    parts = [share.sample(whole_BSC[:, share.span][real_BS[:, share.span]], most) for share in shares]
    assert not len(whole_BSC[1:, shares[-1].span][real_BS[1:, shares[-1].span]]), "a rank with little"
    whole_TC = whole_BSC[real_BS]
    assert torch.equal(torch.stack(parts).sum(0), _evenly(whole_TC, most) if len(whole_TC) > most else whole_TC)
    assert shares[0].mean_tokens == 12 / size


def test_the_parts_of_a_sequence_are_all_of_it_in_order() -> None:
    positions = torch.arange(LENGTH)
    parts = [positions[SequenceShare(None, rank, 4, LENGTH).span] for rank in range(4)]
    assert torch.equal(torch.cat(parts), positions)
