"""The model card (``README.md``) of an exported folder: what the model is, how it routes, and figures that exist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vqmoe_ds.checkpoint.formats.huggingface.stock import weighs_over_all
from vqmoe_ds.config.schema import CodeSource, QKNorm, RunConfig

SOURCES = {
    CodeSource.CONTEXT: "a mix of the embeddings of the token and of those before it (window {window}, decay {decay})",
    CodeSource.TOKEN_EMBEDDING: "the token's embedding",
    CodeSource.POSITION_EMBEDDING: "the token's embedding plus a sinusoidal vector of its position",
    CodeSource.LAYER_STATE: "the layer's own normalised input",
    CodeSource.EARLY_BLOCK: "the output of block {block} (for blocks up to it: the token's embedding)",
}


def model_card(
    config: RunConfig, arch: str, step: int, summary: dict[str, Any] | None, logits_note: str, no_gguf: str | None
) -> str:
    """Text of the card.

    Args:
        config: of the run.
        arch: one of ``ARCHITECTURES``.
        step: optimizer steps behind the weights.
        summary: ``summary.json`` of the run, if it was found and speaks of these very weights.
        logits_note: number type of the weights and what it means for the logits.
        no_gguf: why llama.cpp cannot take the folder; None where its converter can.
    """
    model, moe = config.model, config.moe
    groups = f" on {model.kv_heads} key-value heads" if model.kv_heads not in (0, model.heads) else ""
    window = f" over the last {model.sliding_window} tokens" if model.sliding_window else ""
    heads = f"{model.heads} attention heads{groups}{window}{_norms(config)}"
    kind = "classifier of texts" if config.finetune.classes else "language model"
    sections = [
        _header(config, arch),
        f"# A Mixture-of-Experts {kind} ({moe.router} routing)\n",
        f"{model.layers} blocks of width {model.width}, {heads}, {_experts(config)}, "
        f"vocabulary {model.vocab_size}, trained with a context of {model.sequence_length} tokens for {step} steps.\n",
        "## Use\n",
        _usage(config, arch),
        "## How tokens find their experts\n",
        _routing(config),
        "## Figures\n",
        _figures(summary),
        "## Weights\n",
        logits_note + "\n",
        "## Other programs\n",
        _programs(config, arch, no_gguf),
        "## Limits\n",
        f"{_purpose(config)} Nothing is known of its text past "
        f"{model.sequence_length} tokens of context. The training data is not described here: whoever publishes this "
        "model should say what it was.\n",
    ]
    return "\n".join(sections)


def find_summary(checkpoint: Path, step: int) -> dict[str, Any] | None:
    """``summary.json`` of the run that a tag lies in, if it was written at the same step."""
    # A tag lies in RUN/checkpoints, a portable folder or an export perhaps in RUN itself.
    for folder in (checkpoint, *list(checkpoint.resolve().parents)[:2]):
        try:
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            return summary if summary["steps"] == step else None
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _purpose(config: RunConfig) -> str:
    classes = config.finetune.classes
    if not classes:
        return "A base model without instruction tuning or safety measures."
    return f"It knows the classes {', '.join(classes)} and gives one of them to every text, whatever it is about."


def _header(config: RunConfig, arch: str) -> str:
    code = "- custom_code\n" if arch == "vqmoe" else ""
    task = "text-classification" if config.finetune.classes else "text-generation"
    return f"---\nlibrary_name: transformers\npipeline_tag: {task}\ntags:\n- moe\n- vqmoe\n{code}---\n"


def _norms(config: RunConfig) -> str:
    scope = {QKNorm.HEADS: " for each head alone", QKNorm.FULL: " over all heads"}.get(config.model.qk_norm)
    return f" (queries and keys normed{scope})" if scope else ""


def _experts(config: RunConfig) -> str:
    every = config.model.moe_every
    where = "every block" if every == 1 else f"every {every}. block"
    where += f" after the first {config.model.dense_layers}" if config.model.dense_layers else ""
    if not config.moe.facts.has_experts:
        return "no experts"
    shared = f" and {config.moe.shared_experts} shared ones" if config.moe.shared_experts else ""
    return f"{config.moe.num_experts} experts{shared} of hidden width {config.moe.expert_hidden} in {where}"


def _usage(config: RunConfig, arch: str) -> str:
    if config.finetune.classes:
        return """```python
from transformers import pipeline

classify = pipeline("text-classification", "THIS_FOLDER", trust_remote_code=True)
print(classify(["the first text", "the second"], truncation=True))
```
"""
    trust = ", trust_remote_code=True" if arch == "vqmoe" else ""
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER"{trust})
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER"{trust})
inputs = tokenizer(["The ", "Once upon a time"], return_tensors="pt", padding=True)
print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=50, do_sample=True, temperature=0.8)))
```
"""


