"""Upcycling: the function of the dense model is kept, what cannot be kept is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install -r requirements-dev.txt")

from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from tests import warm
from tests.huggingface import edit, load_back, tokens_of
from tests.upcycle.sources import LLAMA3, MULTIPLIED, YARN, distance, save_dense, upcycled
from vqmoe_ds.checkpoint.open import open_checkpoint
from vqmoe_ds.runtime.errors import CheckpointError, ConfigError
from vqmoe_ds.upcycle.dense import DenseSource, UpcycleOptions, upcycle

ROOT = Path(__file__).resolve().parents[2]
ROUTES: dict[str, dict[str, Any]] = {
    "both paths": {},
    "codes alone": {"moe.top_k": 0, "moe.num_experts": 5},
    "codes in the layer": {"codebook.source": "layer_state", "moe.top_k": 3},
    "linear": {"moe.router": "topk"},
    "linear, one expert of weight 1": {"moe.router": "topk", "moe.top_k": 1, "router.softmax_over": "chosen"},
    "probabilities of all experts": {"moe.top_k": 3, "moe.num_experts": 3, "router.softmax_over": "all"},
    "hash": {"moe.router": "hash_token"},
    "hash and code": {"moe.router": "hash_and_code", "moe.num_experts": 5},
    "hash of n-grams": {"moe.router": "hash_ngrams", "router.ngrams": 3, "moe.num_experts": 5},
    "every second block": {"model.moe_every": 2},
    "after the first block": {"model.dense_layers": 1},
    "dense again": {"moe.router": "dense"},
}
SOURCES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped queries": {"num_key_value_heads": 2},
    "one key-value head": {"num_key_value_heads": 1},
    "tied embeddings": {"tie_word_embeddings": True},
    "larger epsilon": {"rms_norm_eps": 1e-2},
    "epsilon of Llama 2": {"rms_norm_eps": 1e-5},
    "another rotary base": {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
    "positions of Llama 3": {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}},
    "positions of YaRN": {"kind": Qwen3Config, "head_dim": 6, "rope_parameters": YARN},
    "positions scaled linearly": {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 100.0}},
    "biases of Qwen 2": {"kind": Qwen2Config, "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    "multipliers of Granite": {"kind": GraniteConfig, **MULTIPLIED, "tie_word_embeddings": True},
    "wide heads": {"head_dim": 8, "num_key_value_heads": 2},
    "sliding window": {"kind": MistralConfig, "sliding_window": 5, "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    "no sliding window": {"kind": Qwen3Config, "head_dim": 6, "sliding_window": 5, "use_sliding_window": False},
    "norms of heads": {"kind": Qwen3Config, "head_dim": 6},
    "norms of wide heads, larger epsilon": {
        **{"kind": Qwen3Config, "head_dim": 8, "num_key_value_heads": 2, "rms_norm_eps": 1e-2},
        "tie_word_embeddings": True,
    },
}


@pytest.mark.parametrize("routes", ROUTES)
def test_every_router_keeps_the_function(routes: str, tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense")
    model = upcycled(tmp_path / "dense", ROUTES[routes])
    assert distance(dense, model) < 1e-5
    experts = len(model.moe_blocks) * model.config.moe.num_experts
    assert sum(p.numel() for n, p in model.named_parameters() if ".experts." in n) == experts * 3 * 24 * 36


@pytest.mark.parametrize("source", SOURCES)
def test_what_our_transformer_lacks_is_rewritten_exactly(source: str, tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense", **SOURCES[source])
    assert distance(dense, upcycled(tmp_path / "dense", {"codebook.num_codes": 9})) < 1e-5


def test_mistral_within_its_window(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense", MistralConfig, sliding_window=32, num_key_value_heads=2)
    assert distance(dense, upcycled(tmp_path / "dense")) < 1e-5
    assert upcycled(tmp_path / "dense", {"model.sequence_length": 64}).config.model.sliding_window == 32


@pytest.mark.parametrize("options", [{}, {"kind": GraniteConfig, **MULTIPLIED}, {"rms_norm_eps": 1e-2}], ids=str)
def test_tied_embeddings_stay_tied_unless_told_otherwise(options: dict[str, Any], tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense", **options, tie_word_embeddings=True)
    tied, apart = (upcycled(tmp_path / "dense", more) for more in ({}, {"model.tie_embeddings": False}))
    assert tied.head.weight is tied.embed.weight and apart.head.weight is not apart.embed.weight
    assert distance(dense, tied) < 1e-5 and distance(dense, apart) < 1e-5
    save_dense(tmp_path / "apart", **options, tie_word_embeddings=False)
    assert not upcycled(tmp_path / "apart").config.model.tie_embeddings
    with pytest.raises(ConfigError, match="model.tie_embeddings=True contradicts the source, whose model has False"):
        upcycled(tmp_path / "apart", {"model.tie_embeddings": True})


def test_a_head_beside_tied_embeddings_is_theirs_or_refused(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense", tie_word_embeddings=True)
    weights = load_file(tmp_path / "dense" / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    save_file({**weights, "lm_head.weight": head}, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    assert distance(dense, upcycled(tmp_path / "dense")) < 1e-5
    save_file({**weights, "lm_head.weight": 2 * head}, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="tie_word_embeddings is true, and lm_head.weight is not the embedding"):
        upcycled(tmp_path / "dense")


@pytest.mark.parametrize("layers, window", [(0, 8), (3, 0), (1, None)])
def test_a_window_is_that_of_all_layers_or_refused_by_name(layers: int, window: int | None, tmp_path: Path) -> None:
    options = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": layers}
    dense = save_dense(tmp_path / "dense", Qwen2Config, **options)
    for types in (dense.config.layer_types, None):  # None: as transformers 4 writes it
        edit(tmp_path / "dense" / "config.json", layer_types=types)
        if window is not None:
            model = upcycled(tmp_path / "dense")
            assert model.config.model.sliding_window == window and distance(dense, model) < 1e-5
            continue
        name = "layer_types" if types else "max_window_layers"
        with pytest.raises(CheckpointError, match=rf"\(sliding_window, {name}\).*set model.sequence_length=8 or less"):
            upcycled(tmp_path / "dense")
        assert upcycled(tmp_path / "dense", {"model.sequence_length": 8}).config.model.sliding_window == 0


@pytest.mark.parametrize(("granularity", "top_k", "experts"), [(2, 2, 6), (3, 3, 12), (2, 4, 8), (4, 8, 8)])
def test_slices_make_up_whole_mlps(granularity: int, top_k: int, experts: int, tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense", rms_norm_eps=1e-5)
    overrides = {"moe.router": "topk", "moe.top_k": top_k, "moe.num_experts": experts}
    model = upcycled(tmp_path / "dense", overrides, granularity)
    assert model.config.moe.expert_hidden == 36 // granularity
    assert distance(dense, model) < 1e-5


def test_noise_parts_the_copies(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense")
    distances = [distance(dense, upcycled(tmp_path / "dense", noise=noise)) for noise in (0.001, 0.1)]
    assert 1e-5 < distances[0] < distances[1]
    one, other = (upcycled(tmp_path / "dense", noise=0.1).state_dict()["blocks.0.mlp.experts.w1"] for _ in range(2))
    assert torch.equal(one, other), "the same noise every time"
    relative = (one[1] - one[0]).std() / one.std()
    assert 0.12 < relative < 0.16, "two draws of 0.1 are 0.14 apart"


def test_the_tool_writes_a_portable_checkpoint_that_trains(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense", num_key_value_heads=2, rms_norm_eps=1e-5)
    dense.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    (tmp_path / "dense" / "model.safetensors").unlink()
    command = [sys.executable, "tools/upcycle.py", str(tmp_path / "dense"), str(tmp_path / "start")]
    run = subprocess.run([*command, "--set", "moe.num_experts=4"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "4 experts of hidden width 36 a layer, router vq with top_k 2, function preserved" in run.stdout
    reader = open_checkpoint(tmp_path / "start")
    assert reader.kind == "portable" and reader.step == 0 and not reader.has_optimizer
    model = load_back(reader)
    assert distance(dense, model) < 1e-5
    assert model.bank is not None and not model.bank.initialized, "codes are placed on data at the first step"
    loss, aux = model.train()(tokens_of(), tokens_of(seed=1))
    (loss + aux).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    again = warm.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "--force" in again.stderr


# ------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"model_type": "gpt2"}, "a model of type gpt2"),
        (
            {"model_type": "olmo2"},
            "a model of type olmo2; those that can be upcycled are llama, mistral, qwen2, qwen3, granite, mix",
        ),
        (
            {"model_type": "deepseek_v3", "kv_lora_rank": 512},
            r"type deepseek_v3, whose attention is latent \(kv_lora_rank",
        ),
        ({"model_type": "qwen3_next", "linear_num_value_heads": 8}, "type qwen3_next, whose attention is linear"),
        ({"model_type": "glm4_moe", "n_group": 4}, "type glm4_moe, whose router picks groups of experts first"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"its weights are quantised .*dequantise them first"),
        ({"clip_qkv": 8.0}, r"queries, keys and values are clipped \(clip_qkv=8.0\)"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu is not silu"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, r"scaled \(llama3\)"),
        (
            {"rope_parameters": LLAMA3 | {"low_freq_factor": 2.0}},
            r"\(llama3\) with low_freq_factor=2.0; known is only 1",
        ),
        (
            {"rope_parameters": YARN | {"attention_factor": 1.0}},
            r"\(yarn\) with attention_factor=1.0; known is only 1.1",
        ),
        ({"rope_parameters": YARN | {"rope_type": "longrope"}}, r"scaled \(longrope\); known are default, linear"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"num_key_value_heads": 3}, "cannot be shared evenly"),
        ({"hidden_size": None}, "has no number hidden_size"),
    ],
)
def test_options_that_cannot_be_represented_are_named(values: dict[str, Any], reason: str, tmp_path: Path) -> None:
    save_dense(tmp_path / "dense")
    edit(tmp_path / "dense" / "config.json", **values)
    with pytest.raises(CheckpointError, match=reason):
        DenseSource(tmp_path / "dense")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("model.layers.0.self_attn.q_proj.bias", torch.ones(24), "q_proj.bias, a bias that is not zero"),
        ("model.layers.1.self_attn.q_norm.weight", torch.ones(6), "q_norm.weight, which our transformer lacks"),
        ("model.layers.0.mlp.gate_proj.bias", torch.zeros(36), None),
        ("model.layers.0.mlp.up_proj.weight", torch.ones(36, 24).char(), r"up_proj.weight holds whole numbers \(int8"),
    ],
)
def test_weights_that_cannot_be_represented_are_named(
    name: str, value: torch.Tensor, reason: str | None, tmp_path: Path
) -> None:
    dense = save_dense(tmp_path / "dense")
    weights = load_file(tmp_path / "dense" / "model.safetensors")
    save_file({**weights, name: value}, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    if reason is None:
        assert distance(dense, upcycled(tmp_path / "dense")) < 1e-5
        return
    with pytest.raises(CheckpointError, match=reason):
        DenseSource(tmp_path / "dense")


@pytest.mark.parametrize(
    ("overrides", "granularity", "reason"),
    [
        ({"moe.top_k": 1}, 1, "set moe.top_k to 2 or more, or to 0"),
        ({"moe.top_k": 1, "moe.router": "topk"}, 1, "set moe.top_k to 2 or more, or to 0"),
        ({"router.softmax_over": "all"}, 1, "with router.softmax_over=all .*; leave router.softmax_over out"),
        ({"router.softmax_over": "all", "moe.router": "topk"}, 1, "with router.softmax_over=all"),
        ({"codebook.soft_output": 1.0}, 1, "set both to 0"),
        ({"moe.output_norm": True}, 1, "set both to false"),
        (
            {"moe.router": "hash_and_code", "router.gated": False},
            1,
            "MLP would give 2 times its function",
        ),
        ({"moe.shared_experts": 1}, 1, "moe.shared_experts=1 would add to what copies"),
        ({}, 2, "one slice is not the whole MLP"),
        ({"moe.router": "topk"}, 5, "does not divide the MLP's hidden width 36"),
        ({"moe.router": "topk", "moe.top_k": 3}, 2, "multiples of 2"),
        ({"model.width": 48}, 1, "model.width=48 contradicts the source, whose model has 24"),
        ({"moe.expertz": 4}, 1, "no such field"),
        ({"moe.router": "token_table"}, 1, "needs a table"),
        (
            {"moe.router": "token_table", "router.path": "none.safetensors"},
            1,
            "router.path=none.safetensors does not exist",
        ),
    ],
)
def test_options_that_would_change_the_function_are_refused(
    overrides: dict[str, Any], granularity: int, reason: str, tmp_path: Path
) -> None:
    save_dense(tmp_path / "dense")
    with pytest.raises(ConfigError, match=reason) as caught:
        upcycle(tmp_path / "dense", tmp_path / "new", UpcycleOptions(granularity), overrides)
    assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()


def test_a_missing_weight_leaves_nothing_behind(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense")
    weights = load_file(tmp_path / "dense" / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="model.layers.2.mlp.up_proj.weight is missing"):
        upcycle(tmp_path / "dense", tmp_path / "new", UpcycleOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_back_to_hugging_face(tmp_path: Path) -> None:
    import vqmoe_ds.models.hf  # noqa: F401 (registers the model)
    from vqmoe_ds.checkpoint.formats.huggingface.folder import ExportOptions, export_hf

    kept = {"kind": MistralConfig, "sliding_window": 5, "tie_word_embeddings": True}
    dense = save_dense(tmp_path / "dense", num_key_value_heads=2, **kept)
    upcycle(tmp_path / "dense", tmp_path / "new", UpcycleOptions(), {"moe.top_k": 0, "moe.num_experts": 3})
    export_hf(open_checkpoint(tmp_path / "new"), tmp_path / "hf", ExportOptions(tokenizer="none"))
    described = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (described["sliding_window"], described["tie_word_embeddings"]) == (5, True)
    assert "lm_head.weight" not in load_file(tmp_path / "hf" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        assert (model(tokens_of()).logits - dense(tokens_of()).logits).abs().max() < 1e-5
