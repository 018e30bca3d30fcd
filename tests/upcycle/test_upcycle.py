"""Upcycling: the function of the dense model is kept, what cannot be kept is refused."""

from __future__ import annotations

import json
import re
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
    GraniteMoeConfig,
    GraniteMoeSharedConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests import warm
from tests.huggingface import load_back, tokens_of
from vqmoe_ds.checkpoint.open import open_checkpoint
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.moe.sources import EmbeddingSource
from vqmoe_ds.runtime.errors import CheckpointError, ConfigError
from vqmoe_ds.upcycle.command import build_parser, main
from vqmoe_ds.upcycle.dense import DenseSource, UpcycledReader, UpcycleOptions, upcycle, upcycled_config
from vqmoe_ds.upcycle.routed import RoutedReader, RoutedSource, calibration_ids, routed_config, with_codes

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "initializer_range": 24**-0.5,  # unit gain: with more, float32 rounding of the dense model alone passes 1e-5
}


def _dense(folder: Path, kind: Any = LlamaConfig, **options: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**{**SHAPE, **options})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def _upcycled(
    source: Path, overrides: dict[str, Any] | None = None, granularity: int = 1, noise: float = 0.0
) -> MoETransformer:
    options, dense = UpcycleOptions(granularity, noise), DenseSource(source)
    return load_back(UpcycledReader(dense, upcycled_config(dense, options, overrides or {}), options))


def _distance(dense: Any, model: MoETransformer) -> float:
    tokens_BS = tokens_of(4, 32)
    with torch.no_grad():
        want = dense(tokens_BS).logits
        assert want.abs().max() > 1, "logits that say something"
        return float((model(tokens_BS)[0] - want).abs().max())


LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
MULTIPLIED = {
    **{"embedding_multiplier": 1.5, "attention_multiplier": 0.3, "residual_multiplier": 0.6, "logits_scaling": 0.7},
    **{"num_key_value_heads": 2, "rms_norm_eps": 1e-5},
}
ROUTES: dict[str, dict[str, Any]] = {
    "both paths": {},
    "codes alone": {"moe.top_k": 0, "moe.num_experts": 5},
    "codes in the layer": {"codebook.source": "layer_state", "moe.top_k": 3},
    "linear": {"moe.router": "topk"},
    "linear, one expert of weight 1": {"moe.router": "topk", "moe.top_k": 1, "router.softmax_over": "chosen"},
    "probabilities of all experts": {"moe.top_k": 3, "moe.num_experts": 3, "router.softmax_over": "all"},
    "hash": {"moe.router": "hash_token"},
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
    dense = _dense(tmp_path / "dense")
    model = _upcycled(tmp_path / "dense", ROUTES[routes])
    assert _distance(dense, model) < 1e-5
    experts = len(model.moe_blocks) * model.config.moe.num_experts
    assert sum(p.numel() for n, p in model.named_parameters() if ".experts." in n) == experts * 3 * 24 * 36


@pytest.mark.parametrize("source", SOURCES)
def test_what_our_transformer_lacks_is_rewritten_exactly(source: str, tmp_path: Path) -> None:
    dense = _dense(tmp_path / "dense", **SOURCES[source])
    assert _distance(dense, _upcycled(tmp_path / "dense", {"codebook.num_codes": 9})) < 1e-5


def test_mistral_within_its_window(tmp_path: Path) -> None:
    dense = _dense(tmp_path / "dense", MistralConfig, sliding_window=32, num_key_value_heads=2)
    assert _distance(dense, _upcycled(tmp_path / "dense")) < 1e-5
    assert _upcycled(tmp_path / "dense", {"model.sequence_length": 64}).config.model.sliding_window == 32


@pytest.mark.parametrize("options", [{}, {"kind": GraniteConfig, **MULTIPLIED}, {"rms_norm_eps": 1e-2}], ids=str)
def test_tied_embeddings_stay_tied_unless_told_otherwise(options: dict[str, Any], tmp_path: Path) -> None:
    dense = _dense(tmp_path / "dense", **options, tie_word_embeddings=True)
    tied, apart = (_upcycled(tmp_path / "dense", more) for more in ({}, {"model.tie_embeddings": False}))
    assert tied.head.weight is tied.embed.weight and apart.head.weight is not apart.embed.weight
    assert _distance(dense, tied) < 1e-5 and _distance(dense, apart) < 1e-5
    _dense(tmp_path / "apart", **options, tie_word_embeddings=False)
    assert not _upcycled(tmp_path / "apart").config.model.tie_embeddings
    with pytest.raises(ConfigError, match="model.tie_embeddings=True contradicts the source, whose model has False"):
        _upcycled(tmp_path / "apart", {"model.tie_embeddings": True})


def test_a_head_beside_tied_embeddings_is_theirs_or_refused(tmp_path: Path) -> None:
    dense = _dense(tmp_path / "dense", tie_word_embeddings=True)
    weights = load_file(tmp_path / "dense" / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    save_file({**weights, "lm_head.weight": head}, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    assert _distance(dense, _upcycled(tmp_path / "dense")) < 1e-5
    save_file({**weights, "lm_head.weight": 2 * head}, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="tie_word_embeddings is true, and lm_head.weight is not the embedding"):
        _upcycled(tmp_path / "dense")


@pytest.mark.parametrize("layers, window", [(0, 8), (3, 0), (1, None)])
def test_a_window_is_that_of_all_layers_or_refused_by_name(layers: int, window: int | None, tmp_path: Path) -> None:
    options = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": layers}
    dense = _dense(tmp_path / "dense", Qwen2Config, **options)
    for types in (dense.config.layer_types, None):  # None: as transformers 4 writes it
        _options(tmp_path / "dense", layer_types=types)
        if window is not None:
            model = _upcycled(tmp_path / "dense")
            assert model.config.model.sliding_window == window and _distance(dense, model) < 1e-5
            continue
        name = "layer_types" if types else "max_window_layers"
        with pytest.raises(CheckpointError, match=rf"\(sliding_window, {name}\).*set model.sequence_length=8 or less"):
            _upcycled(tmp_path / "dense")
        assert _upcycled(tmp_path / "dense", {"model.sequence_length": 8}).config.model.sliding_window == 0


@pytest.mark.parametrize(("granularity", "top_k", "experts"), [(2, 2, 6), (3, 3, 12), (2, 4, 8), (4, 8, 8)])
def test_slices_make_up_whole_mlps(granularity: int, top_k: int, experts: int, tmp_path: Path) -> None:
    dense = _dense(tmp_path / "dense", rms_norm_eps=1e-5)
    overrides = {"moe.router": "topk", "moe.top_k": top_k, "moe.num_experts": experts}
    model = _upcycled(tmp_path / "dense", overrides, granularity)
    assert model.config.moe.expert_hidden == 36 // granularity
    assert _distance(dense, model) < 1e-5


def test_noise_parts_the_copies(tmp_path: Path) -> None:
    dense = _dense(tmp_path / "dense")
    distances = [_distance(dense, _upcycled(tmp_path / "dense", noise=noise)) for noise in (0.001, 0.1)]
    assert 1e-5 < distances[0] < distances[1]
    one, other = (_upcycled(tmp_path / "dense", noise=0.1).state_dict()["blocks.0.mlp.experts.w1"] for _ in range(2))
    assert torch.equal(one, other), "the same noise every time"
    relative = (one[1] - one[0]).std() / one.std()
    assert 0.12 < relative < 0.16, "two draws of 0.1 are 0.14 apart"


def test_the_tool_writes_a_portable_checkpoint_that_trains(tmp_path: Path) -> None:
    dense = _dense(tmp_path / "dense", num_key_value_heads=2, rms_norm_eps=1e-5)
    dense.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    (tmp_path / "dense" / "model.safetensors").unlink()
    command = [sys.executable, "tools/upcycle.py", str(tmp_path / "dense"), str(tmp_path / "start")]
    run = subprocess.run([*command, "--set", "moe.num_experts=4"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "4 experts of hidden width 36 a layer, router vq with top_k 2, function preserved" in run.stdout
    reader = open_checkpoint(tmp_path / "start")
    assert reader.kind == "portable" and reader.step == 0 and not reader.has_optimizer
    model = load_back(reader)
    assert _distance(dense, model) < 1e-5
    assert model.bank is not None and not model.bank.initialized, "codes are placed on data at the first step"
    loss, aux = model.train()(tokens_of(), tokens_of(seed=1))
    (loss + aux).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    again = warm.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "--force" in again.stderr


# ------------------------------------------------------------ refusals


def _options(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


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
    _dense(tmp_path / "dense")
    _options(tmp_path / "dense", **values)
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
    dense = _dense(tmp_path / "dense")
    weights = load_file(tmp_path / "dense" / "model.safetensors")
    save_file({**weights, name: value}, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    if reason is None:
        assert _distance(dense, _upcycled(tmp_path / "dense")) < 1e-5
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
        ({"moe.shared_experts": 1}, 1, "moe.shared_experts=1 would add to what copies"),
        ({}, 2, "one slice is not the whole MLP"),
        ({"moe.router": "topk"}, 5, "does not divide the MLP's hidden width 36"),
        ({"moe.router": "topk", "moe.top_k": 3}, 2, "multiples of 2"),
        ({"model.width": 48}, 1, "model.width=48 contradicts the source, whose model has 24"),
        ({"moe.expertz": 4}, 1, "no such field"),
        ({"moe.router": "token_table"}, 1, "needs a table"),
        ({"moe.router": "token_table", "router.path": "none.safetensors"}, 1, "it does not exist"),
    ],
)
def test_options_that_would_change_the_function_are_refused(
    overrides: dict[str, Any], granularity: int, reason: str, tmp_path: Path
) -> None:
    _dense(tmp_path / "dense")
    with pytest.raises(ConfigError, match=reason) as caught:
        upcycle(tmp_path / "dense", tmp_path / "new", UpcycleOptions(granularity), overrides)
    assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()


def test_a_missing_weight_leaves_nothing_behind(tmp_path: Path) -> None:
    _dense(tmp_path / "dense")
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
    dense = _dense(tmp_path / "dense", num_key_value_heads=2, **kept)
    upcycle(tmp_path / "dense", tmp_path / "new", UpcycleOptions(), {"moe.top_k": 0, "moe.num_experts": 3})
    export_hf(open_checkpoint(tmp_path / "new"), tmp_path / "hf", ExportOptions(tokenizer="none"))
    described = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (described["sliding_window"], described["tie_word_embeddings"]) == (5, True)
    assert "lm_head.weight" not in load_file(tmp_path / "hf" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        assert (model(tokens_of()).logits - dense(tokens_of()).logits).abs().max() < 1e-5


# ------------------------------------------------------------ sources with experts


FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"kind": MixtralConfig, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "sliding_window": None},
    "Mixtral, one expert a token": {"kind": MixtralConfig, "num_experts_per_tok": 1, "head_dim": 8},
    "Mixtral, sliding window": {"kind": MixtralConfig, "num_key_value_heads": 2, "sliding_window": 5},
    "Qwen3-MoE, sliding window": {
        **{"kind": Qwen3MoeConfig, "head_dim": 6, "use_sliding_window": True, "sliding_window": 5},
    },
    "OLMoE": {"kind": OlmoeConfig, "rms_norm_eps": 1e-5},
    "OLMoE, grouped queries": {"kind": OlmoeConfig, "rms_norm_eps": 1e-2, "num_key_value_heads": 2},
    "OLMoE, weights that sum to 1": {"kind": OlmoeConfig, "norm_topk_prob": True},
    "Qwen2-MoE": {"kind": Qwen2MoeConfig, "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    "Qwen2-MoE, no biases": {"kind": Qwen2MoeConfig, "qkv_bias": False, "num_key_value_heads": 2},
    "Qwen2-MoE, some blocks dense": {"kind": Qwen2MoeConfig, "norm_topk_prob": True, "mlp_only_layers": [0, 2]},
    "Granite-MoE": {"kind": GraniteMoeConfig, **MULTIPLIED, "tie_word_embeddings": True},
    "Granite-MoE, one expert a token": {"kind": GraniteMoeConfig, **MULTIPLIED, "num_experts_per_tok": 1},
    "Granite-MoE, shared experts": {"kind": GraniteMoeSharedConfig, **MULTIPLIED, "shared_intermediate_size": 72},
    "Granite-MoE, no shared expert": {"kind": GraniteMoeSharedConfig, "shared_intermediate_size": 0},
    "Qwen3-MoE": {"kind": Qwen3MoeConfig, "head_dim": 8, "num_key_value_heads": 2, "norm_topk_prob": True},
    "Qwen3-MoE, larger epsilon": {"kind": Qwen3MoeConfig, "head_dim": 6, "rms_norm_eps": 1e-2},
    "Qwen3-MoE, one expert a token": {"kind": Qwen3MoeConfig, "head_dim": 6, "num_experts_per_tok": 1},
    "Qwen3-MoE, every second block": {"kind": Qwen3MoeConfig, "head_dim": 6, "decoder_sparse_step": 2},
    "Qwen3-MoE, some blocks dense": {"kind": Qwen3MoeConfig, "head_dim": 6, "mlp_only_layers": [0, 2]},
    "Qwen3-MoE, first block dense": {"kind": Qwen3MoeConfig, "head_dim": 6, "mlp_only_layers": [0]},
    "Qwen3-MoE, tied": {"kind": Qwen3MoeConfig, "head_dim": 6, "tie_word_embeddings": True},
}


def _routed(folder: Path, **options: Any) -> Any:
    """A model with experts; a Mixtral unless ``kind`` says otherwise."""
    experts = {"num_experts_per_tok": 2, "vocab_size": 257, "num_local_experts": 4, "num_experts": 4}
    kind = options.pop("kind", MixtralConfig)
    if kind is Qwen3MoeConfig:
        experts["moe_intermediate_size"] = 20
    if kind is Qwen2MoeConfig:
        experts |= {"moe_intermediate_size": 20, "shared_expert_intermediate_size": 40}
    return _dense(folder, kind, **{**experts, **options})


def test_a_window_of_every_second_layer_is_refused_past_its_length(tmp_path: Path) -> None:
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
    theirs = _routed(tmp_path / "moe", kind=Qwen2MoeConfig, **window)
    assert theirs.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    for types in (theirs.config.layer_types, None):
        _options(tmp_path / "moe", layer_types=types)
        source = RoutedSource(tmp_path / "moe")
        with pytest.raises(CheckpointError, match=r"sliding_window, .*set model.sequence_length=8 or less"):
            routed_config(source, {})
        assert routed_config(source, {"model.sequence_length": 8}).model.sliding_window == 0


def _text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("".join(f"{n} times {n} is {n * n}. " for n in range(400)))
    return tmp_path / "text.txt"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_routed_source_is_itself_under_a_linear_router(family: str, tmp_path: Path) -> None:
    theirs = _routed(tmp_path / "moe", **FAMILIES[family])
    source = RoutedSource(tmp_path / "moe")
    model = load_back(RoutedReader(source, routed_config(source, {}, router="topk")))
    assert model.config.moe.router == "topk" and _distance(theirs, model) < 1e-5
    sparse = [hasattr(layer, "block_sparse_moe") or hasattr(layer.mlp, "gate") for layer in theirs.model.layers]
    assert model.moe_blocks == [block for block, there in enumerate(sparse) if there]


@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ({}, "rope_parameters"),
        ({"kind": OlmoeConfig, "rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ({"kind": Qwen3MoeConfig, "head_dim": 6, "sliding_window": 5}, "use_sliding_window"),
        *(({"kind": GraniteMoeConfig}, name) for name in MULTIPLIED if name.endswith(("_multiplier", "_scaling"))),
        ({"kind": GraniteMoeSharedConfig, "shared_intermediate_size": 72}, "attention_multiplier"),
        ({"kind": GraniteConfig}, "attention_multiplier"),
    ],
)
def test_an_option_that_is_left_out_means_what_it_does_in_its_family(
    options: dict[str, Any], left_out: str, tmp_path: Path
) -> None:
    dense = options.get("kind") is GraniteConfig
    theirs = (_dense if dense else _routed)(tmp_path / "moe", **options)
    described = json.loads((tmp_path / "moe" / "config.json").read_text())
    del described[left_out]
    (tmp_path / "moe" / "config.json").write_text(
        json.dumps({**described, "sliding_window": options.get("sliding_window")})
    )
    if dense:
        assert _distance(theirs, _upcycled(tmp_path / "moe")) < 1e-5
        return
    source = RoutedSource(tmp_path / "moe")
    assert _distance(theirs, load_back(RoutedReader(source, routed_config(source, {}, router="topk")))) < 1e-5


@pytest.mark.parametrize(
    ("family", "where"),
    [
        *(("Mixtral", "layer_state"), ("Mixtral", "context"), ("OLMoE", "layer_state"), ("Qwen3-MoE", "context")),
        *(("Qwen2-MoE", "layer_state"), ("Qwen3-MoE", "layer_state"), ("Qwen3-MoE, every second block", "layer_state")),
    ],
)
def test_codes_are_the_means_of_the_tokens_each_expert_receives(family: str, where: str, tmp_path: Path) -> None:
    theirs = _routed(tmp_path / "moe", **{**FAMILIES[family], "rms_norm_eps": 1e-6})
    layers = [layer for layer in theirs.model.layers if hasattr(layer.mlp, "gate")]
    source = RoutedSource(tmp_path / "moe")
    config = routed_config(source, {"codebook.source": where})
    ids = calibration_ids(str(_text(tmp_path)), "bytes", 660, config)
    windows = ids.view(-1, 33)
    held = torch.arange(len(windows)) % 10 == 1
    reader, report = with_codes(source, config, ids)
    codes_LNC = reader.buffers()["bank.codes_LKC"]

    inputs: dict[int, torch.Tensor] = {}
    for layer, block in enumerate(layers):
        block.mlp.register_forward_pre_hook(lambda _, args, layer=layer: inputs.update({layer: args[0]}))
    with torch.no_grad():
        tokens_BS = windows[~held][:, :-1]
        theirs(tokens_BS)
        for layer, block in enumerate(layers):
            x_TD = inputs[layer].flatten(0, 1)
            chosen_Tk = (x_TD @ block.mlp.gate.weight.t()).topk(2).indices
            z_TD = x_TD
            if where == "context":
                z_TD = EmbeddingSource(config.codebook, 257, 24, 32)(
                    tokens_BS, theirs.model.embed_tokens(tokens_BS)
                ).flatten(0, 1)
            z_TD = torch.nn.functional.rms_norm(z_TD, (24,), eps=1e-6)
            for expert in range(4):
                mean_D = z_TD[(chosen_Tk == expert).any(dim=1)].mean(dim=0)
                assert torch.allclose(codes_LNC[layer, expert], mean_D, atol=1e-4)
    assert report.tokens == int((~held).sum()) * 32 and report.unused == [0] * len(layers)

    with torch.no_grad():
        want = theirs(windows[held][:, :-1]).logits
        after = load_back(reader)(windows[held][:, :-1], windows[held][:, 1:])[0]
    before = torch.nn.functional.cross_entropy(want.flatten(0, 1), windows[held][:, 1:].flatten())
    assert abs(report.loss_before - float(before)) < 1e-4
    assert abs(report.loss_after - float(after)) < 1e-4
    assert all(0 <= one <= either <= 1 for one, either in zip(report.first_choice, report.any_choice, strict=True))
    if where == "layer_state":  # of 4 experts the codes' choice is the router's first far more often than by chance
        assert sum(report.first_choice) > 0.35 * len(layers) and sum(report.any_choice) > 0.6 * len(layers)


def test_an_expert_alone_gives_what_the_chosen_gave_together_on_average(tmp_path: Path) -> None:
    """OLMoE's weights do not sum to 1; with codes alone the one expert of a token would give too much."""
    theirs = _routed(tmp_path / "moe", **FAMILIES["OLMoE"])
    source = RoutedSource(tmp_path / "moe")
    ids = calibration_ids(str(_text(tmp_path)), "bytes", 660, routed_config(source, {}))
    windows = ids.view(-1, 33)
    inputs: dict[int, torch.Tensor] = {}
    for layer, block in enumerate(theirs.model.layers):
        block.mlp.gate.register_forward_hook(lambda _, args, out, layer=layer: inputs.update({layer: out[1]}))
    with torch.no_grad():
        theirs(windows[torch.arange(len(windows)) % 10 != 1][:, :-1])
    for top_k in (0, 2):
        reader, _ = with_codes(source, routed_config(source, {"moe.top_k": top_k}), ids)
        for layer in range(3):
            scale = float(inputs[layer].sum(dim=-1).mean()) if top_k == 0 else 1.0
            assert 0.4 < scale <= 1
            old = source.tensor(f"model.layers.{layer}.mlp.experts.1.down_proj.weight") * source.stream_scale
            assert torch.allclose(reader.tensor(f"blocks.{layer}.mlp.experts.w2")[1], old * scale, atol=1e-5)


@pytest.mark.parametrize(
    "family",
    [
        *["Mixtral", "OLMoE", "Qwen2-MoE", "Qwen3-MoE, every second block"],
        "Granite-MoE, shared experts",
    ],
)
def test_the_tool_reports_agreement_and_loss(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _routed(tmp_path / "moe", **FAMILIES[family])
    command = [str(tmp_path / "moe"), str(tmp_path / "new"), "--calibration", str(_text(tmp_path))]
    options = ["--tokenizer", "bytes", "--calibration_tokens", "2000", "--set", "moe.top_k=0"]
    assert main(build_parser("").parse_args(command + options)) == 0
    said = capsys.readouterr().out
    assert "one code for each" in said and "first choice for" in said and "before" in said and "after" in said
    model = load_back(open_checkpoint(tmp_path / "new"))
    assert model.bank is not None and model.bank.initialized and not model.bank.initialization_due
    assert model.config.moe.top_k == 0 and model.config.codebook.num_codes == 4


def test_a_family_that_cannot_be_kept_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No weight is there, and no calibration text: what the model is decides first."""
    (tmp_path / "moe").mkdir()
    config = {"model_type": "deepseek_v2", "kv_lora_rank": 16, "n_shared_experts": 2}
    (tmp_path / "moe" / "config.json").write_text(json.dumps(config))
    for more in ([], ["--calibration", "missing.txt"]):
        assert main(build_parser("").parse_args([str(tmp_path / "moe"), str(tmp_path / "new"), *more])) == 2
        said = capsys.readouterr().err
        assert "type deepseek_v2, whose attention is latent (kv_lora_rank)" in said and said.count("\n") == 1


GROUPS = ["--set", "codebook.groups=2", "--set", "codebook.source=context"]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ([], "needs? --calibration FILE"),
        (["--calibration", "missing.txt"], "calibration text missing.txt cannot be read"),
        (["--calibration", "TEXT", "--granularity", "2"], "are for dense sources"),
        (["--calibration", "TEXT", "--set", "codebook.source=early_block"], "codes cannot be calibrated"),
        (["--calibration", "TEXT", "--set", "moe.num_experts=8"], "moe.num_experts=8 contradicts what SRC becomes"),
        (["--calibration", "TEXT", *GROUPS], r"codebook.groups=2 contradicts what SRC becomes \(1\)"),
        (["--calibration", "TEXT", "--calibration_tokens", "40"], "40 calibration tokens are too few"),
        (["--calibration", "TEXT", "--tokenizer", "SRC"], "has no tokenizer.json"),
    ],
)
def test_experts_that_cannot_be_calibrated_are_refused(
    more: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _routed(tmp_path / "moe")
    names = {"TEXT": str(_text(tmp_path)), "SRC": str(tmp_path / "moe")}
    tokenizer = [] if "--tokenizer" in more else ["--tokenizer", "bytes"]
    command = [str(tmp_path / "moe"), str(tmp_path / "new"), *(names.get(word, word) for word in more), *tokenizer]
    capsys.readouterr()  # the bar of save_pretrained
    assert main(build_parser("").parse_args(command)) == 2
    said = capsys.readouterr().err
    assert re.search(reason, said) and said.count("\n") == 1 and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "values", "reason"),
    [
        ({"kind": OlmoeConfig}, {"clip_qkv": 8.0}, r"\(clip_qkv=8.0\)"),
        ({"kind": OlmoeConfig, "attention_bias": True}, {}, "bias, a bias that is not zero"),
        ({"kind": Qwen3MoeConfig, "head_dim": 6, "attention_bias": True}, {}, "bias, a bias that is not zero"),
        (
            {"kind": Qwen2MoeConfig, "shared_expert_intermediate_size": 30},
            {},
            "a shared expert of width 30, which is no multiple",
        ),
        ({"kind": Qwen3MoeConfig, "head_dim": 6, "mlp_only_layers": [1]}, {}, r"experts in blocks \[0, 2\] alone"),
        ({"kind": Qwen3MoeConfig, "head_dim": 6, "decoder_sparse_step": 4}, {}, r"experts in blocks \[\] alone"),
        ({"kind": Qwen3MoeConfig, "head_dim": 6}, {"num_local_experts": None}, "has no number num_local_experts"),
    ],
)
def test_routed_sources_that_cannot_be_represented_are_named(
    options: dict[str, Any], values: dict[str, Any], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = _routed(tmp_path / "moe", **options)
    if "attention_bias" in options:
        with torch.no_grad():
            model.model.layers[1].self_attn.k_proj.bias.add_(1)
        model.save_pretrained(tmp_path / "moe")
    _options(tmp_path / "moe", **values)
    command = [str(tmp_path / "moe"), str(tmp_path / "new"), "--calibration", str(_text(tmp_path))]
    capsys.readouterr()
    assert main(build_parser("").parse_args([*command, "--tokenizer", "bytes"])) == 2
    said = capsys.readouterr().err
    assert re.search(reason, said) and said.count("\n") == 1 and not (tmp_path / "new").exists()
