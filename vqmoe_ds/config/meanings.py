"""Hints on unknown names: the option that other trainers call so, and the nearest known name."""

from __future__ import annotations

import difflib

_PRECISION = "did you mean train.precision?"
_MICRO = "it is train_micro_batch_size_per_gpu of the DeepSpeed JSON"
_OPTIMIZER = "the optimizer is the DeepSpeed JSON's (optimizer.type and optimizer.params)"
_ZERO = "it is zero_optimization of the DeepSpeed JSON"
_CONTEXT = "did you mean model.sequence_length?"

MEANINGS = {
    **dict.fromkeys(("dtype", "precision", "bf16", "fp16", "fp32", "bfloat16", "float16", "amp", "half"), _PRECISION),
    **dict.fromkeys(("mixed_precision", "torch_dtype", "autocast"), _PRECISION),
    **dict.fromkeys(("micro_batch_size", "micro_batch", "microbatch_size", "mbs", "per_device_batch_size"), _MICRO),
    **dict.fromkeys(("per_device_train_batch_size", "per_gpu_batch_size", "train_micro_batch_size_per_gpu"), _MICRO),
    **dict.fromkeys(("optimizer", "optim", "adam", "adamw", "eps", "epsilon", "adam_epsilon"), _OPTIMIZER),
    **dict.fromkeys(("zero", "zero_stage", "stage", "zero_optimization", "offload", "offload_optimizer"), _ZERO),
    **dict.fromkeys(
        ("gradient_accumulation_steps", "gradient_accumulation", "accumulation_steps", "accumulate_grad_batches"),
        "it is gradient_accumulation_steps of the DeepSpeed JSON",
    ),
    **dict.fromkeys(
        ("scheduler", "lr_scheduler", "lr_scheduler_type", "lr_schedule", "lr_decay_style"),
        "the schedule is train.warmup_steps and train.min_learning_rate_ratio (or scheduler in the DeepSpeed JSON)",
    ),
    **dict.fromkeys(("ep", "ep_size", "expert_parallel", "expert_parallel_size", "autoep_size"), "give --ep_size"),
    **dict.fromkeys(
        ("sp", "sp_size", "sequence_parallel", "ulysses", "context_parallel_size", "cp", "cp_size"),
        "did you mean train.sequence_parallel_size?",
    ),
    **dict.fromkeys(
        ("tensor_parallel", "tp", "tp_size", "pipeline_parallel", "pp", "pp_size"),
        "only data, expert (--ep_size) and sequence parallelism (--sp_size) are supported here",
    ),
    **dict.fromkeys(("dropout", "hidden_dropout", "attention_dropout"), "there is no dropout here; leave it out"),
    **dict.fromkeys(("lr", "learning_rate", "max_lr", "peak_lr"), "did you mean train.learning_rate?"),
    **dict.fromkeys(("min_lr", "min_lr_ratio", "final_lr", "lr_min"), "did you mean train.min_learning_rate_ratio?"),
    **dict.fromkeys(("batch", "batch_size", "global_batch_size", "train_batch_size"), "did you mean train.batch_size?"),
    **dict.fromkeys(("steps", "max_steps", "train_steps", "iterations", "train_iters"), "did you mean train.steps?"),
    **dict.fromkeys(
        ("warmup", "num_warmup_steps", "lr_warmup_steps", "warmup_ratio"), "did you mean train.warmup_steps?"
    ),
    **dict.fromkeys(
        ("clip", "max_grad_norm", "clip_grad", "gradient_clipping", "grad_norm"), "did you mean train.grad_clip?"
    ),
    **dict.fromkeys(("wd", "decay_weight", "l2"), "did you mean train.weight_decay?"),
    **dict.fromkeys(("adam_beta1", "b1"), "did you mean train.beta1?"),
    **dict.fromkeys(("adam_beta2", "b2"), "did you mean train.beta2?"),
    "betas": "did you mean train.beta1 and train.beta2?",
    **dict.fromkeys(
        ("gradient_checkpointing", "recompute", "checkpoint_activations"),
        "did you mean train.activation_checkpointing?",
    ),
    **dict.fromkeys(
        ("num_layers", "n_layer", "n_layers", "depth", "num_hidden_layers", "blocks"), "did you mean model.layers?"
    ),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "hidden_dim"), "did you mean model.width?"
    ),
    **dict.fromkeys(("num_heads", "n_head", "n_heads", "num_attention_heads"), "did you mean model.heads?"),
    **dict.fromkeys(("head_dim", "kv_channels"), "did you mean model.head_width?"),
    **dict.fromkeys(
        ("num_key_value_heads", "num_query_groups", "n_kv_heads", "num_kv_heads"), "did you mean model.kv_heads?"
    ),
    **dict.fromkeys(("seq_len", "seq_length", "block_size", "context", "context_length", "max_length"), _CONTEXT),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), _CONTEXT),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "d_ff", "ffn_hidden_size", "expert_width"), "did you mean moe.expert_hidden?"
    ),
    **dict.fromkeys(("n_experts", "experts", "num_local_experts", "expert_count"), "did you mean moe.num_experts?"),
    **dict.fromkeys(("k", "topk", "num_experts_per_tok", "experts_per_token"), "did you mean moe.top_k?"),
    **dict.fromkeys(
        ("aux_loss_coef", "router_aux_loss_coef", "moe_aux_loss_coeff"), "did you mean moe.balance_weight?"
    ),
    **dict.fromkeys(("n_codes", "codebook_size", "num_embeddings"), "did you mean codebook.num_codes?"),
    **dict.fromkeys(("output_dir", "out_dir", "output", "save_dir", "log_dir"), "did you mean run.run_dir?"),
    **dict.fromkeys(("eval_steps", "eval_interval", "val_every", "validate_every"), "did you mean run.eval_every?"),
    **dict.fromkeys(("save_steps", "save_interval", "checkpoint_every"), "did you mean run.save_every?"),
    **dict.fromkeys(("report_to", "log_with", "wandb", "mlflow", "tensorboard", "logger"), "did you mean run.log_to?"),
    **dict.fromkeys(("logging_steps", "log_interval", "log_steps"), "did you mean run.log_every?"),
    **dict.fromkeys(("save_total_limit", "keep_checkpoints", "max_checkpoints"), "did you mean run.keep_last?"),
    **dict.fromkeys(("dataset", "data_path", "train_data", "train_file", "corpus"), "did you mean data.path?"),
    **dict.fromkeys(("valid_data", "validation_data", "valid_file", "val_data"), "did you mean data.valid_path?"),
    **dict.fromkeys(("random_seed", "rng_seed"), "did you mean train.seed?"),
}
"""Hints by the last part of a name; looked at only where the name is no field of ours."""

