"""Upcycling of models with experts: codes in place of their router, and what cannot be kept is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install -r requirements-dev.txt")

from transformers import (
    GraniteConfig,
    GraniteMoeConfig,
    GraniteMoeSharedConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from tests.huggingface import edit, load_back
from tests.upcycle.sources import MULTIPLIED, distance, save_dense, upcycled
from vqmoe_ds.checkpoint.open import open_checkpoint
from vqmoe_ds.moe.sources import EmbeddingSource
from vqmoe_ds.runtime.errors import CheckpointError
from vqmoe_ds.upcycle.command import build_parser, main
from vqmoe_ds.upcycle.routed import RoutedReader, RoutedSource, calibration_ids, routed_config, with_codes

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
    return save_dense(folder, kind, **{**experts, **options})


def test_a_window_of_every_second_layer_is_refused_past_its_length(tmp_path: Path) -> None:
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
    theirs = _routed(tmp_path / "moe", kind=Qwen2MoeConfig, **window)
    assert theirs.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    for types in (theirs.config.layer_types, None):
        edit(tmp_path / "moe" / "config.json", layer_types=types)
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
    assert model.config.moe.router == "topk" and distance(theirs, model) < 1e-5
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
    theirs = (save_dense if dense else _routed)(tmp_path / "moe", **options)
    described = json.loads((tmp_path / "moe" / "config.json").read_text())
    del described[left_out]
    (tmp_path / "moe" / "config.json").write_text(
        json.dumps({**described, "sliding_window": options.get("sliding_window")})
    )
    if dense:
        assert distance(theirs, upcycled(tmp_path / "moe")) < 1e-5
        return
    source = RoutedSource(tmp_path / "moe")
    model = load_back(RoutedReader(source, routed_config(source, {}, router="topk")))
    # Attention without its multiplier is sharp: in float32 rounding alone is 1.001e-5 on some CPUs.
    theirs.set_experts_implementation("eager")  # the grouped product has no float64
    assert distance(theirs.double(), model.double()) < 1e-5


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
    edit(tmp_path / "moe" / "config.json", **values)
    command = [str(tmp_path / "moe"), str(tmp_path / "new"), "--calibration", str(_text(tmp_path))]
    capsys.readouterr()
    assert main(build_parser("").parse_args([*command, "--tokenizer", "bytes"])) == 2
    said = capsys.readouterr().err
    assert re.search(reason, said) and said.count("\n") == 1 and not (tmp_path / "new").exists()
