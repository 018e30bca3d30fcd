"""The configuration of one MoE layer."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from pydantic import ValidationError

from vqmoe_ds.config.problems import first_problem
from vqmoe_ds.config.routers import options_for
from vqmoe_ds.config.schema import CodebookConfig, CodeSource, MoEConfig, RunConfig
from vqmoe_ds.runtime.errors import ConfigError, shown

_KINDS = {"int": Integral, "float": Real, "bool": bool, "MoEConfig": MoEConfig, "CodebookConfig": CodebookConfig}
"""What a field may hold, by the name of its type; NumPy's numbers are numbers too."""


@dataclass(frozen=True)
class LayerConfig:
    """Configuration of a ``MoELayer`` and its router.

    Examples:
        >>> from vqmoe_ds.moe import LayerConfig, MoEConfig
        >>> config = LayerConfig(width=64, moe=MoEConfig(router="topk", num_experts=8, expert_hidden=128, top_k=2))
        >>> config.options.softmax_over.value
        'auto'

    Raises:
        ConfigError: a value of another type, an unknown router or option, or a contradiction.
    """

    width: int
    """Model width D."""
    moe: MoEConfig = field(default_factory=MoEConfig)
    """Experts and the name of their router."""
    options: Any = None
    """Options of the router: its ``Options``, a dict of them, or None for the defaults."""
    codebook: CodebookConfig = field(default_factory=lambda: CodebookConfig(source=CodeSource.LAYER_STATE))
    """Read by routers that use codes."""
    layer: int = 0
    """Index among the MoE layers of the model, by which weights are drawn and a codebook is found in its bank."""
    seed: int = 0
    """Experts are drawn from (seed, layer, global expert id), whatever the layout."""
    ep_size: int = 1
    """Ranks that share the experts; must divide their number."""
    ep_rank: int = 0
    """This rank's place among them."""
    vocab_size: int = 0
    """Token ids that a router may see; needed by routers that have a table of them."""
    sequence_length: int = 0
    """Tokens of a sequence, by which routers go that mix them; 0: unknown."""
    steps: int = 1
    """Optimizer steps of the run, by which schedules go that are not given in steps."""
    out_scale: float = 1.0
    """Factor on the initial down projections."""
    shared_codebook: bool = False
    """Whether codebooks come with every call (``RoutingContext.codebooks``); else the layer has one of its own."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value, wanted = getattr(self, f.name), str(f.type)
            if not isinstance(value, _KINDS.get(wanted, object)):
                found = type(value).__name__
                raise ConfigError(f"LayerConfig.{f.name}={shown(value)} is of type {found}; give {wanted}")
        if self.width < 1:
            raise ConfigError(f"width={self.width} makes no layer; give 1 or more")
        if self.layer < 0:
            raise ConfigError(f"layer={self.layer} is no index of an MoE layer; give 0 or more")
        try:
            kind = self.moe.facts
            object.__setattr__(self, "options", options_for(self.moe.router, self.options or {}))
        except ValidationError as error:
            raise ConfigError(f"options of the {self.moe.router} router: {first_problem(error)}") from None
        except ValueError as error:
            raise ConfigError(str(error)) from None
        experts, ranks = self.moe.num_experts, self.ep_size
        if not kind.has_experts:
            raise ConfigError(f"moe.router={self.moe.router} has no experts; a dense model has no MoE layer")
        if kind.needs_top_k and not self.moe.top_k:
            raise ConfigError(f"moe.top_k=0 leaves moe.router={self.moe.router} without experts; use 1 or more")
        if ranks < 1 or experts % ranks:
            raise ConfigError(
                f"ep_size={ranks} does not divide num_experts={experts}: each rank holds as many as the others"
            )
        if not 0 <= self.ep_rank < ranks:
            raise ConfigError(f"ep_rank={self.ep_rank} is no place among the {ranks} rank(s) of ep_size")
        if kind.uses_codebook and not self.shared_codebook and self.codebook.source is not CodeSource.LAYER_STATE:
            raise ConfigError(
                f"codebook.source={self.codebook.source.value} looks at more than the layer's input; set "
                "codebook.source=layer_state, or give the experts of each token in RoutingContext.expert_ids_TR"
            )
        if kind.uses_codebook and self.codebook.groups > 1 and self.codebook.source is CodeSource.LAYER_STATE:
            raise ConfigError(
                f"codebook.groups={self.codebook.groups} needs the codes of all layers before the first block, and "
                "codebook.source=layer_state looks at each layer's input; set codebook.groups=1"
            )

    @classmethod
    def of(cls, run: RunConfig, layer: int, ep_size: int = 1, ep_rank: int = 0) -> LayerConfig:
        """Configuration of one layer of the model of a run."""
        model = run.model
        return cls(
            width=model.width,
            moe=run.moe,
            options=run.router,
            codebook=run.codebook,
            layer=layer,
            seed=run.train.seed,
            ep_size=ep_size,
            ep_rank=ep_rank,
            vocab_size=model.vocab_size,
            sequence_length=model.sequence_length,
            steps=run.train.steps,
            # Two parts of each block write to the stream (GPT-2, Radford 2019); MoETransformer scales the others alike.
            out_scale=(2 * model.layers) ** -0.5,
            shared_codebook=True,
        )