def _programs(config: RunConfig, arch: str, no_gguf: str | None) -> str:
    served = f"they read {arch.capitalize()} by themselves" if arch != "vqmoe" else "their Transformers backends"
    gguf = "`python convert_hf_to_gguf.py THIS_FOLDER --outtype f32` of its repository" if no_gguf is None else no_gguf
    rows = [
        ("transformers", "yes", "as above" if arch == "vqmoe" else "as above; nothing but stock code"),
        ("vqmoe_ds", "yes", "`python tools/convert_checkpoint.py THIS_FOLDER CHECKPOINT --to deepspeed` trains on"),
        ("llama.cpp (GGUF)", "yes" if no_gguf is None else "no", gguf),
        ("vLLM, SGLang", "not tried", served),
    ]
    shown = rows[:2] if config.finetune.classes else rows
    return "".join(f"| {' | '.join(row)} |\n" for row in [("program", "", "how, or why not"), ("---",) * 3, *shown])


def _routing(config: RunConfig) -> str:
    moe, book = config.moe, config.codebook
    if not moe.facts.has_experts:
        return "There are no experts: this is the dense yardstick of its family.\n"
    table = "A fixed table gives every token id one expert in every layer (Hash Layers, Roller 2021)."
    told = moe.facts.told_rows(config.router)
    mixed = f"a learned {told}-way gate mixes them" if moe.facts.weights_rows(config) else "all count alike"
    if moe.facts.looks_back(config):
        path = getattr(config.router, "path", None)
        first = "a fixed hash of the token" if path is None else "a fixed table of token ids"
        more = "a fixed hash of the last two" if told == 2 else f"fixed hashes of the last 2 to {told} tokens"
        table = f"Every token has {told} experts in every layer, by {first} and {more}; {mixed}."
    norm = " A LayerNorm follows every expert." if moe.output_norm and not moe.facts.has_discrete_path else ""
    if moe.facts.uses_token_table and not moe.facts.uses_codebook:
        return f"{table}{norm}\n"
    over_all = weighs_over_all(config)
    weights = "the softmax over all experts" if over_all else "the softmax over the chosen"
    chosen = "the best expert" if moe.top_k == 1 else f"the {moe.top_k} best experts"
    linear = f"A linear router picks {chosen} for the layer's input, weighted by {weights}."
    if moe.facts.is_stock:
        return f"{linear}{norm} No token is dropped.\n"
    source = SOURCES[book.source].format(window=book.context_window, decay=book.context_decay, block=book.source_block)
    codes = book.num_codes or moe.num_experts
    text = (
        f"Each token has a *code* in each layer: the nearest of {codes} learned vectors to {source}. A table "
        f"({book.code_map.value}) maps codes to experts, so there is no router to learn on this path "
        "(VQMoE, arXiv 2411.19402). "
    )
    if book.groups > 1:
        text += (
            f"Experts fall into {book.groups} groups: the code of the first layer names a token's group, which is the "
            "same in all layers, and the codes of later layers choose within it. "
        )
    if moe.facts.uses_token_table:
        text = f"{table} {text}So every token has two experts, which share a layer's; {mixed}.{norm} "
    elif moe.top_k:
        text += linear + " A learned two-way gate mixes the two paths, which share the experts. "
    else:
        text += "The expert of the code is the only one. "
    if moe.facts.has_discrete_path and moe.output_norm:
        text += "A LayerNorm follows the expert of the code. "
    return text + "No token is dropped, and codes no longer move.\n"


def _figures(summary: dict[str, Any] | None) -> str:
    if summary is None:
        return "None were found beside the checkpoint. Measure before you compare.\n"
    lines = []
    if summary.get("validation_bits_per_byte") is not None:
        lines.append(f"* held-out text of the training run: {summary['validation_bits_per_byte']:.4f} bits/byte")
    if summary.get("tokens"):
        lines.append(f"* tokens seen in training: {summary['tokens']:,}")
    counts = summary.get("parameters") or {}
    if "stored" in counts and "active" in counts:
        lines.append(f"* parameters: {counts['stored']:,} stored, {counts['active']:,} used by one token")
    return "\n".join(lines or ["The run's summary holds none."]) + "\n"
