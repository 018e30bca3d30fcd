"""The model that a run configuration asks for: of language, or a classifier of texts or images; whole or frozen."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vqmoe_ds.config.schema import FinetuneConfig, RunConfig, Trainable
from vqmoe_ds.models.classifier import Classifier
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.models.vision import VisionTransformer
from vqmoe_ds.moe.layer import MoELayer
from vqmoe_ds.moe.routers.base import drawn
from vqmoe_ds.runtime.extras import library

ADAPTED = r".*\.attention\.(qkv|out)"
"""The attention's matrices, which get LoRA adapters."""
HEAD_SCALE = 0.02
"""Standard deviation of a new head's weights."""


def build_model(
    config: RunConfig, ep_size: int = 1, ep_rank: int = 0, layer_class: type[MoELayer] = MoELayer
) -> MoETransformer:
    """The model of a run, its frozen parameters without gradient; arguments as of ``MoETransformer``.

    Raises:
        ConfigError: ``finetune.lora_rank`` without the package peft.
    """
    model = bare_model(config, ep_size, ep_rank, layer_class)
    if config.finetune.checkpoint is None:
        return model
    if config.finetune.lora_rank:
        _add_adapters(model, config.finetune)
    for name, param in model.named_parameters():
        # Over peft's own draws, which come from the global generator and so depend on whatever drew before.
        values = fresh(name, tuple(param.shape), config)
        if values is not None:
            param.data.copy_(values)
        param.requires_grad_(learns(name, config))
    return model


def bare_model(
    config: RunConfig, ep_size: int = 1, ep_rank: int = 0, layer_class: type[MoELayer] = MoELayer
) -> MoETransformer:
    """The model without adapters and with nothing frozen; arguments as of ``MoETransformer``."""
    kind = Classifier if config.finetune.classes else pretrained_class(config)
    return kind(config, ep_size, ep_rank, layer_class)


def pretrained_class(config: RunConfig) -> type[MoETransformer]:
    """The class of the model that pretraining makes: a language model, or a classifier of images."""
    return VisionTransformer if config.model.image_size else MoETransformer


def fresh(name: str, shape: tuple[int, ...], config: RunConfig) -> Tensor | None:
    """First values of a parameter that fine-tuning adds, from (seed, name) alone; None of a pretrained one.

    The head of a classifier starts small, so that all classes are alike; of a LoRA product ``B A``, B starts at zero.
    """
    if ".lora_B." in name:
        return torch.zeros(shape)
    if ".lora_A." in name:
        return drawn(shape, shape[1] ** -0.5, config.train.seed, name)
    if name == "head.weight" and config.finetune.classes:
        return drawn(shape, HEAD_SCALE, config.train.seed, "classifier")
    return None


def pretrained_name(name: str) -> str:
    """The name that a parameter has in a model without LoRA adapters."""
    return name.replace(".base_layer.", ".")


def learns(name: str, config: RunConfig) -> bool:
    """Whether a fine-tuned run trains the parameter of this name.

    The head learns in every case, and with it an embedding that it shares (``model.tie_embeddings``).
    ``experts`` are those of all MoE layers, shared ones too; in a dense model, which has none, the MLPs. Continuous
    routers and gates learn with ``trainable=all`` alone; codebooks are buffers and no parameters.
    """
    head = "embed." if config.ties_head else "head."
    if ".lora_" in name or name.startswith(head):
        return True
    if config.finetune.trainable is Trainable.ALL:
        return True
    if config.finetune.trainable is Trainable.HEAD:
        return False
    learned = (".experts.", ".shared.") if config.moe.facts.has_experts else (".mlp.",)
    return any(part in name for part in learned)


def _add_adapters(model: nn.Module, config: FinetuneConfig) -> None:
    """LoRA (Hu 2021) on every attention: ``W x + alpha / r B A x``."""
    peft = library("peft", "finetune.lora_rank")
    options = peft.LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=ADAPTED)
    peft.inject_adapter_in_model(options, model)
