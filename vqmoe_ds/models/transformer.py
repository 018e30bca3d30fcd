"""The language model: a pre-norm decoder with sparse experts. Plain PyTorch, no engine calls.

Legend: B batch, S sequence, T = B * S tokens, M of them real (not padding), D width, A heads, H width of a head,
F = H / 2 angles of a position, L MoE layers, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqmoe_ds.config.schema import CodeSource, ModelConfig, QKNorm, Router, RunConfig
from vqmoe_ds.models.cache import BlockCache, Cache
from vqmoe_ds.models.linear import Linear
from vqmoe_ds.models.loss import cross_entropy
from vqmoe_ds.models.rotary import rotate, rotate_qkv
from vqmoe_ds.moe.codebook import CodebookBank
from vqmoe_ds.moe.dispatch import Kept, make_plans, sort_rows
from vqmoe_ds.moe.layer import MoELayer
from vqmoe_ds.moe.routers import KnownRoute, hash_of_tokens, routes_ahead, rows_per_token
from vqmoe_ds.moe.routers.base import draw_linear_maps, drawn
from vqmoe_ds.moe.sources import EmbeddingSource


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale, computed in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, eps=1e-6)


class Attention(nn.Module):
    """Causal self-attention with rotary positions (Su 2021) through PyTorch's fused kernel.

    Queries and keys may be normalised before they are turned (``model.qk_norm``): each head alone with one scale for
    all heads, or all heads together.
    """

    cos_SF: Tensor
    sin_SF: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner = config.attention_width
        self.heads, self.head_width = config.heads, inner // config.heads
        self.qkv = Linear(config.width, 3 * inner)
        self.out = Linear(inner, config.width)
        self.qk_norm = config.qk_norm
        if self.qk_norm is not QKNorm.NONE:
            normed = inner if self.qk_norm is QKNorm.FULL else self.head_width
            self.q_norm, self.k_norm = RMSNorm(normed), RMSNorm(normed)
        rates = config.rope_theta ** (-torch.arange(0, self.head_width, 2) / self.head_width)
        angles = torch.arange(config.sequence_length).unsqueeze(1) * rates
        self.register_buffer("cos_SF", angles.cos(), persistent=False)
        self.register_buffer("sin_SF", angles.sin(), persistent=False)

    def forward(self, x_BSD: Tensor, past: BlockCache | None = None) -> Tensor:
        batch, length, _ = x_BSD.shape
        start = 0 if past is None else past.position_of(length)
        qkv = self.qkv(x_BSD).view(batch, length, 3, self.heads, self.head_width)
        q, k, v = self._turned(qkv, self.cos_SF[start : start + length], self.sin_SF[start : start + length])
        if past is not None:
            k, v = past.append(k, v)
        mask = x_BSD.new_ones(length, start + length, dtype=torch.bool).tril(start) if start else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out(y.transpose(1, 2).flatten(2))

    def _turned(self, qkv_BS3AH: Tensor, cos_SF: Tensor, sin_SF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, normalised as configured and turned to their positions, and values: ``[B, A, S, H]``."""
        if self.qk_norm is QKNorm.NONE:
            return rotate_qkv(qkv_BS3AH, cos_SF, sin_SF)
        q_BSAH, k_BSAH, v_BSAH = qkv_BS3AH.unbind(2)
        if self.qk_norm is QKNorm.HEADS:
            q_BSAH, k_BSAH = self.q_norm(q_BSAH), self.k_norm(k_BSAH)
        else:
            q_BSAH = self.q_norm(q_BSAH.flatten(2)).view_as(q_BSAH)
            k_BSAH = self.k_norm(k_BSAH.flatten(2)).view_as(k_BSAH)
        return *rotate(q_BSAH, k_BSAH, cos_SF, sin_SF), v_BSAH.transpose(1, 2)


class DenseMLP(nn.Module):
    """One SwiGLU MLP: what an expert is, without the choice."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = Linear(width, hidden)
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention and one feed-forward part, sparse or dense, each on the normalised stream."""

    def __init__(self, config: ModelConfig, feed_forward: nn.Module) -> None:
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(config.width), Attention(config)
        self.mlp_norm, self.mlp = RMSNorm(config.width), feed_forward

    def forward(
        self,
        x_BSD: Tensor,
        known: KnownRoute | None,
        bank: CodebookBank | None,
        past: BlockCache | None = None,
        real_M: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), past)
        rows = self.mlp_norm(x_BSD)
        if real_M is not None:  # padding reaches no expert: to those the real tokens are one sequence
            rows = real_tokens(rows, real_M).unsqueeze(0)
        y, aux_loss = self.mlp(rows, known, bank) if isinstance(self.mlp, MoELayer) else (self.mlp(rows), None)
        if real_M is not None:
            y = torch.zeros_like(x_BSD).flatten(0, 1).index_copy(0, real_M, y.squeeze(0)).view_as(x_BSD)
        return x_BSD + y, aux_loss


