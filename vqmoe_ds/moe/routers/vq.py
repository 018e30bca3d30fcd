"""The router of discrete codes.

Legend: T tokens, D width, C code width, K codes, R routed rows per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqmoe_ds.config.routers import register_router
from vqmoe_ds.config.schema import CodeMap, CodeSource, RunConfig
from vqmoe_ds.moe.codebook import CodebookBank
from vqmoe_ds.moe.config import LayerConfig
from vqmoe_ds.moe.routers.base import Routing, RoutingContext, mean_of_all
from vqmoe_ds.moe.routers.dual import DualRouter

WORDS = 1000
"""Token ids from which most stretches of two and three are rare."""


@register_router("vq")
class VQRouter(DualRouter):
    """Discrete codes beside an optional linear router (paper Eq. 4).

    ``y = g_c f_SMoE(x) + g_d E_{map(k)}(q)`` with ``k`` the nearest code, ``g = softmax(W_g x)`` and
    ``q = x + c sg(v_k - x)``. With ``top_k = 0`` only the discrete path remains, ``y = E_{map(k)}(q)``. With
    ``moe.input_norm`` and ``moe.output_norm`` it is ``LN(E_{map(k)}(LN(q)))``, as released.
    """

    uses_codebook = True
    has_discrete_path = True
    exported_as = "vq"
    told_by = "those of its codes"

    def __init__(self, config: LayerConfig) -> None:
        super().__init__(config)
        self.own_codebook: CodebookBank | None = None
        self.index = config.layer
        if not config.shared_codebook:
            self.own_codebook = CodebookBank(config.codebook, 1, self.moe.num_experts, config.width, config.seed)
            self.index = 0

    # ------------------------------------------------------------ what is known of it

    @classmethod
    def check(cls, run: RunConfig) -> None:
        book, model = run.codebook, run.model
        in_layer_space = (
            book.source is CodeSource.LAYER_STATE
            and not book.code_dim
            and not book.normalize_source
            and book.distance == "euclidean"
        )
        for option, purpose in (
            ("moe.code_blend", "feeds code vectors to experts, so they must live among the layer's states: set"),
            ("codebook.commitment_weight", "pulls layer states toward codes: it needs"),
        ):
            value = run.moe.code_blend if option == "moe.code_blend" else book.commitment_weight
            if value > 0 and not in_layer_space:
                raise ValueError(
                    f"{option}>0 {purpose} codebook.source=layer_state, codebook.normalize_source=false, "
                    "codebook.distance=euclidean and codebook.code_dim=0"
                )
        if book.source is CodeSource.EARLY_BLOCK and book.source_block >= model.layers - 1:
            raise ValueError(
                f"codebook.source_block={book.source_block} must be under model.layers - 1 = {model.layers - 1}"
            )
        if run.moe.num_experts % book.groups:
            raise ValueError(f"codebook.groups={book.groups} does not divide moe.num_experts={run.moe.num_experts}")
        if book.groups > 1 and not cls.known_ahead(run):
            raise ValueError(
                f"codebook.groups={book.groups} needs the codes of all layers before the first block: set "
                "codebook.source to context, token_embedding or position_embedding; of images, patch"
            )
        if book.init == "normal" and book.code_map is CodeMap.BALANCED:
            raise ValueError(
                "codebook.init=normal looks at no data, and codebook.code_map=balanced needs the frequency of codes in "
                "them; set codebook.code_map=mod, or codebook.init to kmeans or random"
            )
        if book.code_dim > run.source_width:
            which = "model.width" if run.source_width == model.width else "the values of a patch"
            raise ValueError(f"codebook.code_dim={book.code_dim} exceeds {which}={run.source_width}")
        if book.source_momentum and book.source in (CodeSource.LAYER_STATE, CodeSource.EARLY_BLOCK):
            raise ValueError(
                "codebook.source_momentum works on embeddings, not on codebook.source=" + book.source.value
            )

    @classmethod
    def weights_rows(cls, run: RunConfig) -> bool:
        soft = run.codebook.soft_output > 0 and run.codebook.source is CodeSource.LAYER_STATE
        return run.moe.top_k > 0 or soft

    @classmethod
    def flops(cls, run: RunConfig, layer: int) -> int:
        linear = super().flops(run, layer) + 4 * run.model.width if run.moe.top_k else 0
        return cls.lookup_flops(run, layer) + linear

    @staticmethod
    def lookup_flops(run: RunConfig, layer: int) -> int:
        """Distances of a token to all codes of a layer; a projection, which all layers share, counts once.

        Where codes follow from tokens alone each token of a batch is looked up once, so there it is an upper bound.
        """
        book = run.codebook
        codes, code_width = book.num_codes or run.moe.num_experts, book.code_dim or run.source_width
        return 2 * codes * code_width + (2 * run.source_width * book.code_dim if layer == 0 else 0)

    @classmethod
    def known_ahead(cls, run: RunConfig) -> bool:
        return run.codebook.source not in (CodeSource.LAYER_STATE, CodeSource.EARLY_BLOCK)

    @classmethod
    def hint(cls, run: RunConfig) -> str | None:
        words, several = run.model.vocab_size, run.codebook.source is CodeSource.CONTEXT
        if run.model.image_size or words < WORDS or not several:
            return None
        return (
            f"codes of several tokens (codebook.source=context) suit bytes; with {words:,} token ids those of single "
            "ones did better (token_embedding), and moe.router=hash_and_code with moe.output_norm=true best "
            "(docs/results.md)"
        )

    # ------------------------------------------------------------ routing

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        moe, book = self.moe, self.config.codebook
        offset, aux, soft_T1 = None, x_TD.new_zeros((), dtype=torch.float32), None
        if context.expert_ids_TR is not None:
            discrete_T1 = self.told_experts(context)
        else:
            bank = self._codebook(context)
            codes_T = self._lookup(x_TD, bank)
            # The map alone, not `experts_of`: groups need the code of the first layer, and `check` refuses them here.
            discrete_T1 = bank.code_map_LK[self.index][codes_T].unsqueeze(1)
            if moe.code_blend or book.commitment_weight:
                codes_TC = bank.codes_LKC[self.index].float()[codes_T]
            if moe.code_blend:
                # Rounded last: the difference of near vectors would lose most of its digits in bfloat16.
                offset = (moe.code_blend * (codes_TC - x_TD.detach().float())).to(x_TD.dtype)
            if book.commitment_weight:
                # One half of the paper's loss, `beta ||z - sg v||^2`. The other moves the codes, which are buffers: it
                # is the work of `CodebookBank.update`.
                squares_TC = (x_TD.float() - codes_TC).square()
                aux = aux + book.commitment_weight * mean_of_all(squares_TC, context.mean_tokens)
            if book.soft_output:
                soft_T1 = self._soft_weight(x_TD, bank).unsqueeze(1)
        discrete = Routing(discrete_T1, soft_T1, aux, discrete_offset_TD=offset)
        return self.beside(x_TD, context, discrete)

    def _codebook(self, context: RoutingContext) -> CodebookBank:
        if self.own_codebook is not None and context.codebooks is not None:
            raise ValueError(
                "the vq router has a codebook of its own and was given others: leave RoutingContext.codebooks at None, "
                "or set LayerConfig.shared_codebook"
            )
        bank = self.own_codebook or context.codebooks
        if bank is None:
            raise ValueError(
                "the vq router needs codebooks: give them in RoutingContext.codebooks, or leave "
                "LayerConfig.shared_codebook at False, and the layer has one of its own"
            )
        if self.index >= bank.num_layers:
            raise ValueError(f"layer {self.index} has no place among the {bank.num_layers} codebook(s) it was given")
        if bank.num_experts != self.moe.num_experts:
            raise ValueError(
                f"the codebooks are for {bank.num_experts} experts, and the layer has {self.moe.num_experts}"
            )
        return bank

    @torch.no_grad()
    def _lookup(self, x_TD: Tensor, bank: CodebookBank) -> Tensor:
        z_TC = bank.prepare(x_TD)
        codes_T = bank.lookup(self.index, z_TC)
        bank.observe(self.index, z_TC, codes_T)
        return codes_T

    def _soft_weight(self, x_TD: Tensor, bank: CodebookBank) -> Tensor:
        """Softmax probability of the nearest code: the road on which gradients reach the code choice."""
        # `compared` and not `prepare`, which has no gradient.
        distances_TK = torch.cdist(bank.compared(x_TD), bank.codes_LKC[self.index].float()).square()
        return (-distances_TK / self.config.codebook.soft_output).softmax(dim=-1).amax(dim=-1)
