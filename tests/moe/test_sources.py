"""Code sources: causal, sensitive to order, and steady where they promise to be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vqmoe_ds.config.schema import CodebookConfig, CodeSource
from vqmoe_ds.moe.sources import EmbeddingSource

VOCAB, WIDTH, LENGTH = 40, 16, 12
AHEAD = [CodeSource.TOKEN_EMBEDDING, CodeSource.POSITION_EMBEDDING, CodeSource.CONTEXT]


def _source(source: CodeSource = CodeSource.CONTEXT, **options: object) -> EmbeddingSource:
    return EmbeddingSource(CodebookConfig(source=source, **options), VOCAB, WIDTH, LENGTH)


def _table() -> Tensor:
    return torch.randn(VOCAB, WIDTH)


def _run(source: EmbeddingSource, tokens_BS: Tensor, table_VD: Tensor) -> Tensor:
    return source(tokens_BS, F.embedding(tokens_BS, table_VD))


@pytest.mark.parametrize("kind", AHEAD)
@pytest.mark.parametrize("changed", [0, 3, LENGTH - 1])
def test_later_tokens_never_change_earlier_vectors(kind: CodeSource, changed: int) -> None:
    source, table_VD = _source(kind, context_window=5), _table()
    tokens_BS = torch.randint(1, VOCAB, (2, LENGTH))
    before_BSD = _run(source, tokens_BS, table_VD)
    other_BS = tokens_BS.clone()
    other_BS[0, changed] = 0
    after_BSD = _run(source, other_BS, table_VD)
    differs_BS = (before_BSD != after_BSD).any(dim=-1)
    assert not differs_BS[0, :changed].any() and not differs_BS[1].any()
    assert differs_BS[0, changed]
    reach = 5 if kind is CodeSource.CONTEXT else 1
    assert differs_BS[0, changed : changed + reach].all() and not differs_BS[0, changed + reach :].any()


def test_context_by_hand() -> None:
    source, table_VD = _source(context_window=3, context_decay=0.5), _table()
    tokens = [4, 9, 2, 30]
    got_SD = _run(source, torch.tensor([tokens]), table_VD)[0]
    unit = [table_VD[t] / table_VD[t].square().mean().sqrt() for t in tokens]
    for t in range(4):
        want_D = unit[t].clone()
        for back in (1, 2):
            if t >= back:
                want_D += 0.5**back * torch.cat([unit[t - back][-back:], unit[t - back][:-back]])
        assert torch.allclose(got_SD[t], want_D, atol=1e-5)


def test_context_tells_the_order_of_words() -> None:
    source, table_VD = _source(context_window=3, context_decay=1.0), _table()
    forward, backward = (_run(source, torch.tensor([order]), table_VD)[0, 2] for order in ([5, 6, 7], [6, 5, 7]))
    assert (forward - backward).norm() > 0.5 * forward.norm()


def test_window_of_one_is_the_token_itself() -> None:
    table_VD, tokens_BS = _table(), torch.randint(0, VOCAB, (2, LENGTH))
    vectors_BSD = _run(_source(context_window=1), tokens_BS, table_VD)
    assert torch.allclose(vectors_BSD, F.rms_norm(F.embedding(tokens_BS, table_VD), (WIDTH,), eps=1e-6))


def test_token_embedding_ignores_place_and_position_embedding_does_not() -> None:
    table_VD, tokens_BS = _table(), torch.full((1, LENGTH), 3)
    plain_SD = _run(_source(CodeSource.TOKEN_EMBEDDING), tokens_BS, table_VD)[0]
    placed_SD = _run(_source(CodeSource.POSITION_EMBEDDING, position_weight=0.5), tokens_BS, table_VD)[0]
    assert torch.equal(plain_SD, table_VD[3].expand(LENGTH, -1))
    assert len(torch.unique(placed_SD, dim=0)) == LENGTH
    offsets_SD = placed_SD - F.rms_norm(table_VD[3], (WIDTH,), eps=1e-6)
    assert (offsets_SD.square().mean(dim=1).sqrt() - 0.5).abs().max() < 1e-4


def test_momentum_table_follows_slowly() -> None:
    source, tokens_BS = _source(CodeSource.TOKEN_EMBEDDING, source_momentum=0.75), torch.tensor([[1, 2]])
    first_VD, second_VD = _table(), _table()
    assert torch.equal(_run(source, tokens_BS, first_VD)[0], first_VD[1:3]), "before the first step: the live table"
    source.follow(first_VD)
    assert torch.equal(_run(source, tokens_BS, second_VD)[0], first_VD[1:3]), "the first step copies the table"
    source.follow(second_VD)
    want = 0.75 * first_VD[1:3] + 0.25 * second_VD[1:3]
    assert torch.allclose(_run(source, tokens_BS, second_VD)[0], want, atol=1e-6)
    assert source.bfloat16().table_VD.dtype == torch.float32


@pytest.mark.parametrize("kind", AHEAD)
def test_no_gradient_and_float32(kind: CodeSource) -> None:
    tokens_BS, table_VD = torch.randint(0, VOCAB, (2, LENGTH)), _table().bfloat16().requires_grad_()
    vectors_BSD = _run(_source(kind), tokens_BS, table_VD)
    assert vectors_BSD.dtype == torch.float32 and not vectors_BSD.requires_grad


@pytest.mark.parametrize("kind", AHEAD)
def test_whether_the_table_is_there_is_known_on_the_host(kind: CodeSource) -> None:
    """On the meta device, where reading a number back is an error."""
    source = _source(kind, source_momentum=0.75).to("meta")
    source._ready.write(source.table_ready, False)
    tokens_BS, table_VD = torch.zeros(2, LENGTH, dtype=torch.int64, device="meta"), _table().to("meta")
    for _ in range(2):
        assert _run(source, tokens_BS, table_VD).shape == (2, LENGTH, WIDTH)
        assert source.follows
        source.follow(table_VD)
    with pytest.raises(RuntimeError):
        bool(source.table_ready)


def test_a_loaded_table_is_used_and_one_that_never_moves_stays() -> None:
    source, loaded = (_source(CodeSource.TOKEN_EMBEDDING, source_momentum=1.0) for _ in range(2))
    first_VD, tokens_BS = _table(), torch.tensor([[1, 2]])
    assert source.follows and loaded.follows
    source.follow(first_VD)
    loaded.load_state_dict(source.state_dict())
    for one in (source, loaded):
        assert not one.follows
        one.follow(_table())
        assert torch.equal(_run(one, tokens_BS, _table())[0], first_VD[1:3])
