"""The transformer as a classifier of images: a vision transformer (Dosovitskiy 2021) on the blocks of the text model.

Legend: B images, H pixels a side, C channels, p pixels a side of a patch, P = H / p patches a side, S = P * P patches,
F = p * p * C values of one, D width, A heads, K key-value heads, N = A + 2 K heads of a projection, H width of a head
(in attention), V classes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqmoe_ds.config.schema import CodeSource, ModelConfig, Stem
from vqmoe_ds.data.batches import MASKED
from vqmoe_ds.models.block import Attention
from vqmoe_ds.models.transformer import MoETransformer, Route
from vqmoe_ds.moe.linear import Linear
from vqmoe_ds.moe.routers import RoutingContext
from vqmoe_ds.moe.routers.base import drawn

PIXEL_MEAN, PIXEL_SCALE = 0.5, 0.25
"""Pixels in [0, 1] become about N(0, 1), the same for all data: no statistics belong to a checkpoint."""
POSITION_SIZE = 0.5
"""Standard deviation of the first positions; that of patch embeddings is about 1."""


class PatchAttention(Attention):
    """Attention in which all patches see each other; their positions are learned, so nothing is turned."""

    causal = False

    def _turned(self, qkv_BSNH: Tensor, cos_SF: Tensor, sin_SF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_BSAH, k_BSKH, v_BSKH = self._normalized(qkv_BSNH)
        return q_BSAH.transpose(1, 2), k_BSKH.transpose(1, 2), v_BSKH.transpose(1, 2)


class Positions(nn.Module):
    """A learned vector for every place, added to what stands there."""

    def __init__(self, places: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(places, width))

    def forward(self, x_BSD: Tensor) -> Tensor:
        return x_BSD + self.weight


class PatchStem(nn.Module):
    """A linear map of the pixels of each patch."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patch = config.patch_size
        self.map = Linear(self.patch**2 * config.channels, config.width)

    def forward(self, x_BHHC: Tensor) -> Tensor:
        y: Tensor = self.map(patches_of(x_BHHC, self.patch))
        return y


def patches_of(x_BHHC: Tensor, patch: int) -> Tensor:
    """The values of every patch, ``[B, S, F]``."""
    batch, size, _, channels = x_BHHC.shape
    x_BPpPpC = x_BHHC.view(batch, size // patch, patch, size // patch, patch, channels)
    return x_BPpPpC.transpose(2, 3).flatten(3).flatten(1, 2)


class ConvStem(nn.Module):
    """Two convolutions (Xiao 2021), of stride 2 and of half the patch size, with SiLU between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        middle = max(1, config.width // 2)
        self.first = nn.Conv2d(config.channels, middle, 3, stride=2, padding=1, bias=False)
        self.second = nn.Conv2d(middle, config.width, 3, stride=config.patch_size // 2, padding=1, bias=False)

    def forward(self, x_BHHC: Tensor) -> Tensor:
        y: Tensor = self.second(F.silu(self.first(x_BHHC.permute(0, 3, 1, 2))))
        return y.flatten(2).transpose(1, 2)


def normalized_pixels(images_BHHC: Tensor) -> Tensor:
    """Pixels of images, uint8 or floating-point in [0, 1], as the model sees them."""
    pixels = images_BHHC if images_BHHC.is_floating_point() else images_BHHC.float() / 255
    return (pixels - PIXEL_MEAN) / PIXEL_SCALE


class PatchEmbedding(nn.Module):
    """Vectors ``[B, S, D]`` of the patches of images ``[B, H, H, C]``, row by row; positions are added apart."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.stem = (ConvStem if config.stem is Stem.CONV else PatchStem)(config)
        self.positions = Positions(config.sequence_length, config.width)

    def forward(self, images_BHHC: Tensor) -> Tensor:
        y: Tensor = self.stem(normalized_pixels(images_BHHC).to(self.positions.weight.dtype))
        return y

    def initialize(self, seed: int) -> None:
        """Convolutions of 1/sqrt(fan in) from (seed, name); linear maps are drawn with those of the model."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d):
                shape = tuple(module.weight.shape)
                module.weight.copy_(drawn(shape, math.prod(shape[1:]) ** -0.5, seed, f"embed.{name}"))
        places = self.positions.weight
        places.copy_(drawn(tuple(places.shape), POSITION_SIZE, seed, "embed.positions"))


class VisionTransformer(MoETransformer):
    """Classifier of images over ``config.model.image_size``; the head reads the mean of the patches' states.

    Blocks, MoE layers, routers and experts are those of ``MoETransformer``, and so are the arguments. Codes look at the
    state of the layer, at the pixels of the patch (``patch``), at the patch as embedded (``token_embedding``), at that
    with a sinusoidal vector of its place (``position_embedding``), or at the output of an early block.
    """

    attention_class = PatchAttention

    def _embedding(self) -> nn.Embedding:
        return PatchEmbedding(self.config.model)  # type: ignore[return-value]

    def _initialize_embedding(self, seed: int) -> None:
        assert isinstance(self.embed, PatchEmbedding)
        self.embed.initialize(seed)

    def forward(self, images_BHHC: Tensor, labels_B: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return (mean cross-entropy over images, auxiliary loss) with labels, or (logits ``[B, V]``, auxiliary loss).

        Args:
            images_BHHC: uint8, or floating-point in [0, 1].
            labels_B: ``MASKED`` where an image does not count; or shares of the classes, ``[B, V]``, each row of which
                sums to 1. In training they are smoothed by ``train.label_smoothing``.
        """
        states_BSD, aux_loss = self.states_of(images_BHHC)
        logits_BV = self.head(states_BSD.float().mean(dim=1).to(states_BSD.dtype)).float()
        if labels_B is None:
            return logits_BV, aux_loss
        smoothing = self.config.train.label_smoothing if self.training else 0.0
        if labels_B.dim() == 2:
            return F.cross_entropy(logits_BV, labels_B, label_smoothing=smoothing), aux_loss
        total = F.cross_entropy(logits_BV, labels_B, ignore_index=MASKED, reduction="sum", label_smoothing=smoothing)
        return total / labels_B.ne(MASKED).sum().clamp_min(1), aux_loss

    def states_of(self, images_BHHC: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised states ``[B, S, D]`` after the last block, and the auxiliary loss of all routers."""
        assert isinstance(self.embed, PatchEmbedding)
        embedded_BSD = self.embed(images_BHHC)
        routes = self._routes_of_patches(images_BHHC, embedded_BSD)
        context = RoutingContext(codebooks=self.bank)
        # Called as a module: ZeRO-3 has the vectors there within its forward alone.
        return self._through_blocks(self.embed.positions(embedded_BSD), context, routes)

    def _routes_of_patches(self, images_BHHC: Tensor, embedded_BSD: Tensor) -> dict[int, Route]:
        """Routes of the blocks whose experts follow from the patches, by block index."""
        book = self.config.codebook
        if self.bank is None or self.source is None:
            return {}
        if book.source is CodeSource.EARLY_BLOCK:
            return self._plan_from_source(embedded_BSD.flatten(0, 1), end_block=book.source_block + 1)
        if not self.config.moe.facts.known_ahead(self.config):
            return {}
        if book.source is CodeSource.PATCH:
            pixels_BSF = patches_of(normalized_pixels(images_BHHC), self.config.model.patch_size)
            return self._plan_from_source(pixels_BSF.flatten(0, 1))
        # No table of tokens is averaged, so the source reads nothing of the ids but their number.
        return self._plan_from_source(self.source(embedded_BSD[..., 0], embedded_BSD).flatten(0, 1))
