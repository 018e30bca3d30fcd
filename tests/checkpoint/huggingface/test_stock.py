"""Models that stock Mixtral and Llama compute, and those that they cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install -r requirements-dev.txt")

from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import vqmoe_ds.models.hf  # noqa: F401 (registers the model)
from tests.huggingface import ROPE, config_of, edit, export, load_back, model_of, tokens_of
from vqmoe_ds.checkpoint.formats.huggingface.folder import open_hf
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.runtime.errors import CheckpointError

QK_NORMS: dict[str, dict[str, Any]] = {
    "none": {},
    "heads": {"model.qk_norm": "heads", "model.head_width": 12},
    "full": {"model.qk_norm": "full"},
}


def _topk(top_k: int, experts: int = 4, **model: Any) -> MoETransformer:
    base = config_of("top-2").model_dump()
    base["moe"].update(top_k=top_k, num_experts=experts)
    base["router"].update(softmax_over="chosen" if top_k == 1 < experts else "auto")
    base["model"].update(model)
    return model_of(RunConfig(**base))


@pytest.mark.parametrize(
    ("top_k", "experts", "shape"),
    [
        *[(2, 4, {}), (3, 4, {"head_width": 8}), (4, 4, {}), (1, 1, {}), (1, 4, {})],
        (2, 4, {"heads": 4, "kv_heads": 2, "head_width": 8}),
        *[(2, 4, ROPE | {"rope_scaling": kind, "head_width": 16}) for kind in ("llama3", "yarn")],
        (2, 4, {"rope_scaling": "linear", "rope_factor": 2.0}),
        (2, 4, {"sliding_window": 5, "heads": 4, "kv_heads": 2}),
        (2, 4, {"tie_embeddings": True}),
    ],
)
def test_top_k_models_are_stock_mixtral(top_k: int, experts: int, shape: dict[str, int], tmp_path: Path) -> None:
    model = _topk(top_k, experts, rope_theta=777.0, **shape)
    export(model, tmp_path / "hf", arch="mixtral", max_shard="30KB")
    theirs, found = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert type(theirs) is MixtralForCausalLM
    assert not any(found.values()), found
    for kind in ("eager", "grouped_mm", "batched_mm"):
        theirs.set_experts_implementation(kind)
        with torch.no_grad():
            assert (theirs(tokens_of()).logits - model(tokens_of())[0]).abs().max() < 1e-5
    assert not list((tmp_path / "hf").glob("*.py"))
    for name in ("vqmoe_training.json", "none"):  # with our own configuration, and from Mixtral's alone
        back = load_back(open_hf(tmp_path / "hf"))
        assert back.config.model == model.config.model and back.config.moe == model.config.moe
        assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in model.state_dict().items())
        with torch.no_grad():
            assert torch.equal(back(tokens_of())[0], model(tokens_of())[0])
        (tmp_path / "hf" / name).unlink(missing_ok=True)


def test_a_window_is_nothing_for_llama_cpp(tmp_path: Path) -> None:
    *_, remark = export(model_of(config_of("top-2, sliding window")), tmp_path / "hf", arch="mixtral")
    assert remark.startswith("make no GGUF of it") and "attends to all tokens, and here to 5" in remark
    assert "| llama.cpp (GGUF) | no |" in (tmp_path / "hf" / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("top-1", "with moe.top_k=1 experts are weighted by their probabilities among all here"),
        ("top-2, over all experts", "with router.softmax_over=all experts are weighted"),
        ("norms of wide heads", "model.qk_norm=heads norms queries and keys"),
        ("shared experts, every second", "moe.shared_experts=1 stand beside the routed ones"),
        ("biased queries, gated shared experts", "model.qkv_bias adds a bias"),
        ("context", "moe.router=vq"),
        ("top-2, normed", "moe.output_norm=true puts a LayerNorm after every expert"),
        ("hash of tokens", "moe.router=hash_token"),
        ("dense", "moe.router=dense"),
    ],
)
def test_what_mixtral_cannot_compute_is_refused(case: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=reason):
        export(model_of(config_of(case)), tmp_path / "hf", arch="mixtral")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "shape",
    [
        {"dense_hidden": 40, "rope_theta": 777.0},
        {"heads": 4, "kv_heads": 2, "head_width": 8},
        {"tie_embeddings": True},
        *[ROPE | {"rope_scaling": kind, "head_width": 16} for kind in ("linear", "llama3", "yarn")],
    ],
)
def test_dense_models_are_stock_llama(shape: dict[str, Any], tmp_path: Path) -> None:
    base = config_of("dense").model_dump()
    base["model"].update(shape)
    model = model_of(RunConfig(**base))
    export(model, tmp_path / "hf", arch="llama", max_shard="30KB")
    theirs, found = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert type(theirs) is LlamaForCausalLM and not any(found.values()), found
    with torch.no_grad():
        assert (theirs(tokens_of()).logits - model(tokens_of())[0]).abs().max() < 1e-5
    for name in ("vqmoe_training.json", "none"):  # with our own configuration, and from Llama's alone
        back = load_back(open_hf(tmp_path / "hf"))
        assert back.config.dense_hidden == model.config.dense_hidden and back.config.moe.router == "dense"
        with torch.no_grad():
            assert torch.equal(back(tokens_of())[0], model(tokens_of())[0])
        (tmp_path / "hf" / name).unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("top-2", "moe.router=topk has experts"),
        ("context", "moe.router=vq has experts"),
    ],
)
def test_what_llama_cannot_compute_is_refused(case: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"Llama cannot stand for this model: {reason}"):
        export(model_of(config_of(case)), tmp_path / "hf", arch="llama")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", [{"rms_norm_eps": 1e-5}, {"attention_bias": True}, {"mlp_bias": True}])
def test_a_llama_of_others_that_ours_cannot_compute_is_refused(option: dict[str, Any], tmp_path: Path) -> None:
    export(model_of(config_of("dense")), tmp_path / "hf", arch="llama")
    edit(tmp_path / "hf" / "config.json", **option)
    name, value = next(iter(option.items()))
    with pytest.raises(CheckpointError, match=f"this Llama has {name}={value}, but .* tools/upcycle.py converts more"):
        open_hf(tmp_path / "hf")


def test_llama_has_no_window(tmp_path: Path) -> None:
    base = config_of("dense").model_dump()
    base["model"]["sliding_window"] = 5
    with pytest.raises(CheckpointError, match="model.sliding_window=5 limits attention, and it has no window"):
        export(model_of(RunConfig(**base)), tmp_path / "hf", arch="llama")


def test_mixtral_with_dense_blocks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="model.moe_every=2 leaves dense blocks"):
        export(_topk(2, moe_every=2), tmp_path / "hf", arch="mixtral")


def test_a_mixtral_of_others_with_another_epsilon_is_refused(tmp_path: Path) -> None:
    export(_topk(2), tmp_path / "hf", arch="mixtral")
    edit(tmp_path / "hf" / "config.json", rms_norm_eps=1e-5)
    with pytest.raises(CheckpointError, match="rms_norm_eps=1e-05, but this trainer knows only 1e-06"):
        open_hf(tmp_path / "hf")


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("original", [True, False])
def test_experts_are_read_as_transformers_stacks_them(original: bool, kv_heads: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 12, "num_hidden_layers": 2, "max_position_embeddings": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": kv_heads, "num_local_experts": 3, "rms_norm_eps": 1e-6}
    mixtral = MixtralForCausalLM(MixtralConfig(vocab_size=50, **sizes, **heads)).eval()
    mixtral.save_pretrained(tmp_path / "m", save_original_format=original)
    stacked = "model.layers.0.mlp.experts.gate_up_proj" in load_file(tmp_path / "m" / "model.safetensors")
    assert stacked is not original
    with torch.no_grad():
        assert (load_back(open_hf(tmp_path / "m"))(tokens_of())[0] - mixtral(tokens_of()).logits).abs().max() < 1e-5
    if stacked:
        weights = load_file(tmp_path / "m" / "model.safetensors")
        del weights["model.layers.1.mlp.experts.down_proj"]
        save_file(weights, tmp_path / "m" / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"has no experts.down_proj of its shape beside it"):
            open_hf(tmp_path / "m")
