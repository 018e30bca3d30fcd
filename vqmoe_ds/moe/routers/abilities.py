"""What the router of a configuration can do, and the sentences of those that cannot."""

from __future__ import annotations

from vqmoe_ds.config.schema import (
    ClusterStatistics,
    CodebookConfig,
    CodeSource,
    MoEConfig,
    Router,
    RouterConfig,
    RunConfig,
)
from vqmoe_ds.moe.routers.frozen import final_top_k
from vqmoe_ds.runtime.errors import ConfigError


def routes_ahead(config: MoEConfig, book: CodebookConfig) -> bool:
    """Whether codes of all layers are known before the first block."""
    if config.router is Router.HASH_TOKEN:
        return True
    sources_of_layers = (CodeSource.LAYER_STATE, CodeSource.EARLY_BLOCK)
    return config.router is Router.VQ and book.source not in sources_of_layers


def why_not_causal(run: RunConfig) -> str | None:
    """Why the experts of a token may depend on later tokens; None where they do not."""
    if run.moe.router is Router.EXPERT_CHOICE:
        return "moe.router=expert_choice lets experts choose among all tokens of a sequence, later ones included"
    batch = run.router.statistics is ClusterStatistics.BATCH
    if run.moe.router is Router.ADAPTIVE_CLUSTERING and batch:
        return "router.statistics=batch looks at all tokens of a batch, later ones included"
    return None


def require_causal(run: RunConfig, purpose: str) -> None:
    """Refuse a router that looks ahead.

    Args:
        purpose: what needs causality, as the subject of a sentence ("generating text").

    Raises:
        ConfigError: it does.
    """
    reason = why_not_causal(run)
    if reason is None:
        return
    mend = "train with router.statistics=running" if run.moe.router is Router.ADAPTIVE_CLUSTERING else "use another"
    raise ConfigError(f"{purpose} needs a router that sees no later token, but {reason}; {mend}")


def why_not_exported(run: RunConfig) -> str | None:
    """Why the Hugging Face model cannot compute this one; None where it can."""
    known = (Router.VQ, Router.TOPK, Router.HASH_TOKEN, Router.DENSE)
    if run.moe.router not in known:
        names = ", ".join(router.value for router in known)
        return f"moe.router={run.moe.router.value} is not among the routers of the exported model ({names})"
    return None


def rows_per_token(moe: MoEConfig, options: RouterConfig | None = None) -> int:
    """Expert calls a token makes in one layer; the mean over the run, rounded up, where that grows."""
    if moe.router is Router.VQ:
        return moe.top_k + 1
    if moe.router is Router.HASH_TOKEN:
        return 1
    if moe.router is Router.SMOE_DROPOUT:
        return -(-(moe.top_k + final_top_k(moe, options or RouterConfig())) // 2)
    return max(1, moe.top_k)
