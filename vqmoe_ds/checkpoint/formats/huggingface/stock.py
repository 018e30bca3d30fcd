"""Options of stock models: what a ``config.json`` of Mixtral, Llama and others means here, and the other way round.

Mixtral and Llama can be equal to ours in both directions; of more types upcycling reads single options.
"""

from __future__ import annotations

import math
from typing import Any

from vqmoe_ds.config.schema import ModelConfig, QKNorm, RopeScaling, RunConfig, SoftmaxOver
from vqmoe_ds.moe.routers.base import softmax_over_all
from vqmoe_ds.runtime.errors import CheckpointError

# The epsilon of RMSNorm in models/block.py.
NORM_EPS = 1e-6
_UNSAID: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4096},
    "mixtral": {"rms_norm_eps": 1e-5, "rope_theta": 1e6},
    "olmoe": {"rms_norm_eps": 1e-5},
    **{kind: {"use_sliding_window": False} for kind in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe")},
    **{kind: {"attention_multiplier": 1.0} for kind in ("granite", "granitemoe", "granitemoeshared")},
}
"""What options mean that a ``config.json`` leaves out, by ``model_type``, where ``transformers`` has it otherwise than
in a Llama."""


def said(options: dict[str, Any], name: str, otherwise: Any) -> Any:
    """An option of ``config.json``, or what it means there if it is left out."""
    return options.get(name, _UNSAID.get(str(options.get("model_type")), {}).get(name, otherwise))


def norm_eps_of(options: dict[str, Any]) -> float:
    """Epsilon of the norms of a stock ``config.json``."""
    return float(said(options, "rms_norm_eps", NORM_EPS))


def norm_scale_of(options: dict[str, Any]) -> float:
    """Factor on everything that is written to the residual stream, for the epsilon of the norms.

    ``x / sqrt(mean(x^2) + eps)`` with ``c x`` for ``x`` is the same with ``eps / c^2`` for ``eps``; all norms read the
    stream, so scaling it turns any epsilon into ours.
    """
    return math.sqrt(NORM_EPS / norm_eps_of(options))


def head_width_of(options: dict[str, Any]) -> int:
    """``model.head_width``: 0 where the heads share the width evenly."""
    head_dim, heads = options.get("head_dim"), options.get("num_attention_heads")
    if isinstance(head_dim, int) and isinstance(heads, int) and head_dim * heads == options.get("hidden_size"):
        return 0
    return head_dim or 0


def kv_heads_of(options: dict[str, Any]) -> int:
    """``model.kv_heads``: 0 where every query head has a key-value head of its own."""
    kv_heads = options.get("num_key_value_heads")
    return 0 if kv_heads in (None, options.get("num_attention_heads")) else kv_heads


def window_of(options: dict[str, Any], length: int = 0) -> int:
    """``model.sliding_window`` of a stock ``config.json``: 0 where every token sees all before it.

    Args:
        options: of ``config.json``.
        length: of the context; a window that it stays within may be that of some layers alone.

    Raises:
        CheckpointError: some layers alone have a window, and the context is longer; the option is named.
    """
    window = said(options, "sliding_window", None) if said(options, "use_sliding_window", True) else None
    sliding = _sliding_layers(options) if window else []
    if not window or not any(sliding):
        return 0
    if all(sliding):
        return int(window)
    if length > int(window):
        name = "layer_types" if options.get("layer_types") else "max_window_layers"
        raise CheckpointError(
            f"some layers alone attend to the last {window} tokens (sliding_window, {name}), and in this trainer all "
            f"layers are alike; set model.sequence_length={window} or less"
        )
    return 0


def _sliding_layers(options: dict[str, Any]) -> list[bool]:
    """Which layers have the window, as ``transformers`` reads a ``config.json`` with one; a single entry for all."""
    kind, first = options.get("model_type"), int(options.get("max_window_layers", 28))
    if kind not in ("qwen2", "qwen3", "qwen2_moe"):
        return [True]
    if options.get("layer_types"):
        return [name == "sliding_attention" for name in options["layer_types"]]
    layers = range(int(options["num_hidden_layers"]))
    if kind == "qwen2_moe":
        return [layer % 2 == 0 and layer < first for layer in layers]
    return [layer >= first for layer in layers]


