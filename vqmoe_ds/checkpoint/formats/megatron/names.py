"""Names and layout of our parameters in a megatron-core ``GPTModel`` (0.16, local layer spec).

Megatron keeps the rows of the queries, the key and the value of one key-value head side by side, gate and up projection
in one matrix (``linear_fc1``), and gives every tensor-parallel rank whole heads, both halves of its share of
``linear_fc1``, columns of ``linear_fc2``.

Legend: D width, A heads, K key-value heads, H hidden width, N experts, V vocabulary.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from torch import Tensor

from vqmoe_ds.checkpoint.formats.huggingface.names import is_sparse, placement_of
from vqmoe_ds.checkpoint.formats.huggingface.stock import (
    NORM_EPS,
    head_width_of,
    kv_heads_of,
    softmax_over_of,
    weighs_over_all,
)
from vqmoe_ds.config.schema import ModelConfig, QKNorm, RopeScaling, RunConfig
from vqmoe_ds.runtime.errors import CheckpointError

VOCAB_MULTIPLE = 128
"""Megatron-LM's default ``--make-vocab-size-divisible-by``."""


def padded_vocab(vocab: int, tp: int) -> int:
    """Rows of the embedding as Megatron-LM pads it."""
    # _vocab_size_with_padding of Megatron-LM: every tensor-parallel rank has as many rows.
    unit = VOCAB_MULTIPLE * tp
    return -(-vocab // unit) * unit


def dense_names(config: RunConfig) -> dict[str, tuple[str, ...]]:
    """Megatron's name of every tensor but experts -> ours; two of ours where Megatron keeps them in one."""
    names: dict[str, tuple[str, ...]] = {"embedding.word_embeddings.weight": ("embed.weight",)}
    for block in range(config.model.layers):
        ours, theirs = f"blocks.{block}.", f"decoder.layers.{block}."
        names[theirs + "input_layernorm.weight"] = (ours + "attention_norm.weight",)
        names[theirs + "self_attention.linear_proj.weight"] = (ours + "attention.out.weight",)
        names[theirs + "self_attention.linear_qkv.weight"] = (ours + "attention.qkv.weight",)
        if config.model.qkv_bias:
            names[theirs + "self_attention.linear_qkv.bias"] = (ours + "attention.qkv_bias",)
        if config.model.qk_norm is not QKNorm.NONE:
            for letter in "qk":
                name = f"{theirs}self_attention.{letter}_layernorm.weight"
                names[name] = (f"{ours}attention.{letter}_norm.weight",)
        names[theirs + "pre_mlp_layernorm.weight"] = (ours + "mlp_norm.weight",)
        sparse = is_sparse(config, block)
        if sparse:
            router = _router_name(config)
            # GPTModel has a router in every MoE layer and loads strictly, so the name must be there.
            names[theirs + "mlp.router.weight"] = (ours + router,) if router else ()
        if not sparse or config.moe.shared_experts:
            mlp, ours = ("mlp.shared_experts.", ours + "mlp.shared.") if sparse else ("mlp.", ours + "mlp.")
            names[f"{theirs}{mlp}linear_fc1.weight"] = (ours + "gate.weight", ours + "up.weight")
            names[f"{theirs}{mlp}linear_fc2.weight"] = (ours + "down.weight",)
    names["decoder.final_layernorm.weight"] = ("norm.weight",)
    return names if config.ties_head else names | {"output_layer.weight": ("head.weight",)}


def sparse_blocks(config: RunConfig) -> list[int]:
    return [block for block in range(config.model.layers) if is_sparse(config, block)]


def _router_name(config: RunConfig) -> str | None:
    """Our linear router; None where there is none, and Megatron is given one of zeros."""
    gate = config.moe.facts.linear_gate(config.moe)
    return None if gate is None else f"mlp.router.{gate}"


# ---------------------------------------------------------------- how a tensor lies


def share(name: str, tensors: list[Tensor], model: ModelConfig, tp: int, rank: int) -> Tensor:
    """A tensor-parallel rank's part of Megatron's tensor ``name``, from whole tensors of ours."""
    # Cut, then joined: a rank's product is split in two halves, its gate and its up projection. Cutting the joined
    # matrix would give the first rank nothing but gates.
    if name.endswith("linear_fc1.weight"):
        return torch.cat([tensor.chunk(tp)[rank] for tensor in tensors])
    (whole,) = tensors
    if name.endswith(("linear_qkv.weight", "linear_qkv.bias")):
        # Rows by key-value head, so that cutting them among ranks leaves every head with its own key and value.
        by_group = [x.unflatten(0, (_kv_heads(model), -1)) for x in whole.split(_rows(model))]
        whole = torch.cat(by_group, dim=1).flatten(0, 1)
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return whole.chunk(tp, dim=1)[rank].contiguous()
    if name.startswith(("embedding.", "output_layer.")) or ".linear_qkv." in name:
        return whole.chunk(tp)[rank]
    return whole


def join(name: str, shares: list[Tensor], model: ModelConfig) -> list[Tensor]:
    """The inverse of ``share``: whole tensors of ours from every rank's part."""
    if name.endswith("linear_fc1.weight"):
        halves = [part.chunk(2) for part in shares]
        return [torch.cat([half[0] for half in halves]), torch.cat([half[1] for half in halves])]
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return [torch.cat(shares, dim=1)]
    if name.endswith(("linear_qkv.weight", "linear_qkv.bias")):
        by_group = torch.cat(shares).unflatten(0, (_kv_heads(model), -1))
        parts = by_group.split([rows // _kv_heads(model) for rows in _rows(model)], dim=1)
        return [torch.cat([part.flatten(0, 1) for part in parts])]
    if name.startswith(("embedding.", "output_layer.")):
        return [torch.cat(shares)]
    return [shares[0]]


def _kv_heads(model: ModelConfig) -> int:
    return model.kv_heads or model.heads


def _rows(model: ModelConfig) -> list[int]:
    """Rows of queries, keys and values."""
    return [model.attention_width, model.kv_width, model.kv_width]


def share_shape(name: str, config: RunConfig, tp: int) -> tuple[int, ...]:
    """Shape of ``share``."""
    width, inner, vocab = config.model.width, config.model.attention_width, padded_vocab(config.model.vocab_size, tp)
    head, shared = (inner // config.model.heads,), config.moe.shared_experts * config.moe.expert_hidden
    shapes = {
        "q_layernorm.weight": head,
        "k_layernorm.weight": head,
        "word_embeddings.weight": (vocab // tp, width),
        "output_layer.weight": (vocab // tp, width),
        "linear_qkv.weight": (sum(_rows(config.model)) // tp, width),
        "linear_qkv.bias": (sum(_rows(config.model)) // tp,),
        "linear_proj.weight": (width, inner // tp),
        "router.weight": (config.moe.num_experts, width),
        "mlp.linear_fc1.weight": (2 * config.dense_hidden // tp, width),
        "mlp.linear_fc2.weight": (width, config.dense_hidden // tp),
        "shared_experts.linear_fc1.weight": (2 * shared // tp, width),
        "shared_experts.linear_fc2.weight": (width, shared // tp),
    }
    return next((shape for end, shape in shapes.items() if name.endswith(end)), (width,))


# ---------------------------------------------------------------- options


def why_not_megatron(config: RunConfig) -> str | None:
    """Why a ``GPTModel`` has no place for this model or computes another one; None where it does not."""
    moe = config.moe
    if config.model.qk_norm is QKNorm.FULL:
        return "it norms queries and keys over all heads together (model.qk_norm=full), Megatron each head alone"
    if config.model.rope_scaling is not RopeScaling.NONE:
        return (
            f"it scales its rotary positions (model.rope_scaling={config.model.rope_scaling.value}), this export cannot"
        )
    if moe.shared_gate:
        return "it weights shared experts by a gate (moe.shared_gate), this export cannot"
    single = moe.facts.is_stock and moe.top_k == 1 < moe.num_experts
    if single and not weighs_over_all(config):
        return "it weights a single expert by 1 (router.softmax_over=chosen), Megatron by its probability"
    return None


def megatron_args(config: RunConfig, tp: int, ep: int, grouped: bool, dtype: torch.dtype) -> Namespace:
    """The arguments of Megatron-LM that build this model, by its names (``--use-checkpoint-args`` reads them)."""
    model, moe = config.model, config.moe
    sparse = sparse_blocks(config)
    options: dict[str, Any] = {
        **{"num_layers": model.layers, "hidden_size": model.width, "num_attention_heads": model.heads},
        **{"group_query_attention": _kv_heads(model) != model.heads, "num_query_groups": _kv_heads(model)},
        **{"kv_channels": model.attention_width // model.heads, "qk_layernorm": model.qk_norm is QKNorm.HEADS},
        **{"ffn_hidden_size": config.dense_hidden, "seq_length": model.sequence_length},
        **{"max_position_embeddings": model.sequence_length, "position_embedding_type": "rope"},
        **{"rotary_base": model.rope_theta, "rotary_percent": 1.0, "rotary_interleaved": False},
        **{"add_position_embedding": True, "normalization": "RMSNorm", "norm_epsilon": NORM_EPS, "swiglu": True},
        **{"add_bias_linear": False, "add_qkv_bias": model.qkv_bias},
        "untie_embeddings_and_output_weights": not model.tie_embeddings,
        **{"vocab_size": model.vocab_size, "padded_vocab_size": padded_vocab(model.vocab_size, tp)},
        **{"make_vocab_size_divisible_by": VOCAB_MULTIPLE, "transformer_impl": "local", "params_dtype": dtype},
        **{"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": 1, "expert_model_parallel_size": ep},
        # Both dropouts are 0.1 by Megatron's default.
        **{"num_experts": moe.num_experts if sparse else None, "attention_dropout": 0.0, "hidden_dropout": 0.0},
        # Megatron counts the tokens before a token, we that token as well.
        "window_size": (model.sliding_window - 1, 0) if model.sliding_window else None,
    }
    if sparse:
        options |= {
            **{"moe_router_topk": max(1, moe.top_k), "moe_ffn_hidden_size": moe.expert_hidden},
            **{"moe_shared_expert_intermediate_size": moe.shared_experts * moe.expert_hidden or None},
            **{"moe_grouped_gemm": grouped, "moe_use_legacy_grouped_gemm": grouped},
            **{"moe_layer_freq": [int(block in sparse) for block in range(model.layers)]},
            # The weight of a single expert is its probability among all, that of several among the chosen.
            **{"moe_router_pre_softmax": moe.top_k <= 1 or weighs_over_all(config)},
            **{"moe_router_score_function": "softmax"},
            **{"moe_aux_loss_coeff": moe.balance_weight, "moe_router_load_balancing_type": "aux_loss"},
            # Our routers compute in float32 whatever the weights are; Megatron's default is the activations' type.
            **{"moe_token_dispatcher_type": "alltoall", "moe_router_dtype": "fp32"},
        }
    return Namespace(**options)


def sections_of_args(args: dict[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """The sections of a run configuration that describe the model, from the arguments in a Megatron-LM checkpoint.

    Raises:
        CheckpointError: it computes something that this trainer cannot; the option is named.
    """
    # 2 is Megatron's default.
    heads, experts, top_k = args.get("num_attention_heads"), args.get("num_experts"), args.get("moe_router_topk", 2)
    shape = {"head_dim": args.get("kv_channels"), "num_attention_heads": heads, "hidden_size": args.get("hidden_size")}
    if args.get("group_query_attention"):
        shape["num_key_value_heads"] = args.get("num_query_groups")
    needed = {
        **{"position_embedding_type": "rope", "normalization": "RMSNorm", "norm_epsilon": NORM_EPS, "swiglu": True},
        **{"add_bias_linear": False, "glu_linear_offset": 0.0, "activation_func_clamp_value": None},
        **{"rotary_percent": 1.0, "rotary_interleaved": False, "use_rope_scaling": False, "no_rope_freq": None},
        **{"rotary_seq_len_interpolation_factor": 1, "window_attn_skip_freq": None, "apply_layernorm_1p": False},
        **{"qk_l2_norm": False, "softmax_type": "vanilla", "softmax_scale": None},
    }
    if experts:
        balancing = args.get("moe_router_load_balancing_type")
        needed |= {
            **{"moe_router_score_function": "softmax", "moe_router_topk_scaling_factor": 1.0},
            **{"moe_router_group_topk": None, "moe_router_topk_limited_devices": None},
            **{"moe_shared_expert_gate": False, "moe_apply_probs_on_input": False},
            **{"moe_expert_capacity_factor": None, "moe_router_force_load_balancing": False},
            # Sinkhorn's router weights experts otherwise; the other ways differ in a loss alone.
            "moe_router_load_balancing_type": "aux_loss" if "sinkhorn" in (balancing or ()) else balancing,
        }
    # Options of this kind leave the names and shapes of tensors as they are; of others a tensor is refused by its name.
    for name, value in needed.items():
        if args.get(name) not in (value, None):
            raise CheckpointError(f"{where} has {name}={args[name]}, but this trainer knows only {value}")
    moe: dict[str, Any] = {"router": "dense"}
    if experts:
        hidden = args.get("moe_ffn_hidden_size") or args.get("ffn_hidden_size")
        moe = {"router": "topk", "num_experts": experts, "expert_hidden": hidden, "top_k": top_k}
        moe["balance_weight"] = args.get("moe_aux_loss_coeff") or 0.0
        moe["shared_experts"] = _shared_experts(args, hidden, where)
    try:
        model = {
            # Rows that pad cannot be told from tokens where vocab_size is not recorded.
            **{"vocab_size": args.get("vocab_size") or args["padded_vocab_size"], "layers": args["num_layers"]},
            **{"width": args["hidden_size"], "heads": args["num_attention_heads"]},
            **{"head_width": head_width_of(shape), "kv_heads": kv_heads_of(shape)},
            **{"qkv_bias": bool(args.get("add_qkv_bias")), "qk_norm": "heads" if args.get("qk_layernorm") else "none"},
            **{"sequence_length": args["max_position_embeddings"], "rope_theta": args.get("rotary_base", 10000)},
            "sliding_window": _window(args, where),
            "tie_embeddings": not args.get("untie_embeddings_and_output_weights", True),
            **(_placement(args, where) if experts else {}),
            **{"dense_hidden": args["ffn_hidden_size"]},
        }
    except KeyError as error:
        raise CheckpointError(f"{where} records no {error.args[0]}, so its model is not known") from None
    normalised = not args.get("moe_router_pre_softmax", False) if experts else None
    return {"model": model, "moe": moe, "router": {"softmax_over": softmax_over_of(normalised, top_k)}}


def _shared_experts(args: dict[str, Any], hidden: Any, where: str) -> int:
    """``moe.shared_experts`` of a hidden width of all shared experts together."""
    together = args.get("moe_shared_expert_intermediate_size") or 0
    if together and (not hidden or together % hidden):
        raise CheckpointError(
            f"{where} has moe_shared_expert_intermediate_size={together}, but this trainer knows only whole experts of "
            f"width {hidden}"
        )
    return together // hidden if together else 0


def _window(args: dict[str, Any], where: str) -> int:
    """``model.sliding_window`` of Megatron's ``window_size``: how many tokens before a token and after it are seen."""
    before, after = args.get("window_size") or (-1, 0)
    if after != 0:
        raise CheckpointError(f"{where} has window_size={(before, after)}, but this trainer knows only causal windows")
    return int(before) + 1


def _placement(args: dict[str, Any], where: str) -> dict[str, int]:
    """``model.moe_every`` and ``model.dense_layers`` of Megatron's ``moe_layer_freq``.

    A number n means blocks 0, n, 2n, …; a list says it.
    """
    frequency, layers = args.get("moe_layer_freq", 1), args["num_layers"]
    if not isinstance(frequency, list):
        frequency = [int(block % frequency == 0) for block in range(layers)]
    placement = placement_of([block for block, sparse in enumerate(frequency) if sparse], layers)
    if placement is None:
        raise CheckpointError(
            f"{where} has experts in blocks {frequency}; this trainer has them in the last of every n blocks, "
            "after the first k"
        )
    return placement
