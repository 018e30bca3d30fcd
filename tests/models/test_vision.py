"""The image classifier: what its patches are, that they see each other, and what its codes look at."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.images import squares
from vqmoe_ds.config.load import load_config
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.models.build import build_model
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.models.vision import PIXEL_MEAN, PIXEL_SCALE, VisionTransformer
from vqmoe_ds.moe.state_sync import StateSync
from vqmoe_ds.planning.memory import code_shape
from vqmoe_ds.runtime.errors import ConfigError

SMALL = {
    **{"model.image_size": 8, "model.patch_size": 2, "model.width": 16, "model.heads": 2, "model.vocab_size": 3},
    **{"moe.num_experts": 4, "moe.expert_hidden": 8, "model.dense_hidden": 16},
}
SOURCES = ("layer_state", "token_embedding", "position_embedding", "early_block", "patch")
ROUTERS = [
    *({"codebook.source": source} for source in SOURCES),
    {"moe.top_k": 0},
    {"moe.router": "topk", "moe.top_k": 2},
    {"moe.router": "dense"},
    {"moe.router": "expert_choice", "moe.top_k": 2},
    {"moe.router": "adaptive_clustering", "moe.top_k": 2, "router.statistics": "batch"},
    {"moe.router": "xmoe"},
    {"moe.router": "softmoe"},
    {"moe.router": "softmoe", "router.slots": 1},
    {"moe.router": "softmoe_ac", "router.statistics": "batch"},
    {"model.qk_norm": "heads"},
    {"model.qk_norm": "full"},
]


def config_of(**more) -> RunConfig:
    return load_config("vit-cifar", None, {**SMALL, **more}).config


def model_of(**more) -> VisionTransformer:
    model = build_model(config_of(**more))
    assert isinstance(model, VisionTransformer)
    return model


def batch(count: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = squares(count, seed)
    return torch.from_numpy(images), torch.from_numpy(labels)


@pytest.mark.parametrize("more", ROUTERS, ids=lambda more: "-".join(map(str, more.values())))
def test_it_learns_with_every_router(more):
    model = model_of(**more, **{"train.label_smoothing": 0.0})
    optimizer, sync, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), StateSync(model, 1), []
    for _ in range(25):
        loss, aux = model(*batch(24))
        (loss + aux).backward()
        assert all(param.grad is not None for param in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        sync.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(np.log(3), abs=0.6)
    assert losses[-1] < 0.4 * losses[0]


def test_the_patch_stem_is_the_convolution_of_its_weights():
    model = model_of(**{"model.stem": "patch"})
    images, _ = batch(2)
    pixels = (images.double() / 255 - PIXEL_MEAN) / PIXEL_SCALE
    weight = model.embed.stem.map.weight.detach().double().view(16, 2, 2, 3).permute(0, 3, 1, 2)
    expected = F.conv2d(pixels.permute(0, 3, 1, 2), weight, stride=2).flatten(2).transpose(1, 2)
    assert model.embed(images).detach().double() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(model.embed(images), model.embed(images.float() / 255))  # as for attacks: pixels in [0, 1]


@pytest.mark.parametrize(("patch", "places"), [(2, 16), (4, 4)])
def test_the_convolution_stem_makes_as_many_patches(patch, places):
    model = model_of(**{"model.patch_size": patch})
    assert model.embed(batch()[0]).shape == (6, places, 16)
    assert model.config.model.sequence_length == places


def test_patches_see_each_other_and_know_their_places():
    model = model_of(**{"model.stem": "patch", "moe.router": "dense"}).eval()
    images, _ = batch(1)
    last = images.clone()
    last[:, -2:, -2:] = 255 - last[:, -2:, -2:]
    before, after = (model.states_of(x)[0] for x in (images, last))
    assert (before[:, 0] != after[:, 0]).any()  # the first patch sees the last one
    mirrored = model.states_of(images.roll(4, dims=1))[0].roll(-8, dims=1)
    assert not torch.allclose(before, mirrored, atol=1e-3), "places must tell"
    with torch.no_grad():
        model.embed.positions.weight.zero_()
    rolled = model.states_of(images.roll(4, dims=1))[0].roll(-8, dims=1)
    assert torch.allclose(model.states_of(images)[0], rolled, atol=1e-5), "without them patches are a set"


def test_codes_look_at_the_source_that_is_named():
    """Of images that share a patch its embedding is the same, and its place tells it from a copy in the image."""
    images, _ = batch(2)
    images[1, :2, :2] = images[0, :2, :2]
    images[:, 4:6, 4:6] = images[:, :2, :2]  # patch 10 is a copy of patch 0
    found = {}
    for source in ("token_embedding", "position_embedding"):
        model = model_of(**{"codebook.source": source, "model.stem": "patch", "codebook.num_codes": 32}).eval()
        looked_at = []
        bank = model.bank
        original = bank.prepare
        bank.prepare = lambda z, original=original, looked_at=looked_at: looked_at.append(z) or original(z)
        model(images)
        (z_TD,) = looked_at
        found[source] = z_TD.view(2, 16, -1)
        embedded = model.embed(images).detach()
        if source == "token_embedding":
            assert torch.equal(found[source], embedded)
    assert torch.equal(found["token_embedding"][0, 0], found["token_embedding"][1, 0])
    assert torch.equal(found["token_embedding"][0, 0], found["token_embedding"][0, 10])
    assert torch.equal(found["position_embedding"][0, 0], found["position_embedding"][1, 0])
    assert not torch.equal(found["position_embedding"][0, 0], found["position_embedding"][0, 10])


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_a_dictionary_of_patches_is_clustered_once_and_then_names_their_codes_for_good(stem):
    """The codes of patches are known before the first block, and no training of the model moves them."""
    model = model_of(
        **{"codebook.source": "patch", "codebook.num_codes": 6, "codebook.freeze_step": 1, "model.stem": stem}
    )
    bank, looked_at = model.bank, []
    look_up = model._look_up
    model._look_up = lambda z, *rest: looked_at.append(z) or look_up(z, *rest)
    optimizer, sync, books = torch.optim.AdamW(model.parameters(), lr=1e-2), StateSync(model, 1), []
    images, labels = batch(24)
    for _ in range(3):
        books.append(bank.codes_LKC.clone())
        sum(model(images, labels)).backward()
        optimizer.step()
        optimizer.zero_grad()
        sync.step()
    assert bank.codes_LKC.shape == code_shape(model.config) == (2, 6, 2 * 2 * 3) and bank.initialized
    assert not torch.equal(books[1], books[0]) and torch.equal(books[2], books[1])
    assert all(torch.equal(z_TF, looked_at[0]) for z_TF in looked_at)
    z_BSF = looked_at[0].view(24, 16, 12)
    assert torch.equal(z_BSF[3, 4 * 2 + 1], ((images[3, 4:6, 2:4] / 255 - PIXEL_MEAN) / PIXEL_SCALE).flatten())
    unit_TF = F.rms_norm(looked_at[0], (12,), eps=1e-6)
    nearest = torch.cdist(unit_TF, bank.codes_LKC[0]).min(dim=1).values.square().mean()
    assert nearest < 0.5 * torch.cdist(unit_TF, books[0][0]).min(dim=1).values.square().mean(), "k-means fits them"


def test_models_of_other_routers_are_equal_in_everything_else():
    ours, theirs = model_of(), model_of(**{"moe.router": "topk"})
    mine = dict(ours.named_parameters())
    for name, param in theirs.named_parameters():
        if ".router." not in name:
            assert torch.equal(param, mine[name]), name


def test_labels_are_smoothed_in_training_alone():
    model = model_of(**{"train.label_smoothing": 0.2})
    images, labels = batch()
    logits, _ = model(images)
    assert model(images, labels)[0].item() == pytest.approx(
        F.cross_entropy(logits, labels, label_smoothing=0.2).item(), abs=1e-6
    )
    assert model.eval()(images, labels)[0].item() == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-6)


def test_labels_may_be_shares_of_classes():
    model = model_of(**{"train.label_smoothing": 0.2})
    images, labels = batch()
    whole = F.one_hot(labels, 3).float()
    assert model(images, whole)[0].item() == pytest.approx(model(images, labels)[0].item(), abs=1e-6)
    mixed = 0.3 * whole + 0.7 * whole.roll(1, 0)
    both = 0.3 * model(images, labels)[0] + 0.7 * model(images, labels.roll(1))[0]
    assert model(images, mixed)[0].item() == pytest.approx(both.item(), abs=1e-6)


def test_recomputation_gives_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        model = model_of(**{"train.activation_checkpointing": recompute})
        loss, aux = model(*batch())
        (loss + aux).backward()
        gradients.append({name: param.grad for name, param in model.named_parameters()})
    assert all(torch.equal(gradients[1][name], grad) for name, grad in gradients[0].items())


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"moe.router": "hash_token"}, "moe.router=hash_token reads ids of tokens, and patches of images have none"),
        ({"moe.router": "token_table"}, "reads ids of tokens"),
        ({"moe.router": "stablemoe"}, "reads ids of tokens"),
        ({"codebook.source": "context"}, "codebook.source=context mixes the tokens before"),
        ({"codebook.source": "token_embedding", "codebook.source_momentum": 0.9}, "images have none"),
        ({"codebook.source": "patch", "codebook.code_dim": 13}, "exceeds the values of a patch=12"),
        (
            {"model.image_size": 0, "codebook.source": "patch", "train.label_smoothing": 0, "model.sequence_length": 8},
            "codebook.source=patch looks at the pixels of images",
        ),
        ({"model.patch_size": 3}, "model.patch_size=3 must divide model.image_size=8"),
        ({"model.patch_size": 8}, "model.patch_size=8 leaves one patch of model.image_size=8"),
        ({"model.image_size": 16, "model.patch_size": 8}, "model.stem=conv needs model.patch_size 2 or 4, not 8"),
        ({"model.sequence_length": 17}, "model.sequence_length=17 is not the 16 patches"),
        ({"model.channels": 2}, "model.channels=2 is of no image"),
        ({"model.tie_embeddings": True}, "model.tie_embeddings=true shares an embedding of tokens"),
        ({"model.sliding_window": 4}, "model.sliding_window=4 is of text, and all patches of an image see each other"),
        ({"model.image_size": 0, "model.sequence_length": 8}, "train.label_smoothing is for images"),
        ({"model.image_size": "big"}, "model.image_size"),
    ],
)
def test_what_images_do_not_have_is_refused(more, sentence):
    with pytest.raises(ConfigError, match=sentence):
        config_of(**{**{"codebook.source": "layer_state"}, **more})


def test_the_presets_say_what_they_are():
    cifar, tiny = load_config("vit-cifar").config, load_config("vit-tiny-imagenet").config
    assert build_model(cifar).moe_blocks == [1, 3]
    assert (cifar.model.sequence_length, tiny.model.sequence_length) == (64, 64)
    again = RunConfig.model_validate(cifar.model_dump(mode="json"))
    assert again == cifar
    assert RunConfig().model.image_size == 0 and type(build_model(RunConfig())) is MoETransformer