_FIXED: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {},
    "llama3": {"low_freq_factor": 1, "high_freq_factor": 4},
    "yarn": {"beta_fast": 32, "beta_slow": 1, "truncate": True, "mscale": None, "mscale_all_dim": None},
}
"""Kinds of scaled rotary positions by ``transformers``' name, and their options that are constants here."""


def rope_of(options: dict[str, Any]) -> dict[str, Any]:
    """The fields ``model.rope_...`` of a stock ``config.json``.

    Raises:
        CheckpointError: they are scaled in a way that this trainer does not know; the option is named.
    """
    rope = options.get("rope_parameters") or options.get("rope_scaling") or {}
    # transformers 5 writes rope_parameters with the base in it, 4 rope_scaling beside rope_theta, and once with `type`.
    kind, factor = rope.get("rope_type", rope.get("type", "default")), rope.get("factor")
    section: dict[str, Any] = {"rope_theta": float(rope.get("rope_theta", said(options, "rope_theta", 10000.0)))}
    if kind not in _FIXED:
        raise CheckpointError(f"rotary positions are scaled ({kind}); known are {', '.join(_FIXED)}")
    if kind == "default":
        return section
    if not isinstance(factor, int | float):
        raise CheckpointError(f"rotary positions are scaled ({kind}) by no factor; config.json must name it")
    # YaRN's 0.1 ln(s) + 1, the factor that is taken where none is given.
    fixed = _FIXED[kind] | ({"attention_factor": 0.1 * math.log(factor) + 1} if kind == "yarn" else {})
    for name, only in fixed.items():
        if rope.get(name) not in (None, only):
            raise CheckpointError(
                f"rotary positions are scaled ({kind}) with {name}={rope[name]}; known is only {only}"
            )
    length = rope.get("original_max_position_embeddings", options.get("max_position_embeddings"))
    section |= {"rope_scaling": kind, "rope_factor": float(factor)}
    return section if kind == "linear" else section | {"rope_original_length": length}


def stock_rope(model: ModelConfig) -> dict[str, Any]:
    """The inverse of ``rope_of``: rotary positions as stock models name them."""
    if model.rope_scaling is RopeScaling.NONE:
        return {"rope_theta": model.rope_theta}
    kind = model.rope_scaling.value
    scaling = {"rope_type": kind, "rope_theta": model.rope_theta, "factor": model.rope_factor}
    if model.rope_scaling is not RopeScaling.LINEAR:
        scaling["original_max_position_embeddings"] = model.rope_original_length
    return {"rope_parameters": scaling | {name: only for name, only in _FIXED[kind].items() if only is not None}}


def weighs_over_all(config: RunConfig) -> bool:
    """Whether the linear router's experts are weighted by their probabilities among all; else among the chosen."""
    return softmax_over_all(getattr(config.router, "softmax_over", SoftmaxOver.AUTO), config.moe.top_k)


def softmax_over_of(norm_topk_prob: bool | None, top_k: int) -> SoftmaxOver:
    """``router.softmax_over`` of experts whose weights sum to 1, or not, or (None) as with us."""
    if norm_topk_prob is None or norm_topk_prob != softmax_over_all(SoftmaxOver.AUTO, top_k):
        return SoftmaxOver.AUTO
    return SoftmaxOver.CHOSEN if norm_topk_prob else SoftmaxOver.ALL


def stock_options(config: RunConfig, arch: str) -> dict[str, Any]:
    """``config.json`` of stock Mixtral or Llama, as ``hf_options`` gives it.

    Raises:
        CheckpointError: the architecture cannot compute what this model computes; the option is named.
    """
    model, name = config.model, arch.capitalize()
    reason = why_not_stock(config, arch)
    if reason:
        raise CheckpointError(f"{name} cannot stand for this model: {reason}; export with --arch vqmoe")
    return {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": arch,
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "intermediate_size": config.moe.expert_hidden if arch == "mixtral" else config.dense_hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads or model.heads,
        "head_dim": model.attention_width // model.heads,
        "hidden_act": "silu",
        "max_position_embeddings": model.sequence_length,
        "rms_norm_eps": NORM_EPS,
        **stock_rope(model),
        **(_mixtral_alone(config) if arch == "mixtral" else _LLAMA_ALONE),
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
    }