IN_DEEPSPEED_JSON = {
    **dict.fromkeys(("lr", "learning_rate"), "did you mean optimizer.params.lr (or train.learning_rate of the run)?"),
    **dict.fromkeys(
        ("micro_batch_size", "micro_batch", "micro_batch_size_per_gpu"), "did you mean train_micro_batch_size_per_gpu?"
    ),
    **dict.fromkeys(("per_device_train_batch_size",), "did you mean train_micro_batch_size_per_gpu?"),
    **dict.fromkeys(("batch_size", "global_batch_size"), "did you mean train_batch_size?"),
    **dict.fromkeys(("dtype", "precision", "torch_dtype", "amp"), 'write "bf16": {"enabled": true} (or "fp16")'),
    **dict.fromkeys(("zero", "zero_stage", "stage", "offload"), "did you mean zero_optimization?"),
    **dict.fromkeys(("max_grad_norm", "grad_clip", "clip_grad"), "did you mean gradient_clipping?"),
    **dict.fromkeys(("weight_decay", "betas", "eps", "torch_adam", "fused"), "it belongs to optimizer.params"),
    **dict.fromkeys(("sp_size", "sequence_parallel"), 'write "sequence_parallel_size": N (or give --sp_size)'),
    **dict.fromkeys(("ep_size", "autoep_size"), 'write "expert_parallel": {"autoep_size": N} (or give --ep_size)'),
    **dict.fromkeys(
        ("model", "moe", "router", "codebook", "train", "data", "run", "finetune"),
        "it is a section of the run configuration: give it with --config or --set",
    ),
}
"""Hints on top-level keys of the DeepSpeed JSON."""

IN_PARAMS = {
    **dict.fromkeys(("max_grad_norm", "gradient_clipping", "clip_grad"), "write gradient_clipping at the top level"),
    **dict.fromkeys(("learning_rate", "max_lr"), "did you mean lr?"),
    **dict.fromkeys(("beta1", "beta2", "beta"), 'write "betas": [beta1, beta2]'),
    **dict.fromkeys(("wd", "decay"), "did you mean weight_decay?"),
}
"""Hints on ``optimizer.params``."""


def elsewhere(name: str, before: str = "") -> str:
    """The end of a sentence on an unknown name that another trainer gives to one of our options; else nothing.

    Args:
        name: dotted; its last part with a meaning counts (``bf16.enabled`` is a precision).
        before: put in front of it.
    """
    parts = [part for part in name[-1000:].lower().replace("-", "_").split(".") if part in MEANINGS]
    return before + MEANINGS[parts[-1]] if parts else ""


def nearest_key(name: str, known: list[str]) -> str:
    """The end of an error sentence that names the nearest known key by its letters, or all."""
    name = name[:100]  # longer ones take time and are near nothing
    # Reversed: of names with the same last part the first is kept.
    last = {key.rsplit(".", 1)[-1]: key for key in reversed(known)}
    close = difflib.get_close_matches(name, known, 1, 0.5)
    if not close:
        close = [last[m] for m in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(last), 1, 0.5)]
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
