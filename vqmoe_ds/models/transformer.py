"""The language model: a pre-norm decoder with sparse experts. Plain PyTorch, no engine calls.

Legend: B batch, S sequence, T = B * S tokens, M of them real (not padding), D width, R experts per token,
L MoE layers, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqmoe_ds.config.schema import CodeSource, RunConfig, SequencePlacement
from vqmoe_ds.data.batches import MASKED
from vqmoe_ds.models.block import Attention, Block, RMSNorm, attention_mask, real_tokens
from vqmoe_ds.models.cache import Cache
from vqmoe_ds.models.loss import cross_entropy
from vqmoe_ds.moe.codebook import CodebookBank
from vqmoe_ds.moe.config import LayerConfig
from vqmoe_ds.moe.dispatch import Ahead, Kept, make_plans, sort_rows
from vqmoe_ds.moe.expert_store import ExpertStore
from vqmoe_ds.moe.layer import MoELayer
from vqmoe_ds.moe.linear import Linear
from vqmoe_ds.moe.mlp import DenseMLP
from vqmoe_ds.moe.routers import RoutingContext
from vqmoe_ds.moe.routers.base import drawn
from vqmoe_ds.moe.sequence import Homes, SequenceShare
from vqmoe_ds.moe.sources import EmbeddingSource

LOGIT_SCALE = 0.5
"""Standard deviation of logits at the start."""


class _Tokens(NamedTuple):
    """Tokens that this rank embeds."""

    ids_BS: Tensor
    earlier: int
    """The first so many are not computed, only looked back at."""
    positions_BS: Tensor | None
    """In their documents, where these are kept apart."""

    @property
    def computed_BS(self) -> Tensor:
        """Ids of those that are computed."""
        return self.ids_BS[:, self.earlier :]


class TiedHead(Linear):
    """The output layer whose weight is the embedding's (Press 2017): one parameter, known by the embedding's name.

    A module of its own, so that ZeRO-3 gathers the weight for it too; in a state dict it has no entry.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        # nn.Linear's own weight, which is dropped at once, takes no memory there.
        with torch.device("meta"):
            super().__init__(embedding.embedding_dim, embedding.num_embeddings)
        self.weight = embedding.weight

    def _save_to_state_dict(self, *_: Any) -> None:
        pass

    def _load_from_state_dict(self, *_: Any) -> None:
        pass


Route = tuple[Tensor, Ahead]
"""One block's routes: the experts of each token that are known ahead, and what is known of the dispatch."""


