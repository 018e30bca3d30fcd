"""Text from a model, token by token.

Legend: V vocabulary.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vqmoe_ds.data.tokenizer_base import Tokenizer
from vqmoe_ds.models.cache import Cache
from vqmoe_ds.runtime.device import without_cudnn_attention
from vqmoe_ds.runtime.errors import ConfigError

_COLDEST = 1e-30
"""Temperature below which the likeliest token alone is drawn; float32 has little that is smaller."""


@dataclass(frozen=True)
class Sampling:
    """Settings by which the next token is drawn.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: draw among the fewest tokens whose probabilities sum to this (Holtzman 2020); 1: among all.
        seed: of the draws; the same seed gives the same tokens.

    Raises:
        ConfigError: one is out of its range.
    """

    temperature: float = 0.8
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"--temperature {self.temperature:g} must be finite, 0 (the likeliest token) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top_p {self.top_p:g} must lie above 0 and be at most 1")
        if not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"--seed {self.seed} must lie between 0 and 2^63 - 1")

    def draw(self, logits_V: Tensor, generator: torch.Generator) -> int:
        """An id by its logits (float32, on the CPU)."""
        if self.temperature < _COLDEST:
            return int(logits_V.argmax())
        # The largest is taken off first: over a tiny temperature it would be infinite.
        probabilities_V = ((logits_V - logits_V.max()) / self.temperature).softmax(dim=-1)
        if self.top_p < 1:
            # Stable, so that the same ids are cut off among equals.
            sorted_V, order_V = probabilities_V.sort(descending=True, stable=True)
            # The sum before a token decides: the one that reaches ``top_p`` is among them.
            beyond_V = sorted_V.cumsum(dim=-1) - sorted_V >= self.top_p
            # In float32 a tiny ``top_p`` is 0.
            beyond_V[0] = False
            probabilities_V[order_V[beyond_V]] = 0
        return int(torch.multinomial(probabilities_V, 1, generator=generator))


@torch.no_grad()
def generate(
    model: Callable[..., tuple[Tensor, Tensor]],
    prompt: Sequence[int],
    sampling: Sampling,
    context: int,
    vocab_size: int,
    new_cache: Callable[[], Cache] | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[int]:
    """The ids that follow a prompt, without an end.

    Where prompt and new ids outgrow the context, the model goes on from the last half of what it may read, and reads
    on until that is full again. So a cache is filled anew once in half a context, and text with and without one is the
    same up to rounding.

    Args:
        model: gives logits for ids ``[1, S]`` and an optional ``cache``, in evaluation mode; causal. Called by all
            ranks where experts are spread.
        prompt: one id or more.
        context: tokens the model can read at once.
        vocab_size: ids below this are drawn.
        new_cache: of the model; None reads the whole context anew for every id.
    """
    # On the CPU: a seed gives the same text on any device, and the same ids on all ranks without an exchange.
    generator = torch.Generator().manual_seed(sampling.seed)
    ids = list(prompt)
    cache = new_cache() if new_cache else None
    while True:
        # Before the pass: a cache has room for ``context`` tokens, and positions are known no further.
        if len(ids) > context:
            ids = ids[-max(1, context // 2) :]
            cache = new_cache() if new_cache else None
        unread = ids[cache.length if cache else 0 :]
        with without_cudnn_attention():
            logits_BSV, _ = model(torch.tensor([unread], device=device), cache=cache)
        # ``model.vocab_size`` may be larger than the tokenizer's: ids beyond it stand for no text.
        ids.append(sampling.draw(logits_BSV[0, -1, :vocab_size].float().cpu(), generator))
        yield ids[-1]


def pieces_of_text(ids: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Text added by each id: none where it leaves a character unfinished, which comes with its last id.

    Bytes that are no UTF-8 show as U+FFFD; a character that is never finished is left out.
    """
    pieces = tokenizer.pieces()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for i in ids:
        yield decoder.decode(pieces[i])
