"""Hints on unknown names: the option that other trainers call so, and the nearest known name."""

from __future__ import annotations

import difflib


def _by_name(asked: dict[str, str], said: dict[str, str]) -> dict[str, str]:
    """Name -> hint, from the names that others have for our options, and from those that a sentence answers."""
    hints = {f"did you mean {option}?": names for option, names in asked.items()} | said
    return {name: hint for hint, names in hints.items() for name in names.split()}


MEANINGS = _by_name(
    {
        "train.precision": (
            "dtype precision bf16 fp16 fp32 bfloat16 float16 amp half mixed_precision torch_dtype autocast"
        ),
        "train.sequence_parallel_size": "sp sp_size sequence_parallel ulysses context_parallel_size cp cp_size",
        "train.learning_rate": "lr learning_rate max_lr peak_lr",
        "train.min_learning_rate_ratio": "min_lr min_lr_ratio final_lr lr_min",
        "train.batch_size": "batch batch_size global_batch_size train_batch_size",
        "train.steps": "steps max_steps train_steps iterations train_iters",
        "train.warmup_steps": "warmup num_warmup_steps lr_warmup_steps warmup_ratio",
        "train.grad_clip": "clip max_grad_norm clip_grad gradient_clipping grad_norm",
        "train.weight_decay": "wd decay_weight l2",
        "train.beta1": "adam_beta1 b1",
        "train.beta2": "adam_beta2 b2",
        "train.beta1 and train.beta2": "betas",
        "train.activation_checkpointing": "gradient_checkpointing recompute checkpoint_activations",
        "model.layers": "num_layers n_layer n_layers depth num_hidden_layers blocks",
        "model.width": "hidden_size d_model n_embd dim embed_dim hidden_dim",
        "model.heads": "num_heads n_head n_heads num_attention_heads",
        "model.head_width": "head_dim kv_channels",
        "model.kv_heads": "num_key_value_heads num_query_groups n_kv_heads num_kv_heads",
        "model.sequence_length": (
            "seq_len seq_length block_size context context_length max_length max_position_embeddings n_positions n_ctx "
            "max_seq_len"
        ),
        "moe.expert_hidden": "intermediate_size ffn_dim d_ff ffn_hidden_size expert_width",
        "moe.num_experts": "n_experts experts num_local_experts expert_count",
        "moe.top_k": "k topk num_experts_per_tok experts_per_token",
        "moe.balance_weight": "aux_loss_coef router_aux_loss_coef moe_aux_loss_coeff",
        "codebook.num_codes": "n_codes codebook_size num_embeddings",
        "run.run_dir": "output_dir out_dir output save_dir log_dir",
        "run.eval_every": "eval_steps eval_interval val_every validate_every",
        "run.save_every": "save_steps save_interval checkpoint_every",
        "run.log_to": "report_to log_with wandb mlflow tensorboard logger",
        "run.log_every": "logging_steps log_interval log_steps",
        "run.keep_last": "save_total_limit keep_checkpoints max_checkpoints",
        "data.path": "dataset data_path train_data train_file corpus",
        "data.valid_path": "valid_data validation_data valid_file val_data",
        "train.seed": "random_seed rng_seed",
    },
    {
        "it is train_micro_batch_size_per_gpu of the DeepSpeed JSON": (
            "micro_batch_size micro_batch microbatch_size mbs per_device_batch_size per_device_train_batch_size "
            "per_gpu_batch_size train_micro_batch_size_per_gpu"
        ),
        "the optimizer is the DeepSpeed JSON's (optimizer.type and optimizer.params)": (
            "optimizer optim adam adamw eps epsilon adam_epsilon"
        ),
        "it is zero_optimization of the DeepSpeed JSON": (
            "zero zero_stage stage zero_optimization offload offload_optimizer"
        ),
        "it is gradient_accumulation_steps of the DeepSpeed JSON": (
            "gradient_accumulation_steps gradient_accumulation accumulation_steps accumulate_grad_batches"
        ),
        "the schedule is train.warmup_steps and train.min_learning_rate_ratio (or scheduler in the DeepSpeed JSON)": (
            "scheduler lr_scheduler lr_scheduler_type lr_schedule lr_decay_style"
        ),
        "give --ep_size": "ep ep_size expert_parallel expert_parallel_size autoep_size",
        "only data, expert (--ep_size) and sequence parallelism (--sp_size) are supported here": (
            "tensor_parallel tp tp_size pipeline_parallel pp pp_size"
        ),
        "there is no dropout here; leave it out": "dropout hidden_dropout attention_dropout",
    },
)
"""Hints by the last part of a name; looked at only where the name is no field of ours."""

IN_DEEPSPEED_JSON = _by_name(
    {
        "train_micro_batch_size_per_gpu": (
            "micro_batch_size micro_batch micro_batch_size_per_gpu per_device_train_batch_size"
        ),
        "train_batch_size": "batch_size global_batch_size",
        "zero_optimization": "zero zero_stage stage offload",
        "gradient_clipping": "max_grad_norm grad_clip clip_grad",
    },
    {
        "did you mean optimizer.params.lr (or train.learning_rate of the run)?": "lr learning_rate",
        'write "bf16": {"enabled": true} (or "fp16")': "dtype precision torch_dtype amp",
        "it belongs to optimizer.params": "weight_decay betas eps torch_adam fused",
        'write "sequence_parallel_size": N (or give --sp_size)': "sp_size sequence_parallel",
        'write "expert_parallel": {"autoep_size": N} (or give --ep_size)': "ep_size autoep_size",
        "it is a section of the run configuration: give it with --config or --set": (
            "model moe router codebook train data run finetune"
        ),
    },
)
"""Hints on top-level keys of the DeepSpeed JSON."""

IN_PARAMS = _by_name(
    {
        "lr": "learning_rate max_lr",
        "weight_decay": "wd decay",
    },
    {
        "write gradient_clipping at the top level": "max_grad_norm gradient_clipping clip_grad",
        'write "betas": [beta1, beta2]': "beta1 beta2 beta",
    },
)
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
