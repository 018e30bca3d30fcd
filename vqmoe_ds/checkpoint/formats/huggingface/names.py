"""One table of names and one of options: what a tensor or an option of ours is called in a Hugging Face folder.

Three architectures: ``vqmoe``, our own model there, and two stock ones: ``mixtral``, which models with a top-k router
of two or more experts in every block are equal to, and ``llama``, which dense models are (options of these two are in
``stock.py``). Both tables are read in both directions.

Legend: D width, H expert hidden width, N experts, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from vqmoe_ds.checkpoint.formats.huggingface.stock import (
    NORM_EPS,
    head_width_of,
    kv_heads_of,
    softmax_over_of,
    stock_options,
    weighs_over_all,
)
from vqmoe_ds.checkpoint.io.archive import Stored
from vqmoe_ds.config.routers import routers
from vqmoe_ds.config.schema import MoEConfig, QKNorm, RunConfig
from vqmoe_ds.runtime.errors import CheckpointError

ARCHITECTURES = ("vqmoe", "mixtral", "llama")
CODE_FILES = ("configuration_vqmoe.py", "attention_vqmoe.py", "routing_vqmoe.py", "modeling_vqmoe.py")


@dataclass(frozen=True)
class Part:
    """One tensor of a Hugging Face folder: a tensor of ours, or its rows ``first`` to ``end``, or one expert of it."""

    name: str
    source: str
    rows: tuple[int, int] | None = None
    expert: int | None = None

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the part of a tensor of shape ``whole``."""
        if self.expert is not None:
            return whole[1:]
        return whole if self.rows is None else (self.rows[1] - self.rows[0], *whole[1:])

    def start(self, whole: tuple[int, ...]) -> int:
        """Place of its first value in the flattened whole; its values follow each other there."""
        first = self.expert if self.expert is not None else (self.rows or (0, 0))[0]
        return first * math.prod(whole[1:])


INFERENCE_BUFFERS = {
    "bank.codes_LKC": "model.codebook.codes",
    "bank.code_map_LK": "model.codebook.code_map",
    "bank.projection_DC": "model.codebook.projection",
    "source.table_VD": "model.codebook.source_table",
    "token_table_LV": "model.token_table",
}
"""Buffers that routes follow from; the others serve the learning of codes and go to a file of their own."""


def parts_of(config: RunConfig, arch: str) -> list[Part]:
    """Every parameter of the folder, those of one source side by side."""
    parts = [Part("model.embed_tokens.weight", "embed.weight")]
    for block in range(config.model.layers):
        parts += _block_parts(config, block, arch)
    parts.append(Part("model.norm.weight", "norm.weight"))
    # transformers' own names of the heads of its ForSequenceClassification and ForCausalLM classes.
    head = "score" if config.finetune.classes else "lm_head"
    # A tied weight stands there once: transformers 5 does not tie two tensors of a file that differ.
    return parts if config.ties_head else [*parts, Part(f"{head}.weight", "head.weight")]


def _block_parts(config: RunConfig, block: int, arch: str) -> Iterator[Part]:
    ours, theirs, first, rows = f"blocks.{block}.", f"model.layers.{block}.", 0, {}
    # The order of the rows in attention.qkv: split_heads of models/rotary.py cuts them so.
    for letter in "qkv":
        end = first + (config.model.attention_width if letter == "q" else config.model.kv_width)
        rows[letter], first = (first, end), end
    yield Part(theirs + "input_layernorm.weight", ours + "attention_norm.weight")
    for letter in "qkv" if config.model.qkv_bias else "":
        yield Part(f"{theirs}self_attn.{letter}_proj.bias", ours + "attention.qkv_bias", rows[letter])
    for letter in "qkv":
        yield Part(f"{theirs}self_attn.{letter}_proj.weight", ours + "attention.qkv.weight", rows[letter])
    yield Part(theirs + "self_attn.o_proj.weight", ours + "attention.out.weight")
    if config.model.qk_norm is not QKNorm.NONE:
        for letter in "qk":
            yield Part(f"{theirs}self_attn.{letter}_norm.weight", f"{ours}attention.{letter}_norm.weight")
    yield Part(theirs + "post_attention_layernorm.weight", ours + "mlp_norm.weight")
    if not is_sparse(config, block):
        for name in ("gate", "up", "down"):
            yield Part(f"{theirs}mlp.{name}_proj.weight", f"{ours}mlp.{name}.weight")
    elif arch == "mixtral":
        for name in ("w1", "w2", "w3"):
            for expert in range(config.moe.num_experts):
                expert_name = f"{theirs}block_sparse_moe.experts.{expert}.{name}.weight"
                yield Part(expert_name, f"{ours}mlp.experts.{name}", expert=expert)
        yield Part(theirs + "block_sparse_moe.gate.weight", ours + "mlp.router.gate.weight")
    else:
        for name, our_name in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
            yield Part(f"{theirs}mlp.experts.{name}_proj", f"{ours}mlp.experts.{our_name}")
        for name in ("gate", "up", "down") if config.moe.shared_experts else ():
            yield Part(f"{theirs}mlp.shared_experts.{name}_proj.weight", f"{ours}mlp.shared.{name}.weight")
        if config.moe.shared_gate:
            yield Part(f"{theirs}mlp.shared_expert_gate.weight", f"{ours}mlp.shared.scale.weight")
        yield from _router_parts(config, ours + "mlp.router.", theirs + "mlp.")