_LLAMA_ALONE = {"attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False}


def _mixtral_alone(config: RunConfig) -> dict[str, Any]:
    return {
        # MixtralModel asks whether it is None: 0 would be a window.
        "sliding_window": config.model.sliding_window or None,
        "attention_dropout": 0.0,
        "num_local_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
        "router_aux_loss_coef": config.moe.balance_weight,
        "output_router_logits": False,
    }


def why_not_stock(config: RunConfig, arch: str) -> str | None:
    """Why stock Mixtral or Llama cannot compute the model; None where it can."""
    if config.finetune.classes:
        return "it is a classifier, which pools its states otherwise"
    if config.model.qkv_bias:
        return "model.qkv_bias adds a bias to queries, keys and values, and it has none"
    if config.model.qk_norm is not QKNorm.NONE:
        return f"model.qk_norm={config.model.qk_norm.value} norms queries and keys, and it does not"
    if arch == "mixtral":
        return _why_not_mixtral(config)
    if config.moe.facts.has_experts:
        return f"moe.router={config.moe.router} has experts, and it has none (moe.router=dense)"
    if config.model.sliding_window:
        return f"model.sliding_window={config.model.sliding_window} limits attention, and it has no window"
    return None


def _why_not_mixtral(config: RunConfig) -> str | None:
    moe = config.moe
    if not moe.facts.is_stock:
        return f"moe.router={moe.router} is not its linear router (topk)"
    if moe.output_norm:
        return "moe.output_norm=true puts a LayerNorm after every expert, and it has none"
    if moe.shared_experts:
        return f"moe.shared_experts={moe.shared_experts} stand beside the routed ones, and it has none"
    if config.model.dense_layers:
        return f"model.dense_layers={config.model.dense_layers} leaves dense blocks, and it has experts in every block"
    if config.model.moe_every != 1:
        return f"model.moe_every={config.model.moe_every} leaves dense blocks, and it has experts in every block"
    # A single expert has the weight 1 either way.
    if weighs_over_all(config) and moe.num_experts > 1:
        over = "moe.top_k=1" if moe.top_k == 1 else "router.softmax_over=all"
        return f"with {over} experts are weighted by their probabilities among all here, among the chosen there"
    return None


def stock_sections(options: dict[str, Any], arch: str) -> dict[str, dict[str, Any]]:
    """The sections of a run configuration that describe the model, from a ``config.json`` of stock Mixtral or Llama.

    Raises:
        CheckpointError: it computes something that this trainer cannot; the option is named.
    """
    needed: dict[str, Any] = {"rms_norm_eps": NORM_EPS, "hidden_act": "silu"}
    if arch == "llama":
        needed |= {"attention_bias": False, "mlp_bias": False}
    # A Mixtral that does not name its epsilon has 1e-5, so a missing one cannot pass as ours.
    given = {**options, "rms_norm_eps": norm_eps_of(options)}
    for name, value in needed.items():
        if given.get(name) not in (value, None):
            raise CheckpointError(
                f"this {arch.capitalize()} has {name}={given[name]}, but this trainer knows only {value}; "
                "tools/upcycle.py converts more"
            )
    try:
        model = {
            "vocab_size": options["vocab_size"],
            "layers": options["num_hidden_layers"],
            "width": options["hidden_size"],
            "heads": options["num_attention_heads"],
            "kv_heads": kv_heads_of(options),
            "head_width": head_width_of(options),
            "sequence_length": options["max_position_embeddings"],
            "tie_embeddings": bool(options.get("tie_word_embeddings", False)),
            **rope_of(options),
        }
        if arch == "llama":
            return {"model": model | {"dense_hidden": options["intermediate_size"]}, "moe": {"router": "dense"}}
        model["sliding_window"] = window_of(options)
        moe = {
            "router": "topk",
            "num_experts": options["num_local_experts"],
            "expert_hidden": options["intermediate_size"],
            "top_k": options["num_experts_per_tok"],
            "balance_weight": options.get("router_aux_loss_coef", 0.001),
        }
    except KeyError as error:
        raise CheckpointError(f"config.json lacks {error.args[0]}; export the model again") from None
    return {"model": model, "moe": moe, "router": {"softmax_over": softmax_over_of(True, moe["top_k"])}}