class MoETransformer(nn.Module):
    """Decoder language model over ``config.model`` with the experts of ``config.moe``.

    Args:
        config: the run configuration; ``train.seed`` fixes every initial weight, whatever the layout.
        ep_size: expert-parallel ranks; must divide ``moe.num_experts``.
        ep_rank: this rank's place among them.
        layer_class: of the MoE layers; ``DeepSpeedMoELayer`` where DeepSpeed's engine trains the model.
    """

    token_table_LV: Tensor | None
    share: SequenceShare | None = None
    expert_store: ExpertStore | None = None
    """Where the experts are, if not in the layers: it is told of all that are known ahead."""
    attention_class = Attention

    def __init__(
        self, config: RunConfig, ep_size: int = 1, ep_rank: int = 0, layer_class: type[MoELayer] = MoELayer
    ) -> None:
        super().__init__()
        model, moe, book, facts = config.model, config.moe, config.codebook, config.moe.facts
        self.config = config
        self.embed = self._embedding()
        self.moe_blocks = model.moe_blocks if facts.has_experts else []
        self.blocks = nn.ModuleList()
        for index in range(model.layers):
            if index in self.moe_blocks:
                layer = self.moe_blocks.index(index)
                mlp: nn.Module = layer_class(LayerConfig.of(config, layer, ep_size, ep_rank))
            else:
                mlp = DenseMLP(model.width, config.dense_hidden)
            self.blocks.append(Block(model, mlp, self.attention_class(model)))
        self.norm = RMSNorm(model.width)
        # After the embedding: a shared parameter goes by the name under which it is registered first, in
        # `named_parameters` and so in the optimizer and in checkpoints.
        self.head = TiedHead(self.embed) if model.tie_embeddings else Linear(model.width, model.vocab_size)
        layers = len(self.moe_blocks)
        self.bank: CodebookBank | None = None
        self.source: EmbeddingSource | None = None
        if facts.uses_codebook:
            self.bank = CodebookBank(book, layers, moe.num_experts, config.source_width, config.train.seed)
        if facts.uses_codebook or facts.reads_source:
            self.source = EmbeddingSource(book, model.vocab_size, model.width, model.sequence_length)
        table_LV = facts.token_table(config, layers)
        # Saved, so that a model keeps its routes whatever would make its table later.
        self.register_buffer("token_table_LV", table_LV)
        self._initialize(config.train.seed, (2 * model.layers) ** -0.5)

    def _embedding(self) -> nn.Embedding:
        """What makes vectors ``[B, S, D]`` of inputs."""
        return nn.Embedding(self.config.model.vocab_size, self.config.model.width)

    def _initialize(self, seed: int, out_scale: float) -> None:
        """Normal weights of 1/sqrt(fan in), smaller where they write to the stream; embeddings of unit size.

        Each follows from the seed and its name: models that differ in their router are equal in everything else. Tied
        embeddings have the size of a head: of unit size they would make logits of sqrt(D), and no norm follows the
        head, while one stands before whatever reads the stream.
        """
        scales = {"head": LOGIT_SCALE, "out": out_scale, "down": out_scale}
        with torch.no_grad():
            for name, module in self.named_modules():
                # Routers draw their own: a router with other maps must leave every other weight as it is.
                if isinstance(module, nn.Linear) and not isinstance(module, TiedHead) and ".router." not in name:
                    scale = module.in_features**-0.5 * scales.get(name.rsplit(".", 1)[-1], 1.0)
                    module.weight.copy_(drawn(tuple(module.weight.shape), scale, seed, name))
            self._initialize_embedding(seed)

    def _initialize_embedding(self, seed: int) -> None:
        vocabulary, width = self.embed.weight.shape
        scale = LOGIT_SCALE * width**-0.5 if self.config.model.tie_embeddings else 1.0
        self.embed.weight.copy_(drawn((vocabulary, width), scale, seed, "embed"))

    def share_sequences(self, share: SequenceShare) -> None:
        """Compute this rank's part of every sequence alone from now on; a pass with a cache still reads the whole.

        Every rank of the group is given the same whole sequences. ``forward`` returns logits ``[B, S / P, V]`` of its
        positions, and losses whose mean over the group is that of the whole sequences.
        """
        self.share = share
        for module in self.modules():
            if isinstance(module, Attention):
                module.share = share
        if self.bank is not None:
            self.bank.share = share

    def forward(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor | None = None,
        cache: Cache | None = None,
        positions_BS: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (language-model loss, auxiliary loss) with targets, or (logits ``[B, S, V]``, auxiliary loss).

        The loss to train on is the sum of the two; the first alone is what is reported. It is the mean over the
        targets that are not ``MASKED``, and 0 where all are. With a ``cache`` the tokens follow those read before, in
        evaluation mode and by a causal router.

        Args:
            positions_BS: of tokens in their documents, int64, 0 where one starts: tokens attend, and routes look back,
                within a document alone. None: every sequence is one document.

        Raises:
            ValueError: positions beside a cache, whose tokens are those of one document.
        """
        homes, routes = self._homes(tokens_BS, positions_BS) if self._by_expert(cache) else (None, None)
        x_BSD, aux_loss = self.states(tokens_BS, cache, homes=homes, routes=routes, positions_BS=positions_BS)
        logits_BSV = self.head(x_BSD)
        if targets_BS is None:
            return logits_BSV, aux_loss
        if self.share is not None:
            # Over whole sequences, and shared out: the mean over ranks of `sum_here / count` is the sum of all over
            # their number, also where one rank has more targets than another.
            count = targets_BS.ne(MASKED).sum().clamp_min(1) / self.share.size
            targets_BS = targets_BS[:, self.share.span] if homes is None else homes.mine(targets_BS)
            return cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten(), count), aux_loss
        return cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten()), aux_loss

    def states(
        self,
        tokens_BS: Tensor,
        cache: Cache | None = None,
        real_BS: Tensor | None = None,
        homes: Homes | None = None,
        routes: dict[int, Route] | None = None,
        positions_BS: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Normalised states ``[B, S, D]`` after the last block, and the auxiliary loss of all routers.

        Args:
            real_BS: False where a token is padding, which must follow the real ones: MLPs, experts, routers, codebook
                and all statistics never see it. None: all are real.
            homes: of the tokens, where it is not their position that decides which this rank computes, with their
                ``routes``; the states are then those of its tokens, ``[1, M, D]``.
            positions_BS: as of ``forward``.
        """
        real_M = None if real_BS is None else real_BS.flatten().nonzero().squeeze(1)
        tokens = self._tokens(tokens_BS, cache, positions_BS, homes)
        embedded_BSD = self.embed(tokens.ids_BS)
        if routes is None:
            routes = self._routes_ahead(tokens, embedded_BSD, cache, real_M)
        x_BSD = embedded_BSD[:, tokens.earlier :] if tokens.earlier else embedded_BSD
        reads_source = self.config.moe.facts.reads_source
        context = RoutingContext(
            token_ids_T=real_tokens(tokens.computed_BS, real_M),
            lengths=None if real_BS is None else self._lengths(real_BS),
            codebooks=self.bank,
            share=self.share if cache is None else None,
            mean_tokens=self._mean_tokens(homes),
            source_TD=self._source_of(tokens, embedded_BSD, cache, real_M)[0] if reads_source else None,
        )
        places_BS, past = tokens.positions_BS, 0 if cache is None else cache.length
        positions_T = None if places_BS is None else places_BS[:, tokens.earlier :].flatten()
        # Of whole sequences also where ranks share them: inside attention a rank has all positions.
        mask = attention_mask(x_BSD, tokens_BS.shape[1], past, self.config.model.sliding_window, positions_BS)
        x_BSD, aux_loss = self._through_blocks(x_BSD, context, routes, cache, real_M, homes, mask, positions_T)
        if cache is not None:
            cache.advance(tokens_BS)
        return x_BSD, aux_loss

    def _through_blocks(
        self,
        x_BSD: Tensor,
        context: RoutingContext,
        routes: dict[int, Route],
        cache: Cache | None = None,
        real_M: Tensor | None = None,
        homes: Homes | None = None,
        mask: Tensor | None = None,
        positions_T: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """All blocks and the last norm: states ``[B, S, D]``, and the auxiliary loss of all routers."""
        aux_loss = x_BSD.new_zeros((), dtype=torch.float32)
        recompute = self.config.train.activation_checkpointing and self.training
        early = self.config.codebook.source is CodeSource.EARLY_BLOCK and self.bank is not None
        for index, block in enumerate(self.blocks):
            told_TR, ahead = routes.get(index, (None, Ahead()))
            # All that a router may know enters the block as an argument: a recomputation sees what the forward saw.
            known = replace(context, expert_ids_TR=told_TR)
            if recompute:
                # New in every forward: what an earlier micro-batch kept must not answer this one's recomputation.
                ahead = replace(ahead, kept=Kept())
                # Not reentrant: that form gives a block no gradients where no input requires one, as with a frozen
                # embedding.
                x_BSD, aux, experts_TR = checkpoint(
                    block, x_BSD, known, ahead, None, real_M, homes, mask, positions_T, use_reentrant=False
                )
            else:
                past = None if cache is None else cache.blocks[index]
                x_BSD, aux, experts_TR = block(x_BSD, known, ahead, past, real_M, homes, mask, positions_T)
            if aux is not None:
                aux_loss = aux_loss + aux
            if experts_TR is not None:
                context = replace(context, previous_T=experts_TR[:, 0])
            # Outside the checkpointed block, so that lookup and statistics happen once.
            if early and index == self.config.codebook.source_block:
                routes = self._plan_from_source(real_tokens(x_BSD, real_M), first_block=index + 1)
        return self.norm(x_BSD), aux_loss

    def new_cache(self) -> Cache:
        """An empty cache for texts as long as the context."""
        return Cache(len(self.blocks), self.config.model.sequence_length)

    # ------------------------------------------------------------ routes known ahead

    def _tokens(
        self, tokens_BS: Tensor, cache: Cache | None, positions_BS: Tensor | None, homes: Homes | None = None
    ) -> _Tokens:
        """The tokens that this rank computes, after the ``earlier`` ones that their codes look back at.

        Raises:
            ValueError: ranks that share sequences are given some of another length, or a cache comes with positions.
        """
        if cache is not None and positions_BS is not None:
            raise ValueError("a cache holds the tokens of one document; read packed documents without it")
        if homes is not None:
            return _Tokens(homes.mine(tokens_BS), 0, None if positions_BS is None else homes.mine(positions_BS))
        back = self.config.moe.facts.looks_back(self.config) if self.source is None else self.source.looks_back
        if cache is not None:
            ids_BS = cache.with_earlier(tokens_BS, back)
            return _Tokens(ids_BS, ids_BS.shape[1] - tokens_BS.shape[1], None)
        if self.share is None:
            return _Tokens(tokens_BS, 0, positions_BS)
        if tokens_BS.shape[1] != self.share.length:
            raise ValueError(f"ranks share sequences of {self.share.length} tokens, not of {tokens_BS.shape[1]}")
        span = self.share.span
        earlier = min(back, span.start)
        here = slice(span.start - earlier, span.stop)
        return _Tokens(tokens_BS[:, here], earlier, None if positions_BS is None else positions_BS[:, here])

    def _routes_ahead(
        self, tokens: _Tokens, embedded_BSD: Tensor, cache: Cache | None, real_M: Tensor | None
    ) -> dict[int, Route]:
        """Routes of the blocks whose experts follow from the tokens, by block index; without the ``earlier`` ones."""
        book, facts = self.config.codebook, self.config.moe.facts
        if self.bank is not None and book.source is CodeSource.EARLY_BLOCK:
            # The blocks up to the source look at the embedding.
            tokens_M = real_tokens(tokens.computed_BS, real_M)
            return self._plan_from_source(real_tokens(embedded_BSD, real_M), tokens_M, end_block=book.source_block + 1)
        # In this order, table and code: `KnownExpertsRouter` weighs the columns by place.
        known = [] if self.token_table_LV is None else [self._by_table(tokens, real_M)]
        if self.bank is not None and facts.known_ahead(self.config):
            known.append(self._look_up(*self._source_of(tokens, embedded_BSD, cache, real_M)).unsqueeze(-1))
        return self._plans(torch.cat(known, dim=-1), self.moe_blocks) if known else {}

    def _by_table(self, tokens: _Tokens, real_M: Tensor | None) -> Tensor:
        """Experts that the table of token ids names, int64 ``[L, M, R]``; without the ``earlier`` tokens."""
        moe = self.config.moe
        experts_LBSR = moe.facts.experts_of(self.token_table_LV, tokens.ids_BS, moe.num_experts, tokens.positions_BS)
        experts_LTR = experts_LBSR[:, :, tokens.earlier :].flatten(1, 2)
        return experts_LTR if real_M is None else experts_LTR[:, real_M]

    def _source_of(
        self, tokens: _Tokens, embedded_BSD: Tensor, cache: Cache | None = None, real_M: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Vectors that codes look at, without the ``earlier`` ones; and their tokens where these alone decide them."""
        assert self.source is not None
        start = cache.length if cache is not None else 0 if self.share is None else self.share.span.start
        earlier = tokens.earlier
        source_BSD = self.source(tokens.ids_BS, embedded_BSD, start - earlier, tokens.positions_BS)[:, earlier:]
        alone = cache is None and self.config.codebook.source is CodeSource.TOKEN_EMBEDDING
        return real_tokens(source_BSD, real_M), real_tokens(tokens.computed_BS, real_M) if alone else None

    def _by_expert(self, cache: Cache | None) -> bool:
        """Whether tokens are computed on the rank of their experts; in training alone, and it changes no result."""
        by_expert = self.config.train.sp_placement is SequencePlacement.EXPERT
        return by_expert and self.share is not None and self.training and cache is None

    def _homes(self, tokens_BS: Tensor, positions_BS: Tensor | None) -> tuple[Homes, dict[int, Route]]:
        """The rank of each token's experts, and the routes of this rank's tokens, which need no exchange."""
        assert self.share is not None
        share, layer = self.share, self.moe_layers()[0]
        tokens = self._tokens(tokens_BS, None, positions_BS)
        with torch.no_grad():  # every rank looks up a stretch, as in the other placement: so statistics are the same
            experts_LT = share.gather(self._look_up(*self._source_of(tokens, self.embed(tokens.ids_BS))))
            replicas = share.size // layer.ep_size
            # Where several ranks hold a group, its tokens take turns.
            turn_T = torch.arange(experts_LT.shape[1], device=experts_LT.device) % replicas
            # The first layer tells the rank for all, as codebook.groups is a multiple of ep_size (`placement_trouble`);
            # ranks that share experts are consecutive (`EngineConfig.ep_rank`).
            homes = Homes(share, turn_T * layer.ep_size + experts_LT[0] // layer.num_local_experts)
            mine_LM = experts_LT[:, homes.mine_M]
        return homes, self._plans(mine_LM.unsqueeze(-1), self.moe_blocks, at_home=True)

    def _plan_from_source(
        self, source_MD: Tensor, tokens_M: Tensor | None = None, first_block: int = 0, end_block: int | None = None
    ) -> dict[int, Route]:
        end = len(self.blocks) if end_block is None else end_block
        mine = [layer for layer, block in enumerate(self.moe_blocks) if first_block <= block < end]
        if not mine:
            return {}
        layers = slice(mine[0], mine[-1] + 1)
        experts_LM = self._look_up(source_MD, tokens_M, layers)
        return self._plans(experts_LM.unsqueeze(-1), self.moe_blocks[layers])

    def _look_up(self, source_MD: Tensor, tokens_M: Tensor | None, layers: slice = slice(None)) -> Tensor:
        """Experts that the codes of these vectors name, int64 ``[L, M]``; they count for the codes' statistics."""
        assert self.bank is not None
        z_TC = self.bank.prepare(source_MD)
        codes_LT = self.bank.lookup_all(z_TC, tokens_M, layers)
        # From 0 and not from None: by a start of 0 `observe_all` counts the micro-batch.
        self.bank.observe_all(slice(*layers.indices(self.bank.num_layers)), z_TC, codes_LT)
        return self.bank.experts_of(codes_LT, layers)

    def _plans(self, experts_LTR: Tensor, blocks: list[int], at_home: bool = False) -> dict[int, Route]:
        """Whole dispatch plans where all rows are known, else the experts of those that are and their sort.

        Args:
            at_home: the experts are all among those of this rank.
        """
        if self.expert_store is not None:
            # First of all, so that experts are read while plans are made and blocks run.
            self.expert_store.expect_ahead(self.moe_blocks.index(blocks[0]), experts_LTR.flatten(1))
        layer, moe = self.moe_layers()[0], self.config.moe
        if moe.facts.rows_per_token(moe, self.config.router) > experts_LTR.shape[-1]:
            rows = sort_rows(experts_LTR, layer.num_experts)
            aheads = [Ahead(rows=rows.layer(index)) for index in range(len(blocks))]
        else:
            first = layer.ep_rank * layer.num_local_experts
            where = (None, slice(first, first + layer.num_local_experts)) if at_home else (layer.exchange_group,)
            aheads = [Ahead(plan) for plan in make_plans(experts_LTR, layer.num_experts, *where)]
        return {block: (ids_TR, ahead) for block, ids_TR, ahead in zip(blocks, experts_LTR, aheads, strict=True)}

    def _mean_tokens(self, homes: Homes | None) -> float | None:
        """Tokens per rank of those that share sequences, where ranks hold more or fewer; else None."""
        if homes is not None:
            return sum(homes.counts) // len(homes.counts)
        return None if self.share is None else self.share.mean_tokens

    def _lengths(self, real_BS: Tensor) -> tuple[int, ...] | None:
        """Real tokens of each sequence, where the router asks for them: the host waits for these numbers."""
        looks_ahead = self.config.moe.facts.looks_ahead(self.config.router) is not None
        return tuple(real_BS.sum(dim=1).tolist()) if looks_ahead else None

    def moe_layers(self) -> list[MoELayer]:
        """The MoE layers in order."""
        layers = [self.blocks[index].mlp for index in self.moe_blocks]
        return [layer for layer in layers if isinstance(layer, MoELayer)]