def _router_parts(config: RunConfig, ours: str, theirs: str) -> Iterator[Part]:
    facts = config.moe.facts
    gate = facts.linear_gate(config.moe)
    if gate is not None:
        yield Part(theirs + "gate.weight", ours + gate)
    if gate is not None and facts.uses_codebook:
        yield Part(theirs + "path_gate.weight", ours + "path_gate.weight")
        yield Part(theirs + "path_gate.bias", ours + "path_gate.bias")
    if facts.told_rows(config.router) > 1 and facts.weights_rows(config):
        yield Part(theirs + "pair_gate.weight", ours + "gate.weight")
        yield Part(theirs + "pair_gate.bias", ours + "gate.bias")


def unstacked(weights: dict[str, Stored], arch: str) -> dict[str, Stored]:
    """Weights by the names of transformers 4, expert by expert, where transformers 5 stacked all experts of a block.

    That writes ``mlp.experts.gate_up_proj`` ``[N, 2 H, D]`` and ``mlp.experts.down_proj`` ``[N, D, H]`` under
    ``save_original_format=False``.

    Args:
        weights: of ``read_weights``.
        arch: ``model_type``; Mixtral has names of its own.

    Raises:
        CheckpointError: a stack that is none.
    """
    mixtral, found = arch == "mixtral", dict(weights)
    gate, down, up = ("w1", "w2", "w3") if mixtral else ("gate_proj", "down_proj", "up_proj")
    for name in [name for name in weights if name.endswith(".mlp.experts.gate_up_proj")]:
        block = name.removesuffix("experts.gate_up_proj")
        ours = block.replace(".mlp.", ".block_sparse_moe.") if mixtral else block
        both, last = found.pop(name), found.pop(block + "experts.down_proj", None)
        if last is None or len(both.shape) != 3 or last.shape != (both.shape[0], both.shape[2], both.shape[1] // 2):
            raise CheckpointError(f"{both.path}: {name} has no experts.down_proj of its shape beside it; copy it again")
        hidden = last.shape[2]
        for expert in range(both.shape[0]):
            # transformers cuts the product with gate_up_proj by chunk(2): the rows of the gate come first.
            for matrix, stack, rows in (
                (gate, both, (0, hidden)),
                (up, both, (hidden, 2 * hidden)),
                (down, last, None),
            ):
                found[f"{ours}experts.{expert}.{matrix}.weight"] = _slice_of(stack, expert, rows)
        if mixtral and block + "gate.weight" in found:
            found[ours + "gate.weight"] = found.pop(block + "gate.weight")
    return found


def _slice_of(stack: Stored, expert: int, rows: tuple[int, int] | None) -> Stored:
    """One expert of a stack, or rows of it."""
    # All tensors of safetensors are dense, so an expert, and rows of it, are one stretch of the file.
    part = Part("", "", expert=expert)
    shape, start = part.shape(stack.shape), part.start(stack.shape)
    if rows is not None:
        start += rows[0] * math.prod(shape[1:])
        shape = rows[1] - rows[0], *shape[1:]
    return Stored(stack.path, stack.offset + start * stack.dtype.itemsize, stack.dtype, shape)


def why_not_read(options: dict[str, Any], weights: dict[str, Stored]) -> str | None:
    """Why the weights beside a ``config.json`` are not, as they stand, those of the model; None where they are.

    Args:
        options: of ``config.json``.
        weights: of ``unstacked``.
    """
    if options.get("quantization_config") is not None:
        return "its weights are quantised (quantization_config); dequantise them first"
    for name, stored in weights.items():
        if not stored.dtype.is_floating_point and name not in INFERENCE_BUFFERS.values():
            kind = str(stored.dtype).removeprefix("torch.")
            return f"{name} holds whole numbers ({kind}), as quantised weights do; dequantise it, or delete it if none"
    head, embedding = weights.get("lm_head.weight"), weights.get("model.embed_tokens.weight")
    if options.get("tie_word_embeddings") and head and embedding and not torch.equal(head.whole(), embedding.whole()):
        # transformers 4 takes the embedding then, and 5 the head.
        return (
            "tie_word_embeddings is true, and lm_head.weight is not the embedding; say false if it was trained by "
            "itself, else delete it"
        )
    return None


def is_sparse(config: RunConfig, block: int) -> bool:
    """Tell whether a block has experts."""
    return config.moe.facts.has_experts and block in config.model.moe_blocks


def placement_of(sparse: list[int], layers: int) -> dict[str, int] | None:
    """``moe_every`` and ``dense_layers`` of a model whose blocks ``sparse`` have experts; None where ours cannot."""
    if not sparse:
        return None
    step = sparse[1] - sparse[0] if len(sparse) > 1 else 1
    # Blocks as ModelConfig.moe_blocks has them.
    for every, first in ((sparse[0] + 1, 0), (step, sparse[0])):
        if sparse == [block for block in range(every - 1, layers, every) if block >= first]:
            return {"moe_every": every, "dense_layers": first}
    return None


def shapes_of(config: RunConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of our model, by its name at expert-parallel size 1."""
    model, moe = config.model, config.moe
    width, hidden, experts, inner = model.width, moe.expert_hidden, moe.num_experts, model.attention_width
    told = moe.facts.told_rows(config.router)
    full = model.qk_norm is QKNorm.FULL
    # The first ending that fits a name counts: norms of heads end in norm.weight, too, and so stand before it.
    endings = {
        "attention.q_norm.weight": (inner if full else inner // model.heads,),
        "attention.k_norm.weight": (model.kv_width if full else inner // model.heads,),
        "embed.weight": (model.vocab_size, width),
        "head.weight": (len(config.finetune.classes) or model.vocab_size, width),
        "norm.weight": (width,),
        "attention.qkv.weight": (inner + 2 * model.kv_width, width),
        "attention.qkv_bias": (inner + 2 * model.kv_width,),
        "attention.out.weight": (width, inner),
        "mlp.gate.weight": (config.dense_hidden, width),
        "mlp.up.weight": (config.dense_hidden, width),
        "mlp.down.weight": (width, config.dense_hidden),
        "shared.scale.weight": (1, width),
        "shared.gate.weight": (moe.shared_experts * hidden, width),
        "shared.up.weight": (moe.shared_experts * hidden, width),
        "shared.down.weight": (width, moe.shared_experts * hidden),
        "experts.w1": (experts, hidden, width),
        "experts.w2": (experts, width, hidden),
        "experts.w3": (experts, hidden, width),
        "router.gate.weight": (told if told > 1 else experts, width),
        "router.gate.bias": (told,),
        "continuous.gate.weight": (experts, width),
        "path_gate.weight": (2, width),
        "path_gate.bias": (2,),
    }
    names = dict.fromkeys(part.source for part in parts_of(config, "vqmoe"))
    return {name: next(shape for end, shape in endings.items() if name.endswith(end)) for name in names}


EXPERT_TABLES = ("model.codebook.code_map", "model.token_table")
"""Buffers of a folder that hold numbers of experts."""


def buffer_shapes(config: RunConfig, source_table: bool) -> dict[str, tuple[int, ...]]:
    """Shape of every buffer that routes of a ``vqmoe`` folder follow from, by its name there.

    Args:
        config: of the run.
        source_table: as of ``hf_options``.
    """
    model, moe, book = config.model, config.moe, config.codebook
    layers = sum(is_sparse(config, block) for block in range(model.layers))
    shapes: dict[str, tuple[int, ...]] = {}
    if moe.facts.uses_token_table:
        shapes["model.token_table"] = moe.facts.table_shape(config, layers)
    if not moe.facts.uses_codebook:
        return shapes
    codes = book.num_codes or moe.num_experts
    shapes["model.codebook.codes"] = (layers, codes, book.code_dim or model.width)
    shapes["model.codebook.code_map"] = (layers, codes)
    if book.code_dim:
        shapes["model.codebook.projection"] = (model.width, book.code_dim)
    if source_table:
        shapes["model.codebook.source_table"] = (model.vocab_size, model.width)
    return shapes


def why_not_exported(moe: MoEConfig) -> str | None:
    """Why the Hugging Face model cannot compute the router; None where it can."""
    if moe.facts.exported_as is not None:
        return None
    names = ", ".join(name for name, kind in routers().items() if kind.exported_as is not None)
    return f"moe.router={moe.router} is not among the routers of the exported model ({names})"


# ---------------------------------------------------------------- options

# Folders that exist hold these names: an option that is added here needs its old meaning in NEWER, or they are refused.
_SAME = {
    "vocab_size": "model.vocab_size",
    "hidden_size": "model.width",
    "num_hidden_layers": "model.layers",
    "num_attention_heads": "model.heads",
    "qk_norm": "model.qk_norm",
    "qkv_bias": "model.qkv_bias",
    "max_position_embeddings": "model.sequence_length",
    "tie_word_embeddings": "model.tie_embeddings",
    "rope_theta": "model.rope_theta",
    "rope_scaling_type": "model.rope_scaling",
    "rope_factor": "model.rope_factor",
    "rope_original_length": "model.rope_original_length",
    "moe_every": "model.moe_every",
    "first_k_dense_replace": "model.dense_layers",
    "moe_intermediate_size": "moe.expert_hidden",
    "router": "moe.router",
    "num_experts": "moe.num_experts",
    "n_shared_experts": "moe.shared_experts",
    "shared_expert_gate": "moe.shared_gate",
    "num_experts_per_tok": "moe.top_k",
    "expert_input_norm": "moe.input_norm",
    "expert_output_norm": "moe.output_norm",
    "code_blend": "moe.code_blend",
    "router_aux_loss_coef": "moe.balance_weight",
    "router_z_loss_coef": "moe.z_loss_weight",
    "code_groups": "codebook.groups",
    "code_source": "codebook.source",
    "context_window": "codebook.context_window",
    "context_decay": "codebook.context_decay",
    "position_weight": "codebook.position_weight",
    "source_block": "codebook.source_block",
    "normalize_source": "codebook.normalize_source",
    "code_dim": "codebook.code_dim",
    "code_distance": "codebook.distance",
    "soft_output": "codebook.soft_output",
    "commitment_coef": "codebook.commitment_weight",
}
NEWER = {
    "head_dim": None,
    "qk_norm": "none",
    "norm_topk_prob": None,
    "pair_gate": True,
    "expert_input_norm": False,
    "expert_output_norm": False,
    "code_groups": 1,
    "num_key_value_heads": None,
    "n_shared_experts": 0,
    "first_k_dense_replace": 0,
    "shared_expert_gate": False,
    "qkv_bias": False,
    "rope_scaling_type": "none",
    "rope_factor": 1.0,
    "rope_original_length": 0,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
"""Options that folders of earlier versions lack, and what they mean there."""


def hf_options(config: RunConfig, arch: str, source_table: bool = False) -> dict[str, Any]:
    """``config.json`` without tokens and number type.

    Args:
        config: of the run.
        arch: one of ``ARCHITECTURES``.
        source_table: whether codes look at a moving average of the embeddings (the average has begun).

    Raises:
        CheckpointError: the architecture cannot compute what this model computes; the option is named.
    """
    if arch != "vqmoe":
        return stock_options(config, arch)
    reason = why_not_exported(config.moe)
    if reason is not None:
        raise CheckpointError(f"{reason}; --to portable and --to deepspeed take it")
    run = config.model_dump(mode="json")
    # A table from a file is exported as hash_token, whose model looks experts up in whatever table is there.
    run["moe"]["router"] = config.moe.facts.exported_as
    options = {name: run[path.split(".")[0]][path.split(".")[1]] for name, path in _SAME.items()}
    classes = dict(enumerate(config.finetune.classes))
    labels = {
        "id2label": {str(number): name for number, name in classes.items()},
        "label2id": {name: number for number, name in classes.items()},
        "classifier_pool": config.finetune.pool.value,
        "problem_type": "single_label_classification",
    }
    model = "VQMoEForSequenceClassification" if classes else "VQMoEForCausalLM"
    return {
        "architectures": [model],
        "model_type": "vqmoe",
        "auto_map": {
            "AutoConfig": "configuration_vqmoe.VQMoEConfig",
            "AutoModel": "modeling_vqmoe.VQMoEModel",
            # Of a language model as well, for a classifier that is fine-tuned from it.
            "AutoModelForSequenceClassification": "modeling_vqmoe.VQMoEForSequenceClassification",
            f"AutoModelFor{model.removeprefix('VQMoEFor')}": f"modeling_vqmoe.{model}",
        },
        **options,
        **(labels if classes else {}),
        "head_dim": config.model.attention_width // config.model.heads,
        "num_key_value_heads": config.model.kv_heads or config.model.heads,
        # transformers takes null for no window.
        "sliding_window": config.model.sliding_window or None,
        "norm_topk_prob": not weighs_over_all(config),
        "pair_gate": getattr(config.router, "gated", True),
        "ngrams": getattr(config.router, "ngrams", 2),
        "intermediate_size": config.dense_hidden,
        "num_codes": config.codebook.num_codes or config.moe.num_experts,
        "source_table": source_table,
        "rms_norm_eps": NORM_EPS,
        "use_cache": True,
    }


def run_sections(options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The sections of a run configuration that describe the model, from a ``config.json`` of the ``vqmoe`` kind.

    Raises:
        CheckpointError: an option is missing, or has a value that the trainer cannot compute.
    """
    if options.get("rms_norm_eps", NORM_EPS) != NORM_EPS:
        eps = options["rms_norm_eps"]
        raise CheckpointError(f"config.json has rms_norm_eps={eps}, but this trainer knows only {NORM_EPS}")
    options = {**NEWER, **options}
    sections: dict[str, dict[str, Any]] = {"model": {}, "moe": {}, "codebook": {}, "router": {}}
    try:
        for name, path in _SAME.items():
            section, field = path.split(".")
            sections[section][field] = options[name]
        sections["model"]["head_width"] = head_width_of(options)
        sections["model"]["kv_heads"] = kv_heads_of(options)
        sections["model"]["sliding_window"] = options["sliding_window"] or 0
        sections["model"]["dense_hidden"] = options["intermediate_size"]
        sections["router"]["softmax_over"] = softmax_over_of(options["norm_topk_prob"], options["num_experts_per_tok"])
        if options["router"] in ("hash_and_code", "hash_ngrams"):
            sections["router"]["gated"] = options["pair_gate"]
        if options["router"] == "hash_ngrams":
            sections["router"]["ngrams"] = options["ngrams"]
        sections["codebook"]["num_codes"] = options["num_codes"]
        # config.json holds no momentum, which changes no logits; above 0 the trainer keeps the table and looks at it.
        sections["codebook"]["source_momentum"] = 0.999 if options["source_table"] else 0.0
    except KeyError as error:
        raise CheckpointError(f"config.json lacks {error.args[0]}; export the model again") from None
    if is_classifier(options):
        sections["finetune"] = {"classes": _classes(options), "pool": options.get("classifier_pool", "mean")}
    return sections


def is_classifier(options: dict[str, Any]) -> bool:
    """Tell whether a ``config.json`` is of a classifier of texts."""
    return any(str(name).endswith("ForSequenceClassification") for name in options.get("architectures") or [])


def _classes(options: dict[str, Any]) -> list[str]:
    names = options.get("id2label")
    if not isinstance(names, dict) or sorted(names) != sorted(str(number) for number in range(len(names))):
        raise CheckpointError("config.json has no id2label that names the classes 0, 1, ...; export the model again")
    return [str(names[str(number)]) for number in range(len(names))]