class MoETransformer(nn.Module):
    """Decoder language model over ``config.model`` with the experts of ``config.moe``.

    Args:
        config: the run configuration; ``train.seed`` fixes every initial weight, whatever the layout.
        ep_size: expert-parallel ranks; must divide ``moe.num_experts``.
        ep_rank: this rank's place among them.
    """

    token_table_LV: Tensor | None

    def __init__(self, config: RunConfig, ep_size: int = 1, ep_rank: int = 0) -> None:
        super().__init__()
        model, moe, book = config.model, config.moe, config.codebook
        self.config = config
        self.embed = nn.Embedding(model.vocab_size, model.width)
        self.moe_blocks = [] if moe.router is Router.DENSE else moe_block_indices(model)
        out_scale = (2 * model.layers) ** -0.5
        self.blocks = nn.ModuleList()
        for index in range(model.layers):
            if index in self.moe_blocks:
                layer = self.moe_blocks.index(index)
                mlp: nn.Module = MoELayer(
                    *(model.width, layer, moe, book, config.train.seed, ep_size, ep_rank, out_scale),
                    *(config.router, model.vocab_size, config.train.steps),
                )
            else:
                hidden = model.dense_hidden or moe.expert_hidden * rows_per_token(moe, config.router)
                mlp = DenseMLP(model.width, hidden)
            self.blocks.append(Block(model, mlp))
        self.norm = RMSNorm(model.width)
        self.head = Linear(model.width, model.vocab_size)
        layers = len(self.moe_blocks)
        self.bank: CodebookBank | None = None
        self.source: EmbeddingSource | None = None
        if moe.router is Router.VQ:
            self.bank = CodebookBank(book, layers, moe.num_experts, model.width, config.train.seed)
            self.source = EmbeddingSource(book, model.vocab_size, model.width, model.sequence_length)
        table = None
        if moe.router is Router.HASH_TOKEN:
            table = hash_of_tokens(model.vocab_size, moe.num_experts, layers, config.train.seed)
        self.register_buffer("token_table_LV", table)
        self._initialise(config.train.seed, out_scale)

    def _initialise(self, seed: int, out_scale: float) -> None:
        """Normal weights of 1/sqrt(fan in), smaller where they write to the stream; embeddings of unit size.

        Each follows from the seed and its name: models that differ in their router are equal in everything else.
        """
        scales = {"head": 0.5, "out": out_scale, "down": out_scale}
        with torch.no_grad():
            for name, module in self.named_modules():
                if isinstance(module, nn.Linear) and ".router." not in name:
                    scale = module.in_features**-0.5 * scales.get(name.rsplit(".", 1)[-1], 1.0)
                    module.weight.copy_(drawn(tuple(module.weight.shape), scale, seed, name))
            self.embed.weight.copy_(drawn(tuple(self.embed.weight.shape), 1.0, seed, "embed"))
        for layer in self.moe_layers():
            draw_linear_maps(layer.router, seed, layer.layer)

    def forward(
        self, tokens_BS: Tensor, targets_BS: Tensor | None = None, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (language-model loss, auxiliary loss) with targets, or (logits ``[B, S, V]``, auxiliary loss).

        The loss to train on is the sum of the two; the first alone is what is reported. It is the mean over the
        targets that are not ``MASKED``, and 0 where all are. With a ``cache`` the tokens follow those read before, in
        evaluation mode and by a causal router.
        """
        x_BSD, aux_loss = self.states(tokens_BS, cache)
        logits_BSV = self.head(x_BSD)
        if targets_BS is None:
            return logits_BSV, aux_loss
        return cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten()), aux_loss

    def states(
        self, tokens_BS: Tensor, cache: Cache | None = None, real_BS: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Normalised states ``[B, S, D]`` after the last block, and the auxiliary loss of all routers.

        Args:
            real_BS: False where a token is padding, which must follow the real ones: MLPs, experts, routers, codebook
                and all statistics never see it. None: all are real.
        """
        real_M = None if real_BS is None else real_BS.flatten().nonzero().squeeze(1)
        x_BSD = self.embed(tokens_BS)
        known = self._routes_ahead(tokens_BS, x_BSD, cache, real_M)
        if real_BS is not None and self.config.moe.router is Router.EXPERT_CHOICE:
            known = dict.fromkeys(self.moe_blocks, KnownRoute(lengths=tuple(real_BS.sum(dim=1).tolist())))
        aux_loss = x_BSD.new_zeros((), dtype=torch.float32)
        recompute = self.config.train.activation_checkpointing and self.training
        early = self.config.codebook.source is CodeSource.EARLY_BLOCK and self.bank is not None
        previous_T: Tensor | None = None
        for index, block in enumerate(self.blocks):
            route = known.get(index)
            if previous_T is not None:
                route = KnownRoute(previous_T=previous_T)
            if recompute:
                route = replace(route or KnownRoute(), kept=Kept())
                x_BSD, aux = checkpoint(block, x_BSD, route, self.bank, None, real_M, use_reentrant=False)
            else:
                x_BSD, aux = block(x_BSD, route, self.bank, None if cache is None else cache.blocks[index], real_M)
            if aux is not None:
                aux_loss = aux_loss + aux
            if isinstance(block.mlp, MoELayer):
                previous_T = block.mlp.first_choice_T
            if early and index == self.config.codebook.source_block:
                known = self._plan_from_source(real_tokens(x_BSD, real_M), first_block=index + 1)
        if cache is not None:
            cache.advance(tokens_BS)
        return self.norm(x_BSD), aux_loss

    def new_cache(self) -> Cache:
        """An empty cache for texts as long as the context."""
        return Cache(len(self.blocks), self.config.model.sequence_length)

    # ------------------------------------------------------------ routes known ahead

    def _routes_ahead(
        self, tokens_BS: Tensor, embedded_BSD: Tensor, cache: Cache | None, real_M: Tensor | None
    ) -> dict[int, KnownRoute]:
        """Routes of the blocks whose experts follow from the tokens, by block index."""
        moe, book = self.config.moe, self.config.codebook
        tokens_M = real_tokens(tokens_BS, real_M)
        if self.token_table_LV is not None:
            return self._plans(self.token_table_LV[:, tokens_M], list(self.moe_blocks))
        if moe.router is Router.STABLEMOE:
            return dict.fromkeys(self.moe_blocks, KnownRoute(token_ids_T=tokens_M))
        if self.bank is None or self.source is None:
            return {}
        if book.source is CodeSource.EARLY_BLOCK:  # the blocks up to the source look at the embedding
            return self._plan_from_source(real_tokens(embedded_BSD, real_M), tokens_M, end_block=book.source_block + 1)
        if not routes_ahead(moe, book):
            return {}
        if cache is None:
            alone_M = tokens_M if book.source is CodeSource.TOKEN_EMBEDDING else None
            return self._plan_from_source(real_tokens(self.source(tokens_BS, embedded_BSD), real_M), alone_M)
        ids = cache.with_earlier(tokens_BS, self.source.looks_back)
        start = cache.length + tokens_BS.shape[1] - ids.shape[1]
        source_BSD = self.source(ids, self.embed(ids), start)[:, -tokens_BS.shape[1] :]
        return self._plan_from_source(real_tokens(source_BSD, real_M))

    def _plan_from_source(
        self, source_MD: Tensor, tokens_M: Tensor | None = None, first_block: int = 0, end_block: int | None = None
    ) -> dict[int, KnownRoute]:
        assert self.bank is not None
        bank, end = self.bank, len(self.blocks) if end_block is None else end_block
        z_TC = bank.prepare(source_MD)
        mine = [layer for layer, block in enumerate(self.moe_blocks) if first_block <= block < end]
        if not mine:
            return {}
        layers = slice(mine[0], mine[-1] + 1)
        codes_LT = bank.lookup_all(z_TC, tokens_M)[layers]
        bank.observe_all(layers, z_TC, codes_LT)
        return self._plans(bank.code_map_LK[layers].gather(1, codes_LT), self.moe_blocks[layers])

    def _plans(self, experts_LT: Tensor, blocks: list[int]) -> dict[int, KnownRoute]:
        """Whole dispatch plans where the discrete row is the only one, else its experts and their sort."""
        layer, experts_LT1 = self.moe_layers()[0], experts_LT.unsqueeze(-1)
        if self.config.moe.router is Router.VQ and self.config.moe.top_k > 0:
            rows = sort_rows(experts_LT1, layer.num_experts)
            return {
                block: KnownRoute(ids_T, rows=rows.layer(index))
                for index, (block, ids_T) in enumerate(zip(blocks, experts_LT, strict=True))
            }
        plans = make_plans(experts_LT1, layer.num_experts, layer.exchange_group)
        return {b: KnownRoute(ids, plan) for b, ids, plan in zip(blocks, experts_LT, plans, strict=True)}

    def moe_layers(self) -> list[MoELayer]:
        """The MoE layers in order."""
        layers = [self.blocks[index].mlp for index in self.moe_blocks]
        return [layer for layer in layers if isinstance(layer, MoELayer)]


def real_tokens(x_BS: Tensor, real_M: Tensor | None) -> Tensor:
    """``[B, S, ...]`` -> the rows ``[M, ...]`` of the real tokens; of all T where none is padding."""
    rows = x_BS.flatten(0, 1)
    return rows if real_M is None else rows.index_select(0, real_M)


def moe_block_indices(model: ModelConfig) -> list[int]:
    """Blocks with an MoE layer: the last of every ``moe_every``."""
    return list(range(model.moe_every - 1, model.layers, model.moe_every))
